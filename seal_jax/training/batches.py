"""Batches inside the compiled program: their order, their random numbers, their images."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seal_jax.core import mesh as meshes
from seal_jax.core.state import Stream, stream_key
from seal_jax.data import augment, device
from seal_jax.errors import UsageError

PyTree = Any


class Arrays(NamedTuple):
    """A split on the device: flat uint8 ``images [n, h*w*c]`` and int32 ``labels [n]``."""

    images: jax.Array
    labels: jax.Array


class Batch(NamedTuple):
    """A whole batch: ``rows`` of the data, their ``weights`` (0 for filling) and random ``draws``."""

    rows: jax.Array
    weights: jax.Array
    draws: augment.Draws | None


class Step(NamedTuple):
    """What one step is made of; in a scan every leaf has a leading axis of steps.

    Attributes:
      batch: the batch that is trained on.
      extra: further batches, each leaf ``[extra_batches, ...]``; ``None`` if the method has none.
      key: of the step; ``None`` if nothing in it is random.
    """

    batch: Batch
    extra: Batch | None
    key: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Batches:
    """Draws the batches of an experiment.

    Attributes:
      size: images in the training split.
      batch_size: images a step and seed, over the data axis.
      drop_last: whether an epoch leaves out the images that do not fill a batch.
      balanced: whether every batch has the same number of images of each class.
      num_classes: of the data set.
      image_shape: ``(height, width, channels)``.
      augmentation: what happens to training images; its normalisation also to the others.
      dtype: of the images a model is given.
      shares: devices along the data axis.
      extra_batch_size: images in a further batch; 0 for none.
      extra_batches: further batches a step.
      random: whether a step needs a key.
    """

    size: int
    batch_size: int
    drop_last: bool
    balanced: bool
    num_classes: int
    image_shape: tuple[int, int, int]
    augmentation: augment.Augmentation
    dtype: Any
    shares: int
    extra_batch_size: int
    extra_batches: int
    random: bool

    @property
    def fills(self) -> bool:
        """Whether a batch may hold images that only fill it up."""
        return not self.drop_last and self.size % self.batch_size > 0

    def steps(
        self, seed: jax.Array, first: jax.Array, count: int, per_epoch: int, labels: jax.Array
    ) -> Step:
        """Draw ``count`` steps of one epoch from step ``first`` on, ahead of the scan over them.

        In the step itself the random numbers would be many tiny kernels.
        """
        epoch, start = first // per_epoch, first % per_epoch
        numbers = first + jnp.arange(count)
        with jax.named_scope("shuffle"):
            key = stream_key(seed, Stream.ORDER, epoch)
            if self.balanced:
                order = device.balanced_order(key, labels, self.num_classes, self.batch_size)
            else:
                order = device.epoch_order(key, self.size, self.batch_size, self.drop_last)
            rows, weights = (jax.lax.dynamic_slice_in_dim(part, start, count) for part in order)
        with jax.named_scope("augment"):
            draws = self._draws(seed, Stream.AUGMENT, numbers, self.batch_size)
        extra = self._extra(seed, epoch, start, numbers) if self.extra_batch_size else None
        keys = None
        if self.random:
            keys = jax.vmap(lambda step: stream_key(seed, Stream.STEP, step))(numbers)
        return Step(Batch(rows, weights, draws), extra, keys)

    def _extra(
        self, seed: jax.Array, epoch: jax.Array, start: jax.Array, numbers: jax.Array
    ) -> Batch:
        """Cut further batches from an order of their own, which begins anew when it is used up."""
        with jax.named_scope("shuffle"):
            key = stream_key(seed, Stream.EXTRA_ORDER, epoch)
            order, _ = device.epoch_order(key, self.size, self.extra_batch_size, True)
            index = (start + jnp.arange(numbers.shape[0])) * self.extra_batches
            index = index[:, None] + jnp.arange(self.extra_batches)
            rows = order[index % order.shape[0]]
        with jax.named_scope("augment"):
            images = self.extra_batches * self.extra_batch_size
            draws = jax.tree.map(
                lambda leaf: leaf.reshape(*rows.shape, *leaf.shape[2:]),
                self._draws(seed, Stream.EXTRA_AUGMENT, numbers, images),
            )
        return Batch(rows, jnp.ones(rows.shape, jnp.float32), draws)

    def _draws(
        self, seed: jax.Array, stream: Stream, numbers: jax.Array, images: int
    ) -> augment.Draws:
        def draw(step):
            key = stream_key(seed, stream, step)
            return augment.draw(key, images, self.augmentation, self.image_shape)

        return jax.vmap(draw)(numbers)

    def part(self, tree: PyTree, size: int) -> PyTree:
        """Return this device's rows of arrays over a whole batch of ``size``."""
        own = size // self.shares
        start = jax.lax.axis_index(meshes.DATA) * own
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, own), tree)

    def images(
        self, data: Arrays, rows: jax.Array, draws: augment.Draws | None
    ) -> tuple[jax.Array, jax.Array]:
        """Return images as the model takes them, augmented where there are ``draws``, and labels."""
        with jax.named_scope("gather"):
            images = device.take(data.images, rows, self.image_shape)
            labels = jnp.take(data.labels, rows, mode="clip")
        with jax.named_scope("augment"):
            images = augment.apply(images, draws, self.augmentation, self.dtype)
        return images, labels

    def sample(self, data: Arrays, key: jax.Array, count: int) -> jax.Array:
        """Return ``count`` random training images, not augmented.

        Raises:
          UsageError: there are not so many.
        """
        if count > self.size:
            raise UsageError(
                f"method.sample_size = {count} is larger than the training split, {self.size} images"
            )
        rows = jax.random.choice(key, self.size, (count,), replace=False)
        return self.images(data, rows, None)[0]
