"""Files that are written whole, and short names of folders."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from seal_jax.errors import UsageError

# Longer folder names are cut in the middle, for three runs to fit into 100 columns.
NAME_LENGTH = 18


def write(path: Path, content: str | bytes) -> None:
    """Write a whole file: beside it first, then moved into place, so that no reader sees half of it.

    Raises:
      UsageError: it cannot be written.
    """
    beside = partial(path)
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None


def partial(path: Path) -> Path:
    """Return the file that :func:`write` writes first, which a killed process leaves behind."""
    # In the same folder: os.replace is atomic only within a file system.
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Make a folder for as long as the context lasts; remove those of this prefix that killed processes left."""
    for lock in Path(tempfile.gettempdir()).glob(f"{prefix}*/lock"):
        # The kernel releases a lock however its process ends; LOCK_NB raises where one holds it.
        with contextlib.suppress(OSError), lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent)
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with (folder / "unlocked").open("w") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
                # Found by others only now that it is held.
                (folder / "unlocked").rename(folder / "lock")
            yield folder


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return a short name for each folder, all different.

    >>> short_names([Path("a/seal"), Path("b/seal"), Path("b/normal")])
    ['a/seal', 'b/seal', 'normal']
    >>> short_names([Path("seal_resnet50_tiny_imagenet"), Path("seal_resnet50_digits_imagenet")])
    ['seal_resn…imagenet', 'seal_res…imagenet2']
    """
    parts = [path.resolve().parts for path in paths]
    depths = [1] * len(paths)

    def names() -> list[str]:
        return ["/".join(part[-depth:]) for part, depth in zip(parts, depths, strict=True)]

    # Paths that differ come apart once enough of their parents are named; equal ones are numbered below.
    while len(set(names())) < len(set(parts)):
        named = names()
        for index, name in enumerate(named):
            if named.count(name) > 1:
                depths[index] += 1
    # Names that were cut may be equal again: these are numbered.
    short: list[str] = []
    for name in names():
        candidate, number = _cut(name), 1
        while candidate in short:
            number += 1
            candidate = _cut(name, str(number))
        short.append(candidate)
    return short


def _cut(name: str, suffix: str = "") -> str:
    room = NAME_LENGTH - len(suffix)
    if len(name) <= room:
        return name + suffix
    return f"{name[: (room - 1) - (room - 1) // 2]}…{name[-((room - 1) // 2) :]}{suffix}"
