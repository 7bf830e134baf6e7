"""How much a network can still learn: dormant units, ranks of features, sizes and conditioning of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from seal_jax import layers, paths, units
from seal_jax.errors import UsageError, check_features, check_number, kind_of

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
    values = _singular_values(features)
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
    values = _singular_values(features)
    if not values.any():
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def isometry_deviation(kernel: np.ndarray) -> float:
    r"""Return how far a kernel is from an isometry, whatever its scale: 0 if all singular values are equal.

    A matrix :math:`W` of inputs by outputs has k = min(inputs, outputs) singular values:

    .. math:: \frac{1}{\sqrt k} \left\| \frac{W^\top W}{c} - I \right\|_F, \quad c = \frac1k \sum_i \sigma_i^2,

    with :math:`W W^\top` where there are fewer inputs than outputs. It is the deviation of the squared singular
    values relative to their mean, at most :math:`\sqrt{k - 1}`. Of a convolution it is the mean over positions,
    each of which has its matrix, as FIRE makes isometries of them (Han et al. 2026). Without c and the root of
    k, as papers have it too, it grows with the size of the weights and of the layer.

    Args:
      kernel: ``[..., inputs, outputs]``, as in Flax.

    >>> isometry_deviation(3 * np.eye(4)[:, :2]), round(isometry_deviation(np.ones((4, 2))), 6)
    (0.0, 1.0)
    """
    kernel = np.asarray(kernel, np.float64)
    if kernel.ndim < 2 or not np.isfinite(kernel).all():
        raise UsageError(
            f"kernel is {kind_of(kernel)}: it must be a finite array [..., inputs, outputs]"
        )
    squares = np.linalg.svd(kernel.reshape(-1, *kernel.shape[-2:]), compute_uv=False) ** 2
    # A position whose weights are all zero counts as no deviation.
    means = np.maximum(squares.mean(1, keepdims=True), np.finfo(float).tiny)
    relative = np.where(squares.any(1, keepdims=True), squares / means, 1.0)
    return float(np.sqrt(np.mean((relative - 1) ** 2, axis=1)).mean())


def isometry_deviations(params: PyTree, blocks: Sequence[str]) -> dict[str, float]:
    """Return the mean of :func:`isometry_deviation` over the kernels below each block that has any.

    >>> isometry_deviations({"a": {"kernel": np.eye(2)}, "b": {"scale": np.ones(2)}}, ["a", "b"])
    {'a': 0.0}
    """
    roles = dict(
        zip([path for path, _ in paths.named_leaves(params)], layers.roles(params), strict=True)
    )
    deviations = {
        block: [isometry_deviation(leaf) for path, leaf in below if roles[path] == "kernel"]
        for block, below in _by_block(params, blocks).items()
    }
    return {block: float(np.mean(values)) for block, values in deviations.items() if values}


def norms(tree: PyTree, blocks: Sequence[str]) -> dict[str, jax.Array]:
    """Return the Euclidean norm of all leaves of a tree below each block; may be traced.

    Args:
      tree: parameters, a gradient, or a difference of two of them.
      blocks: paths in the tree.

    >>> by_block = norms({"a": {"kernel": np.array([3.0, 4.0])}, "b": {"bias": np.ones(1)}}, ["a", "b"])
    >>> float(by_block["a"]), float(by_block["b"])
    (5.0, 1.0)
    """
    return {
        block: optax.tree.norm([leaf for _, leaf in below])
        for block, below in _by_block(tree, blocks).items()
    }


def dormant_shares(
    magnitudes: Mapping[str, jax.Array], blocks: Sequence[str], threshold: Any = 0.025
) -> dict[str, jax.Array]:
    """Return the share of dormant units of each block that has units; may be traced.

    Args:
      magnitudes: mean magnitudes of the units of each layer, ``[n]`` by name; see :mod:`seal_jax.units`.
      blocks: paths; a layer belongs to the block that its name lies below.
      threshold: see :func:`seal_jax.units.dormant`.

    >>> shares = dormant_shares({"a/h": np.array([0.0, 1.0]), "b/h": np.ones(3)}, ["a", "b", "c"])
    >>> {block: float(share) for block, share in shares.items()}
    {'a': 0.5, 'b': 0.0}
    """
    flags = {name: units.dormant(values, threshold) for name, values in magnitudes.items()}
    of_blocks = {
        block: [of_layer for name, of_layer in flags.items() if paths.below(name, block)]
        for block in blocks
    }
    return {
        block: jnp.concatenate(below).astype(jnp.float32).mean()
        for block, below in of_blocks.items()
        if below
    }


def _by_block(tree: PyTree, blocks: Sequence[str]) -> dict[str, list[tuple[str, Any]]]:
    leaves = paths.named_leaves(tree)
    grouped = {block: [pair for pair in leaves if paths.below(pair[0], block)] for block in blocks}
    for block, below in grouped.items():
        if not below:
            raise UsageError(f"blocks name {block!r}, which is not in the tree: leave it out")
    return grouped


def _singular_values(features: Any) -> np.ndarray:
    check_features("features", features)
    if not np.isfinite(features).all():
        raise UsageError("features hold NaN or infinity: the network or its input is broken")
    # In float64: float32 would leave noise of 1e-7 of the largest where the rank is deficient.
    return np.linalg.svd(np.asarray(features, np.float64), compute_uv=False)
