"""RandAugment of a batch on the device (Cubuk et al. 2020), as Pillow's operations to a grey level.

Each image has operations of its own, so every operation is computed for the whole batch and one is
selected: a program without branches, of the same cost whatever is drawn. The fourteen operations are
four kinds. Those that map a grey level to another share one table of 256 entries an image and channel;
colour and sharpness are a step away from another image, grey or smoothed; the geometric ones share one
affine warp by the nearest pixel. Each turn costs a value of an image 512 products, for histogram and table,
and each pixel a gather.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# In the order of the paper's section 3; each is drawn with the same probability.
OPERATIONS = (
    "identity",
    "autocontrast",
    "equalize",
    "rotate",
    "solarize",
    "color",
    "posterize",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
STRONGEST = 10.0
# What a warp brings in from outside of the image, as in the paper's code.
FILL = 128
# Translations of AutoAugment are up to 150 pixels of its 331.
_TRANSLATION = 150 / 331
# Pillow's coordinates of a warp have as many bits after the point.
_FRACTION = 16


class Operations(NamedTuple):
    """Which operations are applied to each image, in their order.

    Attributes:
      numbers: int32 ``[batch, n]``, in ``OPERATIONS``.
      negative: bool ``[batch, n]``, whether those that have a direction go the other way: to the left,
        darker, less sharp.
    """

    numbers: jax.Array
    negative: jax.Array


def draw(key: jax.Array, batch: int, count: int) -> Operations:
    """Draw ``count`` operations for each image, with replacement."""
    number_key, sign_key = jax.random.split(key)
    numbers = jax.random.randint(number_key, (batch, count), 0, len(OPERATIONS), jnp.int32)
    return Operations(numbers, jax.random.bernoulli(sign_key, 0.5, (batch, count)))


def apply(images: jax.Array, operations: Operations, magnitude: float) -> jax.Array:
    """Apply each image's operations in turn.

    At magnitude 10 they are as strong as in AutoAugment: rotation by 30 degrees, shear by 0.3,
    translation by 150/331 of the side, factors 1 ± 0.9 of colour, contrast, brightness and sharpness,
    four bits left by posterize, and a threshold of 0 for solarize. Below, the change is proportional.

    Args:
      images: uint8 ``[batch, height, width, channels]``, of one channel or three.
      operations: as :func:`draw` returns them.
      magnitude: from 0 to 10.

    Returns:
      uint8 of the same shape.
    """

    def turn(images: jax.Array, chosen: Operations) -> tuple[jax.Array, None]:
        return _apply_one(images, *chosen, magnitude / STRONGEST), None

    # A loop, and not its body n times: fused with the histogram, the turn before would be computed for each level.
    return jax.lax.scan(turn, images, jax.tree.map(jnp.transpose, operations))[0]


def _apply_one(
    images: jax.Array, numbers: jax.Array, negative: jax.Array, strength: float
) -> jax.Array:
    """Apply one operation to each image; ``strength`` is from 0 to 1."""
    values = images.astype(jnp.int32)
    factor = jnp.where(negative, 1 - 0.9 * strength, 1 + 0.9 * strength)[:, None, None, None]

    def chosen(*names: str) -> jax.Array:
        which = [numbers == OPERATIONS.index(name) for name in names]
        return jnp.stack(which).any(0)[:, None, None, None]

    grey = _grey(values)
    mapped = _look_up(values, _tables(values, grey, chosen, factor, strength))
    blended = _blend(jnp.where(chosen("color"), grey, _smooth(values)), values, factor)
    warped = _warp(values, _matrices(numbers, negative, strength, images.shape[1:3]))
    result = jnp.where(chosen("color", "sharpness"), blended, mapped)
    geometric = chosen("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
    return jnp.where(geometric, warped, result).astype(jnp.uint8)


def _grey(values: jax.Array) -> jax.Array:
    """Return the luma (ITU-R 601-2) ``[b, h, w, 1]`` of int32 images, as Pillow rounds it."""
    if values.shape[-1] == 1:
        return values
    # Weights on the scale of 2**16, which Pillow uses; half a unit rounds.
    luma = values @ jnp.array([19595, 38470, 7471], jnp.int32)
    return ((luma + 2**15) >> 16)[..., None]


def _blend(start: jax.Array, values: jax.Array, factor: jax.Array) -> jax.Array:
    """Return ``start + factor * (values - start)`` as grey levels, truncated like Pillow's blend."""
    return jnp.clip(start + factor * (values - start), 0, 255).astype(jnp.int32)


def _smooth(values: jax.Array) -> jax.Array:
    """Return images smoothed by Pillow's 3x3 filter SMOOTH, which leaves the border as it is."""
    if min(values.shape[1:3]) < 3:
        return values
    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    window = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    # Weights are 1, but 5 in the middle, and 13 in all. Adding 6 rounds: 13 is odd, so that no half occurs.
    inner = (window + 4 * values[:, 1:-1, 1:-1] + 6) // 13
    return values.at[:, 1:-1, 1:-1].set(inner)


def _tables(
    values: jax.Array, grey: jax.Array, chosen, factor: jax.Array, strength: float
) -> jax.Array:
    """Return what grey levels become in each image, int32 ``[b, 256, 1, channels]``."""
    levels = jnp.arange(256)[:, None, None]
    histogram = _histogram(values)
    present = histogram > 0
    # Autocontrast stretches the levels that are present over the whole range.
    low = jnp.argmax(present, 1, keepdims=True)
    high = 255 - jnp.argmax(present[:, ::-1], 1, keepdims=True)
    stretched = jnp.clip((levels - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
    # Equalize maps a level by the number of pixels below it; the highest level that is present does not count.
    pixels = values.shape[1] * values.shape[2]
    step = (pixels - jnp.take_along_axis(histogram, high, 1)) // 255
    below = jnp.cumsum(histogram, 1) - histogram
    equalized = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    # Contrast moves away from the mean of the grey image, rounded.
    mean = (2 * grey.sum((1, 2, 3), keepdims=True) + pixels) // (2 * pixels)
    kept_bits = 8 - round(4 * strength)
    by_name = {
        "autocontrast": jnp.where(high > low, stretched, levels),
        # As in Pillow, nothing happens to an image with too few pixels to tell levels apart.
        "equalize": jnp.where(step > 0, equalized, levels),
        "solarize": jnp.where(levels < 256 * (1 - strength), levels, 255 - levels),
        "posterize": levels & (256 - 2 ** (8 - kept_bits)),
        "contrast": _blend(mean, levels, factor),
        "brightness": _blend(jnp.zeros_like(levels), levels, factor),
    }
    tables = jnp.broadcast_to(levels, histogram.shape)
    for name, table in by_name.items():
        tables = jnp.where(chosen(name), table, tables)
    return tables


def _digits(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the two digits of each grey level to the base 16, one-hot, float32 ``[b, h * w, channels, 16]``."""
    pixels = values.reshape(values.shape[0], -1, values.shape[-1], 1)
    first, second = (digit == jnp.arange(16) for digit in (pixels >> 4, pixels & 15))
    return first.astype(jnp.float32), second.astype(jnp.float32)


def _histogram(values: jax.Array) -> jax.Array:
    """Return how many pixels have each level, int32 ``[b, 256, 1, channels]``."""
    # A matrix product of digits: a scatter of single numbers costs a TPU much more. Products are 0 or 1, so sums are
    # exact.
    counts = jnp.einsum("bpcf,bpcs->bfsc", *_digits(values))
    return counts.astype(jnp.int32).reshape(values.shape[0], 256, 1, values.shape[-1])


def _look_up(values: jax.Array, tables: jax.Array) -> jax.Array:
    """Return each image with its levels replaced by its table's."""
    first, second = _digits(values)
    # The first digit chooses 16 entries, the second one of them. Of all that is added one term is not 0, and levels
    # are exact in the bfloat16 that a TPU multiplies in.
    rows = tables.reshape(values.shape[0], 16, 16, values.shape[-1]).astype(jnp.float32)
    entries = jnp.einsum("bpcf,bfsc->bpcs", first, rows)
    return (entries * second).sum(-1).astype(jnp.int32).reshape(values.shape)


def _matrices(
    numbers: jax.Array, negative: jax.Array, strength: float, size: tuple[int, ...]
) -> jax.Array:
    """Return the affine map of each image from an output pixel to its input, fixed point ``[b, 6]``."""
    height, width = size
    table = np.zeros((len(OPERATIONS), 2, 6))
    table[:] = [1, 0, 0, 0, 1, 0]  # x' = x, y' = y
    for index, sign in enumerate((1, -1)):

        def put(name: str, row: list[float], index: int = index) -> None:
            table[OPERATIONS.index(name), index] = row

        shear = sign * 0.3 * strength
        put("shear_x", [1, shear, 0, 0, 1, 0])
        put("shear_y", [1, 0, 0, shear, 1, 0])
        # Whole pixels.
        put("translate_x", [1, 0, sign * int(_TRANSLATION * width * strength), 0, 1, 0])
        put("translate_y", [1, 0, 0, 0, 1, sign * int(_TRANSLATION * height * strength)])
        angle = math.radians(-sign * 30 * strength)
        cos, sin, x, y = math.cos(angle), math.sin(angle), width / 2, height / 2
        # About the middle of the image.
        put("rotate", [cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y])
    # Of the middle of pixel (0, 0).
    table[..., 2] += (table[..., 0] + table[..., 1]) / 2
    table[..., 5] += (table[..., 3] + table[..., 4]) / 2
    fixed = np.floor(table * 2**_FRACTION + 0.5).astype(np.int32)
    return jnp.asarray(fixed)[numbers, negative.astype(jnp.int32)]


def _warp(values: jax.Array, matrices: jax.Array) -> jax.Array:
    """Return images warped to the nearest pixel, ``FILL`` where that is outside."""
    batch, height, width, channels = values.shape
    row, column = jnp.arange(height)[:, None], jnp.arange(width)
    a, b, c, d, e, f = matrices.T[..., None, None]
    # [b, h, w]; a shift rounds down, so that what lies outside to the left stays negative.
    x = (a * column + b * row + c) >> _FRACTION
    y = (d * column + e * row + f) >> _FRACTION
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    source = jnp.where(inside, y * width + x, 0).reshape(batch, -1, 1)
    pixels = jnp.take_along_axis(values.reshape(batch, -1, channels), source, 1, mode="clip")
    return jnp.where(inside[..., None], pixels.reshape(values.shape), FILL)
