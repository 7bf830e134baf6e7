r"""FIRE: kernels become isometries, the nearest ones to what they were, up to a scale.

Of all :math:`\tilde W` with :math:`\tilde W^T \tilde W = I` the polar factor :math:`W (W^T W)^{-1/2}` is nearest to
W in the Frobenius norm (the orthogonal Procrustes problem).

Han et al., `FIRE: Frobenius-Isometry Reinitialization for Balancing the Stability-Plasticity Tradeoff`, 2026.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from seal_jax import layers, masks, paths, selections
from seal_jax.errors import check_integer

PyTree = Any


def polar_factor(matrix: jax.Array, iterations: int = 10) -> jax.Array:
    r"""Approximate the orthogonal factor of the polar decomposition by iterations of Newton and Schulz.

    .. math:: X_0 = W / \|W\|_F, \qquad X_{k+1} = \tfrac32 X_k - \tfrac12 X_k X_k^T X_k

    Singular vectors stay, and a singular value s becomes :math:`\tfrac32 s - \tfrac12 s^3`: all but 0 tend to 1,
    but small ones grow by a half in each iteration only. Of :math:`s = \|W\|_F / 20` ten iterations make 1.00, of a
    hundredth 0.53.

    Args:
      matrix: floating-point ``[..., m, n]``, one matrix or several.
      iterations: their number, at least 1, static.

    Returns:
      float32 ``[..., m, n]``, with orthonormal columns where m >= n, rows where m <= n; 0 for a matrix of zeros.

    >>> polar_factor(jnp.array([[0.0, 2.0], [-3.0, 0.0]])).round(3).tolist()
    [[0.0, 1.0], [-1.0, 0.0]]
    """
    check_integer("iterations", iterations, 1)
    matrix = jnp.asarray(matrix, jnp.float32)
    norm = jnp.linalg.norm(matrix, axis=(-2, -1), keepdims=True)
    wide = matrix.shape[-2] < matrix.shape[-1]

    def iterate(_: Any, x: jax.Array) -> jax.Array:
        transposed = jnp.matrix_transpose(x)
        # The smaller of the two Gram matrices.
        cubic = (x @ transposed) @ x if wide else x @ (transposed @ x)
        return 1.5 * x - 0.5 * cubic

    # TPUs and GPUs would round the factors otherwise, and what is missing to an isometry would stay.
    with jax.default_matmul_precision("highest"):
        return jax.lax.fori_loop(0, iterations, iterate, matrix / jnp.where(norm > 0, norm, 1.0))


def reinitialise(
    params: PyTree,
    *,
    iterations: int = 10,
    among: masks.Mask | None = None,
    layout: layers.Layout | None = None,
) -> PyTree:
    r"""Return ``params`` with every kernel replaced by a multiple of its nearest isometry.

    .. math:: W \leftarrow \sqrt{d_\text{out} / d_\text{in}} \; W (W^T W)^{-1/2}

    Of a convolution the d_in x d_out matrix at each of its k positions becomes the nearest isometry of its own,
    divided by k, as in the released code; so the whole kernel, with d_in k inputs, need not be one. Grouped
    convolutions count the inputs of a group. All other parameters stay.

    Args:
      params: pytree of arrays.
      iterations: of :func:`polar_factor`; the released code's number.
      among: the parameters to replace, all with two or more axes, in any form of :mod:`seal_jax.masks`, which here
        may take all; by default kernels.
      layout: which axes of kernels are inputs; see :func:`seal_jax.layers.fans`.

    References:
      Han et al., 2026 (see this module); scale and convolutions are those of its released code.

    >>> params = {"fc": {"kernel": jnp.array([[3.0, 0.0], [0.0, 5.0]]), "bias": jnp.ones(2)}}
    >>> reinitialise(params)["fc"]["kernel"].round(3).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """

    def replace(path: str, leaf: jax.Array, chosen: bool) -> jax.Array:
        if not chosen:
            return leaf
        # The axes of inputs and outputs; all others are positions.
        axes = (0, 1) if layers.layout_of(path, layout) == "out_in" else (-1, -2)
        outputs, inputs = (leaf.shape[axis] for axis in axes)
        scale = math.sqrt(outputs / inputs) / (leaf.size // (outputs * inputs))
        matrices = jnp.moveaxis(leaf, axes, (-2, -1))
        factor = polar_factor(matrices, iterations)
        return jnp.moveaxis(scale * factor, (-2, -1), axes).astype(leaf.dtype)

    return paths.map_named(replace, params, selections.eligible(params, among))
