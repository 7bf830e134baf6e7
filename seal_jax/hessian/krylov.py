"""Krylov decompositions of symmetric operators, on the device, with full reorthogonalisation."""

from __future__ import annotations

import abc
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
    """Multiply one vector after the other.

    The loop is Python's: the product is compiled once for whatever is done with it, and compiling
    it takes longer than all the dispatches.

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
    for index in range(start, stop):
        vector = _made(make, op.like, carry, index)
        carry = _used(use, carry, index, vector, product(op, vector))
        # One product at a time: on CPU, programs in flight whose devices wait for each other's part
        # of a sum can take all threads, and XLA ends the process.
        jax.block_until_ready(carry)
    return carry


def product(op: LinearOperator, vector: PyTree) -> PyTree:
    """Return the product of any operator with a vector, from Python."""
    return op(vector) if getattr(op, "eager", False) else _applied(op, vector)


def orthogonalised(basis: PyTree, vector: PyTree) -> tuple[PyTree, jax.Array]:
    """Return the vector without its part in the basis, twice is enough, and that part."""

    def project(_: Any, carry: tuple[PyTree, jax.Array]) -> tuple[PyTree, jax.Array]:
        vector, coefficients = carry
        part = trees.coefficients(basis, vector)
        return trees.add(vector, trees.combine(basis, part, vector), -1.0), coefficients + part

    # A loop, so that it is compiled once.
    count = len(jax.tree.leaves(basis)[0])
    return jax.lax.fori_loop(0, 2, project, (vector, jnp.zeros(count)))


def remainder(length: Any, part: Any, least: Any = 0.0, packed: bool = False) -> Any:
    """Return the norm of what is left of a vector beside its ``part`` in a basis, 0 if rounding.

    For a product that is a breakdown: the basis spans an invariant subspace.

    Args:
      length: the norm as computed.
      part: coefficients in the basis.
      least: further bound below which it counts as nothing.
      packed: whether the basis is in bfloat16. What the rounding of its vectors leaves is in their
        span: normalized, it would make the basis dependent.
    """
    scale = jnp.maximum(jnp.max(jnp.abs(part)), jnp.finfo(jnp.float32).tiny)
    bound = (2.0**-8 if packed else 4 * jnp.finfo(jnp.float32).eps) * scale
    return jnp.where(length <= jnp.maximum(bound, least), 0.0, length)


def unit(vector: PyTree, length: Any) -> PyTree:
    """Return the vector over its norm, zero if that is 0."""
    return trees.scale(vector, jnp.where(length == 0, 0.0, 1 / jnp.where(length == 0, 1.0, length)))


def another(op: LinearOperator, index: Any) -> tuple[PyTree, Any]:
    """Return any direction to go on from after a breakdown, and the ``least`` of its remainder.

    If less is left of it, the basis spans everything that the operator acts on.
    """
    vector = trees.within(selected(op), trees.scrambled(index, op.like))
    return vector, 1e-3 * trees.norm(vector)


def selected(op: LinearOperator) -> PyTree:
    """Return what an operator acts on, 0 or 1 for each leaf; ``None`` for everything."""
    return getattr(op, "selected", None)


def rows(op: LinearOperator) -> int:
    """Return the size of the operator's matrix, without what it does not act on."""
    return getattr(op, "size", trees.size(op.like))


def appended(
    basis: PyTree, index: Any, vector: PyTree, least: Any = 0.0
) -> tuple[PyTree, jax.Array, jax.Array]:
    """Put what a vector adds to a basis into row ``index``, normalized.

    Returns:
      The basis, the vector's part in it, and the norm of what is left beside it, 0 if rounding.
    """
    rest, part = orthogonalised(basis, vector)
    length = remainder(trees.norm(rest), part, least, trees.is_packed(basis))
    return trees.put(basis, index, unit(rest, length)), part, length


def steps(op: LinearOperator, key: jax.Array, size: int) -> Krylov:
    """Take ``size`` Lanczos steps from a random vector, within a program."""

    def step(index: Any, state: Krylov) -> Krylov:
        image = op(trees.take(state.basis, index, op.like))
        direction, least = another(op, index)

        def attempt(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            number, basis, part, length = carry
            first = number == 0
            vector = jax.tree.map(lambda a, b: jnp.where(first, a, b), image, direction)
            basis, *result = appended(basis, index + 1, vector, jnp.where(first, 0.0, least))
            part, length = (
                jnp.where(first, new, old) for new, old in zip(result, (part, length), strict=True)
            )
            return number + 1, basis, part, length

        # The product, and after a breakdown another direction: a loop, so as to be compiled once.
        _, basis, part, length = jax.lax.while_loop(
            lambda carry: (carry[0] == 0) | ((carry[0] == 1) & (carry[3] == 0)),
            attempt,
            (0, state.basis, jnp.zeros(size + 1), jnp.zeros(())),
        )
        # Most of the column is known from the symmetry, but for the newest entry, only roughly.
        column = part[:size]
        projected = state.projected.at[:, index].set(column).at[index, :].set(column)
        return Krylov(basis, projected, length)

    state = Krylov(
        begin(op.like, key, size, False, selected(op)), jnp.zeros((size, size)), jnp.zeros(())
    )
    return jax.lax.fori_loop(0, size, step, state)


def start(like: PyTree, key: jax.Array, selected: PyTree = None) -> PyTree:
    """Return a random unit vector, zero outside of what is selected; traced."""
    vector = trees.within(selected, trees.random(key, like))
    return unit(vector, trees.norm(vector))


def begin(
    like: PyTree, key: jax.Array, size: int, packed: bool = False, selected: PyTree = None
) -> PyTree:
    """Return a basis with room for ``size`` + 1 vectors, the first one random; traced."""
    basis = trees.empty_basis(like, size + 1, packed=packed)
    return trees.put(basis, 0, start(like, key, selected))


class Iteration(abc.ABC):
    """A Lanczos iteration that grows, is cut down to Ritz vectors, and grows again.

    The projection is on the host, in float64; where the basis is stored is up to the subclasses.

    Args:
      op: the operator.
      size: vectors, m.
    """

    def __init__(self, op: LinearOperator, size: int):
        self.op, self.size = op, size
        self.projected, self.residual = np.zeros((size, size)), 0.0

    def extend(self, start: int, stop: int) -> tuple[np.ndarray, float]:
        """Take Lanczos steps; return the projection and the norm of the residual.

        Raises:
          UsageError: products that are not finite.
        """
        for index in range(start, stop):
            image = product(self.op, self._vector(index))
            part, self.residual = self._append(index + 1, image)
            if not (np.isfinite(part).all() and np.isfinite(self.residual)):
                raise UsageError(NOT_FINITE)
            # Most of the column is known from the symmetry, but for the newest entry, only roughly:
            # all of it keeps the projection exact after restarts, where it is no tridiagonal.
            self.projected[:, index] = self.projected[index, :] = part[: self.size]
            if self.residual == 0:
                self._append(index + 1, *another(self.op, index))
        return self.projected, self.residual

    def restart(self, rotation: np.ndarray, values: np.ndarray) -> None:
        """Keep the Ritz vectors ``rotation [m, p]`` of those ``values``, and the residual vector."""
        self._rotate(rotation)
        self.projected = np.diag(np.pad(values, (0, self.size - len(values))))

    @abc.abstractmethod
    def vectors(self, rotation: np.ndarray) -> PyTree:
        """Return the combinations ``rotation [m, k]`` of the basis, each leaf ``[k, ...]``."""

    @abc.abstractmethod
    def _vector(self, index: int) -> PyTree:
        """Return row ``index`` of the basis."""

    @abc.abstractmethod
    def _append(self, index: int, vector: PyTree, least: float = 0.0) -> tuple[np.ndarray, float]:
        """Put what a vector adds to the basis into row ``index``; see :func:`appended`."""

    @abc.abstractmethod
    def _rotate(self, rotation: np.ndarray) -> None:
        """Replace the basis by its combinations ``rotation [m, p]``, and keep its last vector."""


class OnDevice(Iteration):
    """An iteration whose basis is in device memory.

    Args:
      op: the operator.
      key: of the random first vector.
      size: vectors, m.
      packed: whether the basis is in bfloat16.
    """

    def __init__(self, op: LinearOperator, key: jax.Array, size: int, packed: bool = False):
        super().__init__(op, size)
        # Spread over devices like the parameters.
        shardings = jax.tree.map(_with_leading_axis, op.like)
        first = jax.jit(begin, static_argnums=(2, 3), out_shardings=shardings)
        self.basis = first(op.like, key, size, packed, selected(op))

    def _vector(self, index: int) -> PyTree:
        return _taken(self.basis, index, self.op.like)

    def _append(self, index: int, vector: PyTree, least: float = 0.0) -> tuple[np.ndarray, float]:
        self.basis, part, length = _appended(self.basis, index, vector, least)
        return np.asarray(part, np.float64), float(length)

    def _rotate(self, rotation: np.ndarray) -> None:
        kept = rotation.shape[1]
        whole = np.zeros((self.size + 1, self.size + 1), np.float32)
        whole[:-1, :kept], whole[-1, kept] = rotation, 1
        leaves, structure = jax.tree.flatten(self.basis)
        self.basis = None
        # Leaf by leaf, so that no second basis is needed.
        for index, leaf in enumerate(jax.tree.leaves(self.op.like)):
            leaves[index] = _rotated(leaves[index], whole, leaf)
        self.basis = jax.tree.unflatten(structure, leaves)

    def vectors(self, rotation: np.ndarray) -> PyTree:
        """Return the combinations ``rotation [m, k]`` of the basis, each leaf ``[k, ...]``."""
        padded = np.pad(rotation, ((0, 1), (0, 0))).astype(np.float32)
        return _combined(self.basis, padded, self.op.like)


NOT_FINITE = (
    "products with the Hessian hold NaN or infinity: "
    "the parameters, the data or the loss are broken, or overflow"
)


@jax.jit
def _applied(op: LinearOperator, vector: PyTree) -> PyTree:
    return op(vector)


@partial(jax.jit, static_argnames=("make",))
def _made(make: Make, like: PyTree, carry: PyTree, index: Any) -> PyTree:
    return make(like, carry, index)


@partial(jax.jit, static_argnames=("use",), donate_argnames=("carry",))
def _used(use: Use, carry: PyTree, index: Any, vector: PyTree, image: PyTree) -> PyTree:
    return use(carry, index, vector, image)


_taken = jax.jit(trees.take)
_appended = jax.jit(appended, donate_argnums=0)
_rotated = jax.jit(trees.rotate)


@jax.jit
def _combined(basis: PyTree, rotation: jax.Array, like: PyTree) -> PyTree:
    return trees.combine(basis, rotation, like)


def _with_leading_axis(leaf: jax.Array) -> Any:
    """Return the sharding of a stack of arrays like ``leaf``, ``None`` to leave it to the compiler."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
