"""The numbers of a run: ``metrics.jsonl``, and TensorBoard event files made from it.

``metrics.jsonl`` is the record; the event files are a view of it that can be made again. A value
that is not finite is written as ``null``, which every JSON reader takes for a missing number (pandas
reads it as NaN); `read` gives it back as NaN, so an infinity comes back as NaN too.
"""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeGuard

from seal_jax import records
from seal_jax.core import files
from seal_jax.errors import UsageError

Value = int | float | bool | list[float]
# Names to numbers, or to lists of numbers with one per seed.
Row = dict[str, Any]
# As a file holds it: what is not finite is null.
Stored = float | int | bool | None | list[float | int | bool | None]


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """Appends rows to ``metrics.jsonl`` and ``tensorboard/`` of one run folder, made if absent.

    A row is on disk when `append` returns. If checkpoint ``t`` is saved only after the row of step
    ``t`` was appended, a run that is killed at any moment and started again from ``t`` ends up with
    the rows of a run that was never killed.

    Args:
      workdir: the run folder.
      resume_step: rows of later steps are dropped, and so is a last line that was cut short; -1
        starts from nothing.
      write: False, for every process but the first, makes an object that does nothing.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], *, resume_step: int, write: bool = True
    ) -> None:
        self._write = write
        if not write:
            return
        folder = files.as_path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        for path, is_kind, kind in (
            (self._path, Path.is_file, "file"),
            (files.partial(self._path), Path.is_file, "file"),
            (folder / "tensorboard", Path.is_dir, "folder"),
        ):
            if not files.is_remote(path) and path.exists() and not is_kind(path):
                raise UsageError(f"{path} is not a {kind}: move it away, or give another --workdir")
        rows = self._keep_until(resume_step)
        # -1 comes before every step, so the first row may be of step 0.
        self._last = rows[-1]["step"] if rows else -1
        self._board = _EventFile(folder / "tensorboard")
        self._board.write(*rows)
        if not self._path.exists():
            self._path.write_bytes(b"")
        self._written = _size_and_time(self._path)

    def append(self, row: Mapping[str, Value]) -> None:
        """Write one row to disk.

        Args:
          row: an integer ``step``, later than the last row's, and numbers, booleans or lists of
            numbers, one per seed. NumPy and JAX scalars and arrays are taken as numbers and lists.

        Raises:
          UsageError: the step is missing or not later, or a value is none of these.
          OSError: the row cannot be written; the file is as it was.
        """
        if not self._write:
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
        # After the record: the view must not show what the record lacks.
        self._board.write(numbers)

    def close(self) -> None:
        """Close the files; `append` does nothing from here on."""
        if self._write:
            self._board.close()
            self._write = False

    def __exit__(self, *_: object) -> None:
        self.close()

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


def mean(value: Value) -> float:
    """Return the number, or the mean over the seeds."""
    return statistics.fmean(value) if isinstance(value, list) else float(value)


class _EventFile:
    """One TensorBoard event file, written record by record.

    Not tensorboard's ``EventFileWriter``: that imports TensorFlow wherever it is installed, and
    writes from a separate thread.
    """

    def __init__(self, folder: Path) -> None:
        # Imported here: reading metrics needs none of it.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(exist_ok=True)
        # Written again from the record: rows that a resumed run dropped must not stay in the view.
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter((folder / name).open("wb"))
        # TensorBoard expects the version as the first record.
        self._record(file_version="brain.Event:2")

    def write(self, *rows: Row) -> None:
        """Bring the scalars of rows to disk: of several seeds the mean, and each seed's own."""
        for row in rows:
            scalars = {}
            for name, value in row.items():
                if name == "step":
                    continue
                scalars[name] = mean(value)
                if isinstance(value, list) and len(value) > 1:
                    scalars |= {f"{name}/seed{seed}": number for seed, number in enumerate(value)}
            values = [self._summary.Value(tag=tag, simple_value=v) for tag, v in scalars.items()]
            self._record(step=row["step"], summary=self._summary(value=values))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _record(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())
