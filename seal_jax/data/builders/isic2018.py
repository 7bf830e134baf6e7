"""TFDS builder ``isic2018``: skin lesions of the ISIC 2018 challenge, task 3 (HAM10000).

The folder has ``ISIC2018_Task3_Training_GroundTruth.csv``, itself or in a folder of it, and the images
``ISIC_*.jpg`` anywhere below. All 10,015 labelled images form one split, called train (SEAL paper,
section 4.1; few-shot episodes are drawn from all of it).
"""

from __future__ import annotations

from pathlib import Path

from seal_jax.data.builders import originals
from seal_jax.data.builders.originals import ListedImages, Listing
from seal_jax.errors import UsageError

TABLE = "ISIC2018_Task3_Training_GroundTruth.csv"
CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")


def _label(row: dict[str, str], table: Path) -> str:
    """Return the class whose column is one, of a one-hot row."""
    try:
        marked = [label for label in CLASSES if float(row[label])]
        one_hot = len(marked) == 1 and float(row[marked[0]]) == 1
    except ValueError:
        one_hot = False
    if not one_hot:
        values = ", ".join(row[label] for label in CLASSES)
        raise UsageError(
            f"{table}: {row['image']} has {values} for {', '.join(CLASSES)}, which is not a single "
            "one: restore the original"
        )
    return marked[0]


class Isic2018(ListedImages):
    """Images uint8 ``(450, 600, 3)``, seven classes in the order of the table's columns."""

    DESCRIPTION = "ISIC 2018, task 3: dermatoscopic images of seven kinds of skin lesion."
    HOMEPAGE = "https://challenge.isic-archive.com/landing/2018/"

    @staticmethod
    def scan(root: Path) -> Listing:
        """List the images that the table names."""
        table = originals.find(root, TABLE)
        images = originals.Images(root)
        examples = [
            (images.find(f"{row['image']}.jpg", table), _label(row, table))
            for row in originals.rows(table, ("image", *CLASSES))
        ]
        return Listing(root, {"train": examples}, CLASSES)
