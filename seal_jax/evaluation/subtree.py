"""Part of a pytree of weights: what a derivative is taken by, the rest being constant.

A part has the structure of the whole, with ``None`` for every array outside it, as a vector of
:class:`seal_jax.hessian.Operator` has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seal_jax import masks

PyTree = Any
Loss = Callable[[PyTree, PyTree], jax.Array]


def select(mask: masks.Mask | None, whole: PyTree) -> PyTree:
    """Return the part that the mask selects, in any form of :mod:`seal_jax.masks`; ``None``: all.

    >>> select("fc", {"conv": 1.0, "fc": 2.0})
    {'conv': None, 'fc': 2.0}
    """
    if mask is None:
        return whole
    return jax.tree.map(
        lambda flag, leaf: leaf if flag else None, masks.resolve(mask, whole), whole
    )


def merge(whole: PyTree, part: PyTree) -> PyTree:
    """Return the whole with the arrays of the part in their places.

    >>> merge({"conv": 1.0, "fc": 2.0}, {"conv": None, "fc": 5.0})
    {'conv': 1.0, 'fc': 5.0}
    """
    return jax.tree.map(
        lambda own, leaf: leaf if own is None else own, part, whole, is_leaf=lambda own: own is None
    )


def moved(whole: PyTree, direction: PyTree, distance: Any) -> PyTree:
    """Return ``whole + distance * direction``; the direction is a part.

    >>> moved({"conv": 1.0, "fc": 2.0}, {"conv": None, "fc": 1.0}, -0.5)
    {'conv': 1.0, 'fc': 1.5}
    """
    return jax.tree.map(
        lambda own, leaf: leaf if own is None else leaf + distance * own,
        direction,
        whole,
        is_leaf=lambda own: own is None,
    )


def size(part: PyTree) -> int:
    """Return the number of entries of a part.

    >>> size({"conv": None, "fc": jnp.ones((2, 3))})
    6
    """
    return sum(leaf.size for leaf in jax.tree.leaves(part))


def inner(vectors: PyTree, part: PyTree) -> jax.Array:
    """Return the inner products of a part with k others, the first axis of every array, ``[k]``.

    >>> inner({"conv": None, "fc": jnp.eye(2)}, {"conv": None, "fc": jnp.array([3.0, 4.0])}).tolist()
    [3.0, 4.0]
    """
    parts = jax.tree.map(
        lambda rows, own: jnp.tensordot(rows, own, own.ndim, precision="highest"), vectors, part
    )
    return sum(jax.tree.leaves(parts), jnp.zeros(()))


def exact(loss: Loss) -> Loss:
    """Return the loss as float32 with products in full precision.

    Accelerators round the factors of matrix products by default, which is more than what losses
    nearby differ by.
    """

    def exactly(whole: PyTree, batch: PyTree) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return jnp.float32(loss(whole, batch))

    return exactly


def mean_loss(loss: Loss, whole: PyTree, data: PyTree) -> jax.Array:
    """Return the mean loss of batches of one size, which are the first axis of every array of data.

    >>> float(mean_loss(lambda w, x: w * x.sum(), 2.0, jnp.array([[1.0], [2.0]])))
    3.0
    """
    count = len(jax.tree.leaves(data)[0])

    def add(total: jax.Array, batch: PyTree) -> tuple[jax.Array, None]:
        return total + exact(loss)(whole, batch), None

    return jax.lax.scan(add, jnp.zeros(()), data)[0] / count
