"""Batches inside the compiled steps: their order, their random numbers, their images."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from seal_jax.core import mesh as meshes
from seal_jax.core.settings import Train
from seal_jax.core.state import Stream, stream_key
from seal_jax.data import Split, augment, device
from seal_jax.errors import UsageError
from seal_jax.methods import Method
from seal_jax.models import Model

PyTree = Any


class Arrays(NamedTuple):
    """A split on the device: flat uint8 ``images [n, row]`` and int32 ``labels [n]``."""

    images: jax.Array
    labels: jax.Array


def place(mesh: Mesh, split: Split) -> Arrays:
    """Return a split on every device of the mesh."""
    return Arrays(*(meshes.place(mesh, part) for part in device.flatten(split)))


class DataShape(NamedTuple):
    """What the compiled steps must know of a data set: sizes of its splits, images and classes."""

    train: int
    validation: int
    test: int
    image_shape: tuple[int, int, int]
    num_classes: int


class Batch(NamedTuple):
    """A whole batch."""

    rows: jax.Array  # int32 [b], row numbers in the split
    weights: jax.Array  # float32 [b], 0 for examples that only fill the batch up
    augmentation: augment.AugmentationParams | None  # its random parameters, each [b, ...]


class Step(NamedTuple):
    """What one step is made of; in a scan every leaf has a leading axis of steps."""

    batch: Batch
    extra: Batch | None  # the further batches of a method, each leaf [extra_batches, ...]
    key: jax.Array | None  # of the step; None if nothing in it is random

    def key_for(self, stream: Stream) -> jax.Array | None:
        """Return the key of one use within the step; ``None`` where nothing in it is random."""
        return None if self.key is None else stream.within(self.key)


@dataclasses.dataclass(frozen=True)
class Batches:
    """Draws the batches of an experiment."""

    shape: DataShape
    train: Train  # the batch size, and how images are sampled
    method: Method  # may ask for further batches, and for a key
    model: Model
    augmentation: augment.Augmentation  # of training images; its normalisation also of the others
    shards: int  # devices along the data axis

    @property
    def fills(self) -> bool:
        """Whether a batch may hold images that only fill it up."""
        return not self.train.drop_last and self.shape.train % self.train.batch_size > 0

    def steps(
        self, seed: jax.Array, first: jax.Array, count: int, per_epoch: int, labels: jax.Array
    ) -> Step:
        """Draw ``count`` steps of one epoch from step ``first`` on, ahead of the scan over them.

        In the step itself the random numbers would be many tiny kernels.
        """
        size, batch_size = self.shape.train, self.train.batch_size
        epoch, start = first // per_epoch, first % per_epoch
        numbers = first + jnp.arange(count)
        with jax.named_scope("shuffle"):
            key = stream_key(seed, Stream.ORDER, epoch)
            if self.train.sampling == "balanced":
                order = device.balanced_order(key, labels, self.shape.num_classes, batch_size)
            else:
                order = device.epoch_order(key, size, batch_size, self.train.drop_last)
            # A call may start anywhere in the epoch, whose order is a function of the epoch alone.
            rows, weights = (jax.lax.dynamic_slice_in_dim(part, start, count) for part in order)
        augmentation = self._augmentation(seed, Stream.AUGMENT, numbers, batch_size)
        extra = None
        if self.method.extra_batch_size:
            extra = self._extra(seed, epoch, start, numbers)
        keys = None
        if self.method.random or self.model.module.dropout:
            # By the step's number, not split off a key that is carried: a resumed run has the same.
            keys = jax.vmap(lambda step: stream_key(seed, Stream.STEP, step))(numbers)
        return Step(Batch(rows, weights, augmentation), extra, keys)

    def _extra(
        self, seed: jax.Array, epoch: jax.Array, start: jax.Array, numbers: jax.Array
    ) -> Batch:
        """Cut further batches from an order of their own, which starts over when it is used up."""
        count = self.method.extra_batches
        with jax.named_scope("shuffle"):
            key = stream_key(seed, Stream.EXTRA_ORDER, epoch)
            order, _ = device.epoch_order(key, self.shape.train, self.method.extra_batch_size)
            index = (start + jnp.arange(numbers.shape[0])) * count
            index = index[:, None] + jnp.arange(count)
            rows = order[index % order.shape[0]]
        # All further batches of a step at once: one draw for each would be many small kernels.
        images = count * self.method.extra_batch_size
        augmentation = jax.tree.map(
            lambda leaf: leaf.reshape(*rows.shape, *leaf.shape[2:]),
            self._augmentation(seed, Stream.EXTRA_AUGMENT, numbers, images),
        )
        return Batch(rows, jnp.ones(rows.shape, jnp.float32), augmentation)

    def _augmentation(
        self, seed: jax.Array, stream: Stream, numbers: jax.Array, images: int
    ) -> augment.AugmentationParams:
        """Draw the augmentation's parameters for whole batches, the same on any number of devices."""

        def draw(step):
            key = stream_key(seed, stream, step)
            return augment.draw(key, images, self.augmentation, self.shape.image_shape)

        with jax.named_scope("augment"):
            return jax.vmap(draw)(numbers)

    def part(self, tree: PyTree, size: int) -> PyTree:
        """Return this device's rows of arrays over a whole batch of ``size``."""
        count = size // self.shards
        start = jax.lax.axis_index(meshes.DATA) * count
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, count), tree)

    def images(
        self, data: Arrays, rows: jax.Array, augmentation: augment.AugmentationParams | None
    ) -> tuple[jax.Array, jax.Array]:
        """Return images ``[b, h, w, c]`` as the model takes them and labels ``[b]``.

        Without parameters of the ``augmentation`` they are normalised only.
        """
        with jax.named_scope("gather"):
            images = device.take(data.images, rows, self.shape.image_shape)
            labels = jnp.take(data.labels, rows, mode="clip")
        with jax.named_scope("augment"):
            images = augment.apply(images, augmentation, self.augmentation, self.model.module.dtype)
        return images, labels

    def sample(self, data: Arrays, key: jax.Array, count: int) -> jax.Array:
        """Return ``count`` random training images, not augmented.

        Raises:
          UsageError: there are not so many.
        """
        size = self.shape.train
        if count > size:
            raise UsageError(
                f"method.sample_size = {count} is larger than the training split, {size} images"
            )
        rows = jax.random.choice(key, size, (count,), replace=False)
        return self.images(data, rows, None)[0]
