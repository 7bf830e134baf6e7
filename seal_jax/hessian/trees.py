"""Linear algebra on pytrees, leaf by leaf."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def dot(a: PyTree, b: PyTree) -> jax.Array:
    """Return the inner product, a float32 scalar (float64 where the leaves are).

    >>> float(dot({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 4.0])}))
    11.0
    """
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)), jnp.zeros(()))


def norm(a: PyTree) -> jax.Array:
    """Return the Euclidean norm over all leaves."""
    return jnp.sqrt(dot(a, a))


def add(a: PyTree, b: PyTree, factor: Any = 1.0) -> PyTree:
    """Return ``a + factor * b``."""
    return jax.tree.map(lambda x, y: (x + factor * y).astype(x.dtype), a, b)


def scale(a: PyTree, factor: Any) -> PyTree:
    """Return ``factor * a``."""
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), a)


def empty_basis(like: PyTree, count: int) -> PyTree:
    """Return ``count`` zero vectors: every leaf gets a leading axis."""
    return jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), like)


def put(basis: PyTree, index: Any, vector: PyTree) -> PyTree:
    """Return the basis with the vector of that index replaced."""
    return jax.tree.map(lambda rows, x: rows.at[index].set(x), basis, vector)


def take(basis: PyTree, index: Any) -> PyTree:
    """Return one vector of a basis."""
    return jax.tree.map(lambda rows: rows[index], basis)


def coefficients(basis: PyTree, vector: PyTree) -> jax.Array:
    """Return the inner product of a vector with every vector of a basis, ``[count]``."""
    parts = jax.tree.map(lambda rows, x: jnp.tensordot(rows, x, x.ndim), basis, vector)
    return sum(jax.tree.leaves(parts), jnp.zeros(()))


def combine(basis: PyTree, weights: jax.Array) -> PyTree:
    """Return the sum of the basis weighted by ``[count]``, or by each column of ``[count, m]``."""
    return jax.tree.map(
        lambda rows: jnp.tensordot(weights.astype(rows.dtype), rows, ((0,), (0,))), basis
    )


def random(key: jax.Array, like: PyTree, *, signs: bool = False) -> PyTree:
    """Draw a vector of standard normals, or of random signs."""
    leaves, structure = jax.tree.flatten(like)
    draw = jax.random.rademacher if signs else jax.random.normal
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure,
        [draw(own, leaf.shape).astype(leaf.dtype) for own, leaf in zip(keys, leaves, strict=True)],
    )


def size(like: PyTree) -> int:
    """Return the number of entries of a vector."""
    return sum(leaf.size for leaf in jax.tree.leaves(like))
