"""Hare and Tortoise: weights that go back to their slow average every few epochs (Lee et al. 2024)."""

from __future__ import annotations

import dataclasses

from seal_jax.errors import UsageError
from seal_jax.methods.method import Context, Method, Variant, check_options
from seal_jax.transforms.hare_tortoise import returns_after

VARIANTS = {
    "hare_tortoise": Variant(
        "Hare & Tortoise",
        "Lee et al. 2024",
        "warm_start_cifar10.py",
        digits={"decay": 0.9, "every_epochs": 2},
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of Hare & Tortoise; the defaults are those of the released code for warm starts.

    Attributes:
      decay: of the tortoise, the moving average of the hare's weights and BatchNorm statistics.
      every_epochs: epochs after which the hare goes back to the tortoise.
    """

    decay: float = 0.999
    every_epochs: int = 10


def build(options: Options, context: Context) -> Method:
    """Return plain training, the hare, whose weights go back to their average, the tortoise."""
    check_options(options, "lie in [0, 1)", "decay")
    check_options(options, "be at least 1", "every_epochs")
    if context.optimizer.ema:
        raise UsageError(
            f"optimizer.ema = {context.optimizer.ema:g} does not go with method 'hare_tortoise', whose average has "
            "method.decay; set it to 0"
        )
    # The step's own average and not `hare_and_tortoise`, so that BatchNorm's statistics go back, too.
    returns = returns_after(options.every_epochs * context.steps_per_epoch)
    return context.plain(ema=options.decay, returns_to_ema=returns)
