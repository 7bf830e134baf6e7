"""Extreme eigenpairs: by Lanczos iteration with full reorthogonalisation and thick restarts, and, as its
slow cross-check, by power iteration.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.errors import UsageError, check_choice, check_integer, check_key
from seal_jax.hessian import krylov, trees
from seal_jax.hessian.krylov import Basis, LinearOperator

PyTree = Any
Which = Literal["LA", "SA", "LM", "BE"]
# Bytes of a basis where neither a size nor a budget is given.
_DEFAULT_BYTES = 2**28


class Eigenpairs(NamedTuple):
    """Eigenpairs of an operator, in the order of ``which``.

    Attributes:
      values: ``[k]``, NumPy.
      vectors: pytree like a vector, every leaf with a leading axis of k; of unit norm.
      residuals: ``[k]``, upper bounds of ``|H v - value v|``, and so of the distance from each value
        to an eigenvalue of H.
      products: number of products with the operator.
      converged: whether every residual is within the tolerance, so that every value is an eigenvalue.
        It does not exclude that one further out was missed.
    """

    values: np.ndarray
    vectors: PyTree
    residuals: np.ndarray
    products: int
    converged: bool


def order_by(values: np.ndarray, which: Which) -> np.ndarray:
    """Return the indices that sort eigenvalues, the wanted ones first.

    >>> order_by(np.array([-2.0, -1.0, 5.0, 7.0, 9.0]), "BE").tolist()
    [4, 0, 3, 1, 2]
    """
    if which == "BE":  # both ends take turns
        rising = np.argsort(values, kind="stable")
        return np.stack([rising[::-1], rising], axis=1).ravel()[: len(values)]
    keys = {"LA": -values, "SA": values, "LM": -np.abs(values)}
    return np.argsort(keys[which], kind="stable")


def rounding(largest: Any) -> Any:
    """Return the residuals that the rounding of float32 products leaves, by the largest magnitude."""
    return 8 * np.finfo(np.float32).eps * largest + np.finfo(np.float32).tiny


def limits(values: np.ndarray, which: Which, tolerance: float, floor: float) -> np.ndarray:
    """Return how large the residuals of converged pairs may be, ``[k]``.

    That is ``tolerance`` times the largest magnitude of the values at the same end of the spectrum,
    but at least ``floor``. The values are in the order of :class:`Eigenpairs`.

    >>> limits(np.array([1000.0, 100.0, -0.5, -1.0]), "BE", 1e-2, 1e-3).round(3).tolist()
    [10.0, 10.0, 0.01, 0.01]
    """
    upper = (len(values) + 1) // 2 if which == "BE" else len(values)
    scales = [np.abs(end).max(initial=0.0) for end in (values[:upper], values[upper:])]
    scale = np.repeat(scales, [upper, len(values) - upper])
    return np.maximum(tolerance * scale, floor)


def eigenpairs(
    op: LinearOperator,
    k: int,
    which: Which = "LA",
    *,
    tolerance: float = 1e-3,
    basis_size: int | None = None,
    byte_budget: int | None = None,
    basis: Basis = "device",
    max_products: int = 1000,
    key: jax.Array | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Eigenpairs:
    """Return k extreme eigenpairs of a symmetric operator.

    Lanczos iteration with full reorthogonalisation in a basis of bounded size; when it is full, the
    best Ritz vectors are kept and the iteration continues from there (thick restart), until every
    residual is at most ``tolerance`` times the largest magnitude among the values at the same end
    of the spectrum, or 2e-6 of the largest eigenvalue (after restarts 4e-6), which is what float32
    resolves. Starting from one vector, the iteration finds the further copies of a multiple
    eigenvalue late, by rounding, and may leave them out.

    Residuals are estimates of the iteration. Where restarts or bfloat16 have rounded the vectors,
    they are computed from k more products at the end, and pairs are those of the vectors' span.

    Args:
      op: of :func:`seal_jax.hessian.operator` or :func:`seal_jax.hessian.streamed`, or any pytree
        that can be called with a vector and has ``like``, a vector.
      k: number of pairs, in 1..rows of the operator.
      which: the largest ("LA"), the smallest ("SA"), those of largest magnitude ("LM"), or half of
        them from either end, one more of the largest where k is odd ("BE", in falling order).
      tolerance: of the residuals, see above.
      basis_size: vectors in memory; by default as many as fit into 256 MiB, between
        ``max(2 k, k + 20)`` and ``max(4 k, k + 100)``. More vectors need fewer products.
      byte_budget: bytes of device memory for the basis and the work on it, without the memory of a
        product. It sets ``basis_size`` to what fits, up to ``max(4 k, k + 100)``.
      basis: where the basis is stored: on the "device"; there as "bfloat16", in half the bytes, which
        keeps residuals above about 1e-3 of the largest eigenvalue and errors of eigenvalues above
        about its square; or on the "host", from where every step reads it twice.
      max_products: bound on the products of the iteration; the first k are always taken.
      key: of the random start; a fixed one by default.
      progress: called with the products so far and the worst relative residual.

    Raises:
      UsageError: k, basis_size, byte_budget, basis or which out of range, or products that are not
        finite.

    References:
      Wu & Simon, `Thick-restart Lanczos method for large symmetric eigenvalue problems`, 2000.

    >>> import seal_jax.hessian as hessian
    >>> matrix = jnp.diag(jnp.array([3.0, -5.0, 1.0]))
    >>> op = hessian.operator(lambda x: 0.5 * x @ matrix @ x, jnp.zeros(3))
    >>> [round(float(value), 4) for value in eigenpairs(op, 2, "LM").values]
    [-5.0, 3.0]
    """
    size = krylov.rows(op)
    check_choice("which", which, get_args(Which))
    check_choice("basis", basis, get_args(Basis))
    krylov.check_wanted(k, size, tolerance)
    check_integer("max_products", max_products, 1)
    m = choose_basis_size(op.like, k, basis_size, byte_budget, basis)
    iteration = krylov.begin(op, check_key("key", key, optional=True), m, basis)
    filled, products, rounded = 0, 0, basis == "bfloat16"
    while True:
        # Convergence is checked now and then: a basis that has sufficed for long need not be filled up.
        first = k + 2 if not products else filled + max(4, k // 2)
        stop = min(m, size, first, filled + max(1, max_products - products))
        projected, beta = iteration.extend(filled, stop)
        products, filled = products + stop - filled, stop
        # The small problem is solved in float64: errors are then those of the products alone.
        values, rotation = np.linalg.eigh(projected[:filled, :filled])
        order = order_by(values, which)
        largest = np.abs(values).max()
        # Both ends take turns, so that a restart keeps as many of either; results fall.
        wanted = np.sort(order[:k])[::-1] if which == "BE" else order[:k]
        # |A y - value y| of a Ritz vector y is the last remainder times y's last coefficient.
        residuals = np.abs(beta * rotation[-1, wanted]) + rounding(largest)
        floor = 2 * rounding(largest) + (largest / 2**8 if basis == "bfloat16" else 0.0)
        allowed = limits(values[wanted], which, tolerance, floor)
        within = bool((residuals <= allowed).all())
        if progress is not None:
            progress(products, float(residuals.max() / max(largest, np.finfo(np.float32).tiny)))
        # The bound on products may be smaller than k: k pairs need k vectors.
        if filled >= k and (within or filled == size or products >= max_products):
            break
        if filled == m:
            # More Ritz vectors than wanted: those next in line also converge faster from here.
            filled, rounded = min(k + (m - k) // 2, m - 1), True
            kept = order[:filled]
            iteration.restart(rotation[:, kept], values[kept])
    vectors = iteration.vectors(np.pad(rotation[:, wanted], ((0, m - filled), (0, 0))))
    del iteration  # its basis, before further products need the memory
    values, converged = values[wanted], within
    if rounded:
        values, vectors, lengths = _refined(op, vectors, which)
        products += k
        residuals = lengths + rounding(largest)
        # Vectors in float32 leave more than the iteration, which knows them better.
        floor = 4 * rounding(largest)
        converged = bool((residuals <= limits(values, which, tolerance, floor)).all())
    return Eigenpairs(values, vectors, residuals, products, converged)


def choose_basis_size(
    like: PyTree, k: int, asked: int | None, byte_budget: int | None, basis: Basis
) -> int:
    """Return how many vectors the basis of :func:`eigenpairs` has; raise if too few fit for k pairs."""
    size = trees.size(like)
    least, most = min(k + 2, size), min(size, max(4 * k, k + 100))
    if asked is not None and byte_budget is not None:
        raise UsageError("basis_size and byte_budget are both given: choose one")
    if asked is not None:
        if min(size, asked) < least:
            raise UsageError(f"basis_size = {asked} must be at least {least} for k = {k}")
        return min(size, asked)
    default = min(most, max(2 * k, k + 20, _DEFAULT_BYTES // trees.nbytes(like)))
    if byte_budget is None:
        return default
    needed = krylov.device_bytes(like, least, k, basis)
    if needed > byte_budget:
        fixes = {"device": ' or basis = "bfloat16" or "host"', "bfloat16": ' or basis = "host"'}
        raise UsageError(
            f"byte_budget = {byte_budget} must be at least {needed}, for the {least} vectors that "
            f"k = {k} needs: raise it, lower k{fixes.get(basis, '')}"
        )
    if basis == "host":  # the budget is that of the device
        return default
    sizes = range(least, most + 1)
    return max(m for m in sizes if krylov.device_bytes(like, m, k, basis) <= byte_budget)


def _refined(
    op: LinearOperator, vectors: PyTree, which: Which
) -> tuple[np.ndarray, PyTree, np.ndarray]:
    """Return the Ritz pairs in the space of the vectors, and ``|H v - value v|`` from products."""
    # Rounding with every restart, and to bfloat16, takes Ritz vectors apart: they are no longer orthonormal.
    vectors = _orthonormal(vectors, op.like)
    images = jax.tree.map(jnp.zeros_like, vectors)
    for index in range(len(jax.tree.leaves(vectors)[0])):
        image = krylov.product(op, krylov.take(vectors, index, op.like))
        images = krylov.put(images, index, image)
    projected = np.asarray(_gram(vectors, images, op.like), np.float64)
    # Symmetric only up to the rounding of the products; ``eigh`` would read one triangle.
    values, rotation = np.linalg.eigh((projected + projected.T) / 2)
    order = np.argsort(-values) if which == "BE" else order_by(values, which)
    values = values[order]
    rotated, lengths = _residuals(
        vectors, images, rotation[:, order].astype(np.float32), values, op.like
    )
    return values, rotated, np.asarray(lengths, np.float64)


@jax.jit
def _orthonormal(vectors: PyTree, like: PyTree) -> PyTree:
    def append(index: Any, basis: PyTree) -> PyTree:
        return krylov.append(basis, index, trees.take(vectors, index, like))[0]

    count = len(jax.tree.leaves(vectors)[0])
    return jax.lax.fori_loop(0, count, append, jax.tree.map(jnp.zeros_like, vectors))


@jax.jit
def _gram(a: PyTree, b: PyTree, like: PyTree) -> jax.Array:
    count = len(jax.tree.leaves(b)[0])
    return jax.lax.map(lambda i: trees.coefficients(a, trees.take(b, i, like)), jnp.arange(count))


@jax.jit
def _residuals(vectors: PyTree, images: PyTree, rotation: jax.Array, values: Any, like: PyTree):
    def length(column: tuple[jax.Array, jax.Array]) -> jax.Array:
        weights, value = column
        image, vector = (trees.combine(rows, weights, like) for rows in (images, vectors))
        return trees.norm(trees.add(image, vector, -value))

    lengths = jax.lax.map(length, (rotation.T, jnp.asarray(values, jnp.float32)))
    return trees.combine(vectors, rotation, like), lengths


def power_iteration(
    op: LinearOperator,
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
