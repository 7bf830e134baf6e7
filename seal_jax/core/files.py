"""Paths of files and folders, here or in a bucket; files that are written whole; short names of folders.

What is given as text becomes a path by `as_path`, and nowhere else. One of the file system is a ``pathlib.Path``; one
of a bucket, ``gs://bucket/name``, has the same methods. The functions here do what the two do differently.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from seal_jax.errors import UsageError

# Longer folder names are cut in the middle, for three runs to fit into 100 columns.
NAME_LENGTH = 18
BUCKET = "gs://"


def is_remote(name: str | os.PathLike[str]) -> bool:
    """Return whether a path is one of a bucket."""
    return os.fspath(name).startswith(BUCKET)


def as_path(name: str | os.PathLike[str]) -> Path:
    """Return the path that a text means: in a bucket where it begins with ``gs://``, else of the file system.

    Raises:
      UsageError: another URL, or one that the installed packages cannot open.
    """
    text = os.fspath(name)
    if not is_remote(text):
        # A pathlib.Path of a URL has lost the second slash, and would be a folder of this disk.
        if re.match(r"[a-z][a-z0-9+.-]+:/", text):
            raise UsageError(f"{text} cannot be opened: give a folder or a {BUCKET} URL")
        return Path(name)
    if not text.removeprefix(BUCKET).strip("/"):
        raise UsageError(f"{text} names no bucket: give {BUCKET}BUCKET/FOLDER")
    try:
        import gcsfs  # noqa: F401 - etils opens URLs by it

        from seal_jax.core.buckets import BucketPath
    except ImportError as error:
        raise UsageError(
            f'{text} needs gcsfs ({error.name} is missing): pip install "seal_jax[gcs]", or mount the bucket'
        ) from None
    # It has the methods of pathlib.Path that this package uses.
    path: Path = BucketPath(text)
    return path


def relative_to(folder: Path, name: str) -> Path:
    """Return the path that a text means; one that begins with ".." is relative to the folder."""
    if Path(name).parts[:1] != ("..",):
        return as_path(name)
    path = folder / name
    return path.resolve() if is_remote(folder) else Path(os.path.normpath(path))


def write(path: Path, content: str | bytes) -> None:
    """Write a whole file, which no reader sees half of.

    Raises:
      UsageError: it cannot be written.
    """
    try:
        replace(path, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None


def replace(path: Path, content: bytes, *, sync: bool = False) -> None:
    """Write a whole file: beside it first, then moved into place; ``sync`` waits for the disk.

    An object in a bucket appears whole, and is on disk when this returns.
    """
    if is_remote(path):
        path.write_bytes(content)
        return
    beside = partial(path)
    try:
        with beside.open("wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def append(path: Path, data: bytes) -> None:
    """Add to the end of a file; it is on disk when this returns, and as it was if this raises an ``OSError``.

    Nothing can be added to an object in a bucket: it is read and written again, so two processes would lose each
    other's data.
    """
    if is_remote(path):
        path.write_bytes(path.read_bytes() + data)
        return
    # Unbuffered: it is one write, so a kill leaves at most one line cut short.
    with path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            # A disk that is full takes a part without an error.
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def check_writable(folder: Path, option: str) -> None:
    """Raise unless a folder, which may not exist yet, can be written: before hours of work, not after.

    Raises:
      UsageError: it cannot; the message calls it ``option``.
    """
    if is_remote(folder):
        # Only an attempt tells: there are no modes to look at.
        probe = folder / f".probe-{os.getpid()}"
        try:
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UsageError(f"{option}={folder} cannot be written: {error.strerror}") from None
        return
    # What counts is its nearest existing parent.
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UsageError(f"{option}={folder}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{option}={folder}: {existing} cannot be written; name another folder")


def load_array(path: Path) -> np.ndarray:
    """Return the array of a ``.npy`` file, without pickles.

    Raises:
      OSError, ValueError, EOFError: it cannot be read, or holds something else.
    """
    array: np.ndarray = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    return array


@functools.cache
def local(path: Path) -> Path:
    """Return the file itself, or a copy of one in a bucket, for libraries that read files only.

    The copies of files that are beside each other are, too. They are removed when the process ends.
    """
    if not is_remote(path):
        return path
    folder = _copies() / hashlib.sha256(str(path.parent).encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    (folder / path.name).write_bytes(path.read_bytes())
    return folder / path.name


@functools.cache
def _copies() -> Path:
    held = contextlib.ExitStack()
    atexit.register(held.close)
    return held.enter_context(temporary_folder("seal_jax-copies-"))


def partial(path: Path) -> Path:
    """Return the file that :func:`replace` writes first, which a killed process leaves behind."""
    # In the same folder: os.replace is atomic only within a file system.
    return path.with_name(f".{path.name}.partial")


def remove_folder(path: Path) -> None:
    """Remove a folder with all that is in it."""
    if is_remote(path):
        path.rmtree()  # type: ignore[attr-defined]
    else:
        shutil.rmtree(path)


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
