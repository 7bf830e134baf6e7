"""The trace by random probes: Hutchinson's estimate, and Hutch++."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.errors import UsageError, check_key, check_number
from seal_jax.hessian import krylov, trees
from seal_jax.hessian.krylov import LinearOperator

PyTree = Any
Method = Literal["hutchinson", "hutch++"]


class Trace(NamedTuple):
    """An estimate of the trace, ``value``, and its standard ``error`` over the probes."""

    value: float
    error: float


def trace(
    op: LinearOperator,
    *,
    probes: int = 32,
    method: Method = "hutchinson",
    key: jax.Array | None = None,
) -> Trace:
    r"""Return an unbiased estimate of the trace.

    Hutchinson's is the mean of :math:`z^\top H z` over random signs z. Hutch++ takes a third of the
    products for an orthonormal basis Q of :math:`H S`, S random signs, another third for the trace
    within it, which is exact, and the last for Hutchinson's estimate of what is left:

    .. math:: \operatorname{tr} Q^\top H Q
        + \tfrac3m \operatorname{tr} G^\top (I - QQ^\top) H (I - QQ^\top) G

    It is exact for a rank of at most ``probes // 3``, and far better than Hutchinson's where few
    eigenvalues outweigh the others, at the cost of memory for as many vectors.

    Args:
      op: see :func:`seal_jax.hessian.eigenpairs`.
      probes: products with the operator: at least 2 for an error, 6 for "hutch++", which uses the
        multiple of 3 below.
      method: "hutchinson" or "hutch++".
      key: of the probes; a fixed one by default.

    Raises:
      UsageError: an argument out of range, or products that are not finite.

    References:
      Hutchinson, `A stochastic estimator of the trace of the influence matrix`, 1990.
      Meyer, Musco, Musco & Woodruff, `Hutch++: Optimal Stochastic Trace Estimation`, 2021,
      algorithm 1.

    >>> import seal_jax.hessian as hessian
    >>> op = hessian.operator(lambda x: jnp.sum(x**2), jnp.zeros(5))
    >>> trace(op, probes=4)
    Trace(value=10.0, error=0.0)
    """
    if method not in get_args(Method):
        raise UsageError(f"method = {method!r} must be one of {', '.join(get_args(Method))}")
    least = 2 if method == "hutchinson" else 6
    check_number("probes", probes, lambda value: value >= least, f"be at least {least}", whole=True)
    key = check_key("key", key, optional=True)
    if method == "hutch++":
        probes = probes // 3
        sketch, key = jax.random.split(key)
        empty = trees.empty_basis(op.like, probes)
        keys = jax.random.split(sketch, probes)
        basis, _ = krylov.fold(op, _signs, _grow, (empty, keys), 0, probes)
        basis, within = krylov.fold(op, _member, _form, (basis, jnp.zeros(probes)), 0, probes)
        inside = float(np.sum(np.asarray(within, np.float64)))
    else:
        basis, inside = trees.empty_basis(op.like, 1), 0.0
    carry = (basis, jnp.zeros(probes), jax.random.split(key, probes))
    forms = krylov.fold(op, _signs_outside, _form, carry, 0, probes)[1]
    found = np.asarray(forms, np.float64)
    if not (np.isfinite(found).all() and np.isfinite(inside)):
        raise UsageError(krylov.NOT_FINITE)
    return Trace(inside + float(found.mean()), float(found.std(ddof=1) / np.sqrt(probes)))


def _signs(like: PyTree, carry: tuple[PyTree, jax.Array], index: Any) -> PyTree:
    return trees.random(carry[-1][index], like, signs=True)


def _signs_outside(like: PyTree, carry: tuple[Any, ...], index: Any) -> PyTree:
    return krylov.orthogonalised(carry[0], trees.random(carry[-1][index], like, signs=True))[0]


def _member(like: PyTree, carry: tuple[PyTree, jax.Array], index: Any) -> PyTree:
    return trees.take(carry[0], index, like)


def _form(carry: tuple[Any, ...], index: Any, vector: PyTree, image: PyTree) -> tuple[Any, ...]:
    """Keep the quadratic form ``v' H v``."""
    return carry[0], carry[1].at[index].set(trees.dot(vector, image)), *carry[2:]


def _grow(carry: tuple[PyTree, jax.Array], index: Any, vector: PyTree, image: PyTree) -> Any:
    """Put into the basis what an image adds to it; zero where that is rounding."""
    basis, keys = carry
    rest, _ = krylov.orthogonalised(basis, image)
    length = trees.norm(rest)
    # Written so that NaN does not look like rounding.
    nothing = length <= 1e-4 * trees.norm(image)
    unit = trees.scale(rest, jnp.where(nothing, 0.0, 1 / length))
    return trees.put(basis, index, unit), keys
