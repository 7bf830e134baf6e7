"""Load a prepared data set by name into host memory: its records decoded by threads, without TensorFlow."""

import concurrent.futures
import contextlib
import dataclasses
import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from seal_jax.data.dataset import Dataset, Origin, Split, hold_out
from seal_jax.data.decoding import MODES, CorruptImageError, decode
from seal_jax.data.preparation import first_line, open_prepared
from seal_jax.data.shards import damaged_shard, fingerprint, record_place
from seal_jax.errors import UsageError, check_integer

# Records that a thread asks for in one read.
_CHUNK = 256
# Decoding holds the interpreter's lock half of the time: more threads would only wait for it.
THREADS = min(os.cpu_count() or 1, 4)


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
    corrupt: Literal["raise", "skip"] = "raise",
    progress: bool = True,
) -> Dataset:
    """Load a prepared TFDS data set and hold out a validation split.

    Args:
      name: ``digits`` (prepared where it is missing), ``tiny_imagenet``, ``image_folder/NAME`` or any
        TFDS name (``name/config:version``) of images with a class label, prepared as array_record.
      data_dir: the folder of all data sets; None is TFDS's default (``TFDS_DATA_DIR``).
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
      corrupt: "raise" refuses an image that cannot be decoded, "skip" leaves it out and warns.
      progress: whether a progress bar may appear on standard error where decoding takes a while.

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
    whole = _decode(builder, train_split, decoder, "train_split", progress, corrupt)
    if test_split is not None:
        test = _decode(builder, test_split, decoder, "test_split", progress, corrupt)
    else:
        # Seed 0 and not validation_seed: whatever is validated on, the test images stay the same.
        whole, test = hold_out(whole, test_fraction or 0.0, 0, "test_fraction")
    train, validation = hold_out(whole, validation_fraction, validation_seed)
    class_names = decoder.class_names
    folder = os.fspath(builder.data_path)
    origin = Origin(str(builder.version), folder, fingerprint(builder.data_path))
    return Dataset(name, len(class_names), class_names, train, validation, test, origin)


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
    corrupt: Literal["raise", "skip"] = "raise",
    progress: bool = True,
) -> tuple[Split, tuple[str, ...]]:
    """Load all labelled images of a prepared data set as one split, as few-shot episodes need them.

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
    builder = open_prepared(name, data_dir)
    decoder = make_decoder(builder.info, label, size, channels, crop)
    decoder = dataclasses.replace(decoder, decode_images=images)
    wanted = split or "+".join(
        part for part, info in builder.info.splits.items() if info.num_examples
    )
    whole = _decode(builder, wanted, decoder, "split", progress, corrupt)
    labelled = whole.labels >= 0
    if not labelled.all():
        if split is not None or not labelled.any():
            raise UsageError(f"{name}: split={wanted!r} has unlabelled examples: choose another")
        whole = whole.rows(np.flatnonzero(labelled))
    return whole, decoder.class_names


def default_test_split(builder: Any) -> str | None:
    """Return the split that a prepared data set is tested on, ``None`` if it has none."""
    return next((split for split in ("test", "validation") if split in builder.info.splits), None)


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


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Turns records of one data set into images and labels, as the arguments of :func:`load` say."""

    features: Any  # TFDS's, of the image and the label only
    image: str  # their keys
    label: str
    channels: int
    size: tuple[int, int] | None
    crop: int | None = None
    decode_images: bool = True

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in label order."""
        return tuple(self.features[self.label].names)

    def __call__(self, record: bytes) -> tuple[np.ndarray, int]:
        """Return the image, uint8 ``[height, width, channels]``, and the label."""
        import tensorflow_datasets as tfds

        # TFDS leaves the image encoded, since it would need TensorFlow to decode some of them.
        skip = {self.image: tfds.decode.SkipDecoding()}
        example = self.features.deserialize_example_np(record, decoders=skip)
        label = int(example[self.label])
        if not self.decode_images:
            return np.empty((0, 0, self.channels), np.uint8), label
        return decode(example[self.image], self.channels, self.size, self.crop), label


def make_decoder(
    info: Any,
    label: str | None,
    size: tuple[int, int] | None,
    channels: int | None = None,
    crop: int | None = None,
) -> Decoder:
    """Return the decoder for a TFDS ``DatasetInfo``; raise where image and label are not plain."""
    import tensorflow_datasets as tfds

    features, supervised = info.features, info.supervised_keys
    image_key = _choose(features, tfds.features.Image, None, supervised, "the image")
    label_key = _choose(features, tfds.features.ClassLabel, label, supervised, "data.label")
    image = features[image_key]
    # Where TFDS leaves the number of channels open, the decoder converts all images to RGB.
    stored = image.shape[-1] or 3
    if image.np_dtype != np.uint8 or stored not in MODES:
        raise UsageError(
            f"{info.name} has images of dtype {image.np_dtype} and {stored} channels: "
            "choose a data set of 8-bit images with 1, 3 or 4 channels"
        )
    # Not tfds.decode.PartialDecoding, which imports TensorFlow.
    chosen = tfds.features.FeaturesDict({key: features[key] for key in (image_key, label_key)})
    return Decoder(chosen, image_key, label_key, channels or stored, size, crop)


def _choose(features: Any, kind: type, wanted: str | None, supervised: Any, field: str) -> str:
    """Return the key of the one feature of this kind: the wanted, TFDS's supervised, or the only."""
    keys = sorted(key for key, feature in features.items() if isinstance(feature, kind))
    if wanted is not None:
        if wanted not in keys:
            raise UsageError(f"{field}={wanted!r} is not one of {', '.join(keys) or 'none'}")
        return wanted
    preferred = [key for key in keys if key in (supervised or ())]
    for candidates in (preferred, keys):
        if len(candidates) == 1:
            return candidates[0]
    if not keys:
        raise UsageError(
            f"the data set has no {kind.__name__} feature: choose one to classify images"
        )
    raise UsageError(f"{field} must choose one of {', '.join(keys)}")


def _decode(
    builder: Any, split: str, decoder: Decoder, field: str, progress: bool, corrupt: str
) -> Split:
    """Read and decode a split of a prepared data set; ``field`` is what messages call the split."""
    import tensorflow_datasets as tfds
    from tqdm import tqdm

    try:
        count = builder.info.splits[split].num_examples
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"{field}={split!r}: {first_line(error)}; the splits are {', '.join(builder.info.splits)}"
        ) from error
    if count < 1:  # TFDS counts those of train[5:2] as -3
        raise UsageError(f"{field}={split!r} has no example: choose a larger part")

    # With a size given, memory is checked before anything is read.
    if decoder.size is not None:
        side = decoder.size if decoder.crop is None else (decoder.crop, decoder.crop)
        _check_memory(split, (count, *side, decoder.channels))
        _check_memory(split, (1, *decoder.size, decoder.channels))  # before the crop
    labels, damaged = np.empty(count, np.int32), dict[int, str]()
    bar = tqdm(
        total=count,
        desc=f"{builder.name} {split}",
        unit=" images",
        disable=not progress,
        **bar_times(),
    )
    with bar, concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        try:
            source = builder.as_data_source(
                split,
                deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
                file_format="array_record",
            )

            def example(row: int, record: bytes) -> tuple[np.ndarray, int] | None:
                """Decode a record; None for one that is skipped."""
                try:
                    return decoder(record)
                except CorruptImageError as error:
                    damaged[row] = f"{record_place(builder, split, row)}: {error}"
                if corrupt == "raise":
                    raise UsageError(
                        f"{damaged[row]}: replace the image and prepare the data again, or leave it "
                        'out by data.corrupt = "skip"'
                    )
                return None

            # Only the first image tells the stored size, and so the memory that all of them take.
            first = next(filter(None, (example(row, source[row]) for row in range(count))), None)
            if first is None:
                raise UsageError(
                    f"{field}={split!r} has no image that can be decoded: {damaged[0]}; prepare it again"
                )
            shape = first[0].shape
            _check_memory(split, (count, *shape))
            images = np.empty((count, *shape), np.uint8)

            def fill(start: int) -> int:
                """Decode one chunk into its rows of the arrays; return its length."""
                chunk = source.__getitems__(list(range(start, min(start + _CHUNK, count))))
                # Threads write disjoint rows, so nothing is locked.
                for row, record in enumerate(chunk, start):
                    pair = example(row, record)
                    if pair is None:
                        continue
                    image, labels[row] = pair
                    if image.shape != shape:
                        raise UsageError(
                            f"{builder.name} has images of differing sizes ({shape[:2]}, "
                            f"{image.shape[:2]}): set data.image_size"
                        )
                    images[row] = image
                return len(chunk)

            for decoded in pool.map(fill, range(0, count, _CHUNK)):
                bar.update(decoded)
        except UsageError:
            raise
        # Missing or damaged files surface as any error of array_record, protobuf, TFDS or Pillow.
        except Exception as error:
            raise UsageError(
                f"{damaged_shard(builder, split)} cannot be read ({first_line(error)}): "
                f"delete {builder.data_dir} and prepare it again"
            ) from error
    if not damaged:
        return Split(images, labels)
    rows = sorted(damaged)
    warnings.warn(
        f"{len(rows)} of {count} images in {field}={split!r} cannot be decoded and are left out: "
        f"{'; '.join(damaged[row] for row in rows[:3])}{'; ...' if len(rows) > 3 else ''}",
        stacklevel=3,
    )
    return Split(images, labels).rows(np.setdiff1d(np.arange(count), rows))


def bar_times() -> dict[str, float]:
    """Return tqdm's times in seconds for reading data: when its bar appears and how often it changes."""
    # No bar where it takes a moment; a log file gets a line now and then, a terminal a moving bar.
    return {"delay": 2.0, "mininterval": 0.2 if sys.stderr and sys.stderr.isatty() else 15.0}


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
