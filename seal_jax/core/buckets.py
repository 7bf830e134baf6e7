"""Paths in a bucket, such as ``gs://bucket/run``, for code that was written for ``pathlib``.

A bucket is not a file system. An object appears whole once it is written, and replaces an earlier one at once, so no
reader ever sees half of it. But nothing can be appended, locked or renamed, and there are no folders: one exists while
an object's name begins with it.
"""

from __future__ import annotations

import errno
import functools
import io
import logging
import posixpath
import re
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
from etils import epath
from etils.epath.stat_utils import StatResult

from seal_jax.errors import BucketError

# What other processes write must be seen: gcsfs would keep a folder's listing as long as the process lives.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)

# What it cannot do it raises as well; a log of every attempt would hide the one line about it.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


class _Stat(StatResult):
    @property
    def st_size(self) -> int:
        return int(self.length)

    @property
    def st_mtime(self) -> float:
        return float(self.mtime)


class BucketPath(type(epath.Path("gs://"))):  # type: ignore[misc]
    """An ``epath.Path`` with what this package uses of ``pathlib.Path``, and its errors."""

    def open(self, mode: str = "r", buffering: int = -1, **options: Any) -> Any:
        """Open an object; one that is written appears whole, at every ``flush`` and when it is closed."""
        if "r" in mode:
            return super().open(mode, **options)
        if mode[0] not in "wa":
            raise ValueError(f"mode {mode!r}: an object is read, written or appended to")
        raw = _Written(self, self.read_bytes() if "a" in mode and self.exists() else b"")
        return raw if "b" in mode else io.TextIOWrapper(raw, **{"encoding": "utf-8", **options})

    def write_bytes(self, data: bytes) -> int:
        """Write an object, whole or not at all."""
        file = super().open("wb")
        try:
            written = int(file.write(data))
            file.close()
        finally:
            # Else one that was refused would be sent again, at whatever moment Python collects it.
            file.closed = True
        return written

    def stat(self) -> _Stat:
        """Return size and time, under the names of ``pathlib`` too."""
        return _Stat(**vars(super().stat()))

    def iterdir(self) -> Iterator[BucketPath]:
        """List a folder; one that does not exist is empty."""
        try:
            # The console marks a folder by an empty object of its name, which gcsfs lists in it.
            return iter([p for p in super().iterdir() if p.name != self.name or p.exists()])
        except FileNotFoundError:
            return iter(())

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        """List what fits a pattern."""
        return iter(list(super().glob(pattern)))

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder begins with its first object. (gcsfs would make a bucket that is missing.)"""

    def rename(self, target: BucketPath) -> BucketPath:
        """Copy a folder, then remove it: what a kill interrupts can be done again."""
        for path in self._objects():
            (target / path.relative_to(self)).write_bytes(path.read_bytes())
        self.rmtree()
        return target

    def _objects(self) -> Iterator[BucketPath]:
        for path in self.iterdir():
            if path.is_dir():
                yield from path._objects()
            else:
                yield path

    def resolve(self, strict: bool = False) -> BucketPath:
        """Return the path without ``..``."""
        return type(self)(posixpath.normpath(posixpath.join(*self.parts)))


class _Written(io.BytesIO):
    """The content of an object that is being written."""

    def __init__(self, path: BucketPath, content: bytes):
        super().__init__()
        self._path = path
        self._sent: bytes | None = None
        self.write(content)

    def flush(self) -> None:
        content = self.getvalue()
        # A text file flushes this once more when it is closed.
        if content != self._sent:
            self._path.write_bytes(content)
            self._sent = content

    def close(self) -> None:
        try:
            if not self.closed:
                self.flush()
        finally:
            super().close()


def _with_reason(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that raises ``OSError`` with ``strerror`` and nothing else, as those of ``pathlib`` do."""

    @functools.wraps(method)
    def call(self: BucketPath, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        # gcsfs and google.auth have errors of their own, and raise OSErrors that have a text and no number.
        except Exception as error:
            if isinstance(error, OSError) and error.strerror:
                raise
            if isinstance(error, FileNotFoundError):
                reason = "there is no such object or bucket"
                raise FileNotFoundError(errno.ENOENT, reason, str(self)) from error
            # Of a refusal the first line is the request, the second the reason.
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = ": ".join(lines[:2])[:300] or type(error).__name__
            refused = re.search("Forbidden|401|[Cc]redentials", reason)
            if refused:
                reason += "; run `gcloud auth application-default login`, or ask for the role Storage Admin"
            number = errno.EACCES if refused else errno.EIO
            raise BucketError(number, reason, str(self)) from error

    return call


for _name in (
    *("exists", "is_dir", "stat", "iterdir", "glob", "open", "read_bytes", "read_text"),
    *("write_bytes", "write_text", "unlink", "rmtree", "rename", "replace", "copy"),
):
    setattr(BucketPath, _name, _with_reason(getattr(BucketPath, _name)))
