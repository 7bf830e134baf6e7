"""The training loop, from the first step, or the last checkpoint, to the end."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from seal_jax import data, methods
from seal_jax.core import files, vary
from seal_jax.core import mesh as meshes
from seal_jax.core.settings import Settings
from seal_jax.core.state import State
from seal_jax.errors import UsageError
from seal_jax.training import experiment as experiments
from seal_jax.training import loggers, manifest, pretrained, streaming
from seal_jax.training import points as points_lib
from seal_jax.training import workdir as workdirs
from seal_jax.training.batches import Arrays, place
from seal_jax.training.checkpoints import Checkpoints, same_everywhere
from seal_jax.training.experiment import Experiment
from seal_jax.training.metrics import MetricsLog, read
from seal_jax.training.progress import Progress


class NonFiniteError(UsageError):
    """The loss or a parameter is no longer finite."""


class Call(NamedTuple):
    """The outcome of one call of the compiled steps, and of what is due after it."""

    state: State  # overwritten by the next call, so copy what must outlive it
    step: int  # at which the training goes on
    trained: int  # up to which it was trained: ``step``, but where a generation ended early
    losses: jax.Array  # [seeds, steps of the call], on the device
    validation: Any  # sums over the validation split, if it was scored here
    waited: float  # seconds that this and all earlier calls waited for streamed images

    @property
    def ended_early(self) -> bool:
        """Whether a generation has ended here though its budget is not used up."""
        return self.step > self.trained


def calls(
    experiment: Experiment,
    state: State,
    step: int,
    end: int,
    train_data: Arrays,
    validation_data: Arrays | None,
) -> Generator[Call, None, None]:
    """Train from ``step`` to ``end`` and yield after each call of the compiled steps.

    This is the only training loop: a run writes its metrics and checkpoints between two calls, an
    evaluation that repeats a run measures it there. The ``state`` at ``step`` is overwritten; a
    generation that ends early may lead past ``end``.
    """
    clock = experiment.clock
    validate_every = experiment.settings.train.validate_every
    with ExitStack() as held:
        feed = None
        if train_data.stored is not None:
            feed = held.enter_context(streaming.Feed(experiment, train_data, fetch(state.seed)))
        while step < end:
            # A checkpoint is of the state BEFORE the event, so the event is repeated on resume.
            if clock.starts_generation(step):
                state = experiment.start_generation(state, train_data)
            streamed = () if feed is None else (feed.pixels(step),)
            state, losses = experiment.train(state, train_data, *streamed)
            step += experiment.steps_per_call
            # The devices compute meanwhile.
            if feed is not None and step < end:
                feed.prepare(step)
            trained, validation = step, None
            epoch_ends = step % clock.steps_per_epoch == 0
            if validation_data is not None and (
                epoch_ends or (validate_every and step % validate_every == 0)
            ):
                state, validation = experiment.validate(state, validation_data)
            # After the validation, whose best epoch the rules look at.
            if epoch_ends and experiment.early_stopping is not None:
                state = experiment.update_early_stopping(state)
                stopped = fetch(state.early_stopping).stopped.all()
                # A generation that has used up its budget has nothing to skip.
                if stopped and step % clock.steps_per_generation:
                    state = experiment.end_generation(state)
                    step = (clock.generation(step - 1) + 1) * clock.steps_per_generation
            waited = 0.0 if feed is None else feed.waited
            yield Call(state, step, trained, losses, validation, waited)


class Outcome(NamedTuple):
    """How a run ended: at which step, whether that was its end, the state, and whether a signal asked to stop."""

    step: int
    finished: bool
    state: State
    signalled: bool = False


def train(
    settings: Settings,
    workdir: Path,
    dataset: data.Dataset,
    *,
    devices: int | None = None,
    points: Sequence[Path] = (),
    until: float = math.inf,
) -> Outcome:
    """Train until the end, or until SIGTERM or SIGINT; resume the run in ``workdir`` if there is one.

    A run that was stopped at any moment, by any means, and resumed on the same devices ends bit for
    bit like one that was not.

    Args:
      settings: the experiment.
      workdir: the run's folder; see :mod:`seal_jax.training.workdir`.
      dataset: the images, on the host.
      devices: how many of the devices to use, the first ones; all by default.
      points: folders for the points of ``train.vary``, by default those of
        :func:`seal_jax.training.points.folders`.
      until: the time, of ``time.monotonic``, from which on it stops as at a signal. A call of the compiled
        steps is trained whatever the time is, so that runs that are started again and again do end.

    Raises:
      UsageError: input that cannot be used, before anything is written.
      NonFiniteError: the training diverged; the last good checkpoint stays.
    """
    # Before anything else: config.json must hold what the method chose for settings that were left open.
    settings = pretrained.complete(methods.complete(settings), workdir)
    loggers.check(settings)
    mesh = meshes.make(settings, jax.devices()[:devices])
    # Built before the folder is claimed: settings that do not fit must leave nothing behind.
    experiment = experiments.build(settings, experiments.data_shape(dataset), mesh)
    experiments.check_data(settings, dataset)
    points = points or points_lib.folders(workdir, settings)
    main = jax.process_index() == 0
    checkpoints = Checkpoints(workdir / workdirs.CHECKPOINTS, keep=settings.run.keep_checkpoints)
    abstract = experiment.abstract_state()
    init_from: dict[str, np.ndarray] = {}
    source = None
    if settings.train.pretrained:
        # LW's normalisers are a part of the state that only the other run, or a checkpoint, tells of.
        saved_leaves = checkpoints.abstract_leaves()
        # A resumed run has all of it in its checkpoint; the other run may be gone by now.
        if not same_everywhere(checkpoints.steps()):
            method = experiment.method
            source = pretrained.read(
                settings, workdir, experiment.model, replaces_head=method.replaces_head
            )
            init_from = pretrained.take(
                settings, source, abstract, momentum=method.continues_momentum
            )
        abstract = experiment.abstract_state(init_from={**saved_leaves, **init_from})
    with ExitStack() as held, checkpoints, _stop() as stop:

        def claim() -> None:
            workdirs.claim(workdir, settings, points)
            held.enter_context(workdirs.locked(workdir / workdirs.CONFIG, "--workdir"))
            workdirs.record_labels(workdir, dataset.label_record)

        _on_first_process(claim)
        if main:
            print(experiment.summary(), flush=True)
            if files.is_remote(workdir):
                print(
                    f"{workdir} is in a bucket, where nothing can be locked: train it once at a time",
                    flush=True,
                )
            if source and source.note:
                print(source.note, flush=True)
        restored = checkpoints.restore(abstract)
        step = restored.step if restored else 0
        # Rows after the checkpoint are dropped: the epochs they tell of are trained again.
        logs: list[MetricsLog] = []  # in the first process one, in the others none

        def open_log(only: list[str] | None = None) -> None:
            logs.append(held.enter_context(MetricsLog(workdir, resume_step=step)))
            logs[0].show_in(loggers.start(workdir, settings, only))

        if restored:
            if step == experiment.total_steps:
                # No file is touched, but by loggers that lack rows.
                def open_unseen() -> None:
                    last = max((row["step"] for row in read(workdir)), default=-1)
                    if unseen := loggers.unseen(workdir, settings, last):
                        open_log(unseen)

                _on_first_process(open_unseen)
                return _outcome(experiment, workdir, step, restored.state, points)
            into_epoch, count = step % experiment.clock.steps_per_epoch, experiment.steps_per_call
            if into_epoch % count:  # calls would go past the end of the epoch
                raise UsageError(
                    f"run.steps_per_call = {count} does not divide the {into_epoch} steps of the "
                    f"running epoch at the checkpoint of step {step}; give the number the run was "
                    "stopped with"
                )
            if main:
                print(f"resuming at step {step}", flush=True)
        _on_first_process(lambda: manifest.write(workdir, settings, dataset, mesh, step))
        _on_first_process(open_log)
        progress = held.enter_context(Progress(experiment.total_steps, initial=step))
        train_data = place(mesh, dataset.train, dataset.draws)
        test_data = place(mesh, dataset.test)
        validation_data = None
        if dataset.validation is dataset.test:  # data.selection = "test_best"
            validation_data = test_data
        elif len(dataset.validation):
            validation_data = place(mesh, dataset.validation)
        if restored:
            state = restored.state
        else:
            state = experiment.init(experiment.starts(experiment.seeds, init_from), train_data)
        clock, saved = experiment.clock, step
        checkpoint_every = settings.run.checkpoint_every_epochs * clock.steps_per_epoch
        training = calls(
            experiment, state, step, experiment.total_steps, train_data, validation_data
        )
        # Closed here and not when it is collected, where Python would only print that it was interrupted.
        for call in held.enter_context(closing(training)):
            state, step = call.state, call.step
            # This waits for the devices, so that a loss that is not finite stops the run in the call it comes from.
            losses = fetch(call.losses)
            finite = np.isfinite(losses)
            if _is_lost(experiment, finite.all(1)):
                before = call.trained - losses.shape[1]
                first = before + int(np.flatnonzero(~finite.all(0))[0])
                _diverged(experiment, checkpoints, first, saved)
            progress.update(call.trained, loss=float(losses[finite[:, -1], -1].mean()))
            if call.trained % clock.steps_per_epoch == 0:
                # The row must be on disk before the checkpoint: a run resumed at `step` keeps the
                # rows up to there, and would miss this one.
                row = _row(experiment, call, test_data, validation_data)
                if settings.run.log_plasticity:
                    measures = fetch(experiment.plasticity(state, train_data))
                    row |= {f"plasticity/{name}": of.tolist() for name, of in measures.items()}
                for log in logs:
                    log.append(row)
                if call.ended_early:
                    progress.update(step)
            stopping = _any_process(stop.is_set() or time.monotonic() >= until)
            due = step == experiment.total_steps or step % checkpoint_every == 0
            if due or stopping or call.ended_early:
                # A finite loss is not enough: it was computed before the last update.
                if _is_lost(experiment, fetch(experiment.finite(state))):
                    _diverged(experiment, checkpoints, call.trained - 1, saved)
                checkpoints.save(step, state, {"epoch": int(clock.epoch(step))})
                saved = step
            if stopping:
                break
        checkpoints.wait()
        outcome = _outcome(experiment, workdir, step, state, points)
        # One that came after the last call stops what would follow this run.
        return outcome._replace(signalled=_any_process(stop.is_set()))


def _is_lost(experiment: Experiment, finite: np.ndarray) -> bool:
    """Return whether a run must stop, of whose trainings some are not ``finite`` any more."""
    # Points are tried out: one that diverges must not end the others.
    settings = experiment.settings
    tried = settings.run.keep_diverged or bool(vary.points(settings)[0])
    return not (finite.any() if tried else finite.all())


def _outcome(
    experiment: Experiment, workdir: Path, step: int, state: State, points: Sequence[Path]
) -> Outcome:
    """Return how a run ended, after writing its points if that was its end."""
    finished, settings = step == experiment.total_steps, experiment.settings
    if finished and vary.points(settings)[0]:
        points_lib.split(workdir, settings, state, step, int(experiment.clock.epoch(step)), points)
    return Outcome(step, finished, state)


def _row(
    experiment: Experiment, call: Call, test_data: Arrays, validation_data: Arrays | None
) -> dict[str, Any]:
    """Return the metrics row of the epoch that has just ended, one value per seed each."""
    clock, state = experiment.clock, call.state
    # Of `trained` and not `step`, which is at the next generation where one ended early.
    last = call.trained - 1  # the last step of the epoch
    metric_sums = fetch(state.metric_sums)
    row: dict[str, Any] = {
        "step": call.trained,
        "epoch": clock.epoch(last),
        "generation": clock.generation(last),
        "epoch_in_generation": clock.epoch_in_generation(last),
        "learning_rate": experiment.learning_rate(last),
        **_means("train", metric_sums),
    }
    for name, total in metric_sums.measures.items():
        row[f"train/{name}"] = (total / clock.steps_per_epoch).tolist()
    if (noise := metric_sums.noise) is not None:
        shares = {
            "clean_accuracy": (noise.clean_correct, metric_sums.weight),
            "memorised": (noise.memorised, noise.wrong),
            "corrected": (noise.corrected, noise.wrong),
        }
        for name, (part, whole) in shares.items():
            row[f"train/{name}"] = _share(part, whole, metric_sums.loss)
    if call.validation is not None:
        row |= _means("validation", fetch(call.validation))
        if state.ema is not None and validation_data is not None:
            sums = experiment.score(state.ema, validation_data)
            row |= _means("validation_ema", fetch(sums))
    if state.early_stopping is not None:
        stopping = fetch(state.early_stopping)
        row |= {"rate_scale": stopping.rate_scale.tolist(), "stopped": stopping.stopped.tolist()}
    if call.step % clock.steps_per_generation == 0:
        # The test split is scored where a generation ends, never to choose anything.
        row |= _means("test_last", fetch(experiment.score(state.weights, test_data)))
        if state.ema is not None:
            row |= _means("test_ema", fetch(experiment.score(state.ema, test_data)))
        if state.best is not None:
            row |= _means("test_best", fetch(experiment.score(state.best.weights, test_data)))
            row["best_epoch"] = fetch(state.best.epoch).tolist()
    return row


def _means(name: str, sums: Any) -> dict[str, list[float]]:
    """Return loss and accuracy per seed from the sums over a split."""
    totals = {"loss": sums.loss, "accuracy": sums.correct}
    if "top5" in sums.measures and name.startswith("test"):
        totals["top5_accuracy"] = sums.measures["top5"]
    return {f"{name}/{of}": _share(total, sums.weight, sums.loss) for of, total in totals.items()}


def _share(part: np.ndarray, whole: np.ndarray, loss: np.ndarray) -> list[float]:
    """Return a share per training, NaN for those that diverged, whose networks call every image the first class."""
    # A small epoch may have no image under a wrong label: 0 / 0, which the row has as null.
    with np.errstate(invalid="ignore"):
        shares: list[float] = np.where(np.isfinite(loss), part / whole, np.nan).tolist()
    return shares


def _diverged(experiment: Experiment, checkpoints: Checkpoints, step: int, saved: int) -> NoReturn:
    checkpoints.wait()
    clock = experiment.clock
    kept = f"the checkpoint of step {saved} is kept" if saved else "there is no checkpoint yet"
    raise NonFiniteError(
        f"the loss is not finite at step {step} (generation {clock.generation(step)}, epoch "
        f"{clock.epoch(step)}); {kept}; lower optimizer.learning_rate"
    )


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
    """Let the first process act while the others wait; if it raises a UsageError, all of them do."""
    failed: UsageError | None = None
    if jax.process_index() == 0:
        try:
            action()
        except UsageError as error:
            failed = error
    if _any_process(failed is not None):
        raise failed or UsageError("stopped because process 0 did; its message says why")


@contextmanager
def _stop() -> Iterator[threading.Event]:
    """Set an event on SIGTERM and SIGINT; a SIGINT after it interrupts immediately."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return

    def handle(number, frame):
        del frame
        if event.is_set():
            # Who presses Ctrl-C again means it. A SIGTERM may come twice from one cause: to all processes of a machine,
            # and once more from the script that started this one.
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        event.set()
        print(f"{signal.Signals(number).name}: saving a checkpoint, then stopping", flush=True)

    old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
