"""Images that stay encoded where they are stored, and are decoded when they are needed.

:class:`StoredImages` stands in the place of an array of images. :func:`stream` decodes batches ahead of
their use, in worker processes that Grain runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import Any

import numpy as np

from seal_jax.data.decoding import CorruptImageError, decode
from seal_jax.data.readers import Reader, reading
from seal_jax.data.shards import CHUNK
from seal_jax.errors import UsageError

# Decoding holds the interpreter's lock half of the time: more threads would only wait for it.
THREADS = min(os.cpu_count() or 1, 4)
# Decoded batches that wait in each worker process.
_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How encoded images become pixels: the arguments of :func:`seal_jax.data.decoding.decode`."""

    channels: int
    size: tuple[int, int] | None = None
    crop: int | None = None

    def __call__(self, encoded: bytes) -> np.ndarray:
        """Return an image's pixels, uint8 ``[height, width, channels]``."""
        return decode(encoded, self.channels, self.size, self.crop)


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, as programs know it
class StoredImages:
    """Encoded images in the place of an array uint8 ``[n, height, width, channels]``.

    Indexing decodes: by a number, a slice, or an integer array of any shape, as of an array's first
    axis. It can be pickled.

    Attributes:
      reader: of the part of a data set that holds them.
      decoder: what makes pixels of them.
      rows: their numbers there, int64 ``[n]``, or of any shape, in whose place is an image each.
      image_shape: ``(height, width, channels)`` of every image.
    """

    reader: Reader
    decoder: Decoder
    rows: np.ndarray
    image_shape: tuple[int, int, int]

    dtype = np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(n, height, width, channels)``."""
        return (*self.rows.shape, *self.image_shape)

    @property
    def ndim(self) -> int:
        """4, for rows of one axis."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Numbers in all images."""
        return math.prod(self.shape)

    def take(self, rows: np.ndarray | slice) -> StoredImages:
        """Return these images, still encoded."""
        return dataclasses.replace(self, rows=self.rows[rows])

    def __getitem__(self, index: Any) -> np.ndarray:
        numbers = self.rows[index]
        flat = np.reshape(numbers, -1)
        # Threads where many are asked for: the decoders of files hold no lock.
        parts = np.array_split(flat, min(THREADS, max(len(flat) // 8, 1)))
        run = map if len(parts) == 1 else _threads().map
        pixels = np.concatenate(list(run(self._decoded, parts)))
        return pixels.reshape(*np.shape(numbers), *self.image_shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Decode all images."""
        del copy
        return self[:].astype(dtype or np.uint8, copy=False)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return images ``[..., height, width, channels]`` like indexing, without threads."""
        pixels = self._decoded(self.rows[np.reshape(rows, -1)])
        return pixels.reshape(*np.shape(rows), *self.image_shape)

    def _decoded(self, numbers: np.ndarray) -> np.ndarray:
        images = np.empty((len(numbers), *self.image_shape), np.uint8)
        for start in range(0, len(numbers), CHUNK):
            chunk = numbers[start : start + CHUNK]
            with reading(self.reader):
                records = self.reader.read(chunk)
            for row, (encoded, _) in enumerate(records, start):
                try:
                    image = self.decoder(encoded)
                except CorruptImageError as error:
                    raise undecodable(self.reader, numbers[row], error) from error
                if image.shape != self.image_shape:
                    raise differing(self.reader.name, self.image_shape, image.shape)
                images[row] = image
        return images


def undecodable(reader: Reader, number: int, error: CorruptImageError) -> UsageError:
    """Return the error of an image that cannot be decoded."""
    return UsageError(
        f"{reader.where(number)}: {error}: replace the image (what was prepared is prepared again), or "
        'leave it out by data.corrupt = "skip"'
    )


def differing(name: str, one: tuple[int, ...], other: tuple[int, ...]) -> UsageError:
    """Return the error of a part whose images have different shapes."""
    return UsageError(
        f"{name} has images of differing sizes ({one[:2]}, {other[:2]}): set data.image_size"
    )


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="decode")


# The images of a batch as flat bytes ``[..., height * width * channels]``, from the batch's number.
Rows = Callable[[int], np.ndarray]


@dataclasses.dataclass
class _Batches:
    """The batches as Grain asks for them, in the process that decodes them."""

    images: StoredImages
    rows: Rows
    count: int
    processes: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> np.ndarray:
        rows = self.rows(number)
        # Beside other worker processes, threads would only wait for each other.
        pixels = self.images.read(rows) if self.processes else self.images[rows]
        return pixels.reshape(*rows.shape, -1)


def stream(
    images: StoredImages, rows: Rows, start: int, stop: int, processes: int
) -> Iterator[np.ndarray]:
    """Decode the batches ``start .. stop-1`` in order, ahead of their use.

    Args:
      images: what is decoded.
      rows: the rows of a batch, an integer array of any shape, by its number; it is called in the
        worker processes, so it must be a pure function that can be pickled.
      start: the first batch.
      stop: the one after the last.
      processes: worker processes; 0 decodes in threads of this one.

    Yields:
      uint8 ``[*rows.shape, height * width * channels]``.

    Raises:
      UsageError: an image cannot be decoded, or a worker process was ended from outside.
    """
    import grain
    from absl import flags

    # Grain asks for flags of absl in any program, also in one that has no absl command line.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    source = _Batches(images, rows, stop, processes)
    dataset = grain.MapDataset.source(source)[start:]
    if processes:
        options = grain.MultiprocessingOptions(processes, per_worker_buffer_size=_AHEAD)
        reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        batches = dataset.to_iter_dataset(reading).mp_prefetch(options, worker_init_fn=_worker)
    else:
        # One thread decodes batch after batch, with the help of the others.
        batches = dataset.to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
        )
    iterator = iter(batches)
    try:
        with _deaf_processes() if processes else contextlib.nullcontext():
            batch = next(iterator, None)  # which starts the processes
        while batch is not None:
            yield batch
            batch = next(iterator, None)
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        code = str(error).partition("exit code ")[2].partition(".")[0]
        raise UsageError(
            f"a process that decodes images was ended, with exit code {code}: the system does that where memory "
            "(-9) or /dev/shm (-7) is short: lower run.data_workers, or raise these"
        ) from error
    finally:
        iterator.close()


def batches(
    images: Any, order: Sequence[np.ndarray] | np.ndarray, processes: int = 0
) -> Iterator[np.ndarray]:
    """Yield ``images[rows]`` for each ``rows`` of an order; stored images are decoded ahead.

    ``images`` is an array or :class:`StoredImages`, ``[n, height, width, channels]``.
    """
    if not isinstance(images, StoredImages):
        yield from (images[rows] for rows in order)
        return
    flat = stream(images, order.__getitem__, 0, len(order), processes)
    for pixels in flat:
        yield pixels.reshape(*pixels.shape[:-1], *images.image_shape)


def _worker(index: int, count: int) -> None:
    """End a worker process when the process that started it is gone, even if that was killed."""
    del index, count

    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        # Not the parent's number: that tells nothing to a worker whose parent was killed while it started.
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _deaf_processes() -> Iterator[None]:
    """Let processes that are started meanwhile ignore the signals that ask a training to stop.

    A terminal, and most schedulers, send them to all processes; the workers are needed until the last call ends.
    """
    # It is started with the first worker otherwise, and unblocks the signals.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
