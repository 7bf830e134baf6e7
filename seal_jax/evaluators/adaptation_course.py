"""One go through an adaptation, measured at its deployment checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.core.state import State, Weights
from seal_jax.errors import UsageError
from seal_jax.evaluation import anytime
from seal_jax.evaluators.adaptation_systems import system_of
from seal_jax.training import pretrained

if TYPE_CHECKING:
    from seal_jax.evaluators.adaptation import Replay

PyTree = Any


class Trace(NamedTuple):
    """What was measured; the first axis of all arrays is that of the seeds.

    Attributes:
      checkpoints: T steps.
      validated: V steps.
      validation: accuracy ``[S, V]`` after each of these.
      adp: test accuracy ``[S, T]`` of the deployed states; ``adp_top5`` likewise, or None.
      adp_source: accuracy ``[S, T]`` of their features on the source's test data under its own head.
      adp_distance: ``[S, T]`` of their features from the source's.
      test: what ``adp`` is, of the states that training is in; ``test_top5``, ``source`` and
        ``distance`` likewise.
      head_norm: ``[S, T]`` of the states that training is in.
      train_loss: ``[S]`` at the end of each epoch, by step, as the run's own metrics have it.
    """

    checkpoints: tuple[int, ...]
    validated: tuple[int, ...]
    validation: np.ndarray
    adp: np.ndarray
    adp_top5: np.ndarray | None
    adp_source: np.ndarray
    adp_distance: np.ndarray
    test: np.ndarray
    test_top5: np.ndarray | None
    source: np.ndarray
    distance: np.ndarray
    head_norm: np.ndarray
    train_loss: dict[int, np.ndarray]


class Course:
    """One go through an adaptation."""

    def __init__(self, replay: Replay):
        self.replay = replay
        self.programs, self.clock = replay.programs, replay.experiment.clock
        self.scoring = replay.scoring
        self.checkpoints = anytime.checkpoints(replay.total)
        self.validated = anytime.validations(replay.total)
        self.due = sorted({*self.checkpoints, *self.validated}, reverse=True)
        self.losses: list[jax.Array] = []
        self.validation: list[np.ndarray] = []
        self.found: dict[str, list[np.ndarray]] = {}
        self.train_loss: dict[int, np.ndarray] = {}
        self.best: Weights | None = None
        self.best_accuracy = np.full(len(replay.seeds), -np.inf)
        self.deployed: dict[str, np.ndarray] | None = None

    def run(self) -> Trace:
        """Train to the end and return what was measured."""
        programs, clock, scoring = self.programs, self.clock, self.scoring
        starts = programs.starts(self.replay.seeds, self.replay.given())
        state = programs.init(starts, scoring.split("train"))
        prefix = "weights/params/"
        features = {name: own for name, own in state.weights.params.items() if name != scoring.head}
        self.start = pretrained.merge(features, starts.given, prefix)
        step = 0
        self.observe(state, step)
        while step < self.replay.total:
            # As in the training loop, events and the run's own validations included.
            if clock.starts_generation(step):
                state = programs.start_generation(state, scoring.split("train"))
            state, losses = programs.train(state, scoring.split("train"))
            self.losses.append(losses)
            step += 1
            every = self.replay.settings.train.validate_every
            if step % clock.steps_per_epoch == 0:
                state, step = self.end_epoch(state, step)
            elif every and step % every == 0:
                state, _ = programs.validate(state, scoring.split("validation"))
            self.observe(state, step)
        found: dict[str, Any] = {name: np.stack(values, 1) for name, values in self.found.items()}
        return Trace(
            checkpoints=self.checkpoints,
            validated=self.validated,
            validation=np.stack(self.validation, 1),
            train_loss=self.train_loss,
            **{"adp_top5": None, "test_top5": None, **found},
        )

    def end_epoch(self, state: State, step: int) -> tuple[State, int]:
        """Do what the training loop does where an epoch ends; a generation may end with it."""
        metric_sums = jax.device_get(state.metric_sums)
        self.train_loss[step] = mean(metric_sums.loss, metric_sums)
        state, _ = self.programs.validate(state, self.scoring.split("validation"))
        if self.programs.early_stopping is not None:
            state = self.programs.judge(state)
            resting = bool(jax.device_get(state.early_stopping).stopped.all())
            if resting and step % self.clock.steps_per_generation:
                state = self.programs.end_generation(state)
                step = (self.clock.generation(step - 1) + 1) * self.clock.steps_per_generation
        return state, step

    def observe(self, state: State, step: int) -> None:
        """Score what is due; after an early end the steps left out have the last one's state."""
        while self.due and self.due[-1] <= step:
            self.check(step)
            now = self.due.pop()
            if now in self.validated:
                self.keep_if_better(state.weights)
            if now in self.checkpoints:
                self.measure(state.weights)

    def keep_if_better(self, weights: Weights) -> None:
        """Score the validation split; seeds whose accuracy is the best so far are kept."""
        accuracy = self.scoring.validation(weights)
        self.validation.append(accuracy)
        better = accuracy > self.best_accuracy
        if self.best is None or better.any():
            # A copy: the training overwrites its own.
            self.best = _choose(better, weights, weights if self.best is None else self.best)
            self.deployed = None
        self.best_accuracy = np.where(better, accuracy, self.best_accuracy)

    def measure(self, weights: Weights) -> None:
        """Measure what is deployed, and the state that training is in."""
        assert self.best is not None  # the start was validated
        if self.deployed is None:
            scores = self.scores(self.best)
            del scores["head_norm"]
            self.deployed = {
                f"adp_{name}".replace("adp_test", "adp"): values for name, values in scores.items()
            }
        for name, values in {**self.deployed, **self.scores(weights)}.items():
            self.found.setdefault(name, []).append(values)

    def scores(self, weights: Weights) -> dict[str, np.ndarray]:
        """Return accuracies on the target and on the source, and how far the weights are."""
        norms = jax.device_get(self.scoring.sizes(weights.params, self.start))
        for size in norms:
            if not np.isfinite(size).all():
                self.diverged(~np.isfinite(size), "a parameter")
        return {
            **{f"test{name}": values for name, values in self.scoring.test(weights).items()},
            "source": self.scoring.on_source(weights),
            **dict(zip(("head_norm", "distance"), norms, strict=True)),
        }

    def check(self, step: int) -> None:
        """Raise if a loss since the last check was not a number."""
        if self.losses:
            finite = np.isfinite(np.concatenate(jax.device_get(self.losses), 1))
            self.losses = []
            if not finite.all():
                self.diverged(~finite.all(1), "the loss", f" by step {step}")

    def diverged(self, seeds: np.ndarray, what: str, where: str = "") -> None:
        """Raise a UsageError that names the first of these ``seeds`` (bool ``[S]``)."""
        seed = self.replay.seeds[np.flatnonzero(seeds)[0]]
        settings = self.replay.settings
        raise UsageError(
            f"{system_of(settings)} on {settings.data.name}, seed {seed}: {what} is not finite{where}; "
            f"lower the learning rate, {settings.optimizer.learning_rate:g}"
        )


def mean(hits: np.ndarray, sums: Any) -> np.ndarray:
    """Return sums over a split divided by its weight, float64."""
    return np.asarray(hits, np.float64) / np.asarray(sums.weight, np.float64)


@jax.jit
def _choose(better: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Return each seed's new leaves where they are better."""

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(better.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(one, new, old)
