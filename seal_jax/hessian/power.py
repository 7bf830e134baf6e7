"""Power iteration with deflation: the slow cross-check of Lanczos."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.errors import UsageError, check_integer, check_key, check_number
from seal_jax.hessian import krylov, trees
from seal_jax.hessian.lanczos import Eigenpairs, rounding

PyTree = Any


class _Iterate(NamedTuple):
    vector: PyTree
    value: jax.Array
    residual: jax.Array
    products: jax.Array


def power_iteration(
    op: krylov.LinearOperator,
    k: int,
    *,
    tolerance: float = 1e-3,
    max_products: int = 1000,
    key: jax.Array | None = None,
) -> Eigenpairs:
    """Return the k eigenpairs of largest magnitude, one after the other.

    Each is iterated until its residual is at most ``tolerance`` times the first eigenvalue, or until
    it has used ``max_products`` products; the next starts orthogonal to those before. What is wrong
    with those before stays in the residuals of those after, whatever their number of products: the
    first are iterated further than the last, by a factor of the square root of 2 each.

    Raises:
      UsageError: an argument out of range, or products that are not finite.

    >>> import seal_jax.hessian as hessian
    >>> matrix = jnp.diag(jnp.array([3.0, -5.0, 1.0]))
    >>> op = hessian.operator(lambda x: 0.5 * x @ matrix @ x, jnp.zeros(3))
    >>> [round(float(value), 2) for value in power_iteration(op, 2).values]
    [-5.0, 3.0]
    """
    size = krylov.rows(op)
    key = check_key("key", key, optional=True)
    check_number("k", k, lambda value: 1 <= value <= size, f"lie in 1..{size}", whole=True)
    check_number("tolerance", tolerance, lambda value: value > 0, "be positive")
    check_integer("max_products", max_products, 1)
    basis = trees.empty_basis(op.like, k)
    values, residuals, products = np.zeros(k), np.zeros(k), 0
    for index in range(k):
        first = float(abs(values[0])) if index else 0.0
        own = jax.random.fold_in(key, index)
        limit = tolerance * 2 ** (-(k - 1 - index) / 2)
        iterate = _start(basis, own, op.like, krylov.selected(op))
        # A NaN ends it.
        while iterate.products < max_products and (
            iterate.residual > limit * np.maximum(first, np.abs(iterate.value))
        ):
            iterate = _moved(iterate, krylov.product(op, iterate.vector), basis, first, limit)
        if not np.isfinite(float(iterate.residual)):
            raise UsageError(krylov.NOT_FINITE)
        basis = trees.put(basis, index, iterate.vector)
        values[index], residuals[index] = float(iterate.value), float(iterate.residual)
        products += int(iterate.products)
    largest = np.abs(values).max()
    residuals = residuals + rounding(largest)
    within = residuals <= tolerance * largest + rounding(largest)
    return Eigenpairs(values, basis, residuals, products, bool(within.all()))


@jax.jit
def _start(basis: PyTree, key: jax.Array, like: PyTree, selected: PyTree) -> _Iterate:
    vector, _ = krylov.orthogonalised(basis, krylov.start(like, key, selected))
    vector = trees.scale(vector, 1 / trees.norm(vector))
    return _Iterate(vector, jnp.zeros(()), jnp.full((), jnp.inf), jnp.zeros((), jnp.int32))


@jax.jit
def _moved(now: _Iterate, image: PyTree, basis: PyTree, first: Any, tolerance: Any) -> _Iterate:
    """Return the next iterate; the vector stays where it is good enough."""
    value = trees.dot(now.vector, image)
    residual = trees.norm(trees.add(image, now.vector, -value))
    image, _ = krylov.orthogonalised(basis, image)
    length = trees.norm(image)
    moved = trees.scale(image, 1 / jnp.where(length > 0, length, 1.0))
    good = residual <= tolerance * jnp.maximum(first, jnp.abs(value))
    vector = jax.tree.map(lambda a, b: jnp.where(good, a, b), now.vector, moved)
    return _Iterate(vector, value, residual, now.products + 1)
