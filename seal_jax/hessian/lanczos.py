"""Extreme eigenpairs by Lanczos iteration with full reorthogonalisation and thick restarts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.errors import UsageError, check_integer, check_key, check_number
from seal_jax.hessian import krylov, storage, trees
from seal_jax.hessian.krylov import LinearOperator

PyTree = Any
Which = Literal["LA", "SA", "LM", "BE"]


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


def order_by(which: Which) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function that sorts eigenvalues, the wanted ones first.

    >>> order_by("BE")(np.array([-2.0, -1.0, 5.0, 7.0, 9.0])).tolist()
    [4, 0, 3, 1, 2]
    """

    def both_ends(values: np.ndarray) -> np.ndarray:
        rising = np.argsort(values, kind="stable")
        turns = np.stack([rising[::-1], rising], axis=1).ravel()
        return turns[: len(values)]

    orders: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "LA": lambda values: np.argsort(-values, kind="stable"),
        "SA": lambda values: np.argsort(values, kind="stable"),
        "LM": lambda values: np.argsort(-np.abs(values), kind="stable"),
        "BE": both_ends,
    }
    return orders[which]


def rounding(values: np.ndarray) -> float:
    """Return what the rounding of the products themselves leaves of any residual."""
    return float(8 * np.finfo(np.float32).eps * np.abs(values).max(initial=0.0))


def magnitude(values: np.ndarray) -> float:
    """Return the largest magnitude, never 0."""
    return float(max(np.abs(values).max(initial=0.0), np.finfo(np.float32).tiny))


def eigenpairs(
    op: LinearOperator,
    k: int,
    which: Which = "LA",
    *,
    tolerance: float = 1e-3,
    basis_size: int | None = None,
    byte_budget: int | None = None,
    basis: storage.Basis = "device",
    max_products: int = 1000,
    key: jax.Array | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Eigenpairs:
    """Return k extreme eigenpairs of a symmetric operator.

    Lanczos iteration with full reorthogonalisation in a basis of bounded size; when it is full, the
    best Ritz vectors are kept and the iteration goes on from there (thick restart), until every
    residual is at most ``tolerance`` times the largest eigenvalue in magnitude. Each value is one of
    H's to within its residual. As with every method that starts from one vector, of an eigenvalue
    that H has several times the further copies come late, by rounding, and may be left out.

    Args:
      op: as :func:`seal_jax.hessian.operator` or :func:`seal_jax.hessian.streamed` makes it, or any
        pytree that can be called with a vector and has ``like``.
      k: how many, at least 1 and at most the operator's rows.
      which: the largest ("LA"), the smallest ("SA"), those of largest magnitude ("LM"), or half of
        them from either end, one more of the largest where k is odd ("BE", in falling order).
      tolerance: see above; float32 products carry about 1e-6.
      basis_size: vectors held at a time; ``max(2 k, k + 20)`` by default.
      byte_budget: bytes of device memory for the basis and the work on it, without what a product
        needs. It sets ``basis_size`` to what fits, up to ``max(4 k, k + 100)``: more vectors need
        fewer products.
      basis: "device"; "bfloat16", there in half the bytes: rounding then keeps residuals above some
        1e-3 of the largest eigenvalue, and eigenvalues above about its square. They are found by k
        more products, so they bound the error nevertheless. Or "host": in host memory, from where
        every step reads it twice.
      max_products: bound on the products with the operator, but for those k and the first k.
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
    size = trees.size(op.like)
    if which not in get_args(Which):
        raise UsageError(f"which = {which!r} must be one of {', '.join(get_args(Which))}")
    storage.check_basis(basis)
    check_number("k", k, lambda value: 1 <= value <= size, f"lie in 1..{size}", whole=True)
    check_number("tolerance", tolerance, lambda value: value > 0, "be positive")
    check_integer("max_products", max_products, 1)
    m = choose_basis_size(op.like, k, basis_size, byte_budget, basis)
    found = storage.begin(op, check_key("key", key, optional=True), m, basis)
    filled, products = 0, 0
    while True:
        # Looked at now and then, so as not to fill a basis that has long sufficed.
        first = k + 2 if not products else filled + max(4, k // 2)
        stop = min(m, first, filled + max(1, max_products - products))
        projected, beta = found.extend(filled, stop)
        products, filled = products + stop - filled, stop
        values, rotation = np.linalg.eigh(projected[:filled, :filled])
        order = order_by(which)(values)
        values, rotation = values[order], rotation[:, order]
        floor, scale = rounding(values), magnitude(values)
        residuals = np.abs(beta * rotation[-1]) + floor
        within = filled >= k and bool((residuals[:k] <= tolerance * scale + floor).all())
        converged = within or filled == size
        if progress is not None:
            progress(products, float(residuals[:k].max() / scale))
        if converged or (filled >= k and products >= max_products):
            break
        if filled == m:
            filled = min(k + (m - k) // 2, m - 1)
            found.restart(rotation[:, :filled], values[:filled])
    rotation = np.pad(rotation, ((0, m - filled), (0, 0)))
    vectors = found.vectors(rotation[:, :k])
    values, residuals = values[:k], residuals[:k]
    del found
    if basis == "bfloat16":
        values, vectors, residuals = _refined(op, vectors)
        products += k
        order = order_by(which)(values)
        converged = bool((residuals <= tolerance * scale + 2 * floor).all())
    else:
        order = np.arange(k)
    if which == "BE":
        order = np.argsort(-values, kind="stable")
    if (order != np.arange(k)).any():
        values, residuals = values[order], residuals[order]
        vectors = jax.tree.map(lambda rows: rows[order], vectors)
    return Eigenpairs(values, vectors, residuals, products, converged)


def choose_basis_size(
    like: PyTree, k: int, asked: int | None, byte_budget: int | None, basis: storage.Basis
) -> int:
    """Return how many vectors the basis of :func:`eigenpairs` has.

    Raises:
      UsageError: too few for k pairs, or a budget too small.
    """
    size = trees.size(like)
    if asked is not None and byte_budget is not None:
        raise UsageError("basis_size and byte_budget are both given: choose one")
    if asked is not None:
        if min(size, asked) < min(k + 2, size):
            raise UsageError(
                f"basis_size = {asked} must be at least {min(k + 2, size)} for k = {k}"
            )
        return min(size, asked)
    default = min(size, max(2 * k, k + 20))
    most = min(size, max(4 * k, k + 100))
    return storage.fitting_size(like, k, most, byte_budget, basis, default)


def _refined(op: LinearOperator, vectors: PyTree) -> tuple[np.ndarray, PyTree, np.ndarray]:
    """Return the Ritz pairs in the space of the vectors, with residuals from their products."""
    vectors = _orthonormal(vectors, op.like)
    k = len(jax.tree.leaves(vectors)[0])
    images = jax.tree.map(jnp.zeros_like, vectors)
    vectors, images = krylov.fold(op, _ritz_vector, _keep_image, (vectors, images), 0, k)
    projected, _ = krylov.checked(_gram(vectors, images, op.like), 0.0)
    values, rotation = np.linalg.eigh(projected)
    turned, lengths = _residuals(
        vectors, images, jnp.asarray(rotation, jnp.float32), values, op.like
    )
    return values, turned, np.asarray(lengths, np.float64) + rounding(values)


@jax.jit
def _orthonormal(vectors: PyTree, like: PyTree) -> PyTree:
    def one(index: Any, done: PyTree) -> PyTree:
        vector, _ = krylov.orthogonalised(done, trees.take(vectors, index, like))
        return trees.put(done, index, trees.scale(vector, 1 / trees.norm(vector)))

    count = len(jax.tree.leaves(vectors)[0])
    return jax.lax.fori_loop(0, count, one, jax.tree.map(jnp.zeros_like, vectors))


def _ritz_vector(like: PyTree, carry: tuple[PyTree, PyTree], index: Any) -> PyTree:
    return trees.take(carry[0], index, like)


def _keep_image(carry: tuple[PyTree, PyTree], index: Any, vector: PyTree, image: PyTree) -> Any:
    return carry[0], trees.put(carry[1], index, image)


@jax.jit
def _gram(a: PyTree, b: PyTree, like: PyTree) -> jax.Array:
    count = len(jax.tree.leaves(b)[0])
    return jax.lax.map(lambda i: trees.coefficients(a, trees.take(b, i, like)), jnp.arange(count))


@jax.jit
def _residuals(vectors: PyTree, images: PyTree, rotation: jax.Array, values: Any, like: PyTree):
    def length(column: tuple[jax.Array, jax.Array]) -> jax.Array:
        weights, value = column
        image, vector = (trees.combine(own, weights, like) for own in (images, vectors))
        return trees.norm(trees.add(image, vector, -value))

    lengths = jax.lax.map(length, (rotation.T, jnp.asarray(values, jnp.float32)))
    return trees.combine(vectors, rotation, like), lengths
