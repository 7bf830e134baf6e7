"""Linear algebra on pytrees, leaf by leaf.

A part of a pytree has the structure of the whole, with ``None`` for every array outside it. A basis
is a stack of vectors: every leaf has a leading axis. It may be packed, that is, hold the vectors
rounded to bfloat16; the arithmetic is in the vectors' own type all the same. Products are never taken
in the reduced precision that accelerators use for matrices by default: it would cost the
orthogonality of a basis.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax import masks

PyTree = Any
_EXACT = jax.lax.Precision.HIGHEST
# A packed leaf holds the bits of bfloat16. As numbers of that type a compiler for a device that does
# not compute with them, such as a CPU, would widen the whole basis to read one vector of it.
_PACKED = jnp.uint16


def select(mask: masks.Mask | None, whole: PyTree) -> PyTree:
    """Return the part that the mask selects, in any form of :mod:`seal_jax.masks`; ``None``: all.

    >>> select("fc", {"conv": 1.0, "fc": 2.0})
    {'conv': None, 'fc': 2.0}
    """
    if mask is None:
        return whole
    flags = masks.resolve(mask, whole)
    return jax.tree.map(lambda flag, leaf: leaf if flag else None, flags, whole)


def merge(whole: PyTree, part: PyTree, join: Callable = lambda old, new: new) -> PyTree:
    """Return the whole with the arrays of the part, or ``join(old, new)``, in their places.

    >>> merge({"conv": 1.0, "fc": 2.0}, {"conv": None, "fc": 5.0})
    {'conv': 1.0, 'fc': 5.0}
    """
    # None is an empty subtree to JAX unless it is made a leaf.
    return jax.tree.map(
        lambda new, old: old if new is None else join(old, new),
        part,
        whole,
        is_leaf=lambda x: x is None,
    )


def dot(a: PyTree, b: PyTree) -> jax.Array:
    """Return the inner product, a float32 scalar (float64 where the leaves are)."""
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)), jnp.zeros(()))


def norm(a: PyTree) -> jax.Array:
    """Return the Euclidean norm over all leaves.

    The squares of entries below 1e-19 underflow in float32: entries are divided by the largest.

    >>> f"{norm({'w': jnp.array([3e-30, 4e-30])}):.3g}"
    '5e-30'
    """
    leaves = jax.tree.leaves(a)
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0.0) for x in leaves]))
    unit = jnp.where(largest > 0, largest, 1.0)
    return unit * jnp.sqrt(sum(jnp.sum((x / unit) ** 2) for x in leaves))


def add(a: PyTree, b: PyTree, factor: Any = 1.0) -> PyTree:
    """Return ``a + factor * b``."""
    # Back to the vector's type: a loop may not change the types that it carries.
    return jax.tree.map(lambda x, y: (x + factor * y).astype(x.dtype), a, b)


def scale(a: PyTree, factor: Any) -> PyTree:
    """Return ``factor * a``."""
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), a)


def unit(vector: PyTree, length: Any) -> PyTree:
    """Return the vector over its norm, zero if that is 0."""
    # The branch that is not taken is computed as well: it must not divide by zero.
    return scale(vector, jnp.where(length == 0, 0.0, 1 / jnp.where(length == 0, 1.0, length)))


def restrict(selected: PyTree | None, vector: PyTree) -> PyTree:
    """Return the vector times ``selected``, 0 or 1 for each leaf; ``None``: all of it."""
    return vector if selected is None else jax.tree.map(jnp.multiply, vector, selected)


def size(vector: PyTree) -> int:
    """Return the number of entries of a vector."""
    return sum(leaf.size for leaf in jax.tree.leaves(vector))


def nbytes(tree: PyTree) -> int:
    """Return the bytes of all leaves."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def empty_basis(vector: PyTree, count: int, *, packed: bool = False) -> PyTree:
    """Return ``count`` zero vectors."""
    return jax.tree.map(
        lambda x: jnp.zeros((count, *x.shape), _PACKED if packed else x.dtype), vector
    )


def is_packed(basis: PyTree) -> bool:
    """Return whether a basis holds bfloat16 for vectors of another type."""
    return any(rows.dtype == _PACKED for rows in jax.tree.leaves(basis))


def put(basis: PyTree, index: Any, vector: PyTree) -> PyTree:
    """Return the basis with the vector of that index replaced."""
    return jax.tree.map(lambda rows, x: rows.at[index].set(_as_row(x, rows.dtype)), basis, vector)


def _as_row(x: jax.Array, dtype: Any) -> jax.Array:
    if dtype != _PACKED:
        return x.astype(dtype)
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), _PACKED)


def take(basis: PyTree, index: Any, vector: PyTree) -> PyTree:
    """Return one vector of a basis, with the types of ``vector``."""

    def row(rows: jax.Array, x: jax.Array) -> jax.Array:
        if rows.dtype != _PACKED:
            return rows[index]
        return jax.lax.bitcast_convert_type(rows[index], jnp.bfloat16).astype(x.dtype)

    return jax.tree.map(row, basis, vector)


def coefficients(basis: PyTree, vector: PyTree) -> jax.Array:
    """Return the inner product of a vector with every vector of a basis, ``[count]``."""
    if is_packed(basis):
        # Row by row: the whole basis never exists in the vector's type.
        count = len(jax.tree.leaves(basis)[0])
        return jax.lax.map(lambda index: dot(take(basis, index, vector), vector), jnp.arange(count))

    def products(rows: jax.Array, x: jax.Array) -> jax.Array:
        # Narrow leaves are multiplied as they are, and summed in float32.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.tensordot(rows, x, x.ndim, precision=_EXACT, preferred_element_type=wide)

    return sum(jax.tree.leaves(jax.tree.map(products, basis, vector)), jnp.zeros(()))


def combine(basis: PyTree, weights: jax.Array, vector: PyTree) -> PyTree:
    """Return the sum of the basis weighted by ``[count]``, or m sums by the columns of ``[count, m]``.

    The sums have the types of ``vector``.
    """
    if not is_packed(basis):
        return jax.tree.map(
            lambda rows: jnp.tensordot(
                weights.astype(rows.dtype), rows, ((0,), (0,)), precision=_EXACT
            ),
            basis,
        )

    # Vector by vector, as in `coefficients`: one at a time exists in the vector's type.
    def combination(column: jax.Array) -> PyTree:
        def step(index: Any, total: PyTree) -> PyTree:
            return add(total, take(basis, index, vector), column[index])

        return jax.lax.fori_loop(0, len(column), step, jax.tree.map(jnp.zeros_like, vector))

    return combination(weights) if weights.ndim == 1 else jax.lax.map(combination, weights.T)


def rotate(rows: jax.Array, rotation: jax.Array, leaf: jax.Array) -> jax.Array:
    """Return one leaf of the basis of combinations ``rotation [count, m]``, ``[m, ...]``."""
    if not is_packed(rows):
        return combine(rows, rotation, leaf)
    # Rounded column by column, so that the result is never wider than the basis.
    return jax.lax.map(lambda column: _as_row(combine(rows, column, leaf), _PACKED), rotation.T)


def random(key: jax.Array, vector: PyTree, *, signs: bool = False) -> PyTree:
    """Draw a vector of standard normals, or of random signs."""
    leaves, structure = jax.tree.flatten(vector)
    draw = jax.random.rademacher if signs else jax.random.normal
    keys = jax.random.split(key, len(leaves))
    shapes = [leaf.shape for leaf in leaves]
    drawn: list[Any] = list(leaves)
    # Leaves of one shape together: a network has many, and each draw takes long to compile.
    for shape in dict.fromkeys(shapes):
        alike = [index for index, other in enumerate(shapes) if other == shape]
        rows = jax.vmap(lambda key, shape=shape: draw(key, shape))(keys[np.array(alike)])
        for index, row in zip(alike, rows, strict=True):
            drawn[index] = row.astype(leaves[index].dtype)
    return jax.tree.unflatten(structure, drawn)


def pseudo_random(index: Any, vector: PyTree) -> PyTree:
    """Return a vector of pseudo-random numbers in [-1, 1), another for each ``index``.

    A hash of each entry's position: where a random direction is hardly ever needed but must be in the
    program, random keys would take longer to compile than all the rest.
    """
    leaves, structure = jax.tree.flatten(vector)

    def hashed(number: int, leaf: jax.Array) -> jax.Array:
        # Leaves of one shape differ by their number, calls by ``index``.
        bits = jnp.full(leaf.shape, number + 1, jnp.uint32) + jnp.uint32(7919) * jnp.uint32(index)
        for axis in range(leaf.ndim):
            bits = _mixed(bits + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis))
        return (_mixed(bits).astype(jnp.float32) / 2.0**31 - 1).astype(leaf.dtype)

    return jax.tree.unflatten(structure, [hashed(*pair) for pair in enumerate(leaves)])


def _mixed(bits: jax.Array) -> jax.Array:
    """Return the bits mixed by multiplication and shifts, as in Murmur3's finaliser."""
    for factor, shift in ((0x9E3779B1, 16), (0x85EBCA6B, 13), (0xC2B2AE35, 16)):
        bits = bits * jnp.uint32(factor)
        bits = bits ^ (bits >> shift)
    return bits
