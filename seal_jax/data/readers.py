"""Where encoded images with labels are read from: TFDS's array_record, a folder of files, Hugging Face.

A :class:`Reader` reads any of them by number, in any order, without TensorFlow. It can be pickled, so
that worker processes read as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from seal_jax.core import files
from seal_jax.data.decoding import MODES
from seal_jax.data.preparation import first_line, open_prepared
from seal_jax.data.shards import CHUNK, bar_times, damaged_shard, fingerprint, record_place
from seal_jax.errors import UsageError

# Read where they are, without being prepared: ``folder/NAME`` and ``hf/NAME``, at ``data.data_dir``.
IN_PLACE = ("folder", "hf")


class Reader(Protocol):
    """Encoded images of one part of a data set, with their labels."""

    name: str  # what messages call the part
    remedy: str  # what to do where it cannot be read

    def __len__(self) -> int: ...

    def read(self, numbers: Sequence[int] | np.ndarray) -> list[tuple[bytes, int]]:
        """Return the encoded images of these numbers, with their labels."""
        ...

    def labels(self) -> np.ndarray:
        """Return all labels, int32 ``[n]``."""
        ...

    def where(self, number: int) -> str:
        """Return what messages call one image."""
        ...

    def damaged(self) -> str:
        """Return the file or folder that cannot be read, after reading failed."""
        ...


@contextlib.contextmanager
def reading(reader: Reader) -> Iterator[None]:
    """Turn what missing or damaged files raise, while they are read, into one line."""
    try:
        yield
    except UsageError:
        raise
    # Any error of array_record, protobuf, TFDS, pyarrow or the file system.
    except Exception as error:
        raise UsageError(
            f"{reader.damaged()} cannot be read ({first_line(error)}): {reader.remedy}"
        ) from error


@dataclasses.dataclass(frozen=True)
class Opened:
    """A data set whose parts can be read.

    Attributes:
      location: where it is, for messages.
      counts: images by split.
      class_names: in label order.
      channels: of the stored images, 1, 3 or 4.
      version: TFDS's, "" where there is none.
      fingerprint: identifies its files, without reading them whole.
      part: returns the reader of a checked split such as ``train[:10%]``.
    """

    location: str
    counts: Mapping[str, int]
    class_names: tuple[str, ...]
    channels: int
    version: str
    fingerprint: str
    part: Callable[[str], Reader]

    def reader(self, split: str, field: str) -> Reader:
        """Return the reader of a split; ``field`` is what messages call the split.

        Raises:
          UsageError: there is no such split, or it is empty.
        """
        try:
            reader = self.part(split)
        except (KeyError, ValueError) as error:
            raise UsageError(
                f"{field}={split!r}: {first_line(error)}; the splits are {', '.join(self.counts)}"
            ) from error
        if len(reader) < 1:  # TFDS counts those of train[5:2] as -3
            raise UsageError(f"{field}={split!r} has no example: choose a larger part")
        return reader

    @property
    def test_split(self) -> str | None:
        """The split that it is tested on, ``None`` if it has none."""
        return next((split for split in ("test", "validation") if split in self.counts), None)


def open_data(name: str, data_dir: str | os.PathLike | None, label: str | None = None) -> Opened:
    """Open a data set by name, where it is prepared or lies.

    Args:
      name: ``folder/NAME``, ``hf/NAME``, or any name of TFDS, whose data must be prepared as
        array_record; ``digits`` is prepared where it is missing.
      data_dir: the folder of all prepared data sets, or, for the first two, of this one.
      label: which class label, where there are several.

    Raises:
      UsageError: unknown, not prepared, or not images with a class label.
    """
    kind = name.split("/")[0]
    if kind not in IN_PLACE:
        return _open_prepared(name, data_dir, label)
    if not data_dir:
        raise UsageError(
            f"data.name={name!r} is read where it lies: set data.data_dir to its folder"
        )
    return (_open_folder if kind == "folder" else _open_hugging_face)(name, data_dir, label)


@dataclasses.dataclass(frozen=True)
class Parser:
    """Takes a record of a TFDS data set apart.

    Attributes:
      features: TFDS's, of the image and the label only.
      image: key of the image.
      label: key of the label.
      channels: of the stored images.
    """

    features: Any
    image: str
    label: str
    channels: int

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in label order."""
        return tuple(self.features[self.label].names)

    def __call__(self, record: bytes) -> tuple[bytes, int]:
        """Return the encoded image and its label."""
        import tensorflow_datasets as tfds

        # TFDS leaves the image encoded, since it would need TensorFlow to decode some of them.
        skip = {self.image: tfds.decode.SkipDecoding()}
        example = self.features.deserialize_example_np(record, decoders=skip)
        return example[self.image], int(example[self.label])


def make_parser(info: Any, label: str | None) -> Parser:
    """Return the parser for a TFDS ``DatasetInfo``; raise where image and label are not plain."""
    import tensorflow_datasets as tfds

    features, supervised = info.features, info.supervised_keys
    image_key = _choose(features, tfds.features.Image, None, supervised, "the image")
    label_key = _choose(features, tfds.features.ClassLabel, label, supervised, "data.label")
    image = features[image_key]
    # Where TFDS leaves the number of channels open, images are converted to RGB.
    stored = image.shape[-1] or 3
    if image.np_dtype != np.uint8 or stored not in MODES:
        raise UsageError(
            f"{info.name} has images of dtype {image.np_dtype} and {stored} channels: "
            "choose a data set of 8-bit images with 1, 3 or 4 channels"
        )
    # Not tfds.decode.PartialDecoding, which imports TensorFlow.
    chosen = tfds.features.FeaturesDict({key: features[key] for key in (image_key, label_key)})
    return Parser(chosen, image_key, label_key, stored)


class _Prepared:
    """Reads a part of TFDS's array_record files."""

    def __init__(self, folder: str, split: str, source: Any, parser: Parser):
        self.name = f"{Path(folder).parent.name} {split}"
        self.remedy = f"delete {folder} and prepare it again"
        self._folder, self._split = folder, split
        self._source, self._parser = source, parser

    def __len__(self) -> int:
        return len(self._source)

    def read(self, numbers: Sequence[int] | np.ndarray) -> list[tuple[bytes, int]]:
        records = self._source.__getitems__([int(number) for number in numbers])
        return [self._parser(record) for record in records]

    def labels(self) -> np.ndarray:
        # Only reading every record tells them, so they are kept in the user's cache for the next time.
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        data = fingerprint(self._folder, times=True)
        identity = f"{data} {self._split} {self._parser.label} {len(self)}"
        kept = cache / "seal_jax" / "labels" / f"{_hash(identity).hex()}.npy"
        # A file that is damaged or cannot be read is made again.
        with contextlib.suppress(OSError, ValueError, EOFError):
            labels = np.load(kept, allow_pickle=False)
            if labels.shape == (len(self),) and labels.dtype == np.int32:
                return labels
        labels = np.empty(len(self), np.int32)
        starts = range(0, len(labels), CHUNK)
        label = f"labels of {self.name}"
        for start in tqdm(starts, label, unit=" images", unit_scale=CHUNK, **bar_times()):
            chunk = range(start, min(start + CHUNK, len(labels)))
            labels[chunk] = [label for _, label in self.read(chunk)]
        content = io.BytesIO()
        np.save(content, labels)
        # Without a cache the labels are read again: slower, and as good.
        with contextlib.suppress(OSError, UsageError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            files.write(kept, content.getvalue())
        return labels

    def where(self, number: int) -> str:
        return record_place(self._builder(), self._split, int(number))

    def damaged(self) -> str:
        return damaged_shard(self._builder(), self._split)

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        # Opened only for a message: a builder is too much to send to every worker process.
        return tfds.builder_from_directory(self._folder)


def _open_prepared(name: str, data_dir: str | os.PathLike | None, label: str | None) -> Opened:
    import tensorflow_datasets as tfds

    builder = open_prepared(name, data_dir)
    info, parser = builder.info, make_parser(builder.info, label)

    def part(split: str) -> Reader:
        folder = os.fspath(builder.data_dir)
        empty = _Prepared(folder, split, (), parser)
        if info.splits[split].num_examples < 1:
            return empty
        with reading(empty):
            source = builder.as_data_source(
                split,
                deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
                file_format="array_record",
            )
        return _Prepared(folder, split, source, parser)

    return Opened(
        location=str(builder.data_dir),
        counts={split: int(value.num_examples) for split, value in info.splits.items()},
        class_names=parser.class_names,
        channels=parser.channels,
        version=str(builder.version),
        fingerprint=fingerprint(builder.data_path),
        part=part,
    )


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


def _ranges(split: str, counts: Mapping[str, int]) -> list[tuple[str, range]]:
    """Return the ranges that a split in TFDS's syntax selects.

    >>> _ranges("train[:10%]+test", {"train": 50, "test": 7})
    [('train', range(0, 5)), ('test', range(0, 7))]
    """
    import tensorflow_datasets as tfds

    infos = {
        # What TFDS asks of its own records of splits.
        name: types.SimpleNamespace(num_examples=count)
        for name, count in counts.items()
    }
    absolute = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    return [
        (part.splitname, range(*slice(part.from_, part.to).indices(counts[part.splitname])))
        for part in absolute
    ]


class _Files:
    """Reads files below a folder."""

    remedy = "replace the file, or move it away"

    def __init__(self, name: str, root: str, files: np.ndarray, labels: np.ndarray):
        # Relative paths as bytes of one length: a million of them are pickled in a moment.
        self.name, self._root, self._files, self._labels = name, root, files, labels

    def __len__(self) -> int:
        return len(self._files)

    def read(self, numbers: Sequence[int] | np.ndarray) -> list[tuple[bytes, int]]:
        from etils import epath

        return [
            (epath.Path(self.where(number)).read_bytes(), int(self._labels[number]))
            for number in numbers
        ]

    def labels(self) -> np.ndarray:
        return self._labels

    def where(self, number: int) -> str:
        return f"{self._root}/{os.fsdecode(self._files[number])}"

    def damaged(self) -> str:
        return self._root


def _open_folder(name: str, data_dir: str | os.PathLike, label: str | None) -> Opened:
    from etils import epath

    from seal_jax.data.builders.image_folder import ImageFolder

    if label is not None:
        raise UsageError(f"data.label={label!r}: {name} has one label, its folders; leave it out")
    try:
        root = epath.Path(data_dir)
        listing = ImageFolder.scan(root)
    except UsageError as error:
        # The builder of such folders is given them by its own option.
        raise UsageError(str(error).replace("manual_dir", "data.data_dir")) from None
    # A bucket needs gcsfs and credentials, whose errors are of any kind.
    except Exception as error:
        raise UsageError(
            f"data.data_dir={data_dir} cannot be read ({first_line(error)}): give a folder that can"
        ) from error
    numbers = {class_name: index for index, class_name in enumerate(listing.classes)}
    # In an order that depends on the names only, and mixes the classes: of those sorted by class, a part
    # such as train[:80%] would have some classes and not the others. TFDS stores examples in such an order.
    mixed = {
        split: sorted(examples, key=lambda example: _hash(f"{example[1]}/{example[0].name}"))
        for split, examples in listing.splits.items()
    }

    def part(split: str) -> Reader:
        chosen = [
            example
            for split_name, rows in _ranges(split, listing.counts)
            for example in mixed[split_name][rows.start : rows.stop]
        ]
        files = np.array([os.fsencode(path.relative_to(root)) for path, _ in chosen], np.bytes_)
        labels = np.array([numbers[class_name] for _, class_name in chosen], np.int32)
        return _Files(f"{name} {split}", os.fspath(root), files, labels)

    names = hashlib.sha256()
    for split, examples in listing.splits.items():
        for path, class_name in examples:
            names.update(os.fsencode(f"{split}/{class_name}/{path.name}\n"))
    return Opened(
        location=str(root),
        counts=listing.counts,
        class_names=tuple(listing.classes),
        channels=3,
        version="",
        fingerprint=f"names:{names.hexdigest()}",
        part=part,
    )


class _HuggingFace:
    """Reads rows of a Hugging Face data set, which is mapped into memory."""

    remedy = "make the folder again"

    def __init__(self, folder: str, name: str, rows: Any, image: str, label: str):
        self.name, self._folder, self._rows = name, folder, rows
        self._image, self._label = image, label

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, numbers: Sequence[int] | np.ndarray) -> list[tuple[bytes, int]]:
        chosen = self._rows[[int(number) for number in numbers]]
        return [
            (self._bytes(image), int(label))
            for image, label in zip(chosen[self._image], chosen[self._label], strict=True)
        ]

    @staticmethod
    def _bytes(image: Mapping[str, Any]) -> bytes:
        from etils import epath

        return image["bytes"] or epath.Path(image["path"]).read_bytes()

    def labels(self) -> np.ndarray:
        return np.asarray(self._rows.with_format("numpy")[self._label][:], np.int32)

    def where(self, number: int) -> str:
        return f"row {number} of {self.name}"

    def damaged(self) -> str:
        return self._folder


def _open_hugging_face(name: str, data_dir: str | os.PathLike, label: str | None) -> Opened:
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f'data.name={name!r} needs Hugging Face datasets: pip install "seal_jax[hf]"'
        ) from None
    try:
        stored = datasets.load_from_disk(os.fspath(data_dir))
    except Exception as error:
        raise UsageError(
            f"data.data_dir={data_dir} is no Hugging Face data set on disk ({first_line(error)}): make one "
            'by datasets.load_dataset("OWNER/NAME").save_to_disk(FOLDER)'
        ) from error
    splits = dict(stored) if isinstance(stored, datasets.DatasetDict) else {"train": stored}
    features = next(iter(splits.values())).features
    image = _choose(features, datasets.Image, None, (), "the image")
    label = _choose(features, datasets.ClassLabel, label, ("label",), "data.label")
    # Left encoded, as in TFDS.
    encoded = {
        split: rows.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
        for split, rows in splits.items()
    }
    counts = {split: len(rows) for split, rows in encoded.items()}

    def part(split: str) -> Reader:
        chosen = [encoded[split_name].select(rows) for split_name, rows in _ranges(split, counts)]
        rows = datasets.concatenate_datasets(chosen)
        return _HuggingFace(os.fspath(data_dir), f"{name} {split}", rows, image, label)

    # Of a data set, Hugging Face has a digest of how it was made.
    made = " ".join(str(rows._fingerprint) for rows in splits.values())
    return Opened(
        location=os.fspath(data_dir),
        counts=counts,
        class_names=tuple(features[label].names),
        channels=3,
        version="",
        fingerprint=f"hf:{_hash(made).hex()}",
        part=part,
    )


def _hash(name: str) -> bytes:
    return hashlib.sha256(os.fsencode(name)).digest()
