"""An operator whose batches stay in host memory and pass through the device in chunks."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from seal_jax.errors import check_number
from seal_jax.hessian import trees
from seal_jax.hessian.operator import Operator, batch_weights, operator

PyTree = Any
# Chunks on the device at a time: one that is worked on while the next one comes in.
_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Like :class:`seal_jax.hessian.Operator`, but it is called from Python, not under ``jit``.

    Attributes:
      part: the operator without data.
      data: batches along the leading axis of every leaf, anything that has a ``shape`` and a
        ``dtype`` and can be sliced, on the host.
      weights: of the batches, NumPy ``[batches]``.
      chunk: batches that are brought to the device together.
      sharding: of a chunk's leaves, ``None`` for that of the parameters' devices.
    """

    eager: ClassVar[bool] = True

    part: Operator
    data: PyTree
    weights: np.ndarray
    chunk: int
    sharding: Any = None

    @property
    def like(self) -> PyTree:
        """A vector of the operator's domain: the parameters of the subtree."""
        return self.part.like

    @property
    def size(self) -> int:
        """Rows of the matrix."""
        return self.part.size

    def __call__(self, vector: PyTree) -> PyTree:
        """Return ``H v``, a vector."""
        total = jax.tree.map(jnp.zeros_like, vector)
        running: deque[tuple[PyTree, PyTree]] = deque()
        for chunk, weights, count in self._chunks(running):
            own = dataclasses.replace(self.part, data=chunk, weights=weights)
            total = _accumulate(own, vector, total, count)
            running.append((own, total))
            del chunk, own
        # Or the next product's chunks would come before the last ones of this are gone.
        jax.block_until_ready(total)
        return _finish(total, vector, self.weights.sum(), self.part.weight_decay)

    def _chunks(
        self, running: deque[tuple[PyTree, PyTree]]
    ) -> Iterator[tuple[PyTree, jax.Array, int]]:
        """Bring one chunk after another, not before there is room for it."""
        for start in range(0, len(self.weights), self.chunk):
            while len(running) >= _IN_FLIGHT:
                # Transfers are begun at once, whatever the device is busy with: without waiting
                # here, the whole data would be there before the first product is.
                jax.block_until_ready(running.popleft()[1])
            stop = start + self.chunk
            count = min(stop, len(self.weights)) - start
            yield (
                jax.tree.map(
                    lambda leaf, rows=slice(start, stop): self._place(leaf[rows]), self.data
                ),
                self._place(self.weights[start:stop]),
                count,
            )

    def _place(self, part: Any) -> jax.Array:
        """Return a part on the device, filled up to a whole chunk: one shape, one program."""
        part = np.asarray(part)
        missing = self.chunk - len(part)
        part = np.pad(part, [(0, missing)] + [(0, 0)] * (part.ndim - 1)) if missing else part
        sharding = self.sharding
        if sharding is None:
            sharding = getattr(jax.tree.leaves(self.part.params)[0], "sharding", None)
            if isinstance(sharding, NamedSharding):
                sharding = NamedSharding(sharding.mesh, PartitionSpec())
        elif len(sharding.spec) > part.ndim:  # the weights have no axis of examples
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        return jax.device_put(part, sharding)


@jax.jit
def _accumulate(op: Operator, vector: PyTree, total: PyTree, count: Any) -> PyTree:
    return trees.add(total, op.weighted_sum(vector, count))


@jax.jit
def _finish(total: PyTree, vector: PyTree, weight: Any, decay: jax.Array) -> PyTree:
    return trees.add(trees.scale(total, 1 / weight), vector, decay)


def streamed(
    loss: Any,
    params: PyTree,
    data: PyTree,
    *,
    byte_budget: int,
    weights: Any = None,
    sharding: Any = None,
    **options: Any,
) -> Streamed:
    """Return the Hessian of a mean loss over data that stays on the host, as an operator.

    Its values are those of :func:`seal_jax.hessian.operator`. Data may be any size: at most
    ``byte_budget`` bytes of it are on the device at a time, in two chunks, so that one is on its way
    while the other is worked on. A Python loop hands the chunks to one compiled program; it waits
    only for the chunk before the last, so the device never does where transfers are faster than
    products. (A callback from within a program would let the program wait for the host, and is not
    to be had on every kind of device.)

    Args:
      loss: see :func:`seal_jax.hessian.operator`.
      params: likewise, on the device.
      data: batches along the leading axis of every leaf: NumPy arrays, memory-mapped ones, or what
        else has ``shape`` and ``dtype`` and gives an array when it is sliced.
      byte_budget: for the data on the device, at least that of two batches.
      weights: of the batches; see :func:`seal_jax.hessian.operator`.
      sharding: of a chunk's leaves, such as ``NamedSharding(mesh, PartitionSpec(None, "data"))`` for
        the second axis, the examples; by default every device of the parameters has the whole.
      **options: ``mask``, ``weight_decay``, ``mode``, ``outer``, ``precision``.

    Raises:
      UsageError: as for ``operator``, or a budget that two batches do not fit in.

    >>> data = np.arange(6, dtype=np.float32).reshape(6, 1)
    >>> op = streamed(
    ...     lambda x, batch: jnp.mean(batch) * x**2, jnp.float32(1), data, byte_budget=32
    ... )
    >>> op.chunk, float(op(jnp.float32(1)))
    (2, 5.0)
    """
    part = operator(loss, params, **options)
    per_batch = np.asarray(batch_weights(data, weights))
    leaves = jax.tree.leaves(data)
    each = sum(math.prod(leaf.shape[1:]) * np.dtype(leaf.dtype).itemsize for leaf in leaves) + 4
    check_number(
        "byte_budget",
        byte_budget,
        lambda value: value >= _IN_FLIGHT * each,
        f"be at least {_IN_FLIGHT * each}: two batches of {each} bytes; or use smaller batches",
    )
    chunk = min(int(byte_budget) // (_IN_FLIGHT * each), len(per_batch))
    # Chunks of equal size, or nearly so: the last one is filled up.
    chunk = math.ceil(len(per_batch) / math.ceil(len(per_batch) / chunk))
    return Streamed(part, data, per_batch, chunk, sharding)
