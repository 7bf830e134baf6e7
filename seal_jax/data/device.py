"""Data that lives in device memory: laid out flat, its order drawn inside the compiled program."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.data.dataset import Split
from seal_jax.errors import UsageError

LANES = 128


def flatten(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return the images as uint8 ``[n, row]`` and the labels as int32 ``[n]``.

    A row is ``height*width*channels`` bytes, padded with zeros to a multiple of 128, a TPU's lanes.
    """
    # A TPU changes the layout of a whole 4-D array for every gather of its rows: thousands of times
    # the cost of gathering flat rows.
    flat = split.images.reshape(len(split), -1)
    padding = row_bytes(split.images.shape[1:]) - flat.shape[1]
    return np.pad(flat, ((0, 0), (0, padding))), split.labels


def row_bytes(image_shape: tuple[int, ...]) -> int:
    """Return the bytes of a flat image, padded to whole lanes.

    >>> row_bytes((28, 28, 1))
    896
    """
    return -(-math.prod(image_shape) // LANES) * LANES


def take(flat: jax.Array, rows: jax.Array, image_shape: tuple[int, int, int]) -> jax.Array:
    """Gather ``rows``, integer ``[batch]`` in ``0 .. n-1``, of the images that :func:`flatten` returns.

    Returns:
      uint8 ``[batch, *image_shape]``.

    Examples:
      >>> take(jnp.arange(12, dtype=jnp.uint8).reshape(3, 4), jnp.array([2]), (2, 2, 1))[0, :, :, 0]
      Array([[ 8,  9], [10, 11]], dtype=uint8)
    """
    # By default jnp.take checks every row number, to fill in for those out of range.
    pixels = jnp.take(flat, rows, axis=0, mode="clip")[:, : math.prod(image_shape)]
    return pixels.reshape(rows.shape[0], *image_shape)


def steps_per_epoch(n: int, batch: int, drop_last: bool = True) -> int:
    """Return the number of batches in an epoch over ``n`` examples; raise unless it has a whole one.

    Examples:
      >>> steps_per_epoch(10, 4), steps_per_epoch(10, 4, drop_last=False)
      (2, 3)
    """
    if not 1 <= batch <= n:
        raise UsageError(
            f"train.batch_size={batch} must lie in 1..{n}, the number of training examples: lower it"
        )
    return n // batch if drop_last else -(-n // batch)


def epoch_order(
    key: jax.Array, n: int, batch: int, drop_last: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Draw the order of one epoch: a permutation, cut into batches.

    Args:
      key: a JAX random key; may be traced, while the other arguments are static.
      n: number of examples, at least ``batch``.
      batch: examples a step.
      drop_last: leave out the ``n % batch`` examples that do not fill a batch. Otherwise the last
        batch is padded with the first rows of the permutation, at weight 0.

    Returns:
      ``rows`` int32 and ``weights`` float32, both ``[steps, batch]``.
    """
    steps = steps_per_epoch(n, batch, drop_last)
    order = jax.random.permutation(key, n).astype(jnp.int32)
    padding = max(steps * batch - n, 0)
    rows = jnp.concatenate([order, order[:padding]])[: steps * batch]
    weights = jnp.arange(steps * batch) < n
    return rows.reshape(steps, batch), weights.astype(jnp.float32).reshape(steps, batch)


def balanced_order(
    key: jax.Array, labels: jax.Array, num_classes: int, batch: int
) -> tuple[jax.Array, jax.Array]:
    """Draw the order of one epoch of class-balanced batches.

    Every batch has ``batch / num_classes`` (whole) images of each class, by the ``labels``, int32 ``[n]``.
    A class with fewer images than others repeats its own in the same order.

    Returns:
      ``rows`` int32 and ``weights`` float32 (all 1), both ``[n // batch, batch]``.

    Examples:
      >>> labels = jnp.array([0, 0, 0, 1, 1, 0])
      >>> rows, _ = balanced_order(jax.random.key(0), labels, 2, 2)
      >>> jnp.sort(labels[rows], axis=1).tolist()
      [[0, 1], [0, 1], [0, 1]]
    """
    n = labels.shape[0]
    steps, per_class = steps_per_epoch(n, batch), batch // num_classes
    order = jax.random.permutation(key, n).astype(jnp.int32)
    # A stable sort: within its class each image keeps its random place.
    grouped = order[jnp.argsort(labels[order])]
    counts = jnp.bincount(labels, length=num_classes)
    first = jnp.cumsum(counts) - counts
    position = jnp.arange(steps * per_class).reshape(steps, 1, per_class)
    position %= jnp.maximum(counts, 1)[:, None]
    rows = grouped[first[:, None] + position].reshape(steps, batch)
    return rows, jnp.ones((steps, batch), jnp.float32)


def padded_batches(n: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return every example once and in order, for evaluation.

    The last batch is padded with rows from the start at weight 0, so that all have one shape and every
    row number is valid. A batch may be larger than ``n``; ``n`` of 0 gives no batch.

    Returns:
      ``rows`` int32 and ``weights`` float32, both ``[ceil(n / batch), batch]``.

    Examples:
      >>> rows, weights = padded_batches(5, 3)
      >>> rows.tolist(), weights.tolist()
      ([[0, 1, 2], [3, 4, 0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    """
    if batch < 1:
        raise UsageError(f"batch={batch} must be at least 1")
    steps = -(-n // batch)
    index = np.arange(steps * batch)
    rows = (index % max(n, 1)).astype(np.int32)
    weights = (index < n).astype(np.float32)
    return rows.reshape(steps, batch), weights.reshape(steps, batch)
