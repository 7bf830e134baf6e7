"""TFDS builder ``image_folder/NAME``: any folder of images with one subfolder per class.

The layout is one of::

    <class>/*.jpg                one split, called train
    <split>/<class>/*.jpg        splits called train, val and test, or by one of their synonyms

NAME is the user's choice and tells such data sets apart; EuroSAT (``EuroSAT_RGB``) comes like this. Labels follow the
sorted names of the classes.
"""

import re
from pathlib import Path
from typing import ClassVar

import tensorflow_datasets as tfds

from seal_jax.data.builders import originals
from seal_jax.data.builders.originals import ListedImages, Listing
from seal_jax.errors import UsageError

# What a split's folder may be called, and TFDS's name for it.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_NAME = re.compile(r"image_folder/[A-Za-z][\w-]*(:[\d.*]+)?")


def check_name(name: str) -> None:
    """Raise a UsageError unless ``name`` is ``image_folder/NAME``, perhaps with ``:version``.

    >>> check_name("image_folder/eurosat")
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"data.name={name!r} must be image_folder/NAME with a NAME of your choice, a letter and "
            "then letters, digits, _ and -, such as image_folder/eurosat"
        )


def subfolders(folder: Path) -> list[Path]:
    """Return the folders that may be classes or splits, by name."""
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and originals.is_class_folder(path.name)
    )


def images(folder: Path) -> list[Path]:
    """Return the image files in a folder, by name."""
    files = (path for path in folder.iterdir() if originals.is_image(path.name))
    return sorted(path for path in files if path.is_file())


def examples(folder: Path) -> list[tuple[Path, str]]:
    """Return ``(file, class)`` of every image below a folder of class folders; raise where one is empty."""
    found: list[tuple[Path, str]] = []
    for part in subfolders(folder):
        files, below = images(part), subfolders(part)
        # Most likely a level too high was given, or splits by names that are not known.
        if below and not files:
            raise UsageError(
                f"{part} holds folders, no image: give as manual_dir the folder whose subfolders "
                "are the classes, or are train, val and test with the classes below them"
            )
        if below:
            raise UsageError(f"{part} holds {below[0].name}/ beside its images: move it elsewhere")
        if not files:
            raise UsageError(f"{part} has no image: restore it, or remove the empty folder")
        found.extend((path, part.name) for path in files)
    return found


class ImageFolder(ListedImages):
    """Images of any size; the classes are the folders, sorted by name."""

    DESCRIPTION = "A folder of images with one subfolder a class."

    _configs: ClassVar[dict[str, tfds.core.BuilderConfig]] = {}

    @staticmethod
    def scan(root: Path) -> Listing:
        """List the images of a folder with one subfolder per class, or of its splits."""
        originals.require_folder(root)
        parts = subfolders(root)
        # Classes may be called train and test, too: then they hold images.
        in_splits = parts and all(
            part.name.lower() in SPLITS and subfolders(part) and not images(part) for part in parts
        )
        if not in_splits:
            return Listing(root, {"train": examples(root)})
        splits: dict[str, list[tuple[Path, str]]] = {}
        for part in parts:
            split = SPLITS[part.name.lower()]
            if split in splits:
                raise UsageError(
                    f"manual_dir={root} has two folders of the {split} split: keep one"
                )
            splits[split] = examples(part)
        # train, validation, test, however the folders are called and sorted.
        order = dict.fromkeys(SPLITS.values())
        return Listing(root, {name: splits[name] for name in order if name in splits})

    @classmethod
    def get_builder_config(cls, name: str, version=None) -> tfds.core.BuilderConfig:
        """Return the configuration of any name: the user chooses it."""
        del version
        return cls._configs.setdefault(name, tfds.core.BuilderConfig(name=name))
