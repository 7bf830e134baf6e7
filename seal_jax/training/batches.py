"""Batches inside the compiled steps: their order, their random numbers, their images."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from seal_jax.core import mesh as meshes
from seal_jax.core.state import Stream, stream_key
from seal_jax.data import Split, augment, device
from seal_jax.errors import UsageError

PyTree = Any


class Arrays(NamedTuple):
    """A split on the device: flat uint8 ``images [n, row]`` and int32 ``labels [n]``."""

    images: jax.Array
    labels: jax.Array


def place(mesh: Mesh, split: Split) -> Arrays:
    """Return a split on every device of the mesh."""
    return Arrays(*(meshes.place(mesh, part) for part in device.flatten(split)))


class Batch(NamedTuple):
    """A whole batch.

    Attributes:
      rows: int32 ``[b]``, row numbers in the split.
      weights: float32 ``[b]``, 0 for examples that only fill the batch up.
      augmentation: the random parameters of the augmentation, each ``[b, ...]``; ``None`` for none.
    """

    rows: jax.Array
    weights: jax.Array
    augmentation: augment.Draws | None


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

    def key_for(self, stream: Stream) -> jax.Array | None:
        """Return the key of one use within the step; ``None`` where nothing in it is random."""
        return None if self.key is None else stream.within(self.key)


@dataclasses.dataclass(frozen=True)
class Batches:
    """Draws the batches of an experiment.

    Attributes:
      size: images in the training split.
      batch_size: images per step and seed, over the data axis.
      drop_last: whether an epoch leaves out the images that do not fill a batch.
      balanced: whether every batch has the same number of images of each class.
      num_classes: of the data set.
      image_shape: ``(height, width, channels)``.
      augmentation: what happens to training images; its normalisation also to the others.
      dtype: of the images that the model takes.
      shards: devices along the data axis.
      extra_batch_size: images in a further batch; 0 for none.
      extra_batches: further batches per step.
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
    shards: int
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
        augmentation = self._augmentation(seed, Stream.AUGMENT, numbers, self.batch_size)
        extra = self._extra(seed, epoch, start, numbers) if self.extra_batch_size else None
        keys = None
        if self.random:
            keys = jax.vmap(lambda step: stream_key(seed, Stream.STEP, step))(numbers)
        return Step(Batch(rows, weights, augmentation), extra, keys)

    def _extra(
        self, seed: jax.Array, epoch: jax.Array, start: jax.Array, numbers: jax.Array
    ) -> Batch:
        """Cut further batches from an order of their own, which starts over when it is used up."""
        with jax.named_scope("shuffle"):
            key = stream_key(seed, Stream.EXTRA_ORDER, epoch)
            order, _ = device.epoch_order(key, self.size, self.extra_batch_size, True)
            index = (start + jnp.arange(numbers.shape[0])) * self.extra_batches
            index = index[:, None] + jnp.arange(self.extra_batches)
            rows = order[index % order.shape[0]]
        images = self.extra_batches * self.extra_batch_size
        augmentation = jax.tree.map(
            lambda leaf: leaf.reshape(*rows.shape, *leaf.shape[2:]),
            self._augmentation(seed, Stream.EXTRA_AUGMENT, numbers, images),
        )
        return Batch(rows, jnp.ones(rows.shape, jnp.float32), augmentation)

    def _augmentation(
        self, seed: jax.Array, stream: Stream, numbers: jax.Array, images: int
    ) -> augment.Draws:
        """Draw the augmentation's parameters for whole batches, the same on any number of devices."""

        def draw(step):
            key = stream_key(seed, stream, step)
            return augment.draw(key, images, self.augmentation, self.image_shape)

        with jax.named_scope("augment"):
            return jax.vmap(draw)(numbers)

    def part(self, tree: PyTree, size: int) -> PyTree:
        """Return this device's rows of arrays over a whole batch of ``size``."""
        count = size // self.shards
        start = jax.lax.axis_index(meshes.DATA) * count
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, count), tree)

    def images(
        self, data: Arrays, rows: jax.Array, augmentation: augment.Draws | None
    ) -> tuple[jax.Array, jax.Array]:
        """Return images ``[b, h, w, c]`` as the model takes them and labels ``[b]``.

        Without parameters of the ``augmentation`` they are normalised only.
        """
        with jax.named_scope("gather"):
            images = device.take(data.images, rows, self.image_shape)
            labels = jnp.take(data.labels, rows, mode="clip")
        with jax.named_scope("augment"):
            images = augment.apply(images, augmentation, self.augmentation, self.dtype)
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
