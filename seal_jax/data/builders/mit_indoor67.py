"""TFDS builder ``mit_indoor67``: the 67 indoor scenes of Quattoni and Torralba.

The folder has::

    TrainImages.txt, TestImages.txt     lines of <class>/<file>
    Images/<class>/<file>

Other images of ``Images/`` are left out, as in the original protocol. Labels follow the sorted names.
"""

from __future__ import annotations

from pathlib import Path

from seal_jax.data.builders import originals
from seal_jax.data.builders.originals import ListedImages, Listing
from seal_jax.errors import UsageError

SPLITS = {"train": "TrainImages.txt", "test": "TestImages.txt"}


def _example(line: str, listed: Path, root: Path) -> tuple[Path, str]:
    label, slash, name = line.partition("/")
    if not (label and slash and name):
        raise UsageError(f"{listed}: {line!r} is not <class>/<file>: restore the original")
    return originals.listed_image(root / "Images" / label / name, listed), label


class MitIndoor67(ListedImages):
    """Images of several sizes, 67 classes; splits train and test."""

    DESCRIPTION = "MIT Indoor-67: photographs of 67 kinds of indoor scene."
    HOMEPAGE = "https://web.mit.edu/torralba/www/indoor.html"

    @staticmethod
    def scan(root: Path) -> Listing:
        """List the images of the two lists."""
        splits = {}
        for split, name in SPLITS.items():
            listed = originals.find(root, name)
            splits[split] = [_example(line, listed, root) for line in originals.lines(listed)]
        return Listing(root, splits)
