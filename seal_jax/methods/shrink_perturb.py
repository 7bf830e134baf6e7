"""Shrink and perturb: weights move towards zero and a fresh draw (Ash & Adams 2020)."""

from __future__ import annotations

import dataclasses
import math

from seal_jax import forgetting
from seal_jax.errors import check_number
from seal_jax.methods.method import Context, HookContext, Method
from seal_jax.transforms import make_normal_tx

SOURCE = "Ash & Adams 2020"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of shrink and perturb; the defaults are those of the released code's example.

    Attributes:
      shrink: factor on the weights where a generation starts; with 1 and ``perturb`` 0 they stay.
      perturb: factor on the fresh draw that is added.
    """

    shrink: float = 0.4
    perturb: float = 0.1


def build(options: Options, context: Context) -> Method:
    """Return plain training whose weights are shrunk and perturbed where a generation starts."""
    context.require_restarts("shrink_perturb")
    check_number("method.shrink", options.shrink, lambda v: 0 <= v <= 1, "lie in [0, 1]")
    check_number("method.perturb", options.perturb, lambda v: 0 <= v < math.inf, "not be negative")

    def forget(event: HookContext) -> HookContext:
        params = forgetting.shrink_and_perturb(
            event.key,
            event.weights.params,
            context.init_params,
            shrink=options.shrink,
            perturb=options.perturb,
        )
        return event._replace(weights=event.weights._replace(params=params))

    tx = make_normal_tx(**context.arguments())
    return Method(tx=tx, loss=context.loss, on_generation_start=forget)
