"""Power iteration with deflation: the slow cross-check of Lanczos."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from seal_jax.errors import UsageError, check_integer, check_key
from seal_jax.hessian import krylov, trees
from seal_jax.hessian.lanczos import Eigenpairs, rounding

PyTree = Any


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
    it has used ``max_products`` products; the next starts orthogonal to those before. Errors of a
    vector stay in the residuals of all later ones: each is iterated further than the next, by a
    factor of the square root of 2.

    Raises:
      UsageError: an argument out of range, or products that are not finite.

    >>> import jax.numpy as jnp
    >>> import seal_jax.hessian as hessian
    >>> matrix = jnp.diag(jnp.array([3.0, -5.0, 1.0]))
    >>> op = hessian.operator(lambda x: 0.5 * x @ matrix @ x, jnp.zeros(3))
    >>> [round(float(value), 2) for value in power_iteration(op, 2).values]
    [-5.0, 3.0]
    """
    key = check_key("key", key, optional=True)
    krylov.check_wanted(k, krylov.rows(op), tolerance)
    check_integer("max_products", max_products, 1)
    basis = trees.empty_basis(op.like, k)
    values, residuals, products = np.zeros(k), np.zeros(k), 0
    for index in range(k):
        # The last pair may be as wrong as the tolerance says; the ones before must be better.
        limit = tolerance * 2 ** (-(k - 1 - index) / 2)
        vector = _start(basis, jax.random.fold_in(key, index), op.like, krylov.selected(op))
        for _ in range(max_products):
            image = krylov.product(op, vector)
            products += 1
            value, residual, following = _step(basis, vector, image)
            values[index], residuals[index] = float(value), float(residual)
            largest = max(abs(values[0]), abs(values[index]))
            if not residuals[index] > limit * largest:  # a NaN ends it
                break
            vector = following
        if not np.isfinite(residuals[index]):
            raise UsageError(krylov.NOT_FINITE)
        basis = trees.put(basis, index, vector)
    largest = np.abs(values).max()
    residuals = residuals + rounding(largest)
    within = residuals <= tolerance * largest + rounding(largest)
    return Eigenpairs(values, basis, residuals, products, bool(within.all()))


@jax.jit
def _start(basis: PyTree, key: jax.Array, like: PyTree, selected: PyTree) -> PyTree:
    vector, _ = krylov.orthogonalise(basis, krylov.random_unit(like, key, selected))
    return trees.scale(vector, 1 / trees.norm(vector))


@jax.jit
def _step(basis: PyTree, vector: PyTree, image: PyTree) -> tuple[jax.Array, jax.Array, PyTree]:
    """Return a vector's Rayleigh quotient and residual, and the next vector."""
    value = trees.dot(vector, image)
    # Before deflation: the residual is that of H itself.
    residual = trees.norm(trees.add(image, vector, -value))
    image, _ = krylov.orthogonalise(basis, image)
    return value, residual, trees.unit(image, trees.norm(image))
