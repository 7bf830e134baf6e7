"""The folder of a run: its settings are written once and must match ever after."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seal_jax.errors import UsageError
from seal_jax.training import settings as settings_lib
from seal_jax.training.settings import Settings

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"


def claim(workdir: Path, settings: Settings) -> None:
    """Make ``workdir`` the folder of this experiment, or check that it is already.

    The settings of ``run`` may differ: they say how an experiment is run, not which.

    Raises:
      UsageError: the folder belongs to another experiment, cannot be read or cannot be written.
    """
    record = settings_lib.as_dict(settings)
    path = workdir / CONFIG
    if path.exists():
        old = read(workdir)
        differences = settings_lib.differences(_experiment(old), _experiment(record))
        if differences:
            raise UsageError(
                f"{workdir} holds a run with other settings ({'; '.join(differences[:3])}"
                f"{', ...' if len(differences) > 3 else ''}); give another --workdir"
            )
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")  # left by a start that was killed
        if any(entry != partial for entry in workdir.iterdir()):
            raise UsageError(f"{workdir} is not empty and holds no run; give another --workdir")
        partial.write_text(json.dumps(record, indent=2) + "\n")
        os.replace(partial, path)
    except OSError as error:
        raise UsageError(f"--workdir={workdir} cannot be written: {error.strerror}") from None


@contextmanager
def locked(path: Path, option: str) -> Iterator[None]:
    """Hold the lock of a file, which is made if it does not exist, against other processes.

    The kernel releases it however this process ends, so none is left over from a kill. Where files
    cannot be locked, or not be written, nothing is held.

    Args:
      path: of the file, in the folder that only one process may write to.
      option: that named the folder, such as "--workdir".

    Raises:
      UsageError: another process holds it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")  # NFS locks only what is open for writing
    except OSError:
        yield
        return
    with file:
        try:
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
      UsageError: the folder holds no run.
    """
    path = workdir / CONFIG
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{workdir} holds no run: {path} is missing") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("train"), dict):
        raise UsageError(f"{path} does not hold the settings of a run; give another folder")
    for setting in settings_lib.RENAMED:
        section, _, field = setting.partition(".")
        if field in (record.get(section) or {}):
            raise UsageError(f"{path}: {setting} is not a setting{settings_lib.renamed(setting)}")
    return record


def _experiment(record: dict[str, Any]) -> dict[str, Any]:
    """Return what must not change, with the defaults of settings that a record leaves out.

    A setting that is younger than the folder was at its default when the folder was made.
    """
    from seal_jax import methods  # reports read run folders and need no Flax

    defaults = settings_lib.as_dict(Settings())
    name = record.get("method", {}).get("name")
    defaults["method"] = dataclasses.asdict(methods.options(name)) if name in methods.NAMES else {}
    return {
        section: {**values, **record.get(section, {})}
        for section, values in defaults.items()
        if section != "run"
    }
