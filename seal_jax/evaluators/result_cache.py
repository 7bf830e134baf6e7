"""The records of finished work items, one line of JSON each, so that an evaluation can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from itertools import starmap
from pathlib import Path
from typing import Any, TypedDict

from seal_jax import records
from seal_jax.core.settings import differences
from seal_jax.errors import UsageError


class ResultCache:
    """The records of finished work items, in a file that only grows.

    Its first line says what is evaluated and how; a file that begins with another is refused.

    Args:
      path: the file; its folder is made when the first record is kept.
      header: JSON values, nested by name.
      overwrite: start again and discard the file's records.

    Raises:
      UsageError: the file belongs to another evaluation, or cannot be read.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], *, overwrite: bool = False):
        self._path = path
        # As it will be read back: JSON has lists only, and a tuple never equals one.
        self._header = json.loads(json.dumps(header))
        self.records: dict[str, dict[str, Any]] = {}
        self._begun = False
        if path.exists() and not overwrite:
            self._read()

    def keep(self, key: str, record: Mapping[str, Any]) -> None:
        """Write the record of a finished work item to the disk.

        Raises:
          UsageError: the file cannot be written.
        """
        self.records[key] = dict(record)
        try:
            if self._begun:
                path, mode, lines = self._path, "a", [_line(key, record)]
            else:
                # The readable lines are written again: the last may have been cut off by a kill.
                self._path.parent.mkdir(parents=True, exist_ok=True)
                path, mode = self._path.with_suffix(".partial"), "w"
                lines = [json.dumps(self._header), *starmap(_line, self.records.items())]
            # From then on a line is appended. Synced: a kill loses the work item in progress, and no other.
            with path.open(mode, encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
            if not self._begun:
                os.replace(path, self._path)
                self._begun = True
        except OSError as error:
            raise UsageError(f"{self._path} cannot be written: {error.strerror}") from None

    def _read(self) -> None:
        lines = records.lines(self._path, Mapping[str, Any], finite=False)
        # A file always has a first line, an empty one if need be, which is a problem.
        _, header, problem = next(lines)
        if problem:
            raise UsageError(
                f"{self._path} cannot be read: {problem}; give another --output, or --overwrite"
            )
        changed = differences(header, self._header)
        if changed:
            more = ", ..." if len(changed) > 3 else ""
            raise UsageError(
                f"{self._path.parent} holds another evaluation ({'; '.join(changed[:3])}{more}); "
                "give another --output, or --overwrite"
            )
        # Lines after the first bad one are dropped too: only the last can have been cut off, any other is damaged.
        for _, entry, problem in lines:
            try:
                entry = records.check(_Entry, entry, "")
            except UsageError as error:
                problem = str(error)
            if problem or not entry["record"]:
                break  # cut off by a kill or a full disk; the work that follows is done again
            self.records[entry["key"]] = entry["record"]


class _Entry(TypedDict):
    key: str
    record: Mapping[str, Any]


def _line(key: str, record: Mapping[str, Any]) -> str:
    return json.dumps({"key": key, "record": record})
