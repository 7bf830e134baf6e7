"""Shrink and perturb: weights move towards zero and a new initialisation (Ash & Adams 2020)."""

from __future__ import annotations

import dataclasses

from seal_jax import forgetting
from seal_jax.methods.method import Context, HookContext, Method, Variant, check_options

VARIANTS = {
    "shrink_perturb": Variant(
        "Shrink and perturb",
        "Ash & Adams 2020",
        "warm_start_cifar10.py",
        also=("ke_cifar100.py:shrink_perturb",),
    )
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of shrink and perturb; the defaults are those of the released code's example.

    Attributes:
      shrink: factor on the weights where a generation starts; 1 with ``perturb`` 0 is plain training.
      perturb: factor on the new initial values that are added; 1 with ``shrink`` 0 starts from scratch.
    """

    shrink: float = 0.4
    perturb: float = 0.1


def build(options: Options, context: Context) -> Method:
    """Return plain training whose weights are shrunk and perturbed where a generation starts."""
    context.require_restarts("shrink_perturb")
    check_options(options, "lie in [0, 1]", "shrink")
    check_options(options, "be 0 or positive", "perturb")

    # All parameters, norms and biases too; BatchNorm's running statistics stay.
    def forget(hook: HookContext) -> HookContext:
        params = forgetting.shrink_and_perturb(
            hook.key,
            hook.weights.params,
            context.init_params,
            shrink=options.shrink,
            perturb=options.perturb,
        )
        return hook.with_params(params)

    return context.plain(on_generation_start=forget)
