"""Spectral density by stochastic Lanczos quadrature."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from seal_jax.errors import check_key, check_number
from seal_jax.hessian import krylov, storage, trees
from seal_jax.hessian.krylov import LinearOperator


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
    op: LinearOperator,
    *,
    probes: int = 8,
    steps: int = 64,
    basis: storage.Basis = "device",
    key: jax.Array | None = None,
) -> Density:
    r"""Return the spectral density of a symmetric operator.

    Each probe is a random unit vector v; m steps of Lanczos from it give the Gauss quadrature of the
    measure :math:`\sum_i (v^\top u_i)^2 \delta_{\lambda_i}`, whose mean over probes is the density.

    Args:
      op: see :func:`seal_jax.hessian.eigenpairs`.
      probes: random vectors, one after the other, in one program unless the operator is streamed
        or the basis on the host.
      steps: of Lanczos, m; memory holds m + 1 vectors.
      basis: where it lies; see :func:`seal_jax.hessian.eigenpairs`.
      key: of the probes; a fixed one by default.

    Raises:
      UsageError: an argument out of range, or products that are not finite.

    References:
      Ubaru, Chen & Saad, `Fast estimation of tr(f(A)) via stochastic Lanczos quadrature`, 2017;
      Ghorbani, Krishnan & Xiao, `An Investigation into Neural Net Optimization via Hessian
      Eigenvalue Density`, 2019.
    """
    check_number("probes", probes, lambda value: value >= 1, "be at least 1", whole=True)
    check_number("steps", steps, lambda value: value >= 1, "be at least 1", whole=True)
    storage.check_basis(basis)
    size = trees.size(op.like)
    steps = min(steps, size)
    keys = jax.random.split(check_key("key", key, optional=True), probes)
    if krylov.is_eager(op) or basis == "host":
        each = [storage.begin(op, own, steps, basis).extend(0, steps)[0] for own in keys]
    else:
        found = _probe(op, keys, steps, basis == "bfloat16")
        each = [krylov.checked(projected, 0.0)[0] for projected in found]
    values, vectors = np.linalg.eigh(np.stack(each))
    return Density(values, vectors[:, 0, :] ** 2, size)


@partial(jax.jit, static_argnames=("steps", "packed"))
def _probe(op: LinearOperator, keys: jax.Array, steps: int, packed: bool) -> jax.Array:
    def one(key: jax.Array) -> jax.Array:
        state = krylov.begin(op.like, key, steps, packed)
        return krylov.folded(op, krylov.newest, krylov.advance, state, 0, steps).projected

    return jax.lax.map(one, keys)
