"""Load a data set by name into host memory, without TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Sequence

from seal_jax.data.dataset import Dataset, Split, from_arrays, hold_out
from seal_jax.data.decoding import decode_split, make_decoder
from seal_jax.data.preparation import open_prepared, prepare
from seal_jax.errors import UsageError

__all__ = ["Dataset", "Split", "from_arrays", "load", "prepare"]


def _as_size(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise UsageError(
            f"data.image_size={image_size!r} must be a positive side or (height, width)"
        )
    return size


def load(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    label: str | None = None,
    image_size: int | Sequence[int] | None = None,
    validation_fraction: float = 0.1,
    validation_seed: int = 0,
    progress: bool = True,
) -> Dataset:
    """Load a prepared TFDS data set and hold out a validation split.

    Args:
      name: ``digits``, ``tiny_imagenet`` or any TFDS name (``name/config:version``) of images with
        a class label, prepared as array_record. ``digits`` is prepared where it is missing.
      data_dir: where the data lies; None is TFDS's default (``TFDS_DATA_DIR``).
      train_split: a TFDS split, such as ``train`` or ``train[:10%]``.
      test_split: the same; by default ``test`` where there is one, else ``validation``.
      label: which class label, where there are several (CIFAR-100: ``label``, ``coarse_label``).
      image_size: side, or ``(height, width)``, to resize to (bilinear); None keeps the stored size.
      validation_fraction: part of the training split to hold out, stratified by class.
      validation_seed: seed of that split.
      progress: whether a progress bar may appear on standard error where decoding takes a while.

    Returns:
      The data set; images uint8 ``[n, height, width, channels]``, labels int32 ``[n]``.

    Raises:
      UsageError: for an unknown name or split, data that is not prepared (with the command that
        prepares it) or cannot be read, images of differing sizes without ``image_size``, and what
        :func:`seal_jax.data.stratified_split` raises.
    """
    size = _as_size(image_size)
    builder = open_prepared(name, data_dir)
    splits = list(builder.info.splits)
    if test_split is None:
        test_split = next((split for split in ("test", "validation") if split in splits), None)
        if test_split is None:
            raise UsageError(
                f"{name} has neither a test nor a validation split: set test_split to a part "
                f"of {', '.join(splits) or 'another data set'}, such as train[80%:]"
            )
    if test_split == train_split:
        raise UsageError(f"test_split={test_split!r} is the training split: choose other examples")
    decoder = make_decoder(builder.info, label, size)
    classes = decoder.features[decoder.label]
    whole, test = (
        decode_split(builder, split, decoder, field=field, progress=progress)
        for split, field in ((train_split, "train_split"), (test_split, "test_split"))
    )
    train, validation = hold_out(whole, validation_fraction, validation_seed)
    return Dataset(name, classes.num_classes, tuple(classes.names), train, validation, test)
