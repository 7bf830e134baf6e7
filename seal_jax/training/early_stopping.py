"""Generations that end before their budget is used up, and a learning rate that falls on plateaus."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from seal_jax import optimizer_state
from seal_jax.core.settings import Settings
from seal_jax.core.state import EarlyStoppingState, State, fresh_early_stopping
from seal_jax.errors import UsageError
from seal_jax.generations import Clock


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """The rules of early stopping, judged where an epoch ends.

    A training that stops is frozen whole until its generation ends; once all trainings of a run
    have stopped, the run goes on with the next generation at once.

    Attributes:
      clock: epochs and generations.
      patience: epochs without a better validation accuracy after which a training stops; 0: never.
      until_accuracy: training accuracy of an epoch at which it stops; 0: never.
      plateau_epochs: epochs without a better validation accuracy after which the learning rate is
        multiplied by ``plateau_factor``, and again after as many more; 0: never.
      plateau_factor: in (0, 1).
    """

    clock: Clock
    patience: int
    until_accuracy: float
    plateau_epochs: int
    plateau_factor: float

    def fresh(self, step: Any) -> EarlyStoppingState:
        """Return the course of the generation that starts at ``step``."""
        return fresh_early_stopping(self.clock.epoch(step))

    def judge(self, state: State) -> State:
        """Return the state with the course that the epoch which has just ended leads to."""
        assert state.early_stopping is not None
        epoch = self.clock.epoch(state.step - 1)
        stopped, rate_scale, since = state.early_stopping
        if self.until_accuracy:
            stopped |= state.metric_sums.correct >= self.until_accuracy * state.metric_sums.weight
        if state.best is not None:
            if self.patience:
                stopped |= epoch - state.best.epoch >= self.patience
            if self.plateau_epochs:
                since = jnp.maximum(since, state.best.epoch)
                falls = ~state.early_stopping.stopped & (epoch - since >= self.plateau_epochs)
                rate_scale = jnp.where(falls, rate_scale * self.plateau_factor, rate_scale)
                since = jnp.where(falls, epoch, since)
        return state._replace(early_stopping=EarlyStoppingState(stopped, rate_scale, since))

    def end_generation(self, state: State) -> State:
        """Return the state as if the generation had used up its steps."""
        generation = self.clock.generation(state.step - 1) + 1
        step = generation * self.clock.steps_per_generation
        step = step.astype(state.step.dtype)
        # The clocks inside the optimizer count updates, as many as there were steps so far.
        skipped = (step - state.step).astype(jnp.int32)
        moved = jax.tree.map(
            lambda leaf: leaf + skipped if leaf.dtype == jnp.int32 else leaf, state.opt_state
        )
        opt_state = with_clocks(state.opt_state, moved, state.weights.params)
        return state._replace(step=step, opt_state=opt_state)


def with_clocks(opt_state: Any, other: Any, params: Any) -> Any:
    """Return ``opt_state`` with the clocks of ``other``: the counts that are no optimizer's memory.

    What Adam counts for its bias correction is memory, as many updates as there really were.
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
    if not (train.patience or optimizer.plateau_epochs or train.until_accuracy):
        return None
    return EarlyStopping(
        clock,
        train.patience,
        train.until_accuracy,
        optimizer.plateau_epochs,
        optimizer.plateau_factor,
    )
