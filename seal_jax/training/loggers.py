"""Where the rows of a run are shown besides ``metrics.jsonl``: TensorBoard, CSV, Weights & Biases, MLflow.

``metrics.jsonl`` is the record. A logger is a view of it: whenever a run is started, each gets the rows
that the record keeps, and then every new one, so that it lacks nothing whatever happened before. Their
packages are imported only when they are asked for.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import os
import secrets
import socket
import statistics
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from seal_jax import records
from seal_jax.core import files, vary
from seal_jax.core.settings import Settings
from seal_jax.errors import UsageError, nearest

Value = int | float | bool | list[float]
# Names to numbers, or to lists of numbers with one per training.
Row = dict[str, Any]

# The identities of a run with wandb and MLflow, so that a resumed run continues them; and, as "shown", the step up to
# which each logger has all rows.
IDS = "loggers.json"

# What the others keep in the run's folder.
_FILES = {"tensorboard": "tensorboard", "csv": "metrics.csv"}


class Logger(Protocol):
    """Shows rows. Built from the run's folder and settings, which are checked by then."""

    def log(self, *rows: Row) -> None:
        """Show rows, all at once at a start; the steps increase."""

    def close(self, *, failed: bool) -> None:
        """Finish what is shown, of a run that ended well or was stopped, or one that failed."""


def mean(value: Value) -> float:
    """Return the number, or the mean over the seeds."""
    return statistics.fmean(value) if isinstance(value, list) else float(value)


def members(settings: Settings) -> list[str]:
    """Return what the trainings of a run are called: seeds, or with ``train.vary`` the point that several seeds share.

    >>> from seal_jax.core.settings import Train
    >>> members(Settings(train=Train(seeds=2)))
    ['seed0', 'seed1']
    >>> members(Settings(train=Train(seeds=2, vary='{"optimizer.learning_rate": [0.1, 0.3]}')))
    ['learning_rate-0.1', 'learning_rate-0.1', 'learning_rate-0.3', 'learning_rate-0.3']
    """
    if not settings.train.vary:
        return [f"seed{seed}" for seed in range(settings.train.seeds)]
    # MLflow takes no "=" in names.
    labels = [vary.label(point).replace("=", "-") for point in vary.points(settings)]
    return [label for label in labels for _ in range(settings.train.seeds)]


def scalars(row: Row, names: Sequence[str], separator: str = "/") -> dict[str, float]:
    """Return the numbers of a row by name, without its step: of several trainings the mean, and that of each name.

    >>> scalars({"step": 3, "loss": [1.0, 2.0], "epoch": 1}, ["seed0", "seed1"])
    {'loss': 1.5, 'loss/seed0': 1.0, 'loss/seed1': 2.0, 'epoch': 1.0}
    """
    numbers = {}
    for name, value in row.items():
        if name == "step":
            continue
        numbers[name] = mean(value)
        if isinstance(value, list) and len(value) > 1:
            of_names: dict[str, list[float]] = {}
            for member, number in zip(names, value, strict=True):
                of_names.setdefault(f"{name}{separator}{member}", []).append(float(number))
            numbers |= {member: mean(of_member) for member, of_member in of_names.items()}
    return numbers


class TensorBoard:
    """One event file in ``tensorboard/``, written again at every start.

    Not by tensorboard's ``EventFileWriter``: that imports TensorFlow wherever it is installed, and
    writes from a separate thread.
    """

    def __init__(self, workdir: Path, settings: Settings) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._names = Event, Summary, members(settings)
        folder = workdir / _FILES["tensorboard"]
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is not a folder: move it away, or give another --workdir")
        folder.mkdir(exist_ok=True)
        # Written again from the record: rows that a resumed run dropped must not stay in the view.
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter((folder / name).open("wb"))
        # TensorBoard expects the version as the first record.
        self._record(file_version="brain.Event:2")

    def log(self, *rows: Row) -> None:
        """Bring the scalars of rows to disk."""
        for row in rows:
            numbers = scalars(row, self._names).items()
            values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in numbers]
            self._record(step=row["step"], summary=self._summary(value=values))
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Close the file."""
        self._writer.close()

    def _record(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())


class Csv:
    """``metrics.csv``, written again at every start: a line per row, a column per number."""

    def __init__(self, workdir: Path, settings: Settings) -> None:
        self._path = workdir / _FILES["csv"]
        if self._path.exists() and not self._path.is_file():
            raise UsageError(f"{self._path} is not a file: move it away, or give another --workdir")
        self._names = members(settings)
        self._columns: dict[str, None] = {}  # in the order in which they first came
        self._lines: list[dict[str, float]] = []
        self._write("w")

    def log(self, *rows: Row) -> None:
        """Append lines; where the rows have new columns, write the file again."""
        lines = [{"step": row["step"], **scalars(row, self._names)} for row in rows]
        self._lines += lines
        columns = {name: None for line in lines for name in line}
        if columns.keys() <= self._columns.keys():
            self._write("a", *lines)
        else:
            self._columns |= columns
            self._write("w", *self._lines)

    def close(self, *, failed: bool) -> None:
        """Do nothing: the file is closed after every line."""

    def _write(self, mode: str, *lines: dict[str, float]) -> None:
        with self._path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, list(self._columns))
            if mode == "w" and self._columns:
                writer.writeheader()
            writer.writerows(lines)


class Wandb:
    """A run of Weights & Biases, which resumed runs continue.

    Project, entity and mode are wandb's own: ``WANDB_PROJECT`` (default "seal_jax"), ``WANDB_ENTITY``,
    ``WANDB_MODE``. What was sent stays: wandb takes no row back. Rows that it has are not sent again.
    """

    def __init__(self, workdir: Path, settings: Settings) -> None:
        import wandb

        ids, self._names = _read_ids(workdir), members(settings)
        # Ours, and written first: a run that was started is found again whenever this is killed.
        if "wandb" not in ids:
            ids["wandb"] = secrets.token_hex(8)
            _write_ids(workdir, ids)
        self._run = wandb.init(
            id=ids["wandb"],
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", "seal_jax"),
            name=_name(workdir),
            dir=None if files.is_remote(workdir) else workdir,  # wandb writes to disks only
            config=dataclasses.asdict(settings),
            allow_val_change=True,  # the settings of `run` may be others when a run is resumed
        )

    def log(self, *rows: Row) -> None:
        """Send rows, but those whose step wandb has already."""
        for row in rows:
            # After a resume wandb's own step is the one behind the last row that it has.
            if row["step"] >= self._run.step:
                # A row with a step is otherwise kept back until the next one.
                self._run.log(scalars(row, self._names), step=row["step"], commit=True)

    def close(self, *, failed: bool) -> None:
        """Send what is left, and mark the run as finished or failed."""
        self._run.finish(exit_code=int(failed))


class Mlflow:
    """A run of MLflow, which resumed runs continue.

    The server and the experiment are MLflow's own: ``MLFLOW_TRACKING_URI``, and
    ``MLFLOW_EXPERIMENT_NAME`` (default "seal_jax"). What was sent stays: MLflow takes no number back.
    Rows that it has are not sent again.
    """

    def __init__(self, workdir: Path, settings: Settings) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric, self._names = MlflowClient(), Metric, members(settings)
        ids = _read_ids(workdir)
        if "mlflow" in ids:
            self._id = ids["mlflow"]
            self._client.update_run(self._id, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "seal_jax")
            experiment = self._client.get_experiment_by_name(name)
            where = experiment.experiment_id if experiment else self._client.create_experiment(name)
            self._id = self._client.create_run(where, run_name=_name(workdir)).info.run_id
            _write_ids(workdir, {**ids, "mlflow": self._id})
        # Those that it lacks, all of them in a new run: MLflow refuses another value, and the settings of `run` may
        # have one when a run is resumed.
        known = self._client.get_run(self._id).data.params
        params = [
            Param(name, str(value))
            for section, values in dataclasses.asdict(settings).items()
            for field, value in values.items()
            if (name := f"{section}.{field}") not in known
        ]
        if params:
            self._client.log_batch(self._id, params=params)
        # Every row has an epoch, which is sent last: a row that was cut short is sent again.
        sent = self._client.get_metric_history(self._id, "epoch")
        self._last = max((metric.step for metric in sent), default=-1)

    def log(self, *rows: Row) -> None:
        """Send rows, but those whose step MLflow has already."""
        for row in rows:
            step = row["step"]
            if step <= self._last:
                continue
            # MLflow's folders store `loss` as a file, beside which `loss/seed0` has no place.
            numbers = scalars(row, self._names, separator=".")
            numbers["epoch"] = numbers.pop("epoch", 0.0)
            now = int(time.time() * 1000)
            metrics = [self._metric(name, value, now, step) for name, value in numbers.items()]
            self._client.log_batch(self._id, metrics=metrics)
            self._last = step

    def close(self, *, failed: bool) -> None:
        """Mark the run as finished or failed."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


# By the names in ``run.loggers``: the logger, its package, and what to do where it does not start.
_LOGGERS: Mapping[str, tuple[Callable[[Path, Settings], Logger], str, str]] = {
    "tensorboard": (TensorBoard, "tensorboard", "reinstall it"),
    "csv": (Csv, "csv", "make the folder writable"),
    "wandb": (Wandb, "wandb", "run `wandb login`, or set WANDB_MODE=offline"),
    "mlflow": (Mlflow, "mlflow", "set MLFLOW_TRACKING_URI to a server that answers"),
}


def names(settings: Settings) -> list[str]:
    """Return the names in ``run.loggers``.

    >>> from seal_jax.core.settings import Run
    >>> names(Settings(run=Run(loggers="tensorboard, csv")))
    ['tensorboard', 'csv']

    Raises:
      UsageError: there is no logger of a name, or it is there twice.
    """
    found = [name.strip() for name in settings.run.loggers.split(",") if name.strip()]
    for name in found:
        if name not in _LOGGERS or found.count(name) > 1:
            raise UsageError(
                f"run.loggers = {settings.run.loggers!r} must be some of {','.join(_LOGGERS)}, each "
                f"once{nearest(name, list(_LOGGERS))}"
            )
    return found


def check(settings: Settings) -> None:
    """Raise a ``UsageError`` for a logger that does not exist, or whose package is not installed."""
    for name in names(settings):
        package = _LOGGERS[name][1]
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"run.loggers = {settings.run.loggers!r}: {package} is not installed; pip install "
                f"{package}, or leave {name} out"
            )


def unseen(workdir: Path, settings: Settings, last: int) -> list[str]:
    """Return the names in ``run.loggers`` that lack rows up to the step ``last``, or whose file is gone."""
    shown = _read_ids(workdir).get("shown", {})
    return [
        name
        for name in names(settings)
        if shown.get(name) != last or not (workdir / _FILES.get(name, IDS)).exists()
    ]


def start(
    workdir: Path, settings: Settings, only: Collection[str] | None = None
) -> dict[str, Logger]:
    """Return the loggers of ``run.loggers`` by name, or ``only`` these of them, started.

    Raises:
      UsageError: one does not start, as its server does not answer for example.
    """
    started: dict[str, Logger] = {}
    chosen = names(settings) if only is None else only
    # Those in the run's folder last: their files are emptied, which must not happen if a server does not answer.
    for name in sorted(chosen, key=lambda name: name in _FILES):
        make, _, remedy = _LOGGERS[name]
        try:
            started[name] = make(workdir, settings)
        except Exception as error:
            for other, logger in started.items():
                # Nothing is known against the run itself.
                close(workdir, other, logger, failed=False)
            # The caller reports what is about the run's folder, a full disk for example; the errors of a connection are
            # OSErrors too.
            about_folder = isinstance(error, OSError) and name in ("tensorboard", "csv")
            if about_folder or isinstance(error, UsageError):
                raise
            raise UsageError(
                f"run.loggers = {settings.run.loggers!r}: {name} does not start ({reason(error)}); {remedy}, "
                f"or leave {name} out"
            ) from error
    return started


def close(
    workdir: Path, name: str, logger: Logger, *, failed: bool, last: int | None = None
) -> None:
    """Close a logger; one that cannot is a warning, for it must not change how a run ends.

    Args:
      workdir: the run's folder.
      name: its name.
      logger: the logger.
      failed: whether the run has failed.
      last: the step up to which it has all rows, which is recorded unless the run has failed; None if it lacks some.
    """
    try:
        logger.close(failed=failed)
        if last is not None and not failed:
            ids = _read_ids(workdir)
            _write_ids(workdir, {**ids, "shown": {**ids.get("shown", {}), name: last}})
    except Exception as error:
        warnings.warn(f"{name} could not finish ({reason(error)})", stacklevel=2)


def reason(error: Exception) -> str:
    """Return the first line of an error, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _name(workdir: Path) -> str:
    """Return how a run is called: the last two parts of its folder, as the runs of a sweep share the last."""
    return "/".join(os.path.abspath(workdir).split(os.sep)[-2:])


def _read_ids(workdir: Path) -> dict[str, Any]:
    path = workdir / IDS
    if not path.exists():
        return {}
    schema = Mapping[str, str | Mapping[str, int]]
    return dict(records.load(path, schema, "delete it, and new runs are begun there"))


def _write_ids(workdir: Path, ids: Mapping[str, Any]) -> None:
    files.write(workdir / IDS, json.dumps(ids) + "\n")
