"""Load a data set by name into host memory, without TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from seal_jax.data.dataset import Dataset, Split, from_arrays, hold_out
from seal_jax.data.decoding import decode_split, make_decoder
from seal_jax.data.preparation import open_prepared, prepare
from seal_jax.errors import UsageError, check_number

__all__ = ["Dataset", "Split", "from_arrays", "load", "load_labelled", "prepare"]


def _as_size(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise UsageError(
            f"data.image_size={image_size!r} must be a positive side or (height, width)"
        )
    return size


def _checked_size(
    image_size: int | Sequence[int] | None, channels: int | None, crop: int | None
) -> tuple[int, int] | None:
    """Return ``(height, width)`` to resize to; raise unless the three go together."""
    size = _as_size(image_size)
    if channels not in (None, 1, 3):
        raise UsageError(f"channels={channels!r} must be 1 (grey) or 3 (red, green and blue)")
    if crop is not None:
        check_number("crop", crop, lambda side: side >= 1 and side == int(side), "be a whole side")
        if size is not None and crop > min(size):
            raise UsageError(f"crop={crop} is larger than data.image_size={image_size}: lower it")
    return size


def load(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    test_fraction: float | None = None,
    label: str | None = None,
    image_size: int | Sequence[int] | None = None,
    channels: int | None = None,
    crop: int | None = None,
    validation_fraction: float = 0.1,
    validation_seed: int = 0,
    progress: bool = True,
) -> Dataset:
    """Load a prepared TFDS data set and hold out a validation split.

    Args:
      name: ``digits``, ``tiny_imagenet``, ``image_folder/NAME`` or any TFDS name
        (``name/config:version``) of images with a class label, prepared as array_record. ``digits``
        is prepared where it is missing.
      data_dir: where the data lies; None is TFDS's default (``TFDS_DATA_DIR``).
      train_split: a TFDS split, such as ``train`` or ``train[:10%]``.
      test_split: the same; by default ``test`` where there is one, else ``validation``.
      test_fraction: part of the training split to test on, stratified by class and always the same,
        where the data set has neither; None refuses such a data set.
      label: which class label, where there are several (CIFAR-100: ``label``, ``coarse_label``).
      image_size: side, or ``(height, width)``, to resize to (bilinear); None keeps the stored size.
      channels: 3 repeats grey images over red, green and blue; 1 turns these into grey (ITU-R 601-2
        luma); None keeps those of the data set.
      crop: side of the square to cut from the middle after resizing; None keeps all. The public
        few-shot protocol is ``image_size=int(1.15 * side), crop=side``.
      validation_fraction: part of the training split to hold out, stratified by class.
      validation_seed: seed of that split.
      progress: whether a progress bar may appear on standard error where decoding takes a while.

    Returns:
      The data set; images uint8 ``[n, height, width, channels]``, labels int32 ``[n]``.

    Raises:
      UsageError: for an unknown name or split, data that is not prepared (with the command that
        prepares it) or cannot be read, images of differing sizes without ``image_size``, a crop
        larger than the images, and what :func:`seal_jax.data.stratified_split` raises.
    """
    size = _checked_size(image_size, channels, crop)
    builder = open_prepared(name, data_dir)
    test_split = test_split or default_test_split(builder)
    if test_split is None and test_fraction is None:
        raise UsageError(
            f"{name} has neither a test nor a validation split: set train_split and test_split to "
            f"parts of {', '.join(builder.info.splits) or 'another data set'}, such as train[:80%] "
            "and train[80%:]"
        )
    if test_split == train_split:
        raise UsageError(f"test_split={test_split!r} is the training split: choose other examples")
    decoder = make_decoder(builder.info, label, size, channels, crop)
    classes = decoder.features[decoder.label]
    whole = decode_split(builder, train_split, decoder, field="train_split", progress=progress)
    if test_split is not None:
        test = decode_split(builder, test_split, decoder, field="test_split", progress=progress)
    else:
        whole, test = hold_out(whole, test_fraction or 0.0, 0, "test_fraction")
    train, validation = hold_out(whole, validation_fraction, validation_seed)
    return Dataset(name, classes.num_classes, tuple(classes.names), train, validation, test)


def default_test_split(builder: Any) -> str | None:
    """Return the split that a prepared data set is tested on, ``None`` if it has none."""
    return next((split for split in ("test", "validation") if split in builder.info.splits), None)


def load_labelled(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    split: str | None = None,
    label: str | None = None,
    image_size: int | Sequence[int] | None = None,
    channels: int | None = None,
    crop: int | None = None,
    progress: bool = True,
) -> tuple[Split, tuple[str, ...]]:
    """Load all labelled images of a prepared data set as one split, as few-shot episodes need them.

    Args:
      name: as for :func:`load`.
      data_dir: the same.
      split: a TFDS split, such as ``train`` or ``train+test``; None is all splits in a row, without
        the examples whose label is -1, TFDS's mark of an unlabelled one.
      label: as for :func:`load`.
      image_size: the same.
      channels: the same.
      crop: the same.
      progress: the same.

    Returns:
      The split (images uint8 ``[n, height, width, channels]``, labels int32 ``[n]``) and the names
      of the classes.

    Raises:
      UsageError: as :func:`load`, and where a given split has an unlabelled example.
    """
    size = _checked_size(image_size, channels, crop)
    builder = open_prepared(name, data_dir)
    decoder = make_decoder(builder.info, label, size, channels, crop)
    wanted = split or "+".join(
        part for part, info in builder.info.splits.items() if info.num_examples
    )
    whole = decode_split(builder, wanted, decoder, field="split", progress=progress)
    labelled = whole.labels >= 0
    if not labelled.all():
        if split is not None or not labelled.any():
            raise UsageError(f"{name}: split={wanted!r} has unlabelled examples: choose another")
        whole = whole.rows(np.flatnonzero(labelled))
    return whole, tuple(decoder.features[decoder.label].names)
