"""Two ways to compute a convolution: XLA's own, and one whose derivatives are fast in loops on CPU.

XLA's CPU compiler has a fast kernel for convolutions of ``[N, H, W, C]`` with ``[H, W, in, out]``. It brings others
into that layout outside of loops only: in the body of a ``lax.scan`` the convolutions of the backward pass, which JAX
writes in other layouts, become naive loops, over ten times slower (see ``benchmarks/``). ``canonical`` writes all of
them in that layout; small ones are one product of matrices over shifted images, which is fast everywhere. On TPU and
GPU the native form is the right one.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from seal_jax.core import mesh as meshes

# Up to so many bytes of shifted images the processor's caches hold them, and one matrix product is faster.
FEW_BYTES = 2**22


def canonical(
    images: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **fixed: Any,
) -> jax.Array:
    """Convolve like ``lax.conv_general_dilated`` in the cases that this package's networks need.

    It can be differentiated any number of times, forward and backward, and mapped; every derivative is fast in
    a loop on CPU.

    ``images`` are ``[N, H, W, C]``; the ``kernel`` is ``[height, width, C / groups, features]``, where
    ``feature_group_count=groups`` divides ``C`` and ``features``. Strides and padding go along height
    and width, padding of at least 0. ``fixed`` are the other arguments that ``nn.Conv`` passes; undilated, NHWC.

    >>> canonical(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5)), (1, 1), ((1, 1), (1, 1))).shape
    (1, 4, 4, 5)
    """
    window, strides = kernel.shape[:2], tuple(window_strides)
    sides = [
        (size + low + high - width) // stride + 1
        for size, width, stride, (low, high) in zip(
            images.shape[1:3], window, strides, padding, strict=True
        )
    ]
    patches_bytes = len(images) * math.prod((*sides, *kernel.shape[:3])) * images.dtype.itemsize
    products = window in ((1, 1), strides) or patches_bytes < FEW_BYTES
    # What the primitive below does not have.
    special = fixed.get("feature_group_count", 1) != 1 or any(
        fixed.get(name) is not None for name in ("precision", "preferred_element_type")
    )
    if special or products:
        return conv_as_matmul(images, kernel, window_strides, padding, **fixed)
    images, kernel = meshes.varying_alike(images, kernel)
    return _trilinear.bind(
        images,
        kernel,
        missing=_OUTPUTS,
        shape=(len(images), *sides, kernel.shape[-1]),
        strides=strides,
        starts=tuple(low for low, _ in padding),
    )


# The sum of ``outputs * convolution(images, kernel)`` is linear in each of the three. This primitive takes two of them,
# in this order, and returns the sum's gradient by the one that is ``missing``: without the outputs that is the
# convolution, without the images or the kernel the convolution's gradient. So each of the three is the derivative of
# the others, and those of any order are made of them.
_IMAGES, _KERNEL, _OUTPUTS = range(3)
_trilinear = Primitive("convolution")


@functools.partial(jax.jit, static_argnames=("missing", "shape", "strides", "starts"))
def _compute(
    first: jax.Array,
    second: jax.Array,
    *,
    missing: int,
    shape: tuple[int, ...],
    strides: tuple[int, int],
    starts: tuple[int, int],
) -> jax.Array:
    """Return the ``missing`` one of images, kernel and outputs, of this ``shape``, from the other two.

    ``starts`` is the padding before the first row and column; that behind the last follows from the shapes.
    """
    images, kernel, outputs, padding = _roles(first, second, missing, shape, strides, starts)
    if missing == _OUTPUTS:
        return _convolve(images, kernel, strides, padding)
    if missing == _KERNEL:
        # The outputs are the kernel, and what is summed over is the batch, in the place of the channels.
        by_channel, window = images.transpose(3, 1, 2, 0), outputs.transpose(1, 2, 0, 3)
        gradient = _convolve(by_channel, window, (1, 1), padding, rhs_dilation=strides)
        return gradient.transpose(1, 2, 0, 3)
    if max(strides) > 1:
        # Otherwise most products were with the zeros between the outputs.
        return _as_products(first, second, missing, shape, strides, starts)
    # Turned by 180 degrees, with inputs and features exchanged.
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    margins = [
        (width - 1 - low, width - 1 - high)
        for width, (low, high) in zip(kernel.shape[:2], padding, strict=True)
    ]
    return _convolve(outputs, turned, (1, 1), margins)


def _convolve(images: Any, kernel: Any, strides: Any, padding: Any, **dilation: Any) -> jax.Array:
    return jax.lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **dilation
    )


def _roles(first, second, missing, shape, strides, starts) -> tuple[Any, Any, Any, Any]:
    """Return images, kernel and outputs, one of them only its type, and the padding."""
    arrays: list[Any] = [first, second]
    arrays.insert(missing, jax.typeof(first).update(shape=shape))
    images, kernel, outputs = arrays
    padding = [
        # A negative one crops rows that no window reaches.
        (start, (count - 1) * stride + width - start - size)
        for count, stride, width, start, size in zip(
            outputs.shape[1:3], strides, kernel.shape[:2], starts, images.shape[1:3], strict=True
        )
    ]
    return images, kernel, outputs, padding


def _as_products(first, second, missing, shape, strides, starts) -> jax.Array:
    """Return what ``_compute`` does, as matrix products."""
    *arrays, padding = _roles(first, second, missing, shape, strides, starts)
    padding = [(low, max(high, 0)) for low, high in padding]
    outputs = arrays.pop()
    if missing == _OUTPUTS:
        return conv_as_matmul(arrays[0], arrays[1], strides, padding)

    def product(operand: jax.Array) -> jax.Array:
        operands = list(arrays)
        operands[missing] = operand
        return conv_as_matmul(operands[0], operands[1], strides, padding)

    return jax.linear_transpose(product, arrays[missing])(outputs)[0]


def _transpose(position: int, cotangent, first, second, *, missing, **geometry):
    """Return the cotangent of the operand at ``position``, which becomes the missing one."""
    roles = [role for role in (_IMAGES, _KERNEL, _OUTPUTS) if role != missing]
    operand = (first, second)[position]
    given = {roles[0]: first, roles[1]: second, missing: cotangent}
    del given[roles[position]]
    geometry["shape"] = operand.aval.shape
    return _trilinear.bind(
        *(given[role] for role in sorted(given)), missing=roles[position], **geometry
    )


def _batch(operands, axes, *, missing, shape, strides, starts):
    """Map over a batch, of seeds for instance: matrix products side by side remain matrix products."""

    def one(first, second):
        return _as_products(first, second, missing, shape, strides, starts)

    return jax.vmap(one, axes)(*operands), 0


_trilinear.def_impl(_compute)
_trilinear.def_abstract_eval(lambda first, second, *, shape, **geometry: first.update(shape=shape))
ad.defbilinear(_trilinear, functools.partial(_transpose, 0), functools.partial(_transpose, 1))
batching.primitive_batchers[_trilinear] = _batch
mlir.register_lowering(_trilinear, mlir.lower_fun(_compute, multiple_results=False))


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
    "canonical": canonical,
}
