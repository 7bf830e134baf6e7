"""The training loop, from the first step, or the last checkpoint, to the end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from seal_jax import data, methods
from seal_jax.core import mesh as meshes
from seal_jax.core.settings import Settings
from seal_jax.core.state import State
from seal_jax.errors import UsageError
from seal_jax.training import experiment as experiments
from seal_jax.training import pretrained
from seal_jax.training import workdir as workdirs
from seal_jax.training.batches import Arrays
from seal_jax.training.checkpoints import Checkpoints
from seal_jax.training.experiment import Experiment
from seal_jax.training.metrics import MetricsLog
from seal_jax.training.progress import Progress


class NonFiniteError(UsageError):
    """The loss or a parameter is no longer a number."""


class Outcome(NamedTuple):
    """How a run ended: at which step, whether that was its end, and the experiment's state."""

    step: int
    finished: bool
    state: State


def train(
    settings: Settings, workdir: Path, dataset: data.Dataset, *, devices: int | None = None
) -> Outcome:
    """Train until the end, or until SIGTERM or SIGINT; take up the run in ``workdir`` if there is one.

    A run that was stopped at any moment, by any means, and taken up again on the same devices ends
    bit for bit like one that was not.

    Args:
      settings: the experiment.
      workdir: the run's folder; see :mod:`seal_jax.training.workdir`.
      dataset: the images, on the host.
      devices: how many of the devices to use, the first ones; all by default.

    Raises:
      UsageError: input that cannot be used, before anything is written.
      NonFiniteError: the training diverged; the last good checkpoint stays.
    """
    settings = methods.complete(settings)
    mesh = meshes.make(settings, jax.devices()[:devices])
    experiment = experiments.build(settings, experiments.data_shape(dataset), mesh)
    experiments.check_data(settings, dataset)
    main = jax.process_index() == 0
    checkpoints = Checkpoints(workdir / workdirs.CHECKPOINTS, keep=settings.run.keep_checkpoints)
    programs = experiment.programs
    abstract = programs.abstract_state(settings.train.seeds)
    given: dict[str, np.ndarray] = {}
    if settings.train.pretrained:
        before = pretrained.inserted_before(workdir)
        if not checkpoints.steps():
            momentum = experiment.method.continues_momentum
            given = pretrained.load(settings, workdir, abstract, momentum=momentum)
        abstract = programs.abstract_state(settings.train.seeds, {**before, **given})
    with ExitStack() as held, checkpoints, _stop() as stop:

        def claim() -> None:
            workdirs.claim(workdir, settings)
            held.enter_context(workdirs.locked(workdir / workdirs.CONFIG, "--workdir"))

        _on_first_process(claim)
        if main:
            print(experiment.summary(), flush=True)
        restored = checkpoints.restore(abstract)
        if restored is None:
            state, step = None, 0
        else:
            state, step = restored.state, restored.step
            if step == experiment.total_steps:
                return Outcome(step, True, state)  # nothing to do, and no file to touch
            _check_steps_per_call(experiment, step)
            if main:
                print(f"taking up the run at step {step}", flush=True)
        log = MetricsLog(workdir, resume_step=step, write=main)
        progress = Progress(experiment.total_steps, initial=step)
        try:
            loop = _Loop(experiment, dataset, checkpoints, log, progress, stop)
            if state is None:
                seeds = np.arange(settings.train.seeds, dtype=np.uint32) + settings.train.seed
                state = programs.init(programs.starts(seeds, given), loop.train_data)
            return loop.run(state, step)
        finally:
            progress.close()
            log.close()


class _Loop:
    """The state of the loop outside the compiled programs."""

    def __init__(
        self,
        experiment: Experiment,
        dataset: data.Dataset,
        checkpoints: Checkpoints,
        log: MetricsLog,
        progress: Progress,
        stop: threading.Event,
    ):
        self.experiment = experiment
        self.programs = experiment.programs
        self.clock = experiment.clock
        self.checkpoints = checkpoints
        self.log = log
        self.progress = progress
        self.stop = stop
        self.train_data = self.on_device(dataset.train)
        if self.programs.validate_size:
            self.validation_data = self.on_device(dataset.validation)
        self.test_data = self.on_device(dataset.test)

    def on_device(self, split: data.Split) -> Arrays:
        return Arrays(*(meshes.place(self.programs.mesh, part) for part in data.flatten(split)))

    def run(self, state: State, step: int) -> Outcome:
        total = self.experiment.total_steps
        saved = step
        while step < total:
            # A checkpoint is of the moment BEFORE the event, so the event is repeated on resume.
            if self.clock.starts_generation(step):
                state = self.programs.start_generation(state, self.train_data)
            state, losses = self.programs.train(state, self.train_data)
            losses = fetch(losses)
            if not np.isfinite(losses).all():
                self.diverged(step + int(np.flatnonzero(~np.isfinite(losses).all(0))[0]), saved)
            step += self.programs.steps_per_call
            self.progress.update(step, loss=float(losses[:, -1].mean()))
            ended_early = False
            if step % self.clock.steps_per_epoch == 0:
                # The row must be on disk before the checkpoint: a run taken up again at `step`
                # keeps the rows up to there, and would miss this one.
                state, row, ended_early = self.score(state, step)
                self.log.append(row)
                if ended_early:
                    state = self.programs.end_generation(state)
                    step = (self.clock.generation(step - 1) + 1) * self.clock.steps_per_generation
                    self.progress.update(step)
            elif self.validation_is_due(step):
                state, _ = self.programs.validate(state, self.validation_data)
            stopping = _any_process(self.stop.is_set())
            if step == total or stopping or ended_early or self.checkpoint_is_due(step):
                if not fetch(self.programs.finite(state)).all():
                    self.diverged(step - 1, saved)
                self.checkpoints.save(step, state, {"epoch": int(self.clock.epoch(step))})
                saved = step
            if stopping:
                break
        self.checkpoints.wait()
        return Outcome(step, step == total, state)

    def checkpoint_is_due(self, step: int) -> bool:
        every = self.experiment.settings.run.checkpoint_every_epochs * self.clock.steps_per_epoch
        return step % every == 0

    def validation_is_due(self, step: int) -> bool:
        every = self.experiment.settings.train.validate_every
        return bool(self.programs.validate_size and every) and step % every == 0

    def score(self, state: State, step: int) -> tuple[State, dict[str, Any], bool]:
        """Score the epoch that ends at ``step``.

        Returns:
          The state, the metrics row with one value per seed each, and whether the generation ends
          here though its budget is not used up.
        """
        last = step - 1  # the last step of the epoch
        row: dict[str, Any] = {
            "step": step,
            "epoch": self.clock.epoch(last),
            "generation": self.clock.generation(last),
            "epoch_in_generation": self.clock.epoch_in_generation(last),
            "learning_rate": self.experiment.learning_rate(last),
        }
        metric_sums = fetch(state.metric_sums)
        row |= _mean("train", metric_sums)
        for name, total in metric_sums.measures.items():
            row[f"train/{name}"] = (total / self.clock.steps_per_epoch).tolist()
        if self.programs.validate_size:
            state, sums = self.programs.validate(state, self.validation_data)
            row |= _mean("validation", fetch(sums))
        ended_early, ends = False, step % self.clock.steps_per_generation == 0
        if self.programs.early_stopping is not None:
            state = self.programs.judge(state)
            course = fetch(state.early_stopping)
            row |= {"rate_scale": course.rate_scale.tolist(), "stopped": course.stopped.tolist()}
            ended_early = bool(course.stopped.all()) and not ends
        if ends or ended_early:
            # The test split is scored where a generation ends, never to choose anything.
            row |= _mean("test_last", fetch(self.programs.test(state.weights, self.test_data)))
            if state.best is not None:
                best = fetch(self.programs.test(state.best.weights, self.test_data))
                row |= _mean("test_best", best)
                row["best_epoch"] = fetch(state.best.epoch).tolist()
        return state, row, ended_early

    def diverged(self, step: int, saved: int) -> None:
        self.checkpoints.wait()
        generation = self.clock.generation(step)
        kept = f"the checkpoint of step {saved} is kept" if saved else "there is no checkpoint yet"
        raise NonFiniteError(
            f"the loss is not finite at step {step} (generation {generation}, epoch "
            f"{self.clock.epoch(step)}); {kept}; lower optimizer.learning_rate"
        )


def _mean(name: str, sums: Any) -> dict[str, list[float]]:
    """Return loss and accuracy per seed from the sums over a split."""
    hits = {"accuracy": sums.correct}
    if "top5" in sums.measures:
        hits["top5_accuracy"] = sums.measures["top5"]
    means = {f"{name}/{measure}": (total / sums.weight).tolist() for measure, total in hits.items()}
    return {f"{name}/loss": (sums.loss / sums.weight).tolist(), **means}


def fetch(tree: Any) -> Any:
    """Return arrays as NumPy, whole in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def _any_process(flag: bool) -> bool:
    """Tell whether the flag is set in any process, so that all stop together."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def _on_first_process(action: Callable[[], None]) -> None:
    """Let the first process act, the others wait; if it raises a UsageError, all of them do."""
    failed: UsageError | None = None
    if jax.process_index() == 0:
        try:
            action()
        except UsageError as error:
            failed = error
    if _any_process(failed is not None):
        raise failed or UsageError("stopped because process 0 did; its message says why")


def _check_steps_per_call(experiment: Experiment, step: int) -> None:
    """Raise if calls that start at ``step`` would run over the end of its epoch."""
    into_epoch, each = step % experiment.clock.steps_per_epoch, experiment.programs.steps_per_call
    if into_epoch % each:
        raise UsageError(
            f"run.steps_per_call = {each} does not divide the {into_epoch} steps of the running epoch "
            f"at the checkpoint of step {step}; give the number the run was stopped with"
        )


@contextmanager
def _stop() -> Iterator[threading.Event]:
    """Set an event on SIGTERM and SIGINT; a second signal interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return

    def handle(number, frame):
        del frame
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        print(f"{signal.Signals(number).name}: saving a checkpoint, then stopping", flush=True)

    old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
