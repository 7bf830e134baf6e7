"""TFDS builder ``tiny_imagenet``: the original Tiny-ImageNet folder, given as the manual directory.

The layout is that of ``tiny-imagenet-200.zip``::

    wnids.txt                           one WordNet id a line; their order is the label order
    words.txt                           optional: WordNet id, tab, names
    train/<wnid>/images/*.JPEG
    val/val_annotations.txt             file name, tab, WordNet id, ...
    val/images/*.JPEG

A folder with fewer classes in the same layout works alike. The original test images are unlabelled
and left out.
"""

from __future__ import annotations

from pathlib import Path

from seal_jax.data.builders.originals import ListedImages, Listing
from seal_jax.errors import UsageError


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def _require(root: Path, *parts: str) -> Path:
    path = root.joinpath(*parts)
    if not path.exists():
        raise UsageError(
            f"manual_dir={root} lacks {'/'.join(parts)}: give the unpacked tiny-imagenet-200 folder"
        )
    return path


class TinyImagenet(ListedImages):
    """Images uint8 ``(64, 64, 3)`` and the classes of ``wnids.txt``; splits train and validation.

    ``info.metadata["words"]`` holds the readable names.
    """

    DESCRIPTION = "Tiny-ImageNet: 64x64 images of a subset of ImageNet's classes."
    HOMEPAGE = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    SIZE = (64, 64)
    ENCODING = "jpeg"

    @staticmethod
    def scan(root: Path) -> Listing:
        """List the training images by class and name, the validation images as annotated."""
        if not root.is_dir():
            raise UsageError(
                f"manual_dir={root} is not a folder: give the unpacked tiny-imagenet-200"
            )
        wnids = _lines(_require(root, "wnids.txt"))
        if not wnids or len(set(wnids)) != len(wnids):
            raise UsageError(
                f"{root}/wnids.txt must list each WordNet id once: restore the original"
            )
        train: list[tuple[Path, str]] = []
        for wnid in wnids:
            images = sorted(_require(root, "train", wnid, "images").glob("*.JPEG"))
            if not images:
                raise UsageError(
                    f"{root}/train/{wnid}/images has no .JPEG file: restore the original"
                )
            train.extend((path, wnid) for path in images)

        annotations = _require(root, "val", "val_annotations.txt")
        validation = []
        for line in _lines(annotations):
            name, wnid, *_ = [*line.split("\t"), "", ""]
            if wnid not in wnids:
                raise UsageError(f"{annotations}: {name} has class {wnid!r}, which wnids.txt lacks")
            validation.append((_require(root, "val", "images", name), wnid))

        words = {}
        if (root / "words.txt").exists():
            for line in _lines(root / "words.txt"):
                wnid, _, names = line.partition("\t")
                if wnid in wnids:
                    words[wnid] = names
        return Listing(root, {"train": train, "validation": validation}, wnids, words)

    def key(self, path: Path, label: str) -> str:
        """Return the file's name, which is unique here."""
        del label
        return path.name
