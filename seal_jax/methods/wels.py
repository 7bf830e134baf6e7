"""WELS and WELSR: a random part of the weights is reinitialised (Taha et al. 2021)."""

from __future__ import annotations

import dataclasses

import jax

from seal_jax import selections
from seal_jax.methods.method import Context, HookContext, Init, Method, Variant, check_options

ORDER = 20
VARIANTS = {
    "wels": Variant(
        "WELS",
        "Taha et al. 2021, section 3; LW paper, section 1",
        "lw_cifar10.py",
        also=("ke_cifar100.py:wels",),
    ),
    "welsr": Variant("WELSR", "LW paper, section 1", "lw_cifar10.py", {"redraw": True}),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of weight-level splitting.

    Attributes:
      fraction: share of the weights of each kernel that is reinitialised: 0.2 in the LW paper, 0.5 in
        knowledge evolution.
      exact: exactly that share of each kernel, rounded; ``False`` takes every weight by itself with
        that probability.
      redraw: choose other weights in every generation (WELSR), not the same in all (WELS).
      init: from the model's own initialisation, or PyTorch's default ("torch_default").
    """

    fraction: float = 0.2
    exact: bool = True
    redraw: bool = False
    init: Init = "model"


def build(options: Options, context: Context) -> Method:
    """Return WELS, whose choice is made before the first step and kept, or WELSR."""
    check_options(options, "lie in (0, 1)", "fraction")

    def choose(hook: HookContext):
        # Not the hook's own key: which weights are chosen must not depend on what replaces them.
        key = jax.random.fold_in(hook.key, 2)
        return selections.random_subset(
            key, hook.weights.params, options.fraction, exact=options.exact
        )

    # A new choice from each generation's key, so nothing has to be stored.
    if options.redraw:
        return context.relearn("wels", choose, options.init)
    # Stored in the state, so that a resumed run has the same choice.
    return dataclasses.replace(
        context.relearn("wels", lambda hook: hook.method_state, options.init),
        on_start=lambda hook: hook._replace(method_state=choose(hook)),
    )
