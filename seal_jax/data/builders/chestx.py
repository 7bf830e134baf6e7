"""TFDS builder ``chestx``: chest X-rays with exactly one of seven findings (ChestX-ray8).

The folder has ``Data_Entry_2017.csv`` and the images ``*.png`` anywhere below, as in the original
``images_001/images`` .. ``images_012/images``. Images with several findings, none, or another one are
left out (Guo et al. 2020, CD-FSL); the 25,848 others form one split, called train.
"""

from __future__ import annotations

from pathlib import Path

from seal_jax.data.builders import originals
from seal_jax.data.builders.originals import ListedImages, Listing

# The second is what the source offers since 2020.
TABLES = ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv")
CLASSES = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumothorax",
)


class Chestx(ListedImages):
    """Images uint8 ``(1024, 1024, 3)``, grey over three channels; seven classes."""

    DESCRIPTION = "ChestX-ray8: frontal chest X-rays with a single one of seven findings."
    HOMEPAGE = "https://nihcc.app.box.com/v/ChestXray-NIHCC"

    @staticmethod
    def scan(root: Path) -> Listing:
        """List the images with exactly one finding, one of the seven; several are written ``A|B``."""
        table = originals.find(root, *TABLES)
        images = originals.Images(root)
        examples = [
            (images.find(row["Image Index"], table), row["Finding Labels"])
            for row in originals.rows(table, ("Image Index", "Finding Labels"))
            if row["Finding Labels"] in CLASSES
        ]
        return Listing(root, {"train": examples}, CLASSES)
