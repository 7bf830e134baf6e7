"""The files of prepared data: which record lies where, whether a shard can be read, and checksums."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from seal_jax import records
from seal_jax.core import files
from seal_jax.errors import UsageError

CHECKSUMS = "checksums.json"
# Records that are read at once.
CHUNK = 256


def bar_times() -> dict[str, float]:
    """Return tqdm's times in seconds for reading data: when its bar appears and how often it changes."""
    # No bar where it takes a moment; a log file gets a line now and then, a terminal a moving bar.
    return {"delay": 2.0, "mininterval": 0.2 if sys.stderr and sys.stderr.isatty() else 15.0}


def record_place(builder: Any, split: str, row: int) -> str:
    """Return where a row of a TFDS split such as ``train[10%:]`` is stored: record and shard."""
    for part in builder.info.splits[split].file_instructions:
        if row < part.take:
            return f"record {part.skip + row} of {part.filename}"
        row -= part.take
    raise IndexError(row)


def damaged_shard(builder: Any, split: str) -> str:
    """Return the first shard of a split that cannot be read whole, else the data set's folder."""
    for part in builder.info.splits[split].file_instructions:
        for _, chunk in read(part.filename, part.examples_in_shard):
            if isinstance(chunk, str):
                return str(part.filename)
    return str(builder.data_dir)


def read(path: str, count: int) -> Iterator[tuple[int, list[bytes] | str]]:
    """Yield the records of a shard by chunks, each with the number of its first.

    Where records cannot be read, or are not as many as there must be, one line that says so is in their place.

    Args:
      path: of the array_record file.
      count: records that it must hold.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(path)
        # A file that cannot be opened is an error only when the reader is closed.
        if not reader.ok():
            reader.close()
    # Missing, cut short or overwritten: array_record has no type of error of its own.
    except Exception as error:
        yield 0, f"{path} cannot be read ({_message(error)})"
        return
    stored = reader.num_records()
    if stored != count:
        yield 0, f"{path} holds {stored:,} records, not {count:,}"
    for start in range(0, stored, CHUNK):
        stop = min(start + CHUNK, stored)
        try:
            yield start, reader.read(start, stop)
        except Exception as error:
            reason = f"cannot be read ({_message(error)})"
            yield start, f"records {start} to {stop - 1} of {path} {reason}"


def write_checksums(folder: Path) -> None:
    """Write ``checksums.json``, the sha256 of every other file in the folder of a prepared version."""
    text = json.dumps({"sha256": _sha256(_files(folder))}, indent=2, sort_keys=True)
    files.write(folder / CHECKSUMS, text + "\n")


def checksum_problems(folder: Path) -> list[str] | None:
    """Compare the files with ``checksums.json``; return a line for each that differs.

    None where there is no ``checksums.json``: the data was prepared by something else.
    """
    if not (folder / CHECKSUMS).exists():
        return None
    remedy = "delete the file if the data is right, or prepare the data again"
    recorded = records.load(folder / CHECKSUMS, Mapping[str, Mapping[str, str]], remedy)
    expected, actual = recorded.get("sha256", {}), _sha256(_files(folder))
    problems = []
    for name in sorted({*expected, *actual}):
        if name not in actual:
            problems.append(f"{folder / name} is missing")
        elif name not in expected:
            problems.append(f"{folder / name} was not there when the data was prepared")
        elif expected[name] != actual[name]:
            problems.append(f"{folder / name} has another sha256 than when the data was prepared")
    return problems


def fingerprint(folder: str | os.PathLike, *, times: bool = False) -> str:
    """Return a digest that identifies a prepared version, without reading its shards.

    It is of the names and sizes of all files, and of what TFDS's metadata and ``checksums.json`` say; with
    ``times`` of when they were written too, so that a copy has another one.

    Raises:
      UsageError: where the folder cannot be read.
    """
    from etils import epath

    digest = hashlib.sha256()
    try:
        # The data may be in a bucket.
        for path in sorted(epath.Path(folder).iterdir()):
            stat = path.stat()
            digest.update(f"{path.name} {stat.length}\n".encode())
            if times:
                digest.update(f"{stat.mtime}\n".encode())
            if path.suffix in (".json", ".txt"):
                digest.update(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    hidden = (CHECKSUMS, files.partial(folder / CHECKSUMS).name)
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name not in hidden)


def _sha256(paths: list[Path]) -> dict[str, str]:
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    # hashlib leaves the interpreter's lock while it computes.
    with ThreadPoolExecutor() as pool:
        return {path.name: sha for path, sha in zip(paths, pool.map(digest, paths), strict=True)}


def _message(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
