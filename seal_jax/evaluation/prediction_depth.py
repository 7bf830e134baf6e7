"""Prediction depth: k-nearest-neighbour probes on a network's layers, in bounded memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from seal_jax.core import mesh as meshes
from seal_jax.data import available_memory
from seal_jax.errors import UsageError, check_choice, check_integer, check_labels, kind_of

Metric = Literal["l2", "cosine"]
Pooling = Literal["flatten", "gap", "adaptive"]
BANK = "bank"


class Rows(NamedTuple):
    """Features that are computed when they are read, so that they need not all be in memory.

    Attributes:
      number: of rows.
      size: numbers in each.
      read: ``read(start, stop)`` returns ``[stop - start, ...]`` on the host; the same every time.
    """

    number: int
    size: int
    read: Callable[[int, int], np.ndarray]


def as_rows(features: np.ndarray | Rows) -> Rows:
    """Return features of an array as :class:`Rows`."""
    if isinstance(features, Rows):
        return features
    if not isinstance(features, np.ndarray | jax.Array) or features.ndim < 2:
        raise UsageError(f"features are {kind_of(features)}: give an array [n, ...] of numbers")
    flat = features.reshape(len(features), -1)
    return Rows(len(flat), flat.shape[1], lambda start, stop: flat[start:stop])


def knn(
    bank: np.ndarray | Rows,
    bank_labels: np.ndarray,
    queries: np.ndarray | Rows,
    *,
    k: int = 5,
    metric: Metric = "l2",
    exclude_self: bool = False,
    byte_budget: int = 2**28,
) -> np.ndarray:
    """Return the majority class of each query's k nearest neighbours, int ``[queries]``.

    Of classes with equally many votes the lowest number wins, as in scikit-learn. The bank is divided
    over the devices.

    Squared distances are float32, |q|^2 - 2 q b + |b|^2, where for "l2" q and b are taken from the
    mean of the first chunk of the bank. Rounding, which varies with ``byte_budget`` and the number of
    devices, may order neighbours either way whose distances differ by less than some 1e-6 of
    |q|^2 + |b|^2, duplicates of a row with another label among them; of distances that come out equal
    the lower row's is the nearer.

    Args:
      bank: float ``[n, ...]``, flattened from the second axis on, or :class:`Rows`, which are read
        once; a chunk at a time is on the devices.
      bank_labels: integers ``[n]``.
      queries: float ``[m, ...]``, or :class:`Rows`, which are read once where they fit in a quarter of
        the host's free memory, and otherwise for every chunk of the bank.
      k: neighbours; 5 in the SEAL paper, 30 in Baldock et al.
      metric: "l2" or "cosine".
      exclude_self: query i is bank row i, and no neighbour of itself.
      byte_budget: bytes of the devices in use at a time: chunks of bank and queries, and their distances.

    Raises:
      UsageError: k larger than the bank, shapes that do not fit, or values that are not finite.

    References:
      Baldock, Maennel & Neyshabur, `Deep Learning Through the Lens of Example Difficulty`, 2021.

    >>> bank = np.array([[0.0], [1.0], [10.0]])
    >>> knn(bank, np.array([3, 3, 7]), np.array([[0.4], [9.0]]), k=1).tolist()
    [3, 7]
    """
    check_choice("metric", metric, get_args(Metric))
    bank, queries = as_rows(bank), as_rows(queries)
    check_integer("k", k, 1, bank.number - exclude_self)
    if bank.size != queries.size:
        raise UsageError(f"bank {bank[:2]} and queries {queries[:2]} differ in width")
    check_labels("bank_labels", bank_labels, bank.number)
    if exclude_self and bank.number != queries.number:
        raise UsageError("exclude_self needs the bank itself as queries")
    classes, codes = np.unique(bank_labels, return_inverse=True)
    rows, columns = _chunks(queries.number, bank.number, bank.size, byte_budget)
    devices = jax.local_devices()[: max(columns // k, 1)]
    # Every device has at least k rows of the bank to choose from, and all have equally many.
    columns = columns // len(devices) * len(devices)
    mesh = meshes.along(BANK, devices)
    starts = range(0, queries.number, rows)
    nearest = [(jnp.full((rows, k), jnp.inf), jnp.zeros((rows, k), jnp.int32)) for _ in starts]
    centre = np.zeros(bank.size)

    def prepared_queries(start: int) -> np.ndarray:
        part = queries.read(start, min(start + rows, queries.number))
        return _prepared(part, rows, centre, metric)

    # There may be hundreds of chunks of the bank, and to read the queries may mean to compute them.
    if 4 * queries.number * queries.size <= (available_memory() or 0) // 4:
        prepared_queries = functools.cache(prepared_queries)
    # The bank is the outer loop: its chunks are read and placed once. Between chunks only the nearest so far are
    # kept, k distances and labels for each query.
    for first in range(0, bank.number, columns):
        raw = bank.read(first, min(first + columns, bank.number))
        if metric == "l2" and first == 0:
            # Distances do not change, but the rounding of |q|^2 - 2 q b + |b|^2 does.
            centre = raw.reshape(len(raw), -1).mean(0, dtype=np.float64)
        chunk = jax.device_put(
            _prepared(raw, columns, centre, metric), NamedSharding(mesh, PartitionSpec(BANK))
        )
        chunk_codes = np.zeros(columns, np.int32)
        chunk_codes[: len(raw)] = codes[first : first + len(raw)]
        for index, start in enumerate(starts):
            nearest[index] = _merge(
                *nearest[index],
                prepared_queries(start),
                chunk,
                chunk_codes,
                len(raw),
                # The offset otherwise is so low that no query has a row of its own in any chunk.
                start - first if exclude_self else -rows - columns,
                mesh=mesh,
            )
            # One at a time: on CPU, programs in flight whose devices wait for each other can take
            # all threads, and XLA ends the process.
            jax.block_until_ready(nearest[index])
    # Votes [rows, classes]; argmax takes the lowest class of equals.
    count = jax.vmap(partial(jnp.bincount, length=len(classes)))
    votes = [np.asarray(count(labels).argmax(-1)) for _, labels in nearest]
    return classes[np.concatenate(votes)[: queries.number]]


def _chunks(queries: int, bank: int, size: int, byte_budget: int) -> tuple[int, int]:
    """Return how many rows of queries and bank at a time keep within the budget."""
    least = 8 * (2 * size + 1)
    if byte_budget < least:
        raise UsageError(
            f"byte_budget = {byte_budget} is too small for rows of {size} numbers; give at least "
            f"{least}"
        )
    # Solves 8 (side^2 + 2 side size) = byte_budget for chunks of equally many rows of queries and bank: float32
    # distances and what is made of them, and both chunks in two copies.
    side = int(-size + math.sqrt(size**2 + byte_budget / 8))
    return min(queries, side), min(bank, side)


def _prepared(raw: np.ndarray, rows: int, centre: np.ndarray, metric: Metric) -> np.ndarray:
    """Return a chunk as float32 ``[rows, size]``, filled up with zeros."""
    # Centred in float64 (the centre's type), before the rounding to float32.
    part = (raw.reshape(len(raw), -1) - centre).astype(np.float32)
    if not np.isfinite(part).all():
        raise UsageError("features hold NaN or infinity: the network or its input is broken")
    if metric == "cosine":
        part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
    return np.pad(part, ((0, rows - len(part)), (0, 0)))


@partial(jax.jit, static_argnames=("mesh",), donate_argnums=(0, 1))
def _merge(near, labels, queries, bank, codes, count, offset, *, mesh):
    """Merge a chunk of the bank into the nearest so far; ``offset`` is a query's own row in it."""
    k = near.shape[1]

    def nearest_on_device(queries, bank, codes, count, offset):
        product = jnp.matmul(queries, bank.T, precision="highest")
        # [queries, rows of the bank on this device]
        distances = (queries**2).sum(1)[:, None] + (bank**2).sum(1) - 2 * product
        # The row's number within the whole chunk, of which the first ``count`` are rows and the rest filling.
        column = jax.lax.axis_index(BANK) * bank.shape[0] + jnp.arange(bank.shape[0])
        itself = column == jnp.arange(queries.shape[0])[:, None] + offset
        distances = jnp.where((column < count) & ~itself, distances, jnp.inf)
        # Each device sends its own k nearest only, not its distances.
        negative, index = jax.lax.top_k(-distances, min(k, bank.shape[0]))
        return -negative, codes[index]

    whole, divided = PartitionSpec(), PartitionSpec(BANK)
    chunk_near, chunk_labels = jax.shard_map(
        nearest_on_device,
        mesh=mesh,
        in_specs=(whole, divided, divided, whole, whole),
        out_specs=PartitionSpec(None, BANK),
    )(queries, bank, codes, count, offset)
    # Earlier rows stand first: of equal distances top_k takes the lower index.
    together = jnp.concatenate([near, chunk_near], axis=1)
    negative, index = jax.lax.top_k(-together, k)
    both = jnp.concatenate([labels, chunk_labels], axis=1)
    return -negative, jnp.take_along_axis(both, index, axis=1)


def depth(probes: np.ndarray, final: np.ndarray) -> np.ndarray:
    """Return each example's prediction depth, int ``[n]`` in 0..layers.

    It is the first probe from which on all later ones agree with the network's own prediction; the
    number of layers where even the last does not.

    Args:
      probes: predictions of the probes ``[layers, n]``, bottom to top.
      final: the network's predictions ``[n]``.

    >>> depth(np.array([[0, 1, 1], [0, 0, 1], [0, 0, 0]]), np.array([0, 0, 1])).tolist()
    [0, 1, 3]
    """
    if probes.ndim != 2 or probes.shape[1:] != final.shape:
        raise UsageError(
            f"probes {probes.shape} and final {final.shape} must be [layers, n] and [n]"
        )
    agree = probes == final
    # How many probes agree without a break, counted from the top.
    streak = np.cumprod(agree[::-1], axis=0).sum(0)
    return len(probes) - streak


def pool(outputs: jax.Array, pooling: Pooling = "flatten", side: int = 4) -> jax.Array:
    """Return ``[n, numbers]`` of a layer's output ``[n, ...]``.

    Args:
      outputs: ``[n, height, width, channels]``, ``[n, tokens, channels]``, or ``[n, units]``, which
        stays as it is.
      pooling: "flatten" keeps everything, "gap" averages over the image or the tokens, "adaptive"
        averages an image to ``side`` by ``side`` windows, which overlap where ``side`` does not divide
        it, and leaves tokens, which have no sides, as they are.
      side: of "adaptive"; a smaller image keeps its own.

    >>> image = jnp.arange(9.0).reshape(1, 3, 3, 1)
    >>> pool(image, "gap").tolist(), pool(image, "adaptive", 2).tolist()
    ([[4.0]], [[2.0, 3.0, 5.0, 6.0]])
    """
    check_choice("pooling", pooling, get_args(Pooling))
    if outputs.ndim > 2 and pooling == "gap":
        return outputs.mean(tuple(range(1, outputs.ndim - 1)))
    if outputs.ndim == 4 and pooling == "adaptive":
        rows, columns = (_windows(length, side) for length in outputs.shape[1:3])
        outputs = jnp.einsum("nhwc,ih,jw->nijc", outputs, rows, columns, precision="highest")
    return outputs.reshape(outputs.shape[0], -1)


def _windows(length: int, side: int) -> np.ndarray:
    """Return the matrix ``[side, length]`` that averages a line to ``side`` windows."""
    side = min(side, length)
    index = np.arange(side)
    first = index * length // side
    last = -(-(index + 1) * length // side)
    position = np.arange(length)
    # [side, length]: the windows of adaptive pooling as torch defines them, which may overlap
    inside = (position >= first[:, None]) & (position < last[:, None])
    return (inside / (last - first)[:, None]).astype(np.float32)
