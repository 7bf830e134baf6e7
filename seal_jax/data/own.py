"""The data sets that this package builds itself, where TFDS has none in the papers' form."""

from __future__ import annotations

import re

# Data sets built by this package from files that the user brings: what `manual_dir` is.
FOLDERS = {
    "chestx": "the folder of Data_Entry_2017.csv and the images of ChestX-ray8",
    "fgvc_aircraft": "the unpacked fgvc-aircraft-2013b folder",
    "image_folder": "the folder with one subfolder a class, or with train and test folders of such",
    "isic2018": "the folder of ISIC2018_Task3_Training_GroundTruth.csv and the images",
    "mit_indoor67": "the folder of TrainImages.txt, TestImages.txt and Images",
    "tiny_imagenet": "the unpacked tiny-imagenet-200 folder",
}
# These need nothing but installed packages and are small: prepared where they are first used.
SELF_PREPARING = frozenset({"digits"})


def _base(name: str) -> str:
    """Return the name without configuration and version."""
    return re.split("[/:]", name, maxsplit=1)[0]


def own_module(name: str) -> str | None:
    """Return the module of this package that builds the data set ``name``; None for TFDS's own.

    >>> own_module("image_folder/eurosat")
    'seal_jax.data.builders.image_folder'
    """
    base = _base(name)
    known = base in FOLDERS or base in SELF_PREPARING
    return f"{__package__}.builders.{base}" if known else None


def needed_folder(name: str) -> str | None:
    """Return what the data set needs as ``manual_dir``; None where this package asks for nothing."""
    return FOLDERS.get(_base(name))
