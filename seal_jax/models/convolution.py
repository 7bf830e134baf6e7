"""Two ways to compute a convolution: XLA's own, and as products over shifted images.

XLA's CPU compiler brings convolutions into the layout of its fast kernel only outside of loops. In
the body of a ``lax.scan`` the convolutions of the backward pass become naive loops, about ten times
slower (see ``benchmarks/``); matrix products are fast in both places. On TPU and GPU the native
form is the right one.
"""

import functools
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
    """Convolve like ``lax.conv_general_dilated`` in the cases that this package's networks need.

    One matrix product over the shifted images side by side; with groups one for each group; or, where
    every channel is convolved on its own, the sum of the shifted images each times its row of the
    kernel. Every derivative is made of the same products, slices and pads.

    ``images`` are ``[N, H, W, C]``; the ``kernel`` is ``[height, width, C / groups, features]``, where
    ``feature_group_count=groups`` divides ``C`` and ``features``. Strides and padding go along height
    and width. ``fixed`` are the other arguments that ``nn.Conv`` passes; undilated, NHWC.

    >>> conv_as_matmul(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5)), (1, 1), ((1, 1), (1, 1))).shape
    (1, 4, 4, 5)
    """
    height, width, inputs, features = kernel.shape
    groups = fixed.get("feature_group_count", 1)
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    (down, right), (rows, columns) = window_strides, images.shape[1:3]
    if height * width > 1 and (down, right) == (height, width) and groups == 1:
        # Windows that do not overlap, as a ViT's patches, are a reshape: 256 slices take long to compile.
        patches = _windows(images, height, width)
    else:
        last_row, last_column = rows - height + 1, columns - width + 1
        # One strided view for each entry of the kernel's window, [N, H', W', C], by rows.
        shifted = [
            images[:, row : row + last_row : down, column : column + last_column : right]
            for row in range(height)
            for column in range(width)
        ]
        if groups != 1 and inputs == 1 and features == images.shape[-1]:
            # Summed in float32 whatever the dtype of the images, as XLA does.
            total = sum(
                image.astype(jnp.float32) * row
                for image, row in zip(shifted, kernel.reshape(-1, features), strict=True)
            )
            return jnp.asarray(total, images.dtype)
        # [N, H', W', height * width * C], in the order in which the kernel's first three axes are flattened.
        patches = jnp.concatenate(shifted, axis=-1) if len(shifted) > 1 else shifted[0]
    product = functools.partial(
        jax.lax.dot_general,
        precision=fixed.get("precision"),
        preferred_element_type=fixed.get("preferred_element_type"),
    )
    if groups == 1:
        return product(patches, kernel.reshape(-1, features), (((3,), (0,)), ((), ())))
    # Images and kernel as [..., height * width, group, inputs (, outputs)]; the product has the groups in front.
    patches = patches.reshape(*patches.shape[:3], height * width, groups, inputs)
    by_group = kernel.reshape(height * width, inputs, groups, -1)
    outputs = product(patches, by_group, (((3, 5), (0, 1)), ((4,), (2,))))
    return jnp.moveaxis(outputs, 0, 3).reshape(*patches.shape[:3], features)


def _windows(images: jax.Array, height: int, width: int) -> jax.Array:
    """Return ``[N, H / height, W / width, height * width * C]``, without what is left of the image."""
    count, rows, columns, channels = images.shape
    down, across = rows // height, columns // width
    blocks = images[:, : down * height, : across * width]
    blocks = blocks.reshape(count, down, height, across, width, channels)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(count, down, across, -1)


# By name; None leaves nn.Conv its own lax.conv_general_dilated.
CONVOLUTIONS: dict[str, Callable[..., jax.Array] | None] = {
    "native": None,
    "matmul": conv_as_matmul,
}
