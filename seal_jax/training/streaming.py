"""Streamed images on their way to the devices: which ones a step needs, decoded ahead, divided as the mesh is.

The position is the number of the step and nothing else: what a step needs is computed from its seed
and its number by the same code that the compiled step itself uses.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from seal_jax.core import mesh as meshes
from seal_jax.core.settings import Run
from seal_jax.data import StoredImages
from seal_jax.data import streaming as stored_images
from seal_jax.training.batches import Arrays, Pixels

# Of the images of one call of a program, on all devices; the next call's are sent meanwhile.
CALL_BYTES = 2**28
# How the images of a training's steps are divided: those of a further batch like the batch itself.
SPECS = Pixels(
    jax.sharding.PartitionSpec(meshes.SEED, None, meshes.DATA),
    jax.sharding.PartitionSpec(meshes.SEED, None, None, meshes.DATA),
)
# Fewer images are decoded before worker processes have started.
_WORTH_PROCESSES = 10_000
_MOST_PROCESSES = 16


def steps_per_call(step_bytes: int, steps: int) -> int:
    """Return how many steps a call may have: a divisor of ``steps`` whose images fit ``CALL_BYTES``.

    >>> steps_per_call(2**26, 30)
    3
    """
    divisors = (count for count in range(1, steps + 1) if steps % count == 0)
    return max(count for count in divisors if count == 1 or count * step_bytes <= CALL_BYTES)


def processes(run: Run, images: int) -> int:
    """Return how many worker processes decode a split of so many images; 0 is threads of this one."""
    if run.data_workers or images < _WORTH_PROCESSES:
        return run.data_workers
    # One core is left to the training itself.
    return min(max((os.cpu_count() or 2) - 1, 1), _MOST_PROCESSES)


def evaluation(
    mesh: Mesh, images: StoredImages, rows: np.ndarray, run: Run
) -> Iterator[tuple[int, Pixels]]:
    """Yield the images of batches, several batches at once, with the number of the first of them.

    ``rows`` are integers ``[batches, batch]``. All parts have the same number of batches; the last one is
    filled up with row 0.
    """
    count, batch = rows.shape
    pixels = math.prod(images.image_shape)
    size = min(count, max(CALL_BYTES // (batch * pixels), 1))
    parts = -(-count // size)
    shape = (size, batch, pixels)
    filled = np.zeros((parts * size, batch), rows.dtype)
    filled[:count] = rows
    local = meshes.local_part(mesh, shape, meshes.BATCHES)
    order = filled.reshape(parts, size, batch)[:, *local[:2]]
    blocks = stored_images.stream(images, order.__getitem__, 0, parts, processes(run, rows.size))
    for number, block in enumerate(blocks):
        yield number * size, Pixels(meshes.place_part(mesh, shape, meshes.BATCHES, block))


@dataclasses.dataclass(frozen=True)
class _Orders:
    """The rows of every step, for the processes that decode them: a file for each epoch."""

    folder: Path
    per_epoch: int

    def path(self, epoch: int) -> Path:
        return self.folder / f"{epoch}.npy"

    def __call__(self, step: int) -> np.ndarray:
        """Return the rows ``[seeds, images]`` of a step; wait until those of its epoch are there."""
        epoch, number = divmod(step, self.per_epoch)
        # A worker that is ahead by more than the next epoch waits for it to come near, or for the end, with which
        # the folder goes.
        while not self.path(epoch).exists() and self.folder.exists():
            time.sleep(0.005)
        return np.array(np.load(self.path(epoch), mmap_mode="r")[number])

    def write(self, epoch: int, rows: np.ndarray) -> None:
        """Add an epoch's rows ``[steps, seeds, images]``, and drop those that are over."""
        part = self.path(epoch).with_suffix(".part")
        with part.open("wb") as file:
            np.save(file, rows)
        part.rename(self.path(epoch))
        for path in self.folder.glob("*.npy"):
            if int(path.stem) < epoch - 1:
                path.unlink()


class Feed(AbstractContextManager["Feed"]):
    """The images of a training's calls, in the order of its steps.

    Args:
      experiment: what is trained, a :class:`seal_jax.training.step.Experiment`.
      data: the training split, whose images are stored.
      seeds: of the trainings, uint32 ``[seeds]``.

    Attributes:
      waited: seconds that :meth:`pixels` has waited for images.
    """

    def __init__(self, experiment: Any, data: Arrays, seeds: np.ndarray):
        assert data.stored is not None
        batches, self._mesh = experiment.batches, experiment.mesh
        self._images, self._seeds = data.stored, np.asarray(seeds)
        self._labels = jax.device_get(data.labels)
        per_epoch = experiment.clock.steps_per_epoch
        self._count, self._total = experiment.steps_per_call, experiment.total_steps
        self._processes = processes(experiment.settings.run, len(data))
        pixels = math.prod(data.stored.image_shape)
        method, count = batches.method, len(self._seeds)
        self._shapes: list[tuple[int, ...]] = [
            (count, self._count, batches.train.batch_size, pixels)
        ]
        if method.extra_batch_size:
            size = (method.extra_batches, method.extra_batch_size)
            self._shapes.append((count, self._count, *size, pixels))
        self._local = [
            meshes.local_part(self._mesh, shape, spec)
            for shape, spec in zip(self._shapes, SPECS, strict=False)
        ]

        def order(seed: Any, epoch: Any, labels: Any) -> list[Any]:
            rows = [batches.order(seed, epoch, labels)[0]]
            if method.extra_batch_size:
                rows.append(batches.extra_order(seed, epoch, per_epoch))
            return rows

        # On one device of this process: the same rows in every process, without communication.
        self._order = jax.jit(jax.vmap(order, in_axes=(0, None, None)))
        self._folder = tempfile.TemporaryDirectory(prefix="seal_jax-", ignore_cleanup_errors=True)
        self._orders = _Orders(Path(self._folder.name), per_epoch)
        self._stream: Any = None
        self._next = -1  # the step that the stream is at
        # One thread, so that batches come in order; beside the caller's, which waits for the devices meanwhile.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._coming: tuple[int, Future[Pixels]] | None = None
        self.waited = 0.0

    def pixels(self, step: int) -> Pixels:
        """Return the images of the call that starts at ``step``, on the devices."""
        if self._coming is None or self._coming[0] != step:
            self.prepare(step)
        assert self._coming is not None
        coming, self._coming = self._coming[1], None
        start = time.perf_counter()
        try:
            return coming.result()
        finally:
            self.waited += time.perf_counter() - start

    def prepare(self, step: int) -> None:
        """Begin to send the images of the call at ``step``, unless the training is over there."""
        if step < self._total:
            self._coming = step, self._thread.submit(self._send, step)

    def _send(self, step: int) -> Pixels:
        epoch = step // self._orders.per_epoch
        for coming in (epoch, epoch + 1):
            if not self._orders.path(coming).exists():
                self._orders.write(coming, self._rows(coming))
        # At the start, and where a generation ended early.
        if step != self._next:
            self._close_stream()
            self._stream = stored_images.stream(
                self._images, self._orders, step, self._total, self._processes
            )
        # [steps, seeds, images, pixels] of this process -> a block of each array, seeds first.
        rows = np.stack([next(self._stream) for _ in range(self._count)], axis=1)
        self._next = step + self._count
        arrays, first = [], 0
        for shape, spec, local in zip(self._shapes, SPECS, self._local, strict=False):
            sizes = [part.stop - part.start for part in local]
            images = math.prod(sizes[2:-1])
            block = rows[:, :, first : first + images].reshape(sizes)
            arrays.append(meshes.place_part(self._mesh, shape, spec, block))
            first += images
        return Pixels(*arrays)

    def _rows(self, epoch: int) -> np.ndarray:
        """Return the rows that this process needs in an epoch, ``[steps, seeds, images]``."""
        with jax.default_device(jax.local_devices()[0]):
            drawn = jax.device_get(self._order(self._seeds, np.int32(epoch), self._labels))
        parts = []
        for rows, (seeds, _, *images, _) in zip(drawn, self._local, strict=True):
            part = rows[seeds, :, *images]
            parts.append(part.reshape(*part.shape[:2], -1))
        return np.concatenate(parts, axis=-1).swapaxes(0, 1)

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def close(self) -> None:
        """Stop the worker processes."""
        self._thread.shutdown()
        # Before the workers are waited for, who may wait for a file.
        self._folder.cleanup()
        self._close_stream()

    def __exit__(self, *_: object) -> None:
        self.close()
