"""Load a data set by name, without TensorFlow: into host memory, or as images that stay encoded."""

import concurrent.futures
import contextlib
import dataclasses
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from seal_jax.data.dataset import Dataset, Origin, Split, hold_out
from seal_jax.data.decoding import CorruptImageError
from seal_jax.data.readers import Opened, open_data, reading
from seal_jax.data.shards import CHUNK, bar_times
from seal_jax.data.streaming import THREADS, Decoder, StoredImages, differing, undecodable
from seal_jax.errors import UsageError, check_choice, check_integer

Placement = Literal["device", "stream", "auto"]
Corrupt = Literal["raise", "skip"]


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
    placement: Placement = "device",
    room: int | None = None,
    corrupt: Corrupt = "raise",
    progress: bool = True,
) -> Dataset:
    """Load a data set and hold out a validation split.

    Args:
      name: ``digits`` (prepared where it is missing), ``tiny_imagenet``, ``image_folder/NAME`` or any
        TFDS name (``name/config:version``) of images with a class label, prepared as array_record;
        or ``folder/NAME`` or ``hf/NAME``, a folder of images or of a Hugging Face data set as it is.
      data_dir: the folder of all data sets; None is TFDS's default (``TFDS_DATA_DIR``). For the last
        two the folder itself.
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
      placement: ``device`` decodes all images now, into arrays; ``stream`` leaves them encoded, as
        :class:`seal_jax.data.StoredImages`; ``auto`` chooses by ``room``.
      room: bytes that all images may take before ``auto`` streams; None is half of the host's free memory.
      corrupt: "raise" refuses an image that cannot be decoded, "skip" leaves it out and warns; to tell
        which, images that are streamed are all decoded once.
      progress: whether a progress bar may appear on standard error where decoding takes a while.

    Raises:
      UsageError: for an unknown name or split, data that is not prepared (with the command that
        prepares it) or cannot be read, images of differing sizes without ``image_size``, a crop
        larger than the images, and what :func:`seal_jax.data.stratified_split` raises.
    """
    check_choice("data.placement", placement, ("device", "stream", "auto"))
    size = _checked_size(image_size, channels, crop)
    opened = open_data(name, data_dir, label)
    test_split = test_split or opened.test_split
    if test_split is None and test_fraction is None:
        raise UsageError(
            f"{name} has neither a test nor a validation split: set train_split and test_split to "
            f"parts of {', '.join(opened.counts) or 'another data set'}, such as train[:80%] "
            "and train[80%:]"
        )
    if test_split == train_split:
        raise UsageError(f"test_split={test_split!r} is the training split: choose other examples")
    parts = [_stored(opened, train_split, "train_split", size, channels, crop, corrupt)]
    if test_split is not None:
        parts.append(_stored(opened, test_split, "test_split", size, channels, crop, corrupt))
    streamed = placement == "stream"
    if placement == "auto":
        needed = sum(math.prod(part.shape) for part in parts)
        if room is None and (free := available_memory()) is not None:
            room = free // 2
        streamed = room is not None and needed > room
    whole, *tests = (_split(part, streamed, corrupt, progress) for part in parts)
    if not tests:
        # Seed 0 and not validation_seed: whatever is validated on, the test images stay the same.
        whole, *tests = hold_out(whole, test_fraction or 0.0, 0, "test_fraction")
    train, validation = hold_out(whole, validation_fraction, validation_seed)
    class_names = opened.class_names
    origin = Origin(opened.version, opened.location, opened.fingerprint)
    return Dataset(name, len(class_names), class_names, train, validation, tests[0], origin)


def load_labelled(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    split: str | None = None,
    label: str | None = None,
    image_size: int | Sequence[int] | None = None,
    channels: int | None = None,
    crop: int | None = None,
    images: bool = True,
    corrupt: Corrupt = "raise",
    progress: bool = True,
) -> tuple[Split, tuple[str, ...]]:
    """Load all labelled images of a data set as one split, as few-shot episodes need them.

    Args:
      name: as for :func:`load`, like ``data_dir``, ``label``, ``image_size``, ``channels``, ``crop``,
        ``corrupt`` and ``progress``.
      split: a TFDS split, such as ``train`` or ``train+test``; None is all splits in a row, without
        the examples whose label is -1, TFDS's mark of an unlabelled one.
      images: whether to decode images; without, they have no pixels, and only labels are read.

    Returns:
      The split and the names of the classes.

    Raises:
      UsageError: as :func:`load`, and where a given split has an unlabelled example.
    """
    size = _checked_size(image_size, channels, crop)
    opened = open_data(name, data_dir, label)
    wanted = split or "+".join(part for part, count in opened.counts.items() if count)
    if images:
        part = _stored(opened, wanted, "split", size, channels, crop, corrupt)
        whole = _split(part, False, corrupt, progress)
    else:
        reader = opened.reader(wanted, "split")
        none = np.empty((len(reader), 0, 0, channels or opened.channels), np.uint8)
        with reading(reader):
            whole = Split(none, reader.labels())
    labelled = whole.labels >= 0
    if not labelled.all():
        if split is not None or not labelled.any():
            raise UsageError(f"{name}: split={wanted!r} has unlabelled examples: choose another")
        whole = whole.rows(np.flatnonzero(labelled))
    return whole, opened.class_names


def _checked_size(
    image_size: int | Sequence[int] | None, channels: int | None, crop: int | None
) -> tuple[int, int] | None:
    """Return ``(height, width)`` to resize to; raise unless the three go together."""
    size: Any = None
    if image_size is not None:
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(size) != 2 or min(size) < 1:
            raise UsageError(
                f"data.image_size={image_size!r} must be a positive side or (height, width)"
            )
    if channels not in (None, 1, 3):
        raise UsageError(f"channels={channels!r} must be 1 (grey) or 3 (red, green and blue)")
    if crop is not None:
        check_integer("crop", crop, 1)
        if size is not None and crop > min(size):
            raise UsageError(f"crop={crop} is larger than data.image_size={image_size}: lower it")
    return size


def _stored(
    opened: Opened,
    split: str,
    field: str,
    size: tuple[int, int] | None,
    channels: int | None,
    crop: int | None,
    corrupt: Corrupt,
) -> StoredImages:
    """Return the images of a split; the first one tells the shape of all where ``size`` does not."""
    reader = opened.reader(split, field)
    channels = channels or opened.channels
    stored = StoredImages(reader, Decoder(channels, size, crop), np.arange(len(reader)), (0, 0, 0))
    if size is not None:
        _check_memory(reader.name, (1, *size, channels))  # before the crop
        height, width = size if crop is None else (crop, crop)
        return dataclasses.replace(stored, image_shape=(height, width, channels))
    problem = None
    with reading(reader):
        for number in range(len(reader)):
            [(encoded, _)] = reader.read([number])
            try:
                height, width, channels = stored.decoder(encoded).shape
                return dataclasses.replace(stored, image_shape=(height, width, channels))
            except CorruptImageError as error:
                problem = problem or undecodable(reader, number, error)
                if corrupt == "raise":
                    break
    raise problem or AssertionError("a reader has at least one image")


def _split(stored: StoredImages, streamed: bool, corrupt: Corrupt, progress: bool) -> Split:
    """Return the images of a part with their labels; those that cannot be decoded are left out."""
    reader = stored.reader
    if streamed and corrupt == "raise":
        with reading(reader):
            return Split(stored, reader.labels())
    count, shape = len(stored), stored.image_shape
    # Of images that are streamed it is only looked at which ones can be decoded.
    if not streamed:
        _check_memory(reader.name, stored.shape)
    images: Any = stored if streamed else np.empty(stored.shape, np.uint8)
    labels, damaged = np.empty(count, np.int32), dict[int, str]()
    bar = tqdm(total=count, desc=reader.name, unit=" images", disable=not progress, **bar_times())

    def fill(start: int) -> int:
        """Decode one chunk into its rows of the arrays; return its length."""
        chunk = reader.read(range(start, min(start + CHUNK, count)))
        # Threads write disjoint rows, so nothing is locked.
        for row, (encoded, labels[row]) in enumerate(chunk, start):
            try:
                image = stored.decoder(encoded)
            except CorruptImageError as error:
                if corrupt == "raise":
                    raise undecodable(reader, row, error) from error
                damaged[row] = f"{reader.where(row)}: {error}"
                continue
            if image.shape != shape:
                raise differing(reader.name, shape, image.shape)
            if not streamed:
                images[row] = image
        return len(chunk)

    with (
        bar,
        concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
        reading(reader),
    ):
        for decoded in pool.map(fill, range(0, count, CHUNK)):
            bar.update(decoded)
    split = Split(images, labels)
    if not damaged:
        return split
    rows = sorted(damaged)
    if len(rows) == count:
        raise UsageError(
            f"{reader.name} has no image that can be decoded: {damaged[0]}; choose another part"
        )
    warnings.warn(
        f"{len(rows)} of {count} images in {reader.name} cannot be decoded and are left out: "
        f"{'; '.join(damaged[row] for row in rows[:3])}{'; ...' if len(rows) > 3 else ''}",
        stacklevel=4,
    )
    return split.rows(np.setdiff1d(np.arange(count), rows))


def _check_memory(split: str, shape: tuple[int, ...]) -> None:
    """Raise unless images of this shape, and the copy in which they are laid out, fit the memory."""
    needed, free = 2 * math.prod(shape), available_memory()
    if free is not None and needed > free:
        count, height, width, channels = shape
        raise UsageError(
            f"data.image_size: {count} images of {height}x{width}x{channels} in {split!r} and a copy "
            f"of them take {needed:,} bytes, and {free:,} are free: lower data.image_size "
            "(--image-size), or take a part of the split"
        )


def available_memory() -> int | None:
    """Return the bytes that this process can still take; None where the system does not say."""
    limits = []
    with contextlib.suppress(OSError, ValueError, LookupError):
        text = Path("/proc/meminfo").read_text()
        limits.append(1024 * int(text.partition("MemAvailable:")[2].split()[0]))
    with contextlib.suppress(OSError, ValueError, LookupError):
        # What is left of a container's limit, unless that is "max". Caches of files can be dropped.
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = (group / "memory.stat").read_text()
        cached = int(statistics.partition("inactive_file ")[2].split()[0])
        limits.append(limit - used + cached)
    return min(limits, default=None)
