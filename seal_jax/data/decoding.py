"""Decode the images and labels of a prepared split into arrays, with several threads."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import io
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from seal_jax.data.dataset import Split
from seal_jax.data.preparation import first_line
from seal_jax.errors import UsageError

_CHUNK = 256
# Decoding holds the interpreter's lock half of the time: more threads would only wait for it.
_THREADS = min(os.cpu_count() or 1, 4)
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# A bar appears only where decoding takes longer than this, in seconds.
_BAR_DELAY = 2.0


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Turns records of one data set into images and labels.

    Attributes:
      features: the TFDS features of the image and the label alone.
      image: key of the image.
      label: key of the label.
      channels: 1, 3 or 4; stored images with other channels are converted: grey is repeated over
        red, green and blue, and these are weighted to grey as in ITU-R 601-2 luma.
      size: ``(height, width)`` to resize to (bilinear), or None to keep the stored size.
      crop: side of the square to cut from the middle after that, or None for all of it.
    """

    features: Any
    image: str
    label: str
    channels: int
    size: tuple[int, int] | None
    crop: int | None = None

    def __call__(self, record: bytes) -> tuple[np.ndarray, int]:
        """Return the image, uint8 ``[height, width, channels]``, and the label."""
        import tensorflow_datasets as tfds
        from PIL import Image

        skip = {self.image: tfds.decode.SkipDecoding()}
        example = self.features.deserialize_example_np(record, decoders=skip)
        with Image.open(io.BytesIO(example[self.image])) as stored:
            mode = _MODES[self.channels]
            image = stored.convert(mode) if stored.mode != mode else stored.copy()
        if self.size is not None and image.size != self.size[::-1]:
            image = image.resize(self.size[::-1], Image.Resampling.BILINEAR)
        if self.crop is not None:
            image = _crop_centre(image, self.crop)
        pixels = np.asarray(image)
        return pixels.reshape(*pixels.shape[:2], self.channels), int(example[self.label])


def _crop_centre(image: Any, side: int) -> Any:
    """Cut out the central square; an odd number of pixels is shared out as torchvision does."""
    width, height = image.size
    if side > min(width, height):
        raise UsageError(
            f"crop={side} is larger than an image ({height}x{width}): set data.image_size, or lower it"
        )
    # Half a pixel is rounded to the even side.
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def _choose(features: Any, kind: type, given: str | None, supervised: Any, field: str) -> str:
    """Return the key of the one feature of this kind: the given, TFDS's supervised, or the only."""
    keys = sorted(key for key, feature in features.items() if isinstance(feature, kind))
    if given is not None:
        if given not in keys:
            raise UsageError(f"{field}={given!r} is not one of {', '.join(keys) or 'none'}")
        return given
    preferred = [key for key in keys if key in (supervised or ())]
    for candidates in (preferred, keys):
        if len(candidates) == 1:
            return candidates[0]
    if not keys:
        raise UsageError(
            f"the data set has no {kind.__name__} feature: choose one to classify images"
        )
    raise UsageError(f"{field} must choose one of {', '.join(keys)}")


def make_decoder(
    info: Any,
    label: str | None,
    size: tuple[int, int] | None,
    channels: int | None = None,
    crop: int | None = None,
) -> Decoder:
    """Return the decoder for a TFDS ``DatasetInfo``; ``channels`` None keeps those of the data set.

    Raises:
      UsageError: where there is no single image or label to choose, or images are not 8-bit.
    """
    import tensorflow_datasets as tfds

    features, supervised = info.features, info.supervised_keys
    image_key = _choose(features, tfds.features.Image, None, supervised, "the image")
    label_key = _choose(features, tfds.features.ClassLabel, label, supervised, "data.label")
    image = features[image_key]
    stored = image.shape[-1] or 3
    if image.np_dtype != np.uint8 or stored not in _MODES:
        raise UsageError(
            f"{info.name} has images of dtype {image.np_dtype} and {stored} channels: "
            "choose a data set of 8-bit images with 1, 3 or 4 channels"
        )
    # Not tfds.decode.PartialDecoding, which imports TensorFlow.
    chosen = tfds.features.FeaturesDict({key: features[key] for key in (image_key, label_key)})
    return Decoder(chosen, image_key, label_key, channels or stored, size, crop)


def _chunks(source: Any, decoder: Decoder, pool: Any) -> Iterator[tuple[int, Any]]:
    """Yield ``(start, decoded)`` in order, with a bounded number of chunks under way."""

    def decode(start: int) -> Any:
        rows = range(start, min(start + _CHUNK, len(source)))
        return [decoder(record) for record in source.__getitems__(list(rows))]

    pending: list[tuple[int, Any]] = []
    for start in range(0, len(source), _CHUNK):
        pending.append((start, pool.submit(decode, start)))
        if len(pending) >= 32:
            first, future = pending.pop(0)
            yield first, future.result()
    for first, future in pending:
        yield first, future.result()


def decode_split(
    builder: Any, split: str, decoder: Decoder, *, field: str, progress: bool
) -> Split:
    """Read and decode one split of a prepared data set.

    Args:
      builder: of TFDS, prepared.
      split: a TFDS split, such as ``train`` or ``train[:10%]``.
      decoder: from :func:`make_decoder`.
      field: what the message calls the split, such as ``train_split``.
      progress: whether a bar may appear on standard error.

    Raises:
      UsageError: for an unknown split, images of differing sizes, or data that cannot be read.
    """
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

    if decoder.size is not None:
        side = decoder.size if decoder.crop is None else (decoder.crop, decoder.crop)
        _check_memory(split, (count, *side, decoder.channels))
        _check_memory(split, (1, *decoder.size, decoder.channels))  # before the crop
    images: np.ndarray | None = None
    labels = np.empty(count, np.int32)
    bar = tqdm(
        total=count,
        desc=f"{builder.name} {split}",
        unit=" images",
        delay=_BAR_DELAY,
        disable=not progress,
        # A log file gets a line now and then, a terminal a moving bar.
        mininterval=0.2 if sys.stderr and sys.stderr.isatty() else 15.0,
    )
    with bar, concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        try:
            source = builder.as_data_source(
                split,
                deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
                file_format="array_record",
            )
            for start, decoded in _chunks(source, decoder, pool):
                for row, (image, label) in enumerate(decoded, start):
                    if images is None:
                        _check_memory(split, (count, *image.shape))
                        images = np.empty((count, *image.shape), np.uint8)
                    if image.shape != images.shape[1:]:
                        raise UsageError(
                            f"{builder.name} has images of differing sizes ({images.shape[1:3]}, "
                            f"{image.shape[:2]}): set data.image_size"
                        )
                    images[row], labels[row] = image, label
                bar.update(len(decoded))
        except UsageError:
            pool.shutdown(cancel_futures=True)
            raise
        # Missing or damaged files surface as any error of array_record, protobuf, TFDS or Pillow.
        except Exception as error:
            pool.shutdown(cancel_futures=True)
            raise _unreadable(builder, error) from error
    assert images is not None  # count > 0
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


def _unreadable(builder: Any, error: Exception) -> UsageError:
    return UsageError(
        f"{builder.data_dir} cannot be read ({first_line(error)}): delete it and prepare it again"
    )
