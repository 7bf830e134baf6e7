"""Spectral density by stochastic Lanczos quadrature, and the trace by random probes."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.errors import check_number
from seal_jax.hessian import trees
from seal_jax.hessian.lanczos import Krylov, LinearOperator, extend


class Density(NamedTuple):
    """A spectral density as quadrature: a sum of weights at nodes, for each probe.

    Attributes:
      nodes: ``[probes, steps]``, Ritz values.
      weights: ``[probes, steps]``, at least 0, of sum 1 for each probe.
      size: rows of the operator.
    """

    nodes: np.ndarray
    weights: np.ndarray
    size: int

    def moment(self, power: int) -> float:
        """Return the mean of the eigenvalues' ``power``-th power; times ``size`` the trace of H^p."""
        return float((self.weights * self.nodes**power).sum(1).mean())

    def negative_mass(self, below: float = 0.0) -> float:
        """Return the share of eigenvalues under ``below``."""
        return float((self.weights * (self.nodes < below)).sum(1).mean())

    def on_grid(self, grid: np.ndarray, sigma: float) -> np.ndarray:
        """Return the density on a grid, every node widened to a normal of deviation ``sigma``."""
        distance = (grid[:, None, None] - self.nodes) / sigma
        bumps = np.exp(-0.5 * distance**2) / (sigma * np.sqrt(2 * np.pi))
        return (self.weights * bumps).sum(-1).mean(-1)


def density(
    op: LinearOperator, *, probes: int = 8, steps: int = 64, key: jax.Array | None = None
) -> Density:
    r"""Return the spectral density of a symmetric operator.

    Each probe is a random unit vector v; m steps of Lanczos from it give the Gauss quadrature of the
    measure :math:`\sum_i (v^\top u_i)^2 \delta_{\lambda_i}`, whose mean over probes is the density.

    Args:
      op: see :func:`seal_jax.hessian.eigenpairs`.
      probes: random vectors, one after the other in one program.
      steps: of Lanczos, m; memory holds m + 1 vectors.
      key: of the probes; a fixed one by default.

    References:
      Ubaru, Chen & Saad, `Fast estimation of tr(f(A)) via stochastic Lanczos quadrature`, 2017;
      Ghorbani, Krishnan & Xiao, `An Investigation into Neural Net Optimization via Hessian
      Eigenvalue Density`, 2019.
    """
    check_number("probes", probes, lambda value: value >= 1, "be at least 1")
    check_number("steps", steps, lambda value: value >= 1, "be at least 1")
    size = trees.size(op.like)
    steps = min(steps, size)
    keys = jax.random.split(jax.random.key(0) if key is None else key, probes)
    projected = np.asarray(_probe(op, keys, steps), np.float64)
    values, vectors = np.linalg.eigh((projected + projected.transpose(0, 2, 1)) / 2)
    return Density(values, vectors[:, 0, :] ** 2, size)


@partial(jax.jit, static_argnames=("steps",))
def _probe(op: LinearOperator, keys: jax.Array, steps: int) -> jax.Array:
    def one(key: jax.Array) -> jax.Array:
        vector = trees.random(key, op.like)
        vector = trees.scale(vector, 1 / trees.norm(vector))
        basis = trees.put(trees.empty_basis(op.like, steps + 1), 0, vector)
        state = Krylov(basis, jnp.zeros((steps, steps)), jnp.zeros(()))
        return extend(op, state, 0, steps).projected

    return jax.lax.map(one, keys)


class Trace(NamedTuple):
    """An estimate of the trace, ``value``, and its standard ``error`` over the probes."""

    value: float
    error: float


def trace(op: LinearOperator, *, probes: int = 32, key: jax.Array | None = None) -> Trace:
    r"""Return Hutchinson's estimate, the mean of :math:`z^\top H z` over random signs z.

    Args:
      op: see :func:`seal_jax.hessian.eigenpairs`.
      probes: random vectors, at least 2 for an error.
      key: of the probes; a fixed one by default.

    References:
      Hutchinson, `A stochastic estimator of the trace of the influence matrix`, 1990.

    >>> import seal_jax.hessian as hessian
    >>> op = hessian.operator(lambda x: jnp.sum(x**2), jnp.zeros(5))
    >>> trace(op, probes=4)
    Trace(value=10.0, error=0.0)
    """
    check_number("probes", probes, lambda value: value >= 2, "be at least 2")
    keys = jax.random.split(jax.random.key(0) if key is None else key, probes)
    found = np.asarray(_forms(op, keys), np.float64)
    return Trace(float(found.mean()), float(found.std(ddof=1) / np.sqrt(probes)))


@jax.jit
def _forms(op: LinearOperator, keys: jax.Array) -> jax.Array:
    def one(key: jax.Array) -> jax.Array:
        vector = trees.random(key, op.like, signs=True)
        return trees.dot(vector, op(vector))

    return jax.lax.map(one, keys)
