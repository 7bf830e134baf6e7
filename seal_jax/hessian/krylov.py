"""Krylov decompositions of symmetric operators, on the device, with full reorthogonalisation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from seal_jax.errors import UsageError
from seal_jax.hessian import trees

PyTree = Any
# An operator is a pytree that can be called with a vector and has ``like``, one of its vectors. If it
# has a true attribute ``eager`` it is no pytree but called from Python, as ``Streamed`` is. If it acts
# on a part of its vectors alone, it has the attributes ``selected`` and ``size``, as ``Operator`` does.
LinearOperator = Any
Make = Callable[[PyTree, PyTree, Any], PyTree]
Use = Callable[[PyTree, Any, PyTree, PyTree], PyTree]


class Krylov(NamedTuple):
    """A Krylov decomposition ``A V = V T + v b'``; rows of the basis beyond its size are zero.

    Attributes:
      basis: ``[m + 1]`` vectors, orthonormal.
      projected: ``V' A V``, ``[m, m]``.
      residual: norm of what is left over, the last off-diagonal entry.
    """

    basis: PyTree
    projected: jax.Array
    residual: jax.Array


def fold(op: LinearOperator, make: Make, use: Use, carry: PyTree, start: int, stop: int) -> PyTree:
    """Multiply one vector after the other: one program, or a Python loop if the operator is eager.

    Args:
      op: the operator.
      make: ``make(like, carry, index) -> vector``; traced, a function of a module.
      use: ``use(carry, index, vector, product) -> carry``; likewise.
      carry: donated.
      start: first index.
      stop: one past the last.

    Returns:
      The last carry.
    """
    if not is_eager(op):
        return _folded(op, make, use, carry, start, stop)
    for index in range(start, stop):
        vector = _made(make, op.like, carry, index)
        carry = _used(use, carry, index, vector, op(vector))
    return carry


def folded(
    op: LinearOperator, make: Make, use: Use, carry: PyTree, start: Any, stop: Any
) -> PyTree:
    """Do the same within a program."""

    def step(index: Any, carry: PyTree) -> PyTree:
        vector = make(op.like, carry, index)
        return use(carry, index, vector, op(vector))

    return jax.lax.fori_loop(start, stop, step, carry)


def product(op: LinearOperator, vector: PyTree) -> PyTree:
    """Return the product of any operator with a vector, from Python."""
    return op(vector) if is_eager(op) else _applied(op, vector)


def is_eager(op: LinearOperator) -> bool:
    """Return whether an operator must be called from Python."""
    return getattr(op, "eager", False)


def orthogonalised(basis: PyTree, vector: PyTree) -> tuple[PyTree, jax.Array]:
    """Return the vector without its part in the basis, twice is enough, and that part."""
    found = jnp.zeros(())
    for _ in range(2):
        part = trees.coefficients(basis, vector)
        vector = trees.add(vector, trees.combine(basis, part, vector), -1.0)
        found = found + part
    return vector, found


def exhausted(length: Any, part: Any) -> Any:
    """Return whether what is left of a product beside its ``part`` in the basis is rounding.

    That is a breakdown: the basis spans an invariant subspace.
    """
    scale = jnp.maximum(jnp.max(jnp.abs(part)), jnp.finfo(jnp.float32).tiny)
    return length <= 4 * jnp.finfo(jnp.float32).eps * scale


def scrambled(index: Any, first: PyTree) -> PyTree:
    """Return a vector of pseudo-random numbers, zero where the first of a basis is exactly.

    There the operator acts on nothing: see ``Operator.block``.
    """
    vector = trees.scrambled(index, first)
    return jax.tree.map(lambda x, start: jnp.where(start == 0, 0, x), vector, first)


def spans(length: Any, before: Any) -> Any:
    """Return whether of a vector so little is left that the basis must span everything."""
    return length <= 1e-3 * before


def _another(basis: PyTree, index: Any, like: PyTree) -> PyTree:
    """Return any unit vector orthogonal to the basis, to go on from after a breakdown, or zero."""
    any_other = scrambled(index, trees.take(basis, 0, like))
    vector, _ = orthogonalised(basis, any_other)
    length = trees.norm(vector)
    nothing = spans(length, trees.norm(any_other))
    return trees.scale(vector, jnp.where(nothing, 0.0, 1 / jnp.where(nothing, 1.0, length)))


def mirrored(projected: Any, index: Any, column: Any) -> Any:
    """Write a row and a column of the projection.

    Most of it is known from the symmetry, but for the newest entry, only roughly: the full column
    keeps the projection exact after restarts, where it is no tridiagonal.
    """
    return projected.at[:, index].set(column).at[index, :].set(column)


def newest(like: PyTree, state: Krylov, index: Any) -> PyTree:
    """Return the vector that is to be multiplied, the newest of the basis."""
    return trees.take(state.basis, index, like)


def advance(state: Krylov, index: Any, vector: PyTree, image: PyTree) -> Krylov:
    """Take in ``image``, the product with the newest vector."""
    del vector  # as the basis has it
    basis, projected, _ = state
    rest, part = orthogonalised(basis, image)
    length = trees.norm(rest)
    over = exhausted(length, part)
    unit = jax.lax.cond(
        over,
        lambda: _another(basis, index, image),
        lambda: trees.scale(rest, 1 / jnp.where(over, 1.0, length)),
    )
    projected = mirrored(projected, index, part[: projected.shape[0]])
    return Krylov(trees.put(basis, index + 1, unit), projected, jnp.where(over, 0.0, length))


def start(like: PyTree, key: jax.Array, selected: PyTree = None) -> PyTree:
    """Return a random unit vector, zero outside of what is selected; traced."""
    vector = trees.within(selected, trees.random(key, like))
    return trees.scale(vector, 1 / trees.norm(vector))


def rows(op: LinearOperator) -> int:
    """Return the size of the operator's matrix, without what it does not act on."""
    return getattr(op, "size", trees.size(op.like))


def selected(op: LinearOperator) -> PyTree:
    """Return what an operator acts on, 0 or 1 for each leaf; ``None`` for everything."""
    return getattr(op, "selected", None)


def begin(
    like: PyTree, key: jax.Array, size: int, packed: bool = False, selected: PyTree = None
) -> Krylov:
    """Return a basis with room for ``size`` + 1 vectors, the first one random; traced."""
    basis = trees.empty_basis(like, size + 1, packed=packed)
    basis = trees.put(basis, 0, start(like, key, selected))
    return Krylov(basis, jnp.zeros((size, size)), jnp.zeros(()))


class OnDevice:
    """A Krylov basis in device memory that grows, is cut down to Ritz vectors, and grows again.

    Args:
      op: the operator.
      key: of the random first vector.
      size: vectors, m.
      packed: whether the basis is in bfloat16.
    """

    def __init__(self, op: LinearOperator, key: jax.Array, size: int, packed: bool = False):
        self.op, self.size = op, size
        # Spread over devices like the parameters.
        shardings: Any = (jax.tree.map(_with_leading_axis, op.like), None, None)
        first = jax.jit(begin, static_argnums=(2, 3), out_shardings=Krylov(*shardings))
        self.state = first(op.like, key, size, packed, selected(op))

    def extend(self, start: int, stop: int) -> tuple[np.ndarray, float]:
        """Take Lanczos steps; return the projection in float64 and the norm of the residual.

        Raises:
          UsageError: products that are not finite.
        """
        self.state = fold(self.op, newest, advance, self.state, start, stop)
        return checked(self.state.projected, self.state.residual)

    def restart(self, rotation: np.ndarray, values: np.ndarray) -> None:
        """Keep the Ritz vectors ``rotation [m, p]`` of those ``values``, and the residual vector."""
        kept = len(values)
        whole = np.zeros((self.size + 1, self.size + 1))
        whole[:-1, :kept], whole[-1, kept] = rotation, 1
        leaves, structure = jax.tree.flatten(self.state.basis)
        types = jax.tree.leaves(self.op.like)
        residual, self.state = self.state.residual, None
        # Leaf by leaf, so that no second basis is needed.
        for index in range(len(leaves)):
            leaves[index] = _rotated(leaves[index], jnp.asarray(whole, jnp.float32), types[index])
        self.state = Krylov(
            jax.tree.unflatten(structure, leaves), _diagonal(self.size, values), residual
        )

    def vectors(self, rotation: np.ndarray) -> PyTree:
        """Return the combinations ``rotation [m, k]`` of the basis, each leaf ``[k, ...]``."""
        padded = np.pad(rotation, ((0, 1), (0, 0)))
        return _combined(self.state.basis, jnp.asarray(padded, jnp.float32), self.op.like)


def checked(projected: Any, residual: Any) -> tuple[np.ndarray, float]:
    """Return both on the host.

    Raises:
      UsageError: they are not finite.
    """
    found, rest = np.asarray(projected, np.float64), float(residual)
    if not (np.isfinite(found).all() and np.isfinite(rest)):
        raise UsageError(NOT_FINITE)
    return (found + found.T) / 2, rest


NOT_FINITE = (
    "products with the Hessian hold NaN or infinity: "
    "the parameters, the data or the loss are broken, or overflow"
)


@jax.jit
def _applied(op: LinearOperator, vector: PyTree) -> PyTree:
    return op(vector)


@partial(jax.jit, static_argnames=("make", "use"), donate_argnames=("carry",))
def _folded(op: LinearOperator, make: Make, use: Use, carry: PyTree, start: Any, stop: Any):
    return folded(op, make, use, carry, start, stop)


@partial(jax.jit, static_argnames=("make",))
def _made(make: Make, like: PyTree, carry: PyTree, index: Any) -> PyTree:
    return make(like, carry, index)


@partial(jax.jit, static_argnames=("use",), donate_argnames=("carry",))
def _used(use: Use, carry: PyTree, index: Any, vector: PyTree, image: PyTree) -> PyTree:
    return use(carry, index, vector, image)


_rotated = jax.jit(trees.rotate)


@jax.jit
def _combined(basis: PyTree, rotation: jax.Array, like: PyTree) -> PyTree:
    return trees.combine(basis, rotation, like)


def _diagonal(size: int, values: np.ndarray) -> jax.Array:
    return jnp.asarray(np.diag(np.pad(values, (0, size - len(values)))), jnp.float32)


def _with_leading_axis(leaf: jax.Array) -> Any:
    """Return the sharding of a stack of arrays like ``leaf``, ``None`` to leave it to the compiler."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
