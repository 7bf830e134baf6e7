"""What the original files of a data set are, and the TFDS builder that stores them as they are.

A data set whose files the user brings is one function, ``scan(folder) -> Listing``, and a small
subclass of :class:`ListedImages` that calls it. Neither needs TensorFlow or network.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from seal_jax.errors import UsageError

Examples = Sequence[tuple[Path, str]]


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of a data set and their classes.

    Attributes:
      root: the folder that the user gave.
      classes: in label order.
      splits: by TFDS's name of the split, ``(file, class)`` in an order that does not depend on the
        file system.
      words: readable names by class, where the classes are codes.

    Raises:
      UsageError: where there are fewer than two classes, an empty split, a class without an image
        in the training split (in any split where none is called ``train``), an unknown class, or an
        image that is listed twice.
    """

    root: Path
    classes: Sequence[str]
    splits: Mapping[str, Examples]
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if len(self.classes) < 2:
            raise UsageError(
                f"manual_dir={self.root} holds {len(self.classes)} class(es): two are the least"
            )
        for name, examples in self.splits.items():
            if not examples:
                raise UsageError(f"manual_dir={self.root}: the {name} split lists no image")
            again, times = collections.Counter(_key(*each) for each in examples).most_common(1)[0]
            if times > 1:
                raise UsageError(
                    f"manual_dir={self.root}: the {name} split lists {again} twice: keep it once"
                )
        found = {name: {label for _, label in split} for name, split in self.splits.items()}
        everywhere = set().union(*found.values())
        for label in self.classes:
            if label not in found.get("train", everywhere):
                raise UsageError(
                    f"manual_dir={self.root} has no training image of class {label!r}: "
                    "restore the original"
                )
        for label in everywhere.difference(self.classes):
            raise UsageError(f"manual_dir={self.root}: {label!r} is not a class of the data set")

    @property
    def counts(self) -> dict[str, int]:
        """Number of images by split."""
        return {name: len(examples) for name, examples in self.splits.items()}


def _key(path: Path, label: str) -> str:
    """Return the name TFDS orders an example by: the same wherever the folder lies."""
    return f"{label}/{path.name}"


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


class ListedImages(tfds.core.GeneratorBasedBuilder):
    """Images uint8 of any size with a class each, from what the subclass's ``scan`` lists.

    ``info.metadata["words"]`` holds readable class names, where there are any. Examples lie in
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
        """List the images below ``root``."""

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
            image = io.BytesIO(encoded(path, size))
            yield self.key(path, label), {"image": image, "label": labels[label]}
