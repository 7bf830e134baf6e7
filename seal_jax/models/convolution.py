"""Two ways to compute a convolution: XLA's own, and as one matrix product over shifted images.

XLA's CPU compiler brings convolutions into the layout of its fast kernel only outside of loops. In
the body of a ``lax.scan`` the convolutions of the backward pass become naive loops, about ten times
slower (see ``benchmarks/``); matrix products are fast in both places. On TPU and GPU the native
form is the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def conv_as_matmul(
    images: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **fixed: Any,
) -> jax.Array:
    """Convolve like ``lax.conv_general_dilated`` in the cases that residual networks need.

    Every derivative of it is made of matrix products, slices and pads too.

    Args:
      images: ``[N, H, W, C]``.
      kernel: ``[height, width, C, features]``.
      window_strides: along height and width.
      padding: ``(before, after)`` along height and width.
      **fixed: the other arguments that ``nn.Conv`` passes; undilated, ungrouped, NHWC.

    Returns:
      ``[N, H', W', features]``.

    >>> conv_as_matmul(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5)), (1, 1), ((1, 1), (1, 1))).shape
    (1, 4, 4, 5)
    """
    height, width, _, features = kernel.shape
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    (down, right), (rows, columns) = window_strides, images.shape[1:3]
    last_row, last_column = rows - height + 1, columns - width + 1
    shifted = [
        images[:, row : row + last_row : down, column : column + last_column : right]
        for row in range(height)
        for column in range(width)
    ]
    patches = jnp.concatenate(shifted, axis=-1) if len(shifted) > 1 else shifted[0]
    return jax.lax.dot_general(
        patches,
        kernel.reshape(-1, features),
        (((3,), (0,)), ((), ())),
        precision=fixed.get("precision"),
        preferred_element_type=fixed.get("preferred_element_type"),
    )


# By name; None leaves nn.Conv its own lax.conv_general_dilated.
CONVOLUTIONS: dict[str, Callable[..., jax.Array] | None] = {
    "native": None,
    "matmul": conv_as_matmul,
}
