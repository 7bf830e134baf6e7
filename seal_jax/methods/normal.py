"""Plain training, over generations in which nothing is forgotten."""

from __future__ import annotations

import dataclasses

from seal_jax.errors import UsageError
from seal_jax.methods.method import Context, Method
from seal_jax.transforms import make_normal_tx


@dataclasses.dataclass(frozen=True)
class Options:
    """Plain training has none: see ``optimizer.schedule`` and ``train.generations``."""


def build(options: Options, context: Context) -> Method:
    """Return plain training: one cosine over everything, or one in each generation.

    The paper's "Normal" has one generation; "Normal (long)" has several, with ``optimizer.schedule``
    "restart" (cosine and momentum start anew in each) or "single" (one cosine over all of them).
    """
    del options
    reset = context.optimizer.reset_momentum
    epochs = context.train.epochs_per_generation
    if context.optimizer.schedule == "single":
        # One long generation: the clock of the transformation spans the whole run.
        epochs *= context.train.generations
    tx = make_normal_tx(
        context.schedule(),
        steps_per_epoch=context.steps_per_epoch,
        epochs_per_generation=epochs,
        momentum=context.optimizer.momentum,
        weight_decay=context.optimizer.weight_decay,
        nesterov=context.optimizer.nesterov,
        reset_momentum=reset,
    )
    return Method(tx=tx, loss=context.loss)


def require_restarts(context: Context, name: str) -> None:
    """Raise if the schedule does not restart: no forgetting method is defined without."""
    if context.optimizer.schedule == "single":
        raise UsageError(
            f'optimizer.schedule = "single" does not go with method {name!r}; use "restart"'
        )
