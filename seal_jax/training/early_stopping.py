"""Early stopping: generations that end before their budget, and learning rates that fall on plateaus."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from seal_jax import optimizer_state
from seal_jax.core.settings import Optimizer, Settings, Train
from seal_jax.core.state import EarlyStoppingState, State
from seal_jax.errors import UsageError
from seal_jax.generations import Clock


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """The rules of early stopping, applied where an epoch ends; traced.

    A training that stops is frozen whole until its generation ends; once all trainings of a run
    have stopped, the run continues with the next generation immediately.
    """

    clock: Clock
    train: Train  # patience and until_accuracy count
    optimizer: Optimizer  # plateau_epochs and plateau_factor count

    def start(self, step: Any) -> EarlyStoppingState:
        """Return the state of the generation that starts at ``step``."""
        since = jnp.asarray(self.clock.epoch(step), jnp.int32)
        return EarlyStoppingState(jnp.zeros((), bool), jnp.ones((), jnp.float32), since)

    def update(self, state: State) -> State:
        """Apply the rules to the epoch that has just ended: who stops, and whose rate falls."""
        assert state.early_stopping is not None
        train, optimizer = self.train, self.optimizer
        epoch = self.clock.epoch(state.step - 1)
        # The flag only ever turns on here; `start` turns it off for the next generation.
        stopped, rate_scale, since = state.early_stopping
        if train.until_accuracy:
            stopped |= state.metric_sums.correct >= train.until_accuracy * state.metric_sums.weight
        # The epoch has been validated before, so best.epoch is of this generation from its first epoch on.
        if state.best is not None:
            if train.patience:
                stopped |= epoch - state.best.epoch >= train.patience
            if optimizer.plateau_epochs:
                # Epochs count from the last improvement or the last fall of the rate, whichever was later.
                since = jnp.maximum(since, state.best.epoch)
                # A training that stopped before this epoch keeps its rate.
                falls = ~state.early_stopping.stopped & (epoch - since >= optimizer.plateau_epochs)
                rate_scale = jnp.where(falls, rate_scale * optimizer.plateau_factor, rate_scale)
                since = jnp.where(falls, epoch, since)
        return state._replace(early_stopping=EarlyStoppingState(stopped, rate_scale, since))

    def end_generation(self, state: State) -> State:
        """Return the state as if the generation had used up its steps."""
        generation = self.clock.generation(state.step - 1) + 1
        step = (generation * self.clock.steps_per_generation).astype(state.step.dtype)
        # The clocks inside the optimizer count updates, as many as there were steps so far.
        skipped = (step - state.step).astype(jnp.int32)
        # Every int32 is moved, Adam's counts too; with_clocks then takes only the clocks.
        moved = jax.tree.map(
            lambda leaf: leaf + skipped if leaf.dtype == jnp.int32 else leaf, state.opt_state
        )
        opt_state = with_clocks(state.opt_state, moved, state.weights.params)
        return state._replace(step=step, opt_state=opt_state)


def with_clocks(opt_state: Any, other: Any, params: Any) -> Any:
    """Return ``opt_state`` with the clocks of ``other``: the counts that no moment depends on.

    Adam's count for its bias correction is no clock: it counts the updates that were made.
    """
    return optimizer_state.reinitialise(opt_state, other, params, None, when=False, restart=True)


def rules(settings: Settings, clock: Clock, validates: bool) -> EarlyStopping | None:
    """Return the rules that ``settings`` ask for, ``None`` if there are none.

    Raises:
      UsageError: a rule needs a validation split and there is none.
    """
    train, optimizer = settings.train, settings.optimizer
    by_validation = {
        "train.patience": train.patience,
        "optimizer.plateau_epochs": optimizer.plateau_epochs,
        "method.warmup": settings.method.get("warmup"),  # no rule here, but it would never end
    }
    for field, value in by_validation.items():
        if value and not validates:
            raise UsageError(
                f"{field} = {value} needs a validation split: set data.validation_fraction above 0"
            )
    if train.patience or optimizer.plateau_epochs or train.until_accuracy:
        return EarlyStopping(clock, train, optimizer)
    return None
