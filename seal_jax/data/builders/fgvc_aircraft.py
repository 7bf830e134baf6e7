"""TFDS builder ``fgvc_aircraft``: the 100 variants of FGVC-Aircraft.

The folder is the unpacked ``fgvc-aircraft-2013b`` or its ``data``::

    data/images_variant_{train,val,test}.txt     lines of image number and variant
    data/images/<number>.jpg

Labels follow the sorted names of the variants. The images keep the banner below the aircraft.
"""

from __future__ import annotations

from pathlib import Path

from seal_jax.data.builders import originals
from seal_jax.data.builders.originals import ListedImages, Listing
from seal_jax.errors import UsageError

SPLITS = {"train": "train", "validation": "val", "test": "test"}


def _example(line: str, listed: Path) -> tuple[Path, str]:
    number, _, variant = line.partition(" ")
    if not variant.strip():
        raise UsageError(f"{listed}: {line!r} names no variant: restore the original")
    image = originals.listed_image(listed.parent / "images" / f"{number}.jpg", listed)
    return image, variant.strip()


class FgvcAircraft(ListedImages):
    """Images of several sizes, 100 classes; splits train, validation and test."""

    DESCRIPTION = "FGVC-Aircraft: 10,000 photographs of 100 aircraft variants."
    HOMEPAGE = "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/"

    @staticmethod
    def scan(root: Path) -> Listing:
        """List the images of the three lists."""
        splits = {}
        for split, part in SPLITS.items():
            listed = originals.find(root, f"images_variant_{part}.txt")
            splits[split] = [_example(line, listed) for line in originals.lines(listed)]
        return Listing(root, splits)
