"""Mixup and cutmix: each image of a batch is mixed with its neighbour, and so are their losses.

Images ``2k`` and ``2k + 1`` are a pair. The order of an epoch is random, so its pairs are too; and a
device that holds an even part of the batch holds both images of each pair, so any sharding gives the
same images without communication. Each image keeps the larger share of itself: as both images of a
pair are mixed with each other, that leaves none of the mixtures out. An image whose neighbour only fills
the last batch up is mixed with it all the same.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seal_jax.errors import check_number, nonnegative


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How the images of a batch are mixed; with both, each batch draws one of the two.

    Attributes:
      mixup: α of the share λ ~ Beta(α, α) that an image has in its mixture (Zhang et al. 2018); 0 for
        none.
      cutmix: α of Beta(α, α), by which the area is drawn that an image keeps; the rest is a rectangle of
        the other image (Yun et al. 2019, Algorithm 1); 0 for none.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self):
        for name in ("mixup", "cutmix"):
            check_number(f"data.{name}", getattr(self, name), nonnegative, "be 0 or positive")

    @property
    def is_on(self) -> bool:
        """Whether images are mixed."""
        return bool(self.mixup or self.cutmix)


class MixingParams(NamedTuple):
    """The mixing parameters of a batch, the same for all of its images.

    Attributes:
      share: float32 ``[batch]``, of the image's own label in the loss, at least one half.
      outside: float32 ``[batch]``, share of the image's own pixels outside of the box; inside it is one
        minus that.
      box: int32 ``[batch, 4]``, top, left, bottom and right (exclusive); empty for mixup, None without
        cutmix.
    """

    share: jax.Array
    outside: jax.Array
    box: jax.Array | None


def draw(
    key: jax.Array, batch: int, spec: Mixing, image_shape: tuple[int, int, int]
) -> MixingParams:
    """Draw the mixing parameters of a whole (global) batch of images ``(height, width, channels)``."""
    # Always as many keys, so that each has its own whichever are on.
    choice_key, mixup_key, cutmix_key = jax.random.split(key, 3)
    if not spec.cutmix:
        params = _draw_mixup(mixup_key, spec.mixup)
    else:
        params = _draw_cutmix(cutmix_key, spec.cutmix, image_shape)
        if spec.mixup:
            mixup = _draw_mixup(mixup_key, spec.mixup)._replace(box=jnp.zeros(4, jnp.int32))
            cut = jax.random.bernoulli(choice_key)
            params = jax.tree.map(lambda a, b: jnp.where(cut, a, b), params, mixup)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch, *leaf.shape)), params)


def _draw_mixup(key: jax.Array, alpha: float) -> MixingParams:
    share = jax.random.beta(key, alpha, alpha)
    share = jnp.maximum(share, 1 - share)
    return MixingParams(share, share, None)


def _draw_cutmix(key: jax.Array, alpha: float, image_shape: tuple[int, int, int]) -> MixingParams:
    area_key, centre_key = jax.random.split(key)
    kept = jax.random.beta(area_key, alpha, alpha)
    size = jnp.array(image_shape[:2], jnp.int32)
    half = (size * jnp.sqrt(1 - kept)).astype(jnp.int32) // 2
    centre = jax.random.randint(centre_key, (2,), 0, size, jnp.int32)
    low, high = jnp.maximum(centre - half, 0), jnp.minimum(centre + half, size)
    # As in the paper the share is that of the clipped box, not the one that was drawn.
    area = jnp.prod((high - low) / size)
    # Of a box of more than half of the image the image keeps the inside.
    outside = jnp.where(area > 0.5, 0.0, 1.0)
    return MixingParams(jnp.maximum(area, 1 - area), outside, jnp.concatenate([low, high]))


def partners(array: jax.Array) -> jax.Array:
    """Return for each row of an array the row that it is mixed with; the number of rows is even.

    >>> partners(jnp.array([0, 1, 2, 3])).tolist()
    [1, 0, 3, 2]
    """
    # A reversal within pairs, and no gather.
    pairs = array.reshape(array.shape[0] // 2, 2, *array.shape[1:])
    return jnp.flip(pairs, axis=1).reshape(array.shape)


def interpolate(share: jax.Array, own: jax.Array, other: jax.Array) -> jax.Array:
    """Return ``share * own + (1 - share) * other``, in float32."""
    return share * own.astype(jnp.float32) + (1 - share) * other.astype(jnp.float32)


def mix(images: jax.Array, params: MixingParams) -> jax.Array:
    """Mix images ``[batch, height, width, channels]``, normalised or not, with their partners.

    >>> images = jnp.arange(4.0).reshape(4, 1, 1, 1)
    >>> half = MixingParams(jnp.full(4, 0.75), jnp.full(4, 0.75), None)
    >>> mix(images, half).ravel().tolist()
    [0.25, 0.75, 2.25, 2.75]
    """
    weight = params.outside[:, None, None, None]
    if params.box is not None:
        top, left, bottom, right = params.box.T[..., None]
        row, column = jnp.arange(images.shape[1]), jnp.arange(images.shape[2])
        rows, columns = (row >= top) & (row < bottom), (column >= left) & (column < right)
        weight = jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], 1 - weight, weight)
    return interpolate(weight, images, partners(images)).astype(images.dtype)
