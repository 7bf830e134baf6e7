"""WELS and WELSR: a random part of the weights is drawn anew (Taha et al. 2021)."""

from __future__ import annotations

import dataclasses

import jax

from seal_jax import selections
from seal_jax.errors import check_number
from seal_jax.methods.method import Context, HookContext, Method
from seal_jax.methods.relearning import Init, relearning

SOURCE = "Taha et al. 2021, section 3; LW paper, section 1"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of weight-level splitting.

    Attributes:
      fraction: share of the weights of each kernel that is re-initialised: 0.2 in the LW paper, 0.5
        in knowledge evolution.
      exact: exactly that share of each kernel, rounded; ``False`` takes every weight by itself with
        that probability.
      redraw: choose other weights in every generation (WELSR), not the same in all (WELS).
      init: from the model's own initialisation, or PyTorch's default.
    """

    fraction: float = 0.2
    exact: bool = True
    redraw: bool = False
    init: Init = "model"


def build(options: Options, context: Context) -> Method:
    """Return WELS, whose choice is made before the first step and kept, or WELSR."""
    check_number("method.fraction", options.fraction, lambda f: 0 < f < 1, "lie between 0 and 1")

    def choose(event: HookContext):
        # Not the event's own key: what is chosen must not depend on what is drawn for it.
        key = jax.random.fold_in(event.key, 2)
        return selections.random_subset(
            key, event.weights.params, options.fraction, exact=options.exact
        )

    if options.redraw:
        return relearning(context, "wels", choose, init=options.init)
    method = relearning(context, "wels", lambda event: event.method_state, init=options.init)
    return dataclasses.replace(
        method, on_start=lambda event: event._replace(method_state=choose(event))
    )
