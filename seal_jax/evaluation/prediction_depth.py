"""Prediction depth: k-nearest-neighbour probes on a network's layers, in bounded memory."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.errors import UsageError, check_number

Metric = Literal["l2", "cosine"]


def knn(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    *,
    k: int = 5,
    metric: Metric = "l2",
    exclude_self: bool = False,
    byte_budget: int = 2**28,
) -> np.ndarray:
    """Return the majority class of each query's k nearest neighbours, int ``[queries]``.

    Of equally near neighbours the one with the lower row is the nearer; of classes with equally many
    votes the lowest number wins, as in scikit-learn.

    Args:
      bank: float ``[n, ...]``, flattened from the second axis on; on the host, and never whole on
        the device.
      bank_labels: integers ``[n]``.
      queries: float ``[m, ...]``.
      k: neighbours; 5 in the SEAL paper, 30 in Baldock et al.
      metric: "l2" or "cosine".
      exclude_self: query i is bank row i, and no neighbour of itself.
      byte_budget: bytes of the device arrays: chunks of bank, queries, and their distances.

    Raises:
      UsageError: k larger than the bank, shapes that do not fit, or values that are not finite.

    References:
      Baldock, Maennel & Neyshabur, `Deep Learning Through the Lens of Example Difficulty`, 2021.

    >>> bank = np.array([[0.0], [1.0], [10.0]])
    >>> knn(bank, np.array([3, 3, 7]), np.array([[0.4], [9.0]]), k=1).tolist()
    [3, 7]
    """
    if metric not in get_args(Metric):
        raise UsageError(f"metric = {metric!r} must be one of {', '.join(get_args(Metric))}")
    most = len(bank) - exclude_self
    check_number("k", k, lambda value: 1 <= value <= most, f"lie in 1..{most}")
    bank, queries = (array.reshape(len(array), -1) for array in (bank, queries))
    if bank.shape[1] != queries.shape[1] or bank_labels.shape != (len(bank),):
        raise UsageError(
            f"bank {bank.shape}, its labels {bank_labels.shape} and queries {queries.shape} differ"
        )
    if exclude_self and len(bank) != len(queries):
        raise UsageError("exclude_self needs the bank itself as queries")
    classes, codes = np.unique(bank_labels, return_inverse=True)
    # Distances do not change, but the rounding of |q|^2 - 2 q b + |b|^2 does.
    centre = bank.mean(0, dtype=np.float64) if metric == "l2" else np.zeros(bank.shape[1])
    rows, columns = _chunks(len(queries), len(bank), bank.shape[1], byte_budget)
    found = []
    for start in range(0, len(queries), rows):
        part, own = _prepared(queries, start, rows, centre, metric)
        near = jnp.full((rows, k), jnp.inf)
        labels = jnp.zeros((rows, k), jnp.int32)
        for first in range(0, len(bank), columns):
            chunk, count = _prepared(bank, first, columns, centre, metric)
            near, labels = _merge(
                near,
                labels,
                part,
                chunk,
                np.pad(codes[first : first + count].astype(np.int32), (0, columns - count)),
                count,
                start - first if exclude_self else -rows - columns,
            )
        found.append(np.asarray(_vote(labels, len(classes)))[:own])
    return classes[np.concatenate(found)]


def _chunks(queries: int, bank: int, size: int, byte_budget: int) -> tuple[int, int]:
    """Return how many rows of queries and bank at a time keep within the budget."""
    side = int((-size + math.sqrt(size**2 + byte_budget / 8)) // 1)
    if side < 1:
        raise UsageError(f"byte_budget = {byte_budget} is too small for rows of {size} numbers")
    return min(queries, side), min(bank, side)


def _prepared(
    array: np.ndarray, start: int, rows: int, centre: np.ndarray, metric: Metric
) -> tuple[np.ndarray, int]:
    """Return a chunk, filled up with zeros, and its number of rows."""
    part = (array[start : start + rows] - centre).astype(np.float32)
    if not np.isfinite(part).all():
        raise UsageError("features hold NaN or infinity: the network or its input is broken")
    if metric == "cosine":
        part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
    return np.pad(part, ((0, rows - len(part)), (0, 0))), len(part)


@partial(jax.jit, donate_argnums=(0, 1))
def _merge(near, labels, queries, bank, codes, count, offset):
    """Merge a chunk of the bank into the nearest so far; ``offset`` is a query's own row in it."""
    product = jnp.matmul(queries, bank.T, precision="highest")
    squares = (queries**2).sum(1)[:, None] + (bank**2).sum(1)
    distances = squares - 2 * product
    column = jnp.arange(bank.shape[0])
    own = column == jnp.arange(queries.shape[0])[:, None] + offset
    distances = jnp.where((column < count) & ~own, distances, jnp.inf)
    # What was found first stands first, and top_k prefers the lower index among equals.
    together = jnp.concatenate([near, distances], axis=1)
    negative, index = jax.lax.top_k(-together, near.shape[1])
    both = jnp.concatenate([labels, jnp.broadcast_to(codes, distances.shape)], axis=1)
    return -negative, jnp.take_along_axis(both, index, axis=1)


@partial(jax.jit, static_argnames=("classes",))
def _vote(labels, classes):
    def count(row):
        return jnp.zeros(classes, jnp.int32).at[row].add(1).argmax()

    return jax.vmap(count)(labels)


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
