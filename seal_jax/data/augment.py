"""Random crop, flip, RandAugment, cutout and normalisation of a batch, inside the compiled train step.

The augmentation parameters are drawn for the whole global batch and applied separately, so that a
device that holds a part of the batch slices its rows of :class:`AugmentationParams`, and any sharding
gives the same images.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seal_jax.data import randaugment
from seal_jax.errors import UsageError, check_integer, check_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What happens to a batch, in this order: crop, flip, RandAugment, normalise, cutout.

    Attributes:
      mean: channel means on the scale 0..1.
      std: channel standard deviations on the same scale.
      crop_padding: pixels of zeros (black, before normalisation) put around each image before a
        window of the original size is cut out at a random place; 0 for no crop.
      flip: mirror left and right with probability one half.
      cutout: side of a square, centred on a random pixel and clipped at the border, that is set to 0
        after normalisation, which is the channel mean (DeVries and Taylor 2017); 0 for none.
      randaugment: operations of RandAugment on each image; 0 for none.
      randaugment_magnitude: of these, from 0 to 10.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False
    cutout: int = 0
    randaugment: int = 0
    randaugment_magnitude: float = 9.0

    def __post_init__(self):
        for name in ("crop_padding", "cutout", "randaugment"):
            check_integer(f"data.{name}", getattr(self, name), 0)
        check_number(
            "data.randaugment_magnitude",
            self.randaugment_magnitude,
            lambda value: 0 <= value <= randaugment.STRONGEST,
            f"lie in [0, {randaugment.STRONGEST:g}]",
        )
        if not self.mean or len(self.mean) != len(self.std):
            raise UsageError(
                f"mean has {len(self.mean)} channels and std has {len(self.std)}: "
                "give one number a channel"
            )
        if min(self.std) <= 0:
            raise UsageError(f"std={tuple(self.std)} must be positive in every channel")

    @property
    def is_random(self) -> bool:
        """Whether any part of it needs :class:`AugmentationParams`."""
        return bool(self.crop_padding or self.flip or self.cutout or self.randaugment)


class AugmentationParams(NamedTuple):
    """The augmentation parameters of one batch; a field is None where that augmentation is off.

    Attributes:
      offsets: int32 ``[batch, 2]``, row and column of the crop in the padded image.
      flips: bool ``[batch]``.
      cutout_centres: int32 ``[batch, 2]``, row and column.
      operations: of RandAugment, each ``[batch, n]``.
    """

    offsets: jax.Array | None = None
    flips: jax.Array | None = None
    cutout_centres: jax.Array | None = None
    operations: randaugment.Operations | None = None


def check_image_shape(spec: Augmentation, image_shape: tuple[int, int, int]) -> None:
    """Raise unless the augmentation suits images of ``(height, width, channels)``."""
    height, width, channels = image_shape
    if channels != len(spec.mean):
        raise UsageError(
            f"the mean has {len(spec.mean)} channels and the images have {channels}: set data.channels = "
            f"{len(spec.mean)}, or data.normalisation to the statistics of this data set"
        )
    if spec.randaugment and channels not in (1, 3):
        raise UsageError(
            f"data.randaugment = {spec.randaugment} needs images of 1 or 3 channels, not {channels}: "
            "set 0"
        )
    side = min(height, width)
    for name in ("crop_padding", "cutout"):
        if getattr(spec, name) >= side:
            raise UsageError(
                f"data.{name}={getattr(spec, name)} must be smaller than the images "
                f"({height}x{width})"
            )


def draw(
    key: jax.Array, batch: int, spec: Augmentation, image_shape: tuple[int, int, int]
) -> AugmentationParams:
    """Draw the augmentation parameters of a whole (global) batch of images ``(height, width, channels)``.

    Turning one augmentation on leaves the parameters of the others unchanged.
    """
    check_image_shape(spec, image_shape)
    # Always three keys, so that each augmentation has its own whichever are on.
    crop_key, flip_key, cutout_key = jax.random.split(key, 3)
    # A fourth key for what came later, which must not change the others.
    operations_key = jax.random.fold_in(key, 3)
    # A window has 2p + 1 places along each axis of an image that p pixels were added to on both sides.
    places, size = 2 * spec.crop_padding + 1, jnp.array(image_shape[:2], jnp.int32)
    return AugmentationParams(
        jax.random.randint(crop_key, (batch, 2), 0, places, jnp.int32) if places > 1 else None,
        jax.random.bernoulli(flip_key, 0.5, (batch,)) if spec.flip else None,
        jax.random.randint(cutout_key, (batch, 2), 0, size, jnp.int32) if spec.cutout else None,
        randaugment.draw(operations_key, batch, spec.randaugment) if spec.randaugment else None,
    )


def _crop_and_flip(
    images: jax.Array,
    offsets: jax.Array | None,
    flips: jax.Array | None,
    padding: int,
    dtype: Any,
) -> jax.Array:
    """Return the windows at ``offsets`` of the padded images, those of ``flips`` mirrored, as ``dtype``.

    Each axis is a product with a matrix of zeros and ones, whose rows choose a pixel or, in the border,
    none. A sum of one grey level and zeros is exact, also in bfloat16, which holds integers up to 256.
    """

    # On a TPU a gather costs tens of times more, a vmapped dynamic slice becomes a serial loop, and a select for each
    # possible offset takes twice the time of the products.
    def chosen(size: int, offset: jax.Array | None, flips: jax.Array | None) -> jax.Array:
        pixels = jnp.arange(size)
        shown = pixels[None]
        if flips is not None:
            shown = jnp.where(flips[:, None], size - 1 - shown, shown)
        if offset is not None:
            shown = shown + offset[:, None] - padding
        return (shown[..., None] == pixels).astype(dtype)

    batch, height, width, channels = images.shape
    top, left = (None, None) if offsets is None else offsets.T
    # Rows of pixels as they are stored: to lay out three channels apart costs a TPU more than the products.
    rows = images.reshape(batch, height, width * channels).astype(dtype)
    if top is not None:
        rows = jnp.einsum("bij,bjp->bip", chosen(height, top, None), rows)
    return jnp.einsum("bvw,biwc->bivc", chosen(width, left, flips), rows.reshape(images.shape))


def _outside_square(centres: jax.Array, side: int, height: int, width: int) -> jax.Array:
    """Return bool ``[batch, height, width, 1]``, False inside the square."""

    def covered(centre: jax.Array, length: int) -> jax.Array:
        # A square of even side reaches one pixel further up and left than down and right.
        start = centre[:, None] - side // 2
        position = jnp.arange(length)
        return (position >= start) & (position < start + side)

    rows, columns = covered(centres[:, 0], height), covered(centres[:, 1], width)
    return ~(rows[:, :, None] & columns[:, None, :])[..., None]


def apply(
    images: jax.Array, params: AugmentationParams | None, spec: Augmentation, dtype=jnp.float32
) -> jax.Array:
    """Augment and normalise a batch.

    Args:
      images: uint8 ``[batch, height, width, channels]``.
      params: this batch's rows of what :func:`draw` returned; None only normalises, for evaluation.
      spec: the same as given to :func:`draw`.
      dtype: of the result. The arithmetic is float32.

    Returns:
      ``(x / 255 - mean) / std`` as ``dtype``, ``[batch, height, width, channels]``.

    Examples:
      >>> spec = Augmentation(mean=(0.5,), std=(0.5,))
      >>> float(apply(jnp.full((1, 2, 2, 1), 255, jnp.uint8), None, spec)[0, 0, 0, 0])
      1.0
    """
    if images.dtype != jnp.uint8:
        raise UsageError(f"images have dtype {images.dtype}: give uint8, before normalisation")
    _, height, width, channels = images.shape
    check_image_shape(spec, (height, width, channels))

    def drawn(name: str) -> Any:
        values = getattr(params, name)
        if values is None:
            raise UsageError(f"params.{name} is None: draw with the same Augmentation")
        return values

    if params is not None and (spec.crop_padding or spec.flip):
        offsets = drawn("offsets") if spec.crop_padding else None
        flips = drawn("flips") if spec.flip else None
        images = _crop_and_flip(images, offsets, flips, spec.crop_padding, dtype)
    if params is not None and spec.randaugment:
        levels = images.astype(jnp.uint8)
        images = randaugment.apply(levels, drawn("operations"), spec.randaugment_magnitude)

    mean, std = jnp.array(spec.mean, jnp.float32), jnp.array(spec.std, jnp.float32)
    normalised = (images.astype(jnp.float32) / 255.0 - mean) / std
    if params is not None and spec.cutout:
        keep = _outside_square(drawn("cutout_centres"), spec.cutout, height, width)
        normalised = jnp.where(keep, normalised, 0.0)
    return normalised.astype(dtype)
