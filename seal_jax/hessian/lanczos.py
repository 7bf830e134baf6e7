"""Extreme eigenpairs by Lanczos iteration with full reorthogonalisation and thick restarts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from seal_jax.errors import UsageError, check_number
from seal_jax.hessian import trees

PyTree = Any
Which = Literal["LA", "SA", "LM"]
# An operator is a pytree that can be called with a vector and has ``like``, one of its vectors.
LinearOperator = Any


class Eigenpairs(NamedTuple):
    """What :func:`eigenpairs` found, in the order of ``which``.

    Attributes:
      values: ``[k]``, NumPy.
      vectors: pytree like a vector, every leaf with a leading axis of k; of unit norm.
      residuals: ``[k]``, upper bounds of ``|H v - value v|``, and so of the distance from each value
        to an eigenvalue of H.
      products: how many products with the operator it took.
      converged: whether every residual is within the tolerance.
    """

    values: np.ndarray
    vectors: PyTree
    residuals: np.ndarray
    products: int
    converged: bool


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


def orthogonalised(basis: PyTree, vector: PyTree) -> tuple[PyTree, jax.Array]:
    """Return the vector without its part in the basis, twice is enough, and that part."""
    found = jnp.zeros(())
    for _ in range(2):
        part = trees.coefficients(basis, vector)
        vector = trees.add(vector, trees.combine(basis, part), -1.0)
        found = found + part
    return vector, found


def _another(basis: PyTree, index: Any) -> PyTree:
    """Return a random unit vector orthogonal to the basis, to go on from after a breakdown."""
    like = trees.take(basis, 0)
    vector, _ = orthogonalised(
        basis, trees.random(jax.random.fold_in(jax.random.key(1), index), like)
    )
    length = trees.norm(vector)
    # Nothing is left where the basis spans everything.
    spans = length <= 1e-3 * jnp.sqrt(jnp.float32(trees.size(like)))
    return trees.scale(vector, jnp.where(spans, 0.0, 1 / jnp.where(spans, 1.0, length)))


def extend(op: LinearOperator, state: Krylov, start: Any, stop: int) -> Krylov:
    """Take Lanczos steps from ``start`` (may be traced) to ``stop`` vectors."""

    def step(index: Any, state: Krylov) -> Krylov:
        basis, projected, _ = state
        image = op(trees.take(basis, index))
        rest, part = orthogonalised(basis, image)
        length = trees.norm(rest)
        scale = jnp.maximum(jnp.max(jnp.abs(part)), jnp.finfo(jnp.float32).tiny)
        # A breakdown: the basis is an invariant subspace, and the rest is rounding.
        exhausted = length <= 4 * jnp.finfo(jnp.float32).eps * scale
        unit = jax.lax.cond(
            exhausted,
            lambda: _another(basis, index),
            lambda: trees.scale(rest, 1 / jnp.where(exhausted, 1.0, length)),
        )
        length = jnp.where(exhausted, 0.0, length)
        column = part[: projected.shape[0]]
        # Its part in the basis is known from the symmetry, but for the newest entry, only roughly:
        # the full column keeps the projection exact after restarts, where it is no tridiagonal.
        projected = projected.at[:, index].set(column)
        projected = projected.at[index, :].set(column)
        return Krylov(trees.put(basis, index + 1, unit), projected, length)

    return jax.lax.fori_loop(start, stop, step, state)


@partial(jax.jit, static_argnames=("stop",))
def _run(op: LinearOperator, state: Krylov, start: Any, stop: int) -> Krylov:
    return extend(op, state, start, stop)


@jax.jit
def _restart(state: Krylov, rotation: jax.Array, values: jax.Array) -> Krylov:
    """Keep the Ritz vectors ``rotation [m, p]`` and the residual vector after them."""
    size = state.projected.shape[0]
    kept = rotation.shape[1]
    inner = jax.tree.map(lambda rows: rows[:size], state.basis)
    ritz = trees.combine(inner, rotation)
    basis = jax.tree.map(
        lambda rows, own: jnp.zeros_like(rows).at[:kept].set(own).at[kept].set(rows[size]),
        state.basis,
        ritz,
    )
    projected = jnp.zeros_like(state.projected).at[jnp.arange(kept), jnp.arange(kept)].set(values)
    return Krylov(basis, projected, state.residual)


def _first(op: LinearOperator, key: jax.Array, size: int) -> Krylov:
    """Return a basis with room for ``size`` + 1 vectors, spread over devices like the parameters."""
    like = op.like

    def build(key: jax.Array) -> PyTree:
        vector = trees.random(key, like)
        vector = trees.scale(vector, 1 / trees.norm(vector))
        return trees.put(trees.empty_basis(like, size + 1), 0, vector)

    shardings = jax.tree.map(_with_leading_axis, like)
    basis = jax.jit(build, out_shardings=shardings)(key)
    return Krylov(basis, jnp.zeros((size, size)), jnp.zeros(()))


def _with_leading_axis(leaf: jax.Array) -> Any:
    """Return the sharding of a stack of arrays like ``leaf``, ``None`` to leave it to the compiler."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def order_by(which: Which) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function that sorts eigenvalues, the wanted ones first."""
    return {
        "LA": lambda values: np.argsort(-values, kind="stable"),
        "SA": lambda values: np.argsort(values, kind="stable"),
        "LM": lambda values: np.argsort(-np.abs(values), kind="stable"),
    }[which]


def eigenpairs(
    op: LinearOperator,
    k: int,
    which: Which = "LA",
    *,
    tolerance: float = 1e-3,
    basis_size: int | None = None,
    max_products: int = 1000,
    key: jax.Array | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Eigenpairs:
    """Return k extreme eigenpairs of a symmetric operator.

    Lanczos iteration with full reorthogonalisation in a basis of bounded size; when it is full, the
    best Ritz vectors are kept and the iteration goes on from there (thick restart), until every
    residual is at most ``tolerance`` times the largest eigenvalue in magnitude.

    Args:
      op: as :func:`seal_jax.hessian.operator` makes it, or any pytree that can be called with a
        vector and has ``like``.
      k: how many, at least 1 and at most the operator's rows.
      which: the largest ("LA"), the smallest ("SA"), or those of largest magnitude ("LM").
      tolerance: see above; float32 products carry about 1e-6.
      basis_size: vectors held at a time; ``max(2 k, k + 20)`` by default.
      max_products: bound on the products with the operator.
      key: of the random start; a fixed one by default.
      progress: called with the products so far and the worst relative residual.

    Raises:
      UsageError: k, basis_size or which out of range.

    References:
      Wu & Simon, `Thick-restart Lanczos method for large symmetric eigenvalue problems`, 2000.

    >>> import seal_jax.hessian as hessian
    >>> matrix = jnp.diag(jnp.array([3.0, -5.0, 1.0]))
    >>> op = hessian.operator(lambda x: 0.5 * x @ matrix @ x, jnp.zeros(3))
    >>> [round(float(value), 4) for value in eigenpairs(op, 2, "LM").values]
    [-5.0, 3.0]
    """
    size = trees.size(op.like)
    if which not in get_args(Which):
        raise UsageError(f"which = {which!r} must be one of {', '.join(get_args(Which))}")
    check_number("k", k, lambda value: 1 <= value <= size, f"lie in 1..{size}")
    check_number("tolerance", tolerance, lambda value: value > 0, "be positive")
    m = min(size, max(2 * k, k + 20) if basis_size is None else basis_size)
    if m < min(k + 2, size):
        raise UsageError(f"basis_size = {m} must be at least {min(k + 2, size)} for k = {k}")
    key = jax.random.key(0) if key is None else key
    state = _first(op, key, m)
    kept, products = 0, 0
    while True:
        state = _run(op, state, kept, m)
        products += m - kept
        projected, beta = np.asarray(state.projected, np.float64), float(state.residual)
        projected = (projected + projected.T) / 2
        values, rotation = np.linalg.eigh(projected)
        order = order_by(which)(values)
        values, rotation = values[order], rotation[:, order]
        # Rounding of the products themselves bounds what any residual can claim.
        floor = 8 * np.finfo(np.float32).eps * np.abs(values).max(initial=0.0)
        residuals = np.abs(beta * rotation[-1]) + floor
        scale = max(np.abs(values).max(initial=0.0), np.finfo(np.float32).tiny)
        converged = bool((residuals[:k] <= tolerance * scale + floor).all()) or m == size
        if progress is not None:
            progress(products, float(residuals[:k].max() / scale))
        if converged or products + 1 > max_products:
            break
        kept = min(k + (m - k) // 2, m - 1)
        state = _restart(state, jnp.asarray(rotation[:, :kept]), jnp.asarray(values[:kept]))
    inner = jax.tree.map(lambda rows: rows[:m], state.basis)
    vectors = jax.jit(trees.combine)(inner, jnp.asarray(rotation[:, :k]))
    return Eigenpairs(values[:k], vectors, residuals[:k], products, converged)
