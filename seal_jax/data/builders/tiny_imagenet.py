"""TFDS builder ``tiny_imagenet``: the original Tiny-ImageNet folder, given as the manual directory.

The layout is that of ``tiny-imagenet-200.zip``::

    wnids.txt                           one WordNet id a line; their order is the label order
    words.txt                           optional: WordNet id, tab, names
    train/<wnid>/images/*.JPEG
    val/val_annotations.txt             file name, tab, WordNet id, ...
    val/images/*.JPEG

A folder with fewer classes in the same layout works alike. The original test images are unlabelled
and left out. The JPEG bytes are passed through, without TensorFlow or network.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import tensorflow_datasets as tfds

from seal_jax.errors import UsageError

SIDE = 64


@dataclasses.dataclass(frozen=True)
class Folder:
    """What a Tiny-ImageNet folder holds.

    Attributes:
      wnids: WordNet ids in label order.
      words: names by WordNet id, as far as ``words.txt`` has them.
      train: ``(file, wnid)``, sorted by class and name.
      validation: ``(file, wnid)``, in the order of the annotations.
    """

    wnids: list[str]
    words: dict[str, str]
    train: list[tuple[Path, str]]
    validation: list[tuple[Path, str]]


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def _require(root: Path, *parts: str) -> Path:
    path = root.joinpath(*parts)
    if not path.exists():
        raise UsageError(
            f"manual_dir={root} lacks {'/'.join(parts)}: give the unpacked tiny-imagenet-200 folder"
        )
    return path


def scan(root: Path) -> Folder:
    """Read the listing of a Tiny-ImageNet folder; its order does not depend on the file system.

    Raises:
      UsageError: where a file or folder it must have is missing or contradicts another.
    """
    if not root.is_dir():
        raise UsageError(f"manual_dir={root} is not a folder: give the unpacked tiny-imagenet-200")
    wnids = _lines(_require(root, "wnids.txt"))
    if not wnids or len(set(wnids)) != len(wnids):
        raise UsageError(f"{root}/wnids.txt must list each WordNet id once: restore the original")
    train: list[tuple[Path, str]] = []
    for wnid in wnids:
        images = sorted(_require(root, "train", wnid, "images").glob("*.JPEG"))
        if not images:
            raise UsageError(f"{root}/train/{wnid}/images has no .JPEG file: restore the original")
        train.extend((path, wnid) for path in images)

    annotations = _require(root, "val", "val_annotations.txt")
    validation = []
    for line in _lines(annotations):
        name, wnid, *_ = [*line.split("\t"), "", ""]
        if wnid not in wnids:
            raise UsageError(f"{annotations}: {name} has class {wnid!r}, which wnids.txt lacks")
        validation.append((_require(root, "val", "images", name), wnid))
    if not validation:
        raise UsageError(f"{annotations} lists no image: restore the original")

    words = {}
    if (root / "words.txt").exists():
        for line in _lines(root / "words.txt"):
            wnid, _, names = line.partition("\t")
            if wnid in wnids:
                words[wnid] = names
    return Folder(wnids, words, train, validation)


def _checked_bytes(path: Path) -> bytes:
    """Return the file's bytes once they are known to decode to 64x64 pixels."""
    from PIL import Image

    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            size = image.size
    except (OSError, SyntaxError) as error:
        raise UsageError(f"{path} is not a readable image: restore the original file") from error
    if size != (SIDE, SIDE):
        raise UsageError(f"{path} is {size[0]}x{size[1]}, not {SIDE}x{SIDE}: restore the original")
    return content


class TinyImagenet(tfds.core.GeneratorBasedBuilder):
    """Images uint8 ``(64, 64, 3)`` and the classes of ``wnids.txt``; splits train and validation.

    ``info.metadata["words"]`` holds the readable names. Examples lie in TFDS's order, which depends
    on file names alone.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "manual_dir is the unpacked tiny-imagenet-200 folder."

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Tiny-ImageNet: 64x64 images of a subset of ImageNet's classes.",
            homepage="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="jpeg"),
                    # The folder says how many classes there are.
                    "label": tfds.features.ClassLabel(),
                }
            ),
            supervised_keys=("image", "label"),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        folder = scan(Path(dl_manager.manual_dir))
        self.info.features["label"].names = folder.wnids
        self.info.metadata["words"] = folder.words
        return {
            "train": self._generate_examples(folder.train),
            "validation": self._generate_examples(folder.validation),
        }

    def _generate_examples(self, examples: list[tuple[Path, str]]):
        for path, wnid in examples:
            yield path.name, {"image": io.BytesIO(_checked_bytes(path)), "label": wnid}
