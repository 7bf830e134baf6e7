"""CBP: continual backpropagation, a few of the least useful units are replaced all the time (Dohare et al. 2024)."""

from __future__ import annotations

import dataclasses

from seal_jax.methods.method import Context, Method, Variant, check_options
from seal_jax.transforms import make_continual_backprop_tx

VARIANTS = {
    "continual_backprop": Variant(
        "Continual backpropagation",
        "Dohare et al. 2024, Algorithm 1",
        "warm_start_cifar10.py",
        digits={"replacement_rate": 0.002, "maturity": 20},
    )
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of continual backpropagation.

    Attributes:
      replacement_rate: ρ, the share of a layer's mature units that is replaced in each step.
      decay: η, of the running average of each unit's utility.
      maturity: m; units are mature after more steps than these.
    """

    replacement_rate: float = 1e-4
    decay: float = 0.99
    maturity: int = 100


def build(options: Options, context: Context) -> Method:
    """Return plain training with continual backpropagation."""
    context.require_unscaled("continual_backprop")
    check_options(options, "lie in [0, 1]", "replacement_rate")
    check_options(options, "lie in [0, 1)", "decay")
    check_options(options, "be at least 0", "maturity")
    tx = make_continual_backprop_tx(
        context.model.units,
        init_fn=context.init_params,
        **dataclasses.asdict(options),
        **context.arguments(),
    )
    return context.plain(tx=tx, random=True, uses_activations=True)
