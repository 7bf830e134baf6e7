"""The trace by random probes: Hutchinson's estimate, and Hutch++."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

from seal_jax.errors import UsageError, check_choice, check_integer, check_key
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
    within it, which is exact, and the last for Hutchinson's estimate of the rest:

    .. math:: \operatorname{tr} Q^\top H Q
        + \tfrac3m \operatorname{tr} G^\top (I - QQ^\top) H (I - QQ^\top) G

    It is exact for a rank of at most ``probes // 3``, for which it holds as many vectors, and far
    better than Hutchinson's where few eigenvalues outweigh the others.

    Args:
      op: see :func:`seal_jax.hessian.eigenpairs`.
      probes: products with the operator: at least 2, or 6 for "hutch++", which uses the multiple of
        3 below.
      method: "hutchinson" or "hutch++".
      key: of the probes; a fixed one by default.

    Raises:
      UsageError: an argument out of range, or products that are not finite.

    References:
      Hutchinson, `A stochastic estimator of the trace of the influence matrix`, 1990.
      Meyer, Musco, Musco & Woodruff, `Hutch++: Optimal Stochastic Trace Estimation`, 2021,
      algorithm 1.

    >>> import jax.numpy as jnp
    >>> import seal_jax.hessian as hessian
    >>> op = hessian.operator(lambda x: jnp.sum(x**2), jnp.zeros(5))
    >>> trace(op, probes=4)
    Trace(value=10.0, error=0.0)
    """
    check_choice("method", method, get_args(Method))
    least = 2 if method == "hutchinson" else 6
    check_integer("probes", probes, least)
    key = check_key("key", key, optional=True)
    # One zero vector, which takes nothing away: Hutchinson's estimate is Hutch++ without a sketch.
    basis, inside = trees.empty_basis(op.like, 1), 0.0
    if method == "hutch++":
        # A third of the products each: for the sketch, within its span, and outside of it.
        probes = probes // 3
        sketch, key = jax.random.split(key)
        basis = trees.empty_basis(op.like, probes)
        for index, probe in enumerate(jax.random.split(sketch, probes)):
            basis = _grow(basis, index, krylov.product(op, _signs(probe, op.like)))
        # The trace within the span is exact: a sum over its basis.
        members = (krylov.take(basis, index, op.like) for index in range(probes))
        inside = float(np.sum([_quadratic_form(op, member) for member in members]))
    keys = jax.random.split(key, probes)
    forms = np.array([_quadratic_form(op, _signs_outside(basis, probe, op.like)) for probe in keys])
    if not (np.isfinite(forms).all() and np.isfinite(inside)):
        raise UsageError(krylov.NOT_FINITE)
    # The standard error is that of the random part alone.
    return Trace(inside + float(forms.mean()), float(forms.std(ddof=1) / np.sqrt(probes)))


def _quadratic_form(op: LinearOperator, vector: PyTree) -> float:
    return float(_dot(vector, krylov.product(op, vector)))


_dot = jax.jit(trees.dot)


@jax.jit
def _signs(key: jax.Array, like: PyTree) -> PyTree:
    return trees.random(key, like, signs=True)


@jax.jit
def _signs_outside(basis: PyTree, key: jax.Array, like: PyTree) -> PyTree:
    return krylov.orthogonalise(basis, trees.random(key, like, signs=True))[0]


@jax.jit
def _grow(basis: PyTree, index: Any, image: PyTree) -> PyTree:
    """Put the part of an image outside the basis into it; zero where that is rounding."""
    return krylov.append(basis, index, image, 1e-4 * trees.norm(image))[0]
