"""Gradient accumulation: a batch in parts, whose gradients are computed one after the other and summed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def split(tree: PyTree, count: int) -> PyTree:
    """Cut arrays over a batch ``[b, ...]`` into ``count`` parts, ``[count, b / count, ...]``.

    Part i has every ``count``-th example from i on: a balanced batch is sorted by class, and each part should
    have all classes.

    >>> split(jnp.arange(6), 3).tolist()
    [[0, 3], [1, 4], [2, 5]]
    """
    return jax.tree.map(lambda leaf: leaf.reshape(-1, count, *leaf.shape[1:]).swapaxes(0, 1), tree)


def join(tree: PyTree) -> PyTree:
    """Undo :func:`split`."""
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:]), tree)


def accumulated(
    objective: Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]],
    parts: PyTree,
    merge: Callable[[PyTree], PyTree] = lambda auxiliary: auxiliary,
) -> Callable[[PyTree], tuple[jax.Array, PyTree]]:
    """Return the sum of an objective over the parts of a batch, with the memory of one part.

    Differentiated like any function, by whatever method, it computes each part's gradient together with its
    value: a plain scan would keep what the backward pass needs of all parts.

    Args:
      objective: maps (params, part) to (value, auxiliary); only the value is differentiated, once.
      parts: arrays whose first axis is the parts.
      merge: makes the auxiliary value of the whole of those of all parts, stacked along a first axis.

    Returns:
      A function of params that returns the sum of the values, and the merged auxiliary values.

    >>> square = accumulated(lambda w, x: ((w * x) ** 2, x), jnp.array([1.0, 2.0]))
    >>> (value, _), gradient = jax.value_and_grad(square, has_aux=True)(jnp.array(3.0))
    >>> float(value), float(gradient)
    (45.0, 30.0)
    """

    def forward(params):
        def add_part(sums, part):
            (value, auxiliary), gradient = jax.value_and_grad(objective, has_aux=True)(params, part)
            return jax.tree.map(jnp.add, sums, (value, gradient)), auxiliary

        # Like the parameters: where these vary over devices, so do the sums.
        zero = jnp.zeros_like(jax.tree.leaves(params)[0], jnp.float32, shape=())
        (value, gradient), auxiliary = jax.lax.scan(
            add_part, (zero, jax.tree.map(jnp.zeros_like, params)), parts
        )
        return (value, merge(auxiliary)), gradient

    @jax.custom_vjp
    def whole(params):
        return forward(params)[0]

    def backward(gradient, cotangents):
        # The auxiliary values have none that counts.
        slope, _ = cotangents
        return (jax.tree.map(lambda leaf: (slope * leaf).astype(leaf.dtype), gradient),)

    whole.defvjp(forward, backward)
    return whole
