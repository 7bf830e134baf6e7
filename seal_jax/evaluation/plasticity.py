"""How much a network can still learn: dormant units, ranks of features, sizes and conditioning of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from seal_jax import layers, paths
from seal_jax.errors import UsageError, check_features, check_number

PyTree = Any


def effective_rank(features: np.ndarray, share: float = 0.99) -> int:
    r"""Return how many singular values of ``features [n, d]`` hold a share of their sum.

    .. math:: \mathrm{srank} = \min\{k : \sum_{i \le k} \sigma_i \ge s \sum_i \sigma_i\}

    Args:
      features: one row per example, not centred.
      share: s, in (0, 1]; Kumar et al. have 0.99.

    References:
      Kumar et al., `Implicit Under-Parameterization Inhibits Data-Efficient Deep Reinforcement Learning`, 2021.

    >>> effective_rank(np.diag([98.0, 1.5, 0.5])), effective_rank(np.eye(3)), effective_rank(np.zeros((3, 2)))
    (2, 3, 0)
    """
    check_number("share", share, lambda value: 0 < value <= 1, "lie in (0, 1]")
    values = _singular_values("features", features)
    if not values.any():
        return 0
    cumulative = np.cumsum(values) / values.sum()
    # A share of 1 may be missed by rounding; the rank is at most the number of values.
    return min(int(np.searchsorted(cumulative, share)) + 1, len(values))


def entropy_rank(features: np.ndarray) -> float:
    r"""Return the effective rank of ``features [n, d]`` by the entropy of their singular values.

    .. math:: \exp\left(-\sum_i p_i \ln p_i\right), \quad p_i = \sigma_i / \sum_k \sigma_k

    References:
      Roy and Vetterli, `The effective rank: A measure of effective dimensionality`, 2007.

    >>> round(entropy_rank(np.eye(3)), 6), round(entropy_rank(np.ones((5, 4))), 6)
    (3.0, 1.0)
    """
    values = _singular_values("features", features)
    if not values.any():
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def isometry_deviation(kernel: np.ndarray) -> float:
    r"""Return how far a kernel is from an isometry, whatever its scale: 0 if all singular values are equal.

    The kernel, a matrix :math:`W` of all its inputs by its outputs, has k = min(inputs, outputs) singular values:

    .. math:: \frac{1}{\sqrt k} \left\| \frac{W^\top W}{c} - I \right\|_F, \quad c = \frac1k \sum_i \sigma_i^2,

    with :math:`W W^\top` where there are fewer inputs than outputs. It is the deviation of the squared singular
    values relative to their mean, at most :math:`\sqrt{k - 1}`. Measures of the deviation without c, and without
    the root of k, grow with the size of the weights and of the layer.

    Args:
      kernel: ``[..., inputs, outputs]``, as in Flax; kernels of convolutions too.

    >>> isometry_deviation(3 * np.eye(4)[:, :2]), round(isometry_deviation(np.ones((4, 2))), 6)
    (0.0, 1.0)
    """
    values = _singular_values("kernel", np.asarray(kernel).reshape(-1, kernel.shape[-1]))
    squares = values**2
    if not squares.any():
        return 0.0
    return float(np.sqrt(np.mean((squares / squares.mean() - 1) ** 2)))


def norms(tree: PyTree, blocks: Sequence[str]) -> dict[str, float]:
    """Return the Euclidean norm of all leaves of a tree below each block, in float64.

    Args:
      tree: parameters, a gradient, or a difference of two of them.
      blocks: paths in the tree.

    >>> norms({"a": {"kernel": np.array([3.0, 4.0])}, "b": {"bias": np.ones(1)}}, ["a", "b"])
    {'a': 5.0, 'b': 1.0}
    """
    return {
        block: float(np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in below)))
        for block, below in _by_block(tree, blocks).items()
    }


def isometry_deviations(params: PyTree, blocks: Sequence[str]) -> dict[str, float]:
    """Return the mean of :func:`isometry_deviation` over the kernels below each block that has any."""
    roles = jax.tree.unflatten(jax.tree.structure(params), layers.roles(params))
    kernels = {
        block: [leaf for leaf, role in zip(leaves, below, strict=True) if role == "kernel"]
        for (block, leaves), below in zip(
            _by_block(params, blocks).items(), _by_block(roles, blocks).values(), strict=True
        )
    }
    return {
        block: float(np.mean([isometry_deviation(kernel) for kernel in found]))
        for block, found in kernels.items()
        if found
    }


def _by_block(tree: PyTree, blocks: Sequence[str]) -> dict[str, list[Any]]:
    leaves = paths.named_leaves(tree)
    found = {block: [leaf for path, leaf in leaves if paths.below(path, block)] for block in blocks}
    for block, below in found.items():
        if not below:
            raise UsageError(f"blocks name {block!r}, which is not in the tree: leave it out")
    return found


def _singular_values(field: str, matrix: Any) -> np.ndarray:
    check_features(field, matrix)
    if not np.isfinite(matrix).all():
        raise UsageError(f"{field} hold NaN or infinity: the network or its input is broken")
    # In float64: float32 would leave noise of 1e-7 of the largest where the rank is deficient.
    return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
