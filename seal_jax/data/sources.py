"""Load a data set by name, without TensorFlow: into host memory, or as images that stay encoded."""

import concurrent.futures
import contextlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from seal_jax.data.dataset import Dataset, Split, hold_out
from seal_jax.data.preparation import first_line
from seal_jax.data.readers import Opened, Reader, open_data
from seal_jax.data.streaming import CHUNK, THREADS, Decoder, StoredImages, differing, labels_of
from seal_jax.errors import UsageError, check_choice, check_integer

# A bar appears only where decoding takes longer than this, in seconds.
_BAR_DELAY = 2.0
Placement = Literal["device", "stream", "auto"]


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
        :class:`seal_jax.data.StoredImages`; ``auto`` chooses by ``room`` and the host's memory.
      room: bytes that all images may take before ``auto`` streams; None is no limit but the host's.
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
    readers = [opened.reader(train_split, "train_split")]
    if test_split is not None:
        readers.append(opened.reader(test_split, "test_split"))
    parts = [_stored(opened, reader, size, channels, crop) for reader in readers]
    streamed = placement == "stream"
    if placement == "auto":
        needed = sum(math.prod(part.shape) for part in parts)
        free = available_memory()
        streamed = needed > (needed if room is None else room) or 2 * needed > (free or 2 * needed)
    whole, *tests = (
        Split(part, labels_of(part.reader, opened.location))
        if streamed
        else _decode(part, opened, progress)
        for part in parts
    )
    if not tests:
        # Seed 0 and not validation_seed: whatever is validated on, the test images stay the same.
        whole, *tests = hold_out(whole, test_fraction or 0.0, 0, "test_fraction")
    train, validation = hold_out(whole, validation_fraction, validation_seed)
    class_names = opened.class_names
    return Dataset(name, len(class_names), class_names, train, validation, tests[0])


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
    progress: bool = True,
) -> tuple[Split, tuple[str, ...]]:
    """Load all labelled images of a data set as one split, as few-shot episodes need them.

    Args:
      name: as for :func:`load`, like ``data_dir``, ``label``, ``image_size``, ``channels``, ``crop``
        and ``progress``.
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
    reader = opened.reader(wanted, "split")
    if images:
        whole = _decode(_stored(opened, reader, size, channels, crop), opened, progress)
    else:
        none = np.empty((len(reader), 0, 0, channels or opened.channels), np.uint8)
        whole = Split(none, labels_of(reader, opened.location))
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


@contextlib.contextmanager
def _reading(opened: Opened) -> Any:
    """Turn what missing or damaged files raise into one line."""
    try:
        yield
    except UsageError:
        raise
    # Any error of array_record, protobuf, TFDS, pyarrow or the file system.
    except Exception as error:
        raise UsageError(
            f"{opened.location} cannot be read ({first_line(error)}): {opened.remedy}"
        ) from error


def _stored(
    opened: Opened,
    reader: Reader,
    size: tuple[int, int] | None,
    channels: int | None,
    crop: int | None,
) -> StoredImages:
    """Return the images of a part; its first one tells the shape of all where ``size`` does not."""
    channels = channels or opened.channels
    decoder = Decoder(channels, size, crop, opened.remedy)
    shape: tuple[int, ...]
    if size is not None:
        shape = (*(size if crop is None else (crop, crop)), channels)
        _check_memory(reader.name, (1, *size, channels))  # before the crop
    else:
        with _reading(opened):
            [(encoded, _)] = reader.read([0])
            shape = decoder(reader, 0, encoded).shape
    height, width, channels = shape
    return StoredImages(reader, decoder, np.arange(len(reader)), (height, width, channels))


def _decode(stored: StoredImages, opened: Opened, progress: bool) -> Split:
    """Read and decode all images of a part, and their labels in the same pass."""
    from tqdm import tqdm

    reader, count, shape = stored.reader, len(stored), stored.image_shape
    # Before anything is read.
    _check_memory(reader.name, stored.shape)
    images, labels = np.empty(stored.shape, np.uint8), np.empty(count, np.int32)
    bar = tqdm(
        total=count,
        desc=reader.name,
        unit=" images",
        delay=_BAR_DELAY,
        disable=not progress,
        # A log file gets a line now and then, a terminal a moving bar.
        mininterval=0.2 if sys.stderr and sys.stderr.isatty() else 15.0,
    )

    def fill(start: int) -> int:
        """Decode one chunk into its rows of the arrays; return its length."""
        chunk = reader.read(range(start, min(start + CHUNK, count)))
        # Threads write disjoint rows, so nothing is locked.
        for row, (encoded, labels[row]) in enumerate(chunk, start):
            image = stored.decoder(reader, row, encoded)
            if image.shape != shape:
                raise differing(reader.name, shape, image.shape)
            images[row] = image
        return len(chunk)

    with bar, concurrent.futures.ThreadPoolExecutor(THREADS) as pool, _reading(opened):
        for decoded in pool.map(fill, range(0, count, CHUNK)):
            bar.update(decoded)
    return Split(images, labels)


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
