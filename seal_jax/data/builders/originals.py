"""Data sets built from original files that the user provides, and how TFDS stores them.

Each is a subclass of :class:`ListedImages` with its ``scan(folder) -> Listing``. Neither TensorFlow nor
network is needed, and what is missing in a folder is named in one line.
"""

import abc
import collections
import csv
import dataclasses
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from seal_jax.data.decoding import CorruptImageError, decode
from seal_jax.errors import UsageError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
)

Examples = Sequence[tuple[Path, str]]


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of a data set and their classes, below the folder ``root`` that the user gave.

    Attributes:
      splits: by TFDS's name of the split, ``(file, class)`` in an order that does not depend on the
        file system.
      classes: in label order; by default those of the examples, sorted by name.
      words: readable names by class, where the classes are codes.

    Raises:
      UsageError: where there are fewer than two classes, an empty split, a class without an image
        in the training split (in any split where none is called ``train``), an unknown class, or an
        image that is listed twice.
    """

    root: Path
    splits: Mapping[str, Examples]
    classes: Sequence[str] = ()
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        labels = {name: {label for _, label in split} for name, split in self.splits.items()}
        all_labels = set().union(*labels.values())
        if not self.classes:
            object.__setattr__(self, "classes", sorted(all_labels))
        if len(self.classes) < 2:
            raise UsageError(
                f"manual_dir={self.root} holds {len(self.classes)} class(es): two are the least"
            )
        for name, examples in self.splits.items():
            if not examples:
                raise UsageError(f"manual_dir={self.root}: the {name} split lists no image")
            # The keys of `ListedImages.key`, of which TFDS refuses equal ones.
            names = collections.Counter(f"{label}/{path.name}" for path, label in examples)
            [(commonest, times)] = names.most_common(1)
            if times > 1:
                raise UsageError(
                    f"manual_dir={self.root}: the {name} split lists {commonest} twice: keep it once"
                )
        for label in self.classes:
            if label not in labels.get("train", all_labels):
                raise UsageError(
                    f"manual_dir={self.root} has no training image of class {label!r}: "
                    "restore the original"
                )
        for label in all_labels.difference(self.classes):
            raise UsageError(f"manual_dir={self.root}: {label!r} is not a class of the data set")

    @property
    def counts(self) -> dict[str, int]:
        """Number of images by split."""
        return {name: len(examples) for name, examples in self.splits.items()}


class ListedImages(tfds.core.GeneratorBasedBuilder):
    """Images uint8 of any size with one class each, as the subclass's ``scan`` lists them.

    ``info.metadata["words"]`` holds readable class names, where there are any. Examples are stored in
    TFDS's order, which depends on class and file names only.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "manual_dir is the folder of the original files."
    DESCRIPTION = ""
    HOMEPAGE = ""
    # Where all images are alike: (height, width), and how they are encoded.
    SIZE: tuple[int, int] | tuple[None, None] = (None, None)
    ENCODING: str | None = None

    @staticmethod
    @abc.abstractmethod  # TFDS registers concrete builders only
    def scan(root: Path) -> Listing:
        """List the images below ``root``; raise a UsageError for a folder that cannot be used."""

    def key(self, path: Path, label: str) -> str:
        """Return the name that TFDS orders an example by: unique, and the same wherever the folder is."""
        return f"{label}/{path.name}"

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            homepage=self.HOMEPAGE,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(*self.SIZE, 3), encoding_format=self.ENCODING
                    ),
                    # The folder says how many classes there are.
                    "label": tfds.features.ClassLabel(),
                }
            ),
            supervised_keys=("image", "label"),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        listing = self.scan(Path(dl_manager.manual_dir))
        # Only the folder tells the classes, and _info is called before there is one.
        self.info.features["label"].names = list(listing.classes)
        self.info.metadata["words"] = dict(listing.words)
        labels = {name: index for index, name in enumerate(listing.classes)}
        return {
            name: self._generate_examples(examples, labels)
            for name, examples in listing.splits.items()
        }

    def _generate_examples(self, examples: Examples, labels: Mapping[str, int]):
        height, width = self.SIZE
        size = None if height is None or width is None else (height, width)
        for path, label in examples:
            # Encoded, since TFDS would need TensorFlow to encode an array.
            image = io.BytesIO(encoded(path, size))
            yield self.key(path, label), {"image": image, "label": labels[label]}


def encoded(path: Path, size: tuple[int, int] | None = None) -> bytes:
    """Return the image as JPEG or PNG: the file's own bytes if they are that, else PNG of its pixels.

    Raises:
      UsageError: where it does not decode, or has another ``size`` than ``(height, width)``.
    """
    from PIL import Image

    try:
        content = path.read_bytes()
        # Decoded whatever is stored: otherwise damage would show in a training long after.
        pixels = decode(content, 3)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}): restore the original"
        ) from None
    except CorruptImageError as error:
        raise UsageError(
            f"{path} is not a readable image ({error}): restore the original file"
        ) from error
    if size is not None and pixels.shape[:2] != size:
        height, width = pixels.shape[:2]
        raise UsageError(
            f"{path} is {height}x{width}, not {size[0]}x{size[1]}: restore the original"
        )
    with Image.open(io.BytesIO(content)) as image:
        if image.format in ("JPEG", "MPO", "PNG"):  # MPO: cameras' JPEG
            return content
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, format="PNG")
    return png.getvalue()


def is_image(name: str) -> bool:
    """Return whether a file's name is that of an image; hidden files are not.

    >>> is_image("a.JPG"), is_image("._a.jpg"), is_image("Thumbs.db")
    (True, False, False)
    """
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def is_class_folder(name: str) -> bool:
    """Return whether a folder's name may be a class: not what systems and archivers leave behind."""
    return not name.startswith((".", "__MACOSX"))


def require_folder(root: Path) -> None:
    """Raise a UsageError unless ``root`` is a folder."""
    if not root.is_dir():
        raise UsageError(f"manual_dir={root} is not a folder: give that of the original files")


def _find(root: Path, *names: str) -> Path:
    """Return the first of these files that is in ``root`` or in a folder of it; raise where none is."""
    require_folder(root)
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    for name in names:
        for folder in (root, *folders):
            if (folder / name).is_file():
                return folder / name
    raise UsageError(
        f"manual_dir={root} lacks {' or '.join(names)}: give the folder of the original files"
    )


def _lines(path: Path, *, may_be_empty: bool = False) -> list[str]:
    """Return the lines that have text, stripped; raise where the file is not UTF-8, or has none."""
    try:
        stripped = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text: restore the original") from error
    if not any(stripped) and not may_be_empty:
        raise UsageError(f"{path} has no line: restore the original")
    return [line for line in stripped if line]


def _rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield these columns of a csv file with a header; raise where one is missing or a value is empty."""
    reader = csv.DictReader(_lines(path))
    header = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = header
    missing = [column for column in columns if column not in header]
    if missing:
        raise UsageError(
            f"{path} lacks the column {missing[0]!r} (it has {', '.join(header[:8])}): "
            "restore the original"
        )
    for number, row in enumerate(reader, 1):
        for column in columns:
            if not (row[column] or "").strip():
                raise UsageError(
                    f"{path}: {column!r} is empty in row {number} below the header "
                    f"({row[columns[0]]!r}): restore the original"
                )
        yield {column: row[column].strip() for column in columns}


class _Images:
    """The image files anywhere below a folder, by their names."""

    def __init__(self, root: Path):
        self._root = root
        self._paths: dict[str, list[Path]] = {}
        for folder, subfolders, names in os.walk(root, followlinks=True):
            # In place: os.walk goes on into what is left in this list.
            subfolders[:] = filter(is_class_folder, subfolders)
            for name in filter(is_image, names):
                self._paths.setdefault(name, []).append(Path(folder, name))

    def find(self, name: str, source: Path) -> Path:
        """Return the only file called ``name``, which ``source`` lists; raise unless there is one."""
        paths = self._paths.get(name, [])
        if len(paths) == 1:
            return paths[0]
        if paths:
            places = " and ".join(str(path.parent) for path in sorted(paths)[:2])
            raise UsageError(f"{name} is stored in {places}: keep one of them below {self._root}")
        raise UsageError(
            f"manual_dir={self._root} lacks the image {name}, which {source.name} lists: "
            "restore the original"
        )


class Chestx(ListedImages):
    """Chest X-rays with exactly one of seven findings: uint8 ``(1024, 1024, 3)``, grey over three channels.

    The folder has the table and the images ``*.png`` anywhere below, as in the original
    ``images_001/images`` .. ``images_012/images``. Images with several findings (written ``A|B``), none,
    or another one are left out (Guo et al. 2020, CD-FSL); the 25,848 others form one split, called train.
    """

    DESCRIPTION = "ChestX-ray8: frontal chest X-rays with a single one of seven findings."
    HOMEPAGE = "https://nihcc.app.box.com/v/ChestXray-NIHCC"
    # The second is what the source offers since 2020.
    TABLES = ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv")
    # fmt: off
    CLASSES = (
        "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumothorax",
    )
    # fmt: on

    @classmethod
    def scan(cls, root: Path) -> Listing:
        """List the images with exactly one finding, one of the seven."""
        table = _find(root, *cls.TABLES)
        images = _Images(root)
        examples = [
            (images.find(row["Image Index"], table), row["Finding Labels"])
            for row in _rows(table, ("Image Index", "Finding Labels"))
            # Several findings are "A|B" here, which is none of the classes.
            if row["Finding Labels"] in cls.CLASSES
        ]
        return Listing(root, {"train": examples}, cls.CLASSES)


class Isic2018(ListedImages):
    """Skin lesions of the ISIC 2018 challenge, task 3 (HAM10000): uint8 ``(450, 600, 3)``, seven classes.

    The folder has the table, itself or in a folder of it, and the images ``ISIC_*.jpg`` anywhere below.
    All 10,015 labelled images form one split, called train (SEAL paper, section 4.1; few-shot episodes
    are drawn from all of it).
    """

    DESCRIPTION = "ISIC 2018, task 3: dermatoscopic images of seven kinds of skin lesion."
    HOMEPAGE = "https://challenge.isic-archive.com/landing/2018/"
    TABLE = "ISIC2018_Task3_Training_GroundTruth.csv"
    CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")  # in the order of the columns

    @classmethod
    def scan(cls, root: Path) -> Listing:
        """List the images that the table names."""
        table = _find(root, cls.TABLE)
        images = _Images(root)
        examples = [
            (images.find(f"{row['image']}.jpg", table), cls._label(row, table))
            for row in _rows(table, ("image", *cls.CLASSES))
        ]
        return Listing(root, {"train": examples}, cls.CLASSES)

    @classmethod
    def _label(cls, row: dict[str, str], table: Path) -> str:
        """Return the class whose column is one, of a one-hot row."""
        try:
            marked = [label for label in cls.CLASSES if float(row[label])]
            one_hot = len(marked) == 1 and float(row[marked[0]]) == 1
        except ValueError:
            one_hot = False
        if not one_hot:
            values = ", ".join(row[label] for label in cls.CLASSES)
            raise UsageError(
                f"{table}: {row['image']} has {values} for {', '.join(cls.CLASSES)}, which is not a "
                "single one: restore the original"
            )
        return marked[0]


def _from_lists(
    root: Path, files: Mapping[str, str], parse: Callable[[str, Path], tuple[Path, str]]
) -> Listing:
    """List the images of text files, one per split, whose lines ``parse`` turns into file and class."""
    splits = {}
    for split, name in files.items():
        listed = _find(root, name)
        examples = [parse(line, listed) for line in _lines(listed)]
        splits[split] = [(_existing(image, listed), label) for image, label in examples]
    return Listing(root, splits)


def _existing(image: Path, listed: Path) -> Path:
    """Return the file ``image``, which the file ``listed`` lists; raise where it does not exist."""
    if not image.is_file():
        raise UsageError(f"{image} is missing, which {listed.name} lists: restore the original")
    return image


class FgvcAircraft(ListedImages):
    """Images of the 100 variants of FGVC-Aircraft, of several sizes; splits train, validation and test.

    The folder is the unpacked ``fgvc-aircraft-2013b`` or its ``data``::

        data/images_variant_{train,val,test}.txt     lines of image number and variant
        data/images/<number>.jpg

    Labels follow the sorted names of the variants. The images keep the banner below the aircraft.
    """

    DESCRIPTION = "FGVC-Aircraft: 10,000 photographs of 100 aircraft variants."
    HOMEPAGE = "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/"

    @staticmethod
    def scan(root: Path) -> Listing:
        """List the images of the three lists."""

        def parse(line: str, listed: Path) -> tuple[Path, str]:
            # At the first blank only: names of variants have blanks themselves.
            number, _, variant = line.partition(" ")
            if not variant.strip():
                raise UsageError(f"{listed}: {line!r} names no variant: restore the original")
            return listed.parent / "images" / f"{number}.jpg", variant.strip()

        parts = {"train": "train", "validation": "val", "test": "test"}
        files = {split: f"images_variant_{part}.txt" for split, part in parts.items()}
        return _from_lists(root, files, parse)


class MitIndoor67(ListedImages):
    """Images of the 67 indoor scenes of Quattoni and Torralba, of several sizes; splits train and test.

    The folder has::

        TrainImages.txt, TestImages.txt     lines of <class>/<file>
        Images/<class>/<file>

    Other images of ``Images/`` are left out, as in the original protocol. Labels follow the sorted names.
    """

    DESCRIPTION = "MIT Indoor-67: photographs of 67 kinds of indoor scene."
    HOMEPAGE = "https://web.mit.edu/torralba/www/indoor.html"

    @staticmethod
    def scan(root: Path) -> Listing:
        """List the images of the two lists."""

        def parse(line: str, listed: Path) -> tuple[Path, str]:
            label, slash, name = line.partition("/")
            if not (label and slash and name):
                raise UsageError(f"{listed}: {line!r} is not <class>/<file>: restore the original")
            return listed.parent / "Images" / label / name, label

        return _from_lists(root, {"train": "TrainImages.txt", "test": "TestImages.txt"}, parse)


class TinyImagenet(ListedImages):
    """Images uint8 ``(64, 64, 3)`` of the original Tiny-ImageNet folder; splits train and validation.

    The layout is that of ``tiny-imagenet-200.zip``::

        wnids.txt                           one WordNet id per line; their order is the label order
        words.txt                           optional: WordNet id, tab, names
        train/<wnid>/images/*.JPEG
        val/val_annotations.txt             file name, tab, WordNet id, ...
        val/images/*.JPEG

    A folder with fewer classes in the same layout works alike. The original test images are unlabelled
    and left out. ``info.metadata["words"]`` holds the readable names.
    """

    DESCRIPTION = "Tiny-ImageNet: 64x64 images of a subset of ImageNet's classes."
    HOMEPAGE = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    SIZE = (64, 64)
    ENCODING = "jpeg"

    @staticmethod
    def scan(root: Path) -> Listing:
        """List the training images by class and name, the validation images as annotated."""
        listed = _find(root, "wnids.txt")
        root, wnids = listed.parent, _lines(listed, may_be_empty=True)
        if not wnids or len(set(wnids)) != len(wnids):
            raise UsageError(f"{listed} must list each WordNet id once: restore the original")
        train: list[tuple[Path, str]] = []
        for wnid in wnids:
            images = sorted((root / "train" / wnid / "images").glob("*.JPEG"))
            if not images:
                raise UsageError(
                    f"{root}/train/{wnid}/images has no .JPEG file: restore the original"
                )
            train.extend((path, wnid) for path in images)

        annotations = root / "val" / "val_annotations.txt"
        validation = []
        for line in _lines(annotations, may_be_empty=True):
            # Filled up, so that a line without a tab is one of an unknown class, an error below.
            name, wnid, *_ = [*line.split("\t"), "", ""]
            if wnid not in wnids:
                raise UsageError(f"{annotations}: {name} has class {wnid!r}, which wnids.txt lacks")
            validation.append((_existing(root / "val" / "images" / name, annotations), wnid))

        words = {}
        if (root / "words.txt").exists():
            for line in _lines(root / "words.txt", may_be_empty=True):
                wnid, _, names = line.partition("\t")
                if wnid in wnids:
                    words[wnid] = names
        return Listing(root, {"train": train, "validation": validation}, wnids, words)

    def key(self, path: Path, label: str) -> str:
        """Return the file's name, which is unique here."""
        del label
        return path.name
