"""The folder of a run: its settings are written once, and must match whenever it is resumed."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from seal_jax import records
from seal_jax.core import files
from seal_jax.core import settings as settings_lib
from seal_jax.core.settings import Settings
from seal_jax.errors import UsageError

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
LABELS = "labels.npy"


def claim(workdir: Path, settings: Settings, later: Sequence[Path] = ()) -> None:
    """Make ``workdir`` the folder of this experiment, or check that it is already.

    The settings of ``run`` may differ: they say how an experiment is run, not which one it is. What the run will write
    ``later`` are folders of runs, too: once it is begun, one without settings is what a kill cut off.

    Raises:
      UsageError: the folder belongs to another experiment, cannot be read or cannot be written.
    """
    record = dataclasses.asdict(settings)
    path = workdir / CONFIG
    try:
        exists = path.exists()
    except OSError as error:
        raise UsageError(f"--workdir={workdir} cannot be read: {error.strerror}") from None
    if exists:
        old = read(workdir)
        differences = settings_lib.differences(_experiment(old), _experiment(record))
        if differences:
            raise UsageError(
                f"{workdir} holds a run with other settings ({'; '.join(differences[:3])}"
                f"{', ...' if len(differences) > 3 else ''}); give another --workdir"
            )
        return
    try:
        for folder in later:
            _check_free(folder)
        workdir.mkdir(parents=True, exist_ok=True)
        _check_free(workdir)
    except OSError as error:
        raise UsageError(f"--workdir={workdir} cannot be written: {error.strerror}") from None
    # A kill leaves either no config, and so no run, or a whole one.
    write(workdir, settings)


def _check_free(workdir: Path) -> None:
    """Raise if a folder is there that is neither empty nor that of a run."""
    path = workdir / CONFIG
    if not workdir.exists() or path.exists():
        return
    if any(entry != files.partial(path) for entry in workdir.iterdir()):
        raise UsageError(f"{workdir} is not empty and holds no run; give another --workdir")


def write(workdir: Path, settings: Settings) -> None:
    """Write the settings of a run, which makes a folder its own."""
    files.write(workdir / CONFIG, json.dumps(dataclasses.asdict(settings), indent=2) + "\n")


def record_labels(workdir: Path, labels: np.ndarray | None) -> None:
    """Write the labels of a run that replaced some of them, int32 ``[n]``, or check that they are the same.

    Raises:
      UsageError: the run began with other labels, or the file cannot be read or written.
    """
    path = workdir / LABELS
    if labels is None:
        return
    # Its settings are the same, so only what they point to can have changed: the label file, or the data.
    if path.exists():
        try:
            same = np.array_equal(files.load_array(path), labels)
        except (OSError, ValueError, EOFError):
            same = False
        if not same:
            raise UsageError(
                f"{path} holds other labels than the run is to go on with: restore data.label_file and "
                "the data that the run began with, or give another --workdir"
            )
        return
    content = io.BytesIO()
    np.save(content, labels)
    files.write(path, content.getvalue())


@contextmanager
def locked(path: Path, option: str) -> Iterator[None]:
    """Hold the lock of a file, which is made if it does not exist, against other processes.

    The kernel releases it however this process ends, so a kill leaves none behind. Where files
    cannot be locked, as in a bucket, or not be written, nothing is held.

    Args:
      path: of the file, in the folder that only one process may write to.
      option: that named the folder, such as "--workdir".

    Raises:
      UsageError: another process holds it.
    """
    if files.is_remote(path):
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")  # NFS locks only what is open for writing
    except OSError:
        yield
        return
    with file:
        try:
            # LOCK_NB raises where another process holds the lock, instead of waiting for it.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{option}={path.parent} is in use by another process; wait until it ends, or give "
                f"another {option}"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def read(workdir: Path) -> dict[str, Any]:
    """Return the settings a run was started with.

    Raises:
      UsageError: the folder holds no run, or its ``config.json`` has a setting of another type.
    """
    path = workdir / CONFIG
    if not path.exists():
        raise UsageError(f"{workdir} holds no run: {path} is missing")
    remedy = "give the folder of a run"
    record: dict[str, Any] = records.load(path, _Record, remedy)
    defaults = dataclasses.asdict(Settings())
    # An older version may have written settings that this one does not know.
    known = {
        section: {field: value for field, value in record[section].items() if field in values}
        for section, values in {**defaults, "method": record["method"]}.items()
        if isinstance(record.get(section, {}), Mapping) and section in record
    }
    try:
        # Unknown fields are dropped above, except in `method`: a renamed option is still there to be reported.
        for setting in records.RENAMED:
            section, _, field = setting.partition(".")
            if field in known.get(section, {}):
                raise UsageError(f"{setting} is not a setting{records.renamed(setting)}")
        settings_lib.read(Settings, {**record, **known})
    except UsageError as error:
        raise UsageError(f"{path} cannot be read: {error}; {remedy}") from None
    return record


def read_single(workdir: Path) -> dict[str, Any]:
    """Return the settings of a run whose trainings differ in their seeds alone.

    Raises:
      UsageError: as :func:`read`, or the run has several points, which are run folders of their own.
    """
    record = read(workdir)
    if record["train"].get("vary"):
        raise UsageError(
            f"{workdir} trains several points (train.vary): give their folders, which it writes when it ends, "
            f"{workdir}/points/* or those of the sweep's variants"
        )
    return record


class _Named(TypedDict):
    name: str


class _Method(_Named, total=False):
    ascent_epochs: float | None  # the one option that the reports calculate with


class _Record(TypedDict):
    """What every ``config.json`` has; it may lack settings that were added later."""

    data: _Named
    model: _Named
    method: _Method
    optimizer: Mapping[str, Any]
    train: Mapping[str, Any]


def _experiment(record: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that must not change, complete.

    A setting that a record lacks was added after the run; the run used what is its default.
    """
    from seal_jax import methods  # reports read run folders and need no Flax

    defaults = dataclasses.asdict(Settings())
    name = record.get("method", {}).get("name")
    # A method that this version lacks has no defaults here; its name makes the difference that is reported.
    defaults["method"] = dataclasses.asdict(methods.options(name)) if name in methods.NAMES else {}
    return {
        section: {**values, **record.get(section, {})}
        for section, values in defaults.items()
        if section != "run"
    }
