"""TFDS builder ``mit_indoor67``: the 67 indoor scenes of Quattoni and Torralba.

The folder has::

    TrainImages.txt, TestImages.txt     lines of <class>/<file>
    Images/<class>/<file>

Other images of ``Images/`` are left out, as in the original protocol. Labels follow the sorted names.
"""

from __future__ import annotations

from pathlib import Path

from seal_jax.data.builders import files
from seal_jax.data.builders.listing import ListedImages, Listing
from seal_jax.errors import UsageError

SPLITS = {"train": "TrainImages.txt", "test": "TestImages.txt"}


def scan(root: Path) -> Listing:
    """List the images of the two lists.

    Raises:
      UsageError: for a missing list or image, a line that is not ``<class>/<file>``, and a class
        without a training image.
    """
    splits = {}
    for split, name in SPLITS.items():
        listed = files.find(root, name)
        splits[split] = [_example(line, listed, root) for line in files.lines(listed)]
    classes = sorted({label for examples in splits.values() for _, label in examples})
    return Listing(root, classes, splits)


def _example(line: str, listed: Path, root: Path) -> tuple[Path, str]:
    label, slash, name = line.partition("/")
    if not (label and slash and name):
        raise UsageError(f"{listed}: {line!r} is not <class>/<file>: restore the original")
    image = root / "Images" / label / name
    if not image.is_file():
        raise UsageError(f"{image} is missing, which {listed.name} lists: restore the original")
    return image, label


class MitIndoor67(ListedImages):
    """Images of several sizes, 67 classes; splits train and test."""

    DESCRIPTION = "MIT Indoor-67: photographs of 67 kinds of indoor scene."
    HOMEPAGE = "https://web.mit.edu/torralba/www/indoor.html"

    scan = staticmethod(scan)
