"""Spectral density by stochastic Lanczos quadrature."""

from typing import NamedTuple, get_args

import jax
import numpy as np

from seal_jax.errors import check_choice, check_integer, check_key
from seal_jax.hessian import krylov
from seal_jax.hessian.krylov import Basis, LinearOperator
from seal_jax.hessian.lanczos import rounding


class Density(NamedTuple):
    """A spectral density as quadrature: a sum of weights at nodes, for each probe.

    Attributes:
      nodes: ``[probes, steps]``, Ritz values.
      weights: ``[probes, steps]``, at least 0, of sum 1 for each probe.
      couplings: ``[probes, steps]``, of the nodes' Ritz vectors with the next vector of the basis.
      resolution: the rounding of nodes.
      size: rows of the operator.
    """

    nodes: np.ndarray
    weights: np.ndarray
    couplings: np.ndarray
    resolution: float
    size: int

    def moment(self, power: int) -> float:
        """Return the mean of the eigenvalues' ``power``-th power; times ``size`` the trace of H^p."""
        return float((self.weights * self.nodes**power).sum(1).mean())

    def mass_below(self, bound: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        r"""Return a lower and an upper bound of each probe's share of eigenvalues under ``bound``.

        By the inequalities of Chebyshev, Markov and Stieltjes: of all measures with the moments that
        the iteration knows, the canonical one, which has a node at the bound, puts most and least
        below it. The nodes' own weights are no estimate of that share: where many eigenvalues are
        closer to the bound than its neighbouring nodes, they may err by half. Eigenvalues nearer to the
        bound than ``resolution`` may count on either side.

        Returns:
          Two arrays ``[probes]``; each probe's share errs by :func:`share_error`.

        References:
          Golub & Meurant, `Matrices, Moments and Quadrature with Applications`, 2010.

        >>> nodes, weights = np.array([[-2.0, 1.0]]), np.array([[0.25, 0.75]])
        >>> exact = Density(nodes, weights, np.zeros((1, 2)), 1e-6, 2)
        >>> [bound.item() for bound in exact.mass_below(0.0)]
        [0.25, 0.25]
        """
        lower = self._canonical(bound - self.resolution)[0]
        upper = self._canonical(bound + self.resolution)[1]
        return lower, upper

    def _canonical(self, node: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the weights below a prescribed node, without and with its own, ``[probes]``."""
        probes, steps = self.nodes.shape
        gaps = self.nodes - node
        # A node at the bound itself would divide by zero below.
        gaps = np.where(np.abs(gaps) < self.resolution, self.resolution, gaps)
        # The tridiagonal matrix with one more row, in the basis of its Ritz vectors.
        # [probes, steps + 1, steps + 1]
        arrow = np.zeros((probes, steps + 1, steps + 1))
        arrow[:, range(steps), range(steps)] = self.nodes
        arrow[:, -1, :-1] = arrow[:, :-1, -1] = self.couplings
        # That makes the node an eigenvalue (a Gauss-Radau rule).
        arrow[:, -1, -1] = node + (self.couplings**2 / gaps).sum(1)
        values, vectors = np.linalg.eigh(arrow)
        # The square root of a node's weight is the probe's coefficient in its Ritz vector.
        weights = np.einsum("pi,pij->pj", np.sqrt(self.weights), vectors[:, :-1]) ** 2
        nearest = np.abs(values - node).argmin(1)[:, None]
        index = np.arange(steps + 1)
        return (weights * (index < nearest)).sum(1), (weights * (index <= nearest)).sum(1)

    def on_grid(self, grid: np.ndarray, sigma: float) -> np.ndarray:
        """Return the density on a grid, every node widened to a normal of deviation ``sigma``."""
        # [grid, probes, steps]
        distance = (grid[:, None, None] - self.nodes) / sigma
        bumps = np.exp(-0.5 * distance**2) / (sigma * np.sqrt(2 * np.pi))
        return (self.weights * bumps).sum(-1).mean(-1)


def share_error(bounds: np.ndarray, size: int, probes: int) -> float:
    """Return the standard error of a share between ``bounds``, as a mean over probes.

    A normal vector's share of a subspace has a beta distribution, so its variance is known from the
    ``size`` of the operator.

    >>> share_error(np.array([0.1, 0.9]), 98, 2)
    0.05
    """
    # The variance is largest for a share of one half: the nearest to it that the bounds allow is the worst case.
    share = np.clip(0.5, *bounds)
    return float(np.sqrt(2 * share * (1 - share) / (size + 2) / probes))


def density(
    op: LinearOperator,
    *,
    probes: int = 8,
    steps: int = 64,
    basis: Basis = "device",
    key: jax.Array | None = None,
) -> Density:
    r"""Return the spectral density of a symmetric operator.

    Each probe is a random unit vector v; m steps of Lanczos from it give the Gauss quadrature of the
    measure :math:`\sum_i (v^\top u_i)^2 \delta_{\lambda_i}`, whose mean over probes is the density.

    Args:
      op: see :func:`seal_jax.hessian.eigenpairs`.
      probes: random vectors. Each errs by one over the square root of the operator's rows, so that
        few are enough for a network; more steps resolve more.
      steps: of Lanczos, m; memory holds m + 1 vectors.
      basis: where it is stored; see :func:`seal_jax.hessian.eigenpairs`.
      key: of the probes; a fixed one by default.

    Raises:
      UsageError: an argument out of range, or products that are not finite.

    References:
      Ubaru, Chen & Saad, `Fast estimation of tr(f(A)) via stochastic Lanczos quadrature`, 2017;
      Ghorbani, Krishnan & Xiao, `An Investigation into Neural Net Optimization via Hessian
      Eigenvalue Density`, 2019.
    """
    check_integer("probes", probes, 1)
    check_integer("steps", steps, 1)
    check_choice("basis", basis, get_args(Basis))
    size = krylov.rows(op)
    steps = min(steps, size)
    keys = jax.random.split(check_key("key", key, optional=True), probes)
    runs = [krylov.begin(op, probe, steps, basis).extend(0, steps) for probe in keys]
    values, vectors = np.linalg.eigh(np.stack([projected for projected, _ in runs]))
    # Gauss quadrature: the weight of a node is the square of its eigenvector's first entry.
    first, last = vectors[:, 0], vectors[:, -1]
    # The sign of an eigenvector is arbitrary: that with the first entry positive.
    couplings = np.array([[residual] for _, residual in runs]) * last * np.where(first < 0, -1, 1)
    largest = np.abs(values).max()
    # The rounding of vectors to bfloat16, as in `eigenpairs`.
    coarse = largest / 2**8 if basis == "bfloat16" else 0.0
    return Density(values, first**2, couplings, float(rounding(largest) + coarse), size)
