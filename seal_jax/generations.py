"""The clock of generations: which epoch, generation and phase a step belongs to.

Every question is answered for Python integers and for traced steps alike, so that one compiled
program serves all phases and a run can resume in the middle of any of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seal_jax.errors import UsageError, check_integer, check_number

PyTree = Any
Step = Any  # int or a traced integer array
Schedule = Callable[[Step], Any]


def never(step: Step) -> Any:
    """Return False for every step: the condition of an event that never happens."""
    del step
    return False


def branch(condition: Any, compute: Callable[[], PyTree], otherwise: PyTree) -> PyTree:
    """Return ``compute()`` if a condition holds, else ``otherwise``, without computing what is not needed.

    ``jax.lax.cond`` becomes a select under ``vmap``, which computes both sides in every step, although trainings that
    are batched together agree on the step. This remains a branch: it is taken if the condition holds for any of them.

    Args:
      condition: a bool scalar, may be traced.
      compute: returns a tree like ``otherwise``, of the same shapes and dtypes.
      otherwise: a tree of arrays.

    >>> square = lambda x, flag: branch(flag, lambda: x**2, x)
    >>> jax.vmap(square)(jnp.array([3.0, 4.0]), jnp.array([True, False])).tolist()
    [9.0, 4.0]
    """
    result = jax.lax.cond(_any_of_batch(condition), compute, lambda: otherwise)
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), result, otherwise)


@jax.custom_batching.custom_vmap
def _any_of_batch(condition: Any) -> Any:
    return condition


@_any_of_batch.def_vmap
def _(size: int, batched: list[bool], condition: Any) -> tuple[Any, bool]:
    # Called again, so that an outer ``vmap`` reduces its own axis; the result has none.
    del size
    return _any_of_batch(condition.any(0)) if batched[0] else condition, False


@dataclasses.dataclass(frozen=True)
class Clock:
    """Divides steps into epochs and generations (SEAL paper, section 3 and eq. 3).

    Generation 0 is plain training for every method: the papers' "Gen=1". Forgetting happens at the
    start of the generations from 1 on, so G generations have G - 1 forgetting events.

    Attributes:
      steps_per_epoch: S, optimizer steps in an epoch.
      epochs_per_generation: E.
      ascent_epochs: k, the epochs of ascent at the start of each generation from 1 on; k times S
        must be whole. 0 for methods that do not ascend; SEAL's default is ``quarter``.

    >>> clock = Clock(steps_per_epoch=10, epochs_per_generation=8, ascent_epochs=2)
    >>> clock.generation(95), clock.epoch(95), clock.epoch_in_generation(95)
    (1, 9, 1)
    >>> clock.ascending(95), clock.ascending(100), clock.ascending(5)
    (True, False, False)
    """

    steps_per_epoch: int
    epochs_per_generation: int
    ascent_epochs: float = 0

    def __post_init__(self):
        for field in ("steps_per_epoch", "epochs_per_generation"):
            value = check_integer(field, getattr(self, field), 1)
            object.__setattr__(self, field, value)  # NumPy's integers have a width
        k, most = self.ascent_epochs, self.epochs_per_generation
        check_number(
            "ascent_epochs",
            k,
            lambda value: 0 <= value <= most,
            f"lie between 0 and epochs_per_generation = {most}",
        )
        # k may be a fraction of an epoch such as 1/3, whose product with S is whole only up to rounding.
        steps = k * self.steps_per_epoch
        if abs(steps - round(steps)) > 1e-6:
            raise UsageError(
                f"ascent_epochs = {k:g} is {steps:g} steps of {self.steps_per_epoch} per epoch; "
                "it must be a whole number of steps: change ascent_epochs or epochs_per_generation"
            )

    @property
    def ascent_steps(self) -> int:
        """Steps of ascent at the start of each generation from 1 on."""
        # Rounded, not cut off: the product may be a hair below the whole number that was checked.
        return round(self.ascent_epochs * self.steps_per_epoch)

    @property
    def quarter(self) -> float:
        """Epochs of SEAL's ascent by default: E / 4, to the nearest whole step, halves up.

        >>> clock = Clock(steps_per_epoch=3125, epochs_per_generation=70)  # 54687.5 steps
        >>> clock.quarter * 3125
        54688.0
        """
        # In whole steps first: E / 4 epochs need not be a whole number of them.
        # Adding 2 rounds the quarter to the nearest.
        return (self.steps_per_generation + 2) // 4 / self.steps_per_epoch

    @property
    def steps_per_generation(self) -> int:
        """Steps in a generation, S times E."""
        return self.steps_per_epoch * self.epochs_per_generation

    def epoch(self, step: Step) -> Step:
        """Return the epoch since the start of training."""
        return step // self.steps_per_epoch

    def generation(self, step: Step) -> Step:
        """Return the generation, from 0."""
        return step // self.steps_per_generation

    def step_in_generation(self, step: Step) -> Step:
        """Return the steps since the generation began."""
        return step % self.steps_per_generation

    def epoch_in_generation(self, step: Step) -> Step:
        """Return the epoch within the generation."""
        return self.epoch(step) % self.epochs_per_generation

    def starts_generation(self, step: Step) -> Any:
        """Tell whether ``step`` is the first of a generation from 1 on: the time to forget."""
        # `&`, not `and`, here and below: the step may be traced. Generation 0 has nothing to forget.
        return (step > 0) & (self.step_in_generation(step) == 0)

    def ascending(self, step: Step) -> Any:
        """Tell whether the forget subtree ascends at ``step``."""
        return (self.generation(step) >= 1) & (self.step_in_generation(step) < self.ascent_steps)

    def starts_descent(self, step: Step) -> Any:
        """Tell whether ``step`` is the first of descent after an ascent."""
        k = self.ascent_steps
        # Without ascent k is 0, and the first step of a generation must not count as the end of one.
        return (self.generation(step) >= 1) & (self.step_in_generation(step) == k) & (k > 0)

    def last(self, epochs: int) -> Callable[[Step], Any]:
        """Return the function that tells whether a step is in the last ``epochs`` of its generation.

        >>> late = Clock(steps_per_epoch=10, epochs_per_generation=8).last(2)
        >>> late(59), late(60), late(79), late(80)
        (False, True, True, False)
        """
        epochs = check_integer("last_epochs", epochs, 1, self.epochs_per_generation)
        return lambda step: self.epoch_in_generation(step) >= self.epochs_per_generation - epochs

    def restart(self, schedule: float | Schedule) -> Schedule:
        """Return the schedule of the step within the generation as one of the step since the start.

        >>> restarted = Clock(10, 1).restart(lambda step: 0.5**step)
        >>> restarted(3) == restarted(13)
        True
        """
        if callable(schedule):
            return lambda step: schedule(self.step_in_generation(step))
        return lambda step: jnp.asarray(schedule, jnp.float32)
