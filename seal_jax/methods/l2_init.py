"""L2-Init: weight decay towards the initial weights instead of zero (Kumar et al. 2023)."""

from __future__ import annotations

import dataclasses

from seal_jax.errors import UsageError
from seal_jax.methods.method import Context, Method, Variant
from seal_jax.transforms import make_l2_init_tx

VARIANTS = {
    "l2_init": Variant(
        "L2-Init",
        "Kumar et al. 2023, section 3",
        "warm_start_cifar10.py",
        digits={"optimizer.weight_decay": 0.01},
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """L2-Init has none: its strength is ``optimizer.weight_decay``, which decays nothing else then."""


def build(options: Options, context: Context) -> Method:
    """Return plain training whose weight decay pulls towards the weights that it started from."""
    del options
    if context.optimizer.of_optax:
        raise UsageError(
            f"optimizer.name = {context.optimizer.name!r} does not go with method 'l2_init', whose pull takes the "
            "place of the coupled weight decay: use sgd, adam or radam"
        )
    return context.plain(tx=make_l2_init_tx(**context.arguments()))
