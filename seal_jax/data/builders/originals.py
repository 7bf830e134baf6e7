"""Data sets whose original files the user brings: what was found there, and how TFDS stores it.

Each is a subclass of :class:`ListedImages` with its ``scan(folder) -> Listing``, which finds the files
by the functions below. Neither TensorFlow nor network is needed, and what is missing in a folder is
named in one line.
"""

from __future__ import annotations

import abc
import collections
import csv
import dataclasses
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from seal_jax.errors import UsageError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
)

Examples = Sequence[tuple[Path, str]]


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of a data set and their classes.

    Attributes:
      root: the folder that the user gave.
      splits: by TFDS's name of the split, ``(file, class)`` in an order that does not depend on the
        file system.
      classes: in label order; by default those of the examples, sorted by name.
      words: readable names by class, where the classes are codes.

    Raises:
      UsageError: where there are fewer than two classes, an empty split, a class without an image
        in the training split (in any split where none is called ``train``), an unknown class, or an
        image that is listed twice.
    """

    root: Path
    splits: Mapping[str, Examples]
    classes: Sequence[str] = ()
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        labels = {name: {label for _, label in split} for name, split in self.splits.items()}
        all_labels = set().union(*labels.values())
        if not self.classes:
            object.__setattr__(self, "classes", sorted(all_labels))
        if len(self.classes) < 2:
            raise UsageError(
                f"manual_dir={self.root} holds {len(self.classes)} class(es): two are the least"
            )
        for name, examples in self.splits.items():
            if not examples:
                raise UsageError(f"manual_dir={self.root}: the {name} split lists no image")
            keys = collections.Counter(_key(path, label) for path, label in examples)
            [(commonest, times)] = keys.most_common(1)
            if times > 1:
                raise UsageError(
                    f"manual_dir={self.root}: the {name} split lists {commonest} twice: keep it once"
                )
        for label in self.classes:
            if label not in labels.get("train", all_labels):
                raise UsageError(
                    f"manual_dir={self.root} has no training image of class {label!r}: "
                    "restore the original"
                )
        for label in all_labels.difference(self.classes):
            raise UsageError(f"manual_dir={self.root}: {label!r} is not a class of the data set")

    @property
    def counts(self) -> dict[str, int]:
        """Number of images by split."""
        return {name: len(examples) for name, examples in self.splits.items()}


def _key(path: Path, label: str) -> str:
    """Return the name TFDS orders an example by: the same wherever the folder is."""
    return f"{label}/{path.name}"


class ListedImages(tfds.core.GeneratorBasedBuilder):
    """Images uint8 of any size with a class each, from what the subclass's ``scan`` lists.

    ``info.metadata["words"]`` holds readable class names, where there are any. Examples are stored in
    TFDS's order, which depends on class and file names alone.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "manual_dir is the folder of the original files."
    DESCRIPTION = ""
    HOMEPAGE = ""
    # Where all images are alike: (height, width), and how they are encoded.
    SIZE: tuple[int, int] | tuple[None, None] = (None, None)
    ENCODING: str | None = None

    @staticmethod
    @abc.abstractmethod  # TFDS registers concrete builders alone
    def scan(root: Path) -> Listing:
        """List the images below ``root``; raise a UsageError for a folder that cannot be used."""

    def key(self, path: Path, label: str) -> str:
        """Return the unique name that TFDS orders the example by."""
        return _key(path, label)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            homepage=self.HOMEPAGE,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(*self.SIZE, 3), encoding_format=self.ENCODING
                    ),
                    # The folder says how many classes there are.
                    "label": tfds.features.ClassLabel(),
                }
            ),
            supervised_keys=("image", "label"),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        listing = self.scan(Path(dl_manager.manual_dir))
        self.info.features["label"].names = list(listing.classes)
        self.info.metadata["words"] = dict(listing.words)
        labels = {name: index for index, name in enumerate(listing.classes)}
        return {
            name: self._generate_examples(examples, labels)
            for name, examples in listing.splits.items()
        }

    def _generate_examples(self, examples: Examples, labels: Mapping[str, int]):
        height, width = self.SIZE
        size = None if height is None or width is None else (width, height)
        for path, label in examples:
            # Encoded, since TFDS would need TensorFlow to encode an array.
            image = io.BytesIO(encoded(path, size))
            yield self.key(path, label), {"image": image, "label": labels[label]}


def encoded(path: Path, size: tuple[int, int] | None = None) -> bytes:
    """Return the image as JPEG or PNG: the file's own bytes if they are that, else PNG of its pixels.

    Args:
      path: an image file.
      size: ``(width, height)`` that it must have, or None for any.

    Raises:
      UsageError: where it does not decode, has more than 8 bits a channel, or has another size.
    """
    from PIL import Image

    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if image.mode.startswith(("I", "F")):
                raise UsageError(f"{path} has more than 8 bits a channel: convert it to 8")
            if size is not None and image.size != size:
                raise UsageError(
                    f"{path} is {image.size[0]}x{image.size[1]}, not {size[0]}x{size[1]}: "
                    "restore the original"
                )
            if image.format in ("JPEG", "MPO", "PNG"):  # MPO: cameras' JPEG
                return content
            png = io.BytesIO()
            image.convert("L" if image.mode in ("1", "L") else "RGB").save(png, format="PNG")
            return png.getvalue()
    except UsageError:
        raise
    # Pillow reports damage by several types, SyntaxError one of them.
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{path} is not a readable image: restore the original file") from error


def is_image(name: str) -> bool:
    """Return whether a file's name is that of an image; hidden files are not.

    >>> is_image("a.JPG"), is_image("._a.jpg"), is_image("Thumbs.db")
    (True, False, False)
    """
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def is_class_folder(name: str) -> bool:
    """Return whether a folder's name may be a class: not what systems and archivers leave behind."""
    return not name.startswith((".", "__MACOSX"))


def require_folder(root: Path) -> None:
    """Raise a UsageError unless ``root`` is a folder."""
    if not root.is_dir():
        raise UsageError(f"manual_dir={root} is not a folder: give that of the original files")


def find(root: Path, *names: str) -> Path:
    """Return the first of these files that is in ``root`` or in a folder of it.

    Raises:
      UsageError: where none is.
    """
    require_folder(root)
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    for name in names:
        for folder in (root, *folders):
            if (folder / name).is_file():
                return folder / name
    raise UsageError(
        f"manual_dir={root} lacks {' or '.join(names)}: give the folder of the original files"
    )


def lines(path: Path) -> list[str]:
    """Return the lines that have text, stripped.

    Raises:
      UsageError: where the file cannot be read as UTF-8, or has none.
    """
    try:
        stripped = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text: restore the original") from error
    if not any(stripped):
        raise UsageError(f"{path} has no line: restore the original")
    return [line for line in stripped if line]


def listed_image(image: Path, listed: Path) -> Path:
    """Return ``image``, which the file ``listed`` names; raise a UsageError where it is missing."""
    if not image.is_file():
        raise UsageError(f"{image} is missing, which {listed.name} lists: restore the original")
    return image


def rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield the rows of a csv file with a header, as far as these columns go.

    Raises:
      UsageError: where it cannot be read, a column is missing, or a row lacks a value.
    """
    reader = csv.DictReader(lines(path))
    header = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = header
    missing = [column for column in columns if column not in header]
    if missing:
        raise UsageError(
            f"{path} lacks the column {missing[0]!r} (it has {', '.join(header[:8])}): "
            "restore the original"
        )
    for row in reader:
        for column in columns:
            if not (row[column] or "").strip():
                raise UsageError(
                    f"{path}, line {reader.line_num}: {column!r} is empty: restore the original"
                )
        yield {column: row[column].strip() for column in columns}


class Images:
    """The image files anywhere below a folder, by their names."""

    def __init__(self, root: Path):
        self._root = root
        self._paths: dict[str, list[Path]] = {}
        for folder, subfolders, names in os.walk(root, followlinks=True):
            subfolders[:] = filter(is_class_folder, subfolders)
            for name in filter(is_image, names):
                self._paths.setdefault(name, []).append(Path(folder, name))

    def find(self, name: str, source: Path) -> Path:
        """Return the file called ``name``, which ``source`` lists.

        Raises:
          UsageError: where there is none, or more than one.
        """
        paths = self._paths.get(name, [])
        if len(paths) == 1:
            return paths[0]
        if paths:
            places = " and ".join(str(path.parent) for path in sorted(paths)[:2])
            raise UsageError(f"{name} lies in {places}: keep one of them below {self._root}")
        raise UsageError(
            f"manual_dir={self._root} lacks the image {name}, which {source.name} lists: "
            "restore the original"
        )
