"""TFDS builders of data sets that come as folders of classes: Caltech-256, CropDisease, Tiny-ImageNet-C."""

import re
from pathlib import Path

import numpy as np

from seal_jax.data.builders import image_folder, originals
from seal_jax.data.builders.originals import ListedImages, Listing
from seal_jax.data.dataset import stratified_split
from seal_jax.errors import UsageError


class Caltech256(ListedImages):
    """Photographs of 256 kinds of object, of several sizes; splits train and test.

    The folder is the unpacked ``256_ObjectCategories`` or the one above it::

        <number>.<class>/<number>_<image>.jpg

    The clutter, folder 257, is no class and left out. There is no official split: a fixed fifth of the
    images, stratified by class, is for testing, as in the FAST paper (section 6.7), whose own choice is
    not published with it. Labels follow the numbers; ``info.metadata["words"]`` has the names without.
    """

    DESCRIPTION = "Caltech-256 without the clutter, a stratified fifth for testing."
    HOMEPAGE = "https://data.caltech.edu/records/nyy15-4j048"
    TEST_FRACTION = 0.2
    _CLASS = re.compile(r"\d{3}\.(.+)")

    @classmethod
    def scan(cls, root: Path) -> Listing:
        """List the images by class and name, and divide them into training and test images."""
        originals.require_folder(root)
        inner = root / "256_ObjectCategories"
        folder = inner if inner.is_dir() else root
        words: dict[str, str] = {}
        examples: list[tuple[Path, str]] = []
        for part in image_folder.subfolders(folder):
            match = cls._CLASS.fullmatch(part.name)
            if match is None:
                raise UsageError(
                    f"{part} is no folder of a class, such as 001.ak47: give the folder "
                    "256_ObjectCategories, and move others elsewhere"
                )
            if match[1] == "clutter":
                continue
            words[part.name] = match[1]
            # The original has other files, and even folders, beside the images of some classes.
            images = image_folder.images(part)
            if not images:
                raise UsageError(f"{part} has no image: restore it")
            examples.extend((path, part.name) for path in images)
        if not words:
            raise UsageError(
                f"manual_dir={root} has no folder of a class, such as 001.ak47: give the folder "
                "256_ObjectCategories"
            )
        classes = list(words)
        labels = np.array([classes.index(label) for _, label in examples])
        # Images and folders are sorted by name: the split is the same wherever the folder is.
        rows = stratified_split(labels, cls.TEST_FRACTION, 0, field="the test split")
        train, test = ([examples[row] for row in part] for part in rows)
        return Listing(root, {"train": train, "test": test}, classes, words)


class CropDisease(ListedImages):
    """Leaves of 14 plants with 38 diseases, or healthy; splits train and test.

    The folder is the unpacked ``plant-disease`` (its images are PlantVillage's), or the one below it that
    has ``train`` and ``test``, both with one subfolder per class. Few-shot episodes are drawn from
    ``train`` alone (Guo et al. 2020, appendix).
    """

    DESCRIPTION = "Leaves of plants by disease: PlantVillage in its split of CD-FSL."
    HOMEPAGE = "https://www.kaggle.com/datasets/saroz014/plant-disease"

    @staticmethod
    def scan(root: Path) -> Listing:
        """List the images of the two splits."""
        originals.require_folder(root)
        # The archive has them in dataset/.
        for folder in (root, *sorted(root.glob("*")), *sorted(root.glob("*/*"))):
            if (folder / "train").is_dir() and (folder / "test").is_dir():
                parts = {split: folder / split for split in ("train", "test")}
                splits = {split: image_folder.examples(part) for split, part in parts.items()}
                return Listing(root, splits)
        raise UsageError(
            f"manual_dir={root} has no folders train and test: give the unpacked plant-disease"
        )


class TinyImagenetC(ListedImages):
    """Tiny-ImageNet's validation images with corruptions of five severities: uint8 ``(64, 64, 3)``.

    The folder is the unpacked ``Tiny-ImageNet-C``, or the one above it, with all its corruptions or some::

        <corruption>/<severity, 1 to 5>/<wnid>/*.JPEG

    Each corruption and severity is a split, such as ``gaussian_noise_3`` (Hendrycks and Dietterich 2019).
    Labels follow the sorted WordNet ids, other than Tiny-ImageNet's own: compare classes by name.
    """

    DESCRIPTION = "Tiny-ImageNet-C: the validation images of Tiny-ImageNet, corrupted."
    HOMEPAGE = "https://zenodo.org/records/2536630"
    SIZE = (64, 64)
    ENCODING = "jpeg"

    @staticmethod
    def scan(root: Path) -> Listing:
        """List the images of every corruption and severity."""
        originals.require_folder(root)
        inner = root / "Tiny-ImageNet-C"
        folder = inner if inner.is_dir() else root
        splits = {}
        for corruption in image_folder.subfolders(folder):
            for severity in image_folder.subfolders(corruption):
                if not re.fullmatch("[1-5]", severity.name):
                    raise UsageError(
                        f"{severity} is no severity, 1 to 5: give the folder Tiny-ImageNet-C"
                    )
                splits[f"{corruption.name}_{severity.name}"] = image_folder.examples(severity)
        if not splits:
            raise UsageError(
                f"manual_dir={root} has no folders CORRUPTION/SEVERITY: give Tiny-ImageNet-C"
            )
        listing = Listing(root, splits)
        for split, examples in splits.items():
            for missing in sorted({*listing.classes}.difference(label for _, label in examples)):
                raise UsageError(
                    f"manual_dir={root}: {split} has no image of class {missing!r}: restore it"
                )
        return listing
