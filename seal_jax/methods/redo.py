"""ReDo: hidden units that are hardly ever active are replaced by new ones (Sokar et al. 2023)."""

from __future__ import annotations

import dataclasses

from seal_jax.methods.method import Context, Method, Variant, check_options
from seal_jax.transforms import make_redo_tx

VARIANTS = {
    "redo": Variant(
        "ReDo",
        "Sokar et al. 2023, Algorithm 1",
        "warm_start_cifar10.py",
        digits={"every": 20, "threshold": 0.1},
    )
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of ReDo; the defaults are the paper's, which is of reinforcement learning.

    Attributes:
      threshold: τ; a unit is dormant whose mean activation over the batch is at most this share of its
        layer's mean. 0.025 and 0.1 are the paper's, for different trainings.
      every: steps from one replacement of all dormant units to the next.
    """

    threshold: float = 0.025
    every: int = 1000


def build(options: Options, context: Context) -> Method:
    """Return plain training that replaces dormant units, also within a generation."""
    context.require_unscaled("redo")
    check_options(options, "be 0 or positive", "threshold")
    check_options(options, "be at least 1", "every")
    tx = make_redo_tx(
        context.model.units,
        init_fn=context.init_params,
        **dataclasses.asdict(options),
        **context.arguments(),
    )
    return context.plain(tx=tx, random=True, uses_activations=True)
