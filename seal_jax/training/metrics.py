"""The numbers of a run: ``metrics.jsonl``, the record, and the loggers that show its rows.

A value that is not finite is written as ``null``, which every JSON reader takes for a missing number
(pandas reads it as NaN); `read` gives it back as NaN, so an infinity comes back as NaN too.
"""

from __future__ import annotations

import errno
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeGuard

from seal_jax import records
from seal_jax.core import files
from seal_jax.errors import UsageError
from seal_jax.training import loggers as loggers_module
from seal_jax.training.loggers import Logger, Row, Value

# As a file holds it: what is not finite is null.
Stored = float | int | bool | None | list[float | int | bool | None]


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """Appends rows to ``metrics.jsonl`` of one run folder, made if absent, and passes them to loggers.

    A row is on disk when `append` returns. If checkpoint ``t`` is saved only after the row of step
    ``t`` was appended, a run that is killed at any moment and started again from ``t`` ends up with
    the rows of a run that was never killed.

    Args:
      workdir: the run folder.
      resume_step: rows of later steps are dropped, and so is a last line that was cut short; -1
        starts from nothing.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, resume_step: int) -> None:
        self._loggers: dict[str, Logger] = {}
        self._open = True
        folder = files.as_path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        for path in (self._path, files.partial(self._path)):
            if not files.is_remote(path) and path.exists() and not path.is_file():
                raise UsageError(f"{path} is not a file: move it away, or give another --workdir")
        self._kept = self._keep_until(resume_step)
        # -1 comes before every step, so the first row may be of step 0.
        self._last = self._kept[-1]["step"] if self._kept else -1
        if not self._path.exists():
            self._path.write_bytes(b"")
        self._written = _size_and_time(self._path)

    def show_in(self, loggers: Mapping[str, Logger]) -> None:
        """Pass the rows that were kept, and every row from here on, to loggers, which `close` closes.

        One that fails is left out from there on, with a warning: the record has all rows, and the next
        start passes them again.
        """
        self._loggers |= loggers
        if self._kept:
            self._show(*self._kept)

    def _show(self, *rows: Row) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                logger.log(*rows)
            # Whatever a package raises: a view must not end the training.
            except Exception as error:
                warnings.warn(
                    f"{name} failed at step {rows[-1]['step']} ({loggers_module.reason(error)}): the "
                    f"run goes on without it; {self._path} has all rows, and {name} gets them when it "
                    "is started again",
                    stacklevel=3,
                )
                logger = self._loggers.pop(name)
                loggers_module.close(self._path.parent, name, logger, failed=True)

    def append(self, row: Mapping[str, Value]) -> None:
        """Write one row to disk.

        Args:
          row: an integer ``step``, later than the last row's, and numbers, booleans or lists of
            numbers, one per seed. NumPy and JAX scalars and arrays are taken as numbers and lists.

        Raises:
          UsageError: the step is missing or not later, or a value is none of these.
          OSError: the row cannot be written; the file is as it was.
        """
        if not self._open:
            return
        numbers = {name: _plain(name, value) for name, value in row.items()}
        step = numbers.get("step")
        if not _is_step(step):
            raise UsageError(f"metrics row needs an integer 'step', got {step!r}")
        if step <= self._last:
            raise UsageError(f"metrics row of step {step} comes after the row of step {self._last}")
        stored = {name: _with_null(value) for name, value in numbers.items()}
        line = json.dumps(stored, allow_nan=False).encode() + b"\n"
        try:
            # A bucket has no lock that would have kept the other process out.
            if files.is_remote(self._path) and _size_and_time(self._path) != self._written:
                raise OSError(errno.EBUSY, "another process has written to it, stop one of the two")
            files.append(self._path, line)
            self._written = _size_and_time(self._path)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                f"metrics row of step {step} was not written to {self._path}: {reason}"
            ) from error
        self._last = step
        # After the record: no view must show what the record lacks.
        self._show(numbers)

    def close(self, *, failed: bool = False) -> None:
        """Close the loggers, telling them how the run ended; `append` does nothing from here on."""
        self._open = False
        while self._loggers:
            name, logger = self._loggers.popitem()
            # It has every row: one that failed is no longer among them.
            loggers_module.close(self._path.parent, name, logger, failed=failed, last=self._last)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def _keep_until(self, resume_step: int) -> list[Row]:
        """Drop later rows and broken lines from the file, in one step; return the rows kept."""
        old = self._path.read_bytes() if self._path.exists() else b""
        kept, new, lost = [], b"", False
        for line, row, problem in _rows(self._path):
            if problem:
                warnings.warn(f"{self._path}{problem}: dropped", stacklevel=4)
                lost = True
            elif row["step"] <= resume_step:
                kept.append(row)
                new += line + b"\n"
        if lost:
            # Whatever the broken lines held can still be looked at.
            self._path.with_suffix(".jsonl.damaged").write_bytes(old)
        # The file is rewritten only if something is dropped.
        if new != old:
            files.replace(self._path, new, sync=True)
        return kept


def _size_and_time(path: Path) -> tuple[int, float]:
    status = path.stat()
    return status.st_size, status.st_mtime


def read(workdir: str | os.PathLike[str]) -> list[Row]:
    """Return the rows of a run folder, in order of step; [] when it has none.

    A last line that is cut short, as a run in progress can show it, is left out; any other line
    that is not a row is left out with a warning that names it.
    """
    path = files.as_path(workdir) / "metrics.jsonl"
    rows = []
    for _, row, problem in _rows(path):
        if problem:
            warnings.warn(f"{path}{problem}: left out", stacklevel=2)
        else:
            rows.append(row)
    return rows


def _rows(path: Path) -> Iterator[tuple[bytes, Row, str]]:
    """Yield ``(line, row, problem)``; what is wrong with the line is ``""`` for a good one."""
    lines = list(records.lines(path, Mapping[str, Stored])) if path.exists() else []
    last = -1
    for number, (line, row, problem) in enumerate(lines, 1):
        if problem or not _is_step(row.get("step")):
            # What follows the last newline is nothing, or a row cut short. A row that lacks only
            # its newline parses and is kept: JSON objects do not parse before they end.
            if number < len(lines):
                yield line, {}, f":{number} is not a metrics row"
        elif row["step"] <= last:
            yield line, {}, f":{number}: step {row['step']} comes after step {last}"
        else:
            last = row["step"]
            yield line, {name: _with_nan(value) for name, value in row.items()}, ""


def _is_step(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _with_null(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_null(number) for number in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nan(number) for number in value]
    return math.nan if value is None else value


def _plain(name: str, value: Any) -> Any:
    """Return the value as Python numbers; a UsageError names what cannot be."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    numbers = plain if isinstance(plain, list) else [plain]
    if not numbers or not all(isinstance(number, (bool, int, float)) for number in numbers):
        raise UsageError(
            f"metric {name!r} is {value!r}: use a number, or a list of numbers with one a seed"
        )
    return plain
