"""Power iteration with deflation: the slow cross-check of Lanczos."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.hessian import trees
from seal_jax.hessian.lanczos import Eigenpairs, orthogonalised


def power_iteration(
    op: Any,
    k: int,
    *,
    tolerance: float = 1e-3,
    max_products: int = 1000,
    key: jax.Array | None = None,
) -> Eigenpairs:
    """Return the k eigenpairs of largest magnitude, one after the other.

    Each is iterated until its residual is at most ``tolerance`` times the first eigenvalue, or until
    it has used ``max_products`` products; the next starts orthogonal to those before.

    >>> import seal_jax.hessian as hessian
    >>> matrix = jnp.diag(jnp.array([3.0, -5.0, 1.0]))
    >>> op = hessian.operator(lambda x: 0.5 * x @ matrix @ x, jnp.zeros(3))
    >>> [round(float(value), 2) for value in power_iteration(op, 2).values]
    [-5.0, 3.0]
    """
    key = jax.random.key(0) if key is None else key
    basis = trees.empty_basis(op.like, k)
    values, residuals, products = np.zeros(k), np.zeros(k), 0
    for index in range(k):
        first = float(abs(values[0])) if index else 0.0
        value, vector, residual, used = _one(
            op, basis, jax.random.fold_in(key, index), first, tolerance, max_products
        )
        basis = trees.put(basis, index, vector)
        values[index], residuals[index] = float(value), float(residual)
        products += int(used)
    scale = max(np.max(np.abs(values)), np.finfo(np.float32).tiny)
    return Eigenpairs(
        values, basis, residuals, products, bool((residuals <= tolerance * scale).all())
    )


@jax.jit
def _one(op, basis, key, first, tolerance, max_products):
    vector, _ = orthogonalised(basis, trees.random(key, op.like))
    vector = trees.scale(vector, 1 / trees.norm(vector))

    def iterate(carry):
        vector, _, _, used = carry
        image = op(vector)
        value = trees.dot(vector, image)
        residual = trees.norm(trees.add(image, vector, -value))
        image, _ = orthogonalised(basis, image)
        length = trees.norm(image)
        moved = trees.scale(image, 1 / jnp.where(length > 0, length, 1.0))
        kept = residual <= tolerance * jnp.maximum(first, jnp.abs(value))
        vector = jax.tree.map(lambda a, b: jnp.where(kept, a, b), vector, moved)
        return vector, value, residual, used + 1

    def going(carry):
        _, value, residual, used = carry
        unfinished = residual > tolerance * jnp.maximum(first, jnp.abs(value))
        return unfinished & (used < max_products)

    start = (vector, jnp.zeros(()), jnp.full((), jnp.inf), jnp.zeros((), jnp.int32))
    vector, value, residual, used = jax.lax.while_loop(going, iterate, start)
    return value, vector, residual, used
