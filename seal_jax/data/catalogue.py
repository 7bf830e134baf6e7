"""The data sets of the four papers, and which of them are prepared in a folder.

This reads folders itself, because TFDS takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from seal_jax import records
from seal_jax.errors import UsageError


class DataSet(NamedTuple):
    """One data set, with what the papers say of it.

    Attributes:
      paper: its name in the papers.
      names: what it is called here; a further name is another way to have it.
      classes: as the paper counts them.
      train: images the papers train on; text where a paper splits the images itself.
      validation: of an official validation split that is neither trained nor tested on.
      test: images they test on; None where few-shot episodes are drawn from all images.
      used: by which paper, and where it says so.
      note: how the data set here differs from the paper's.
    """

    paper: str
    names: tuple[str, ...]
    classes: int
    train: int | str
    validation: int | None
    test: int | str | None
    used: str
    note: str = ""


_PROBE = "SEAL Table 3"
_FEW_SHOT = "SEAL 4.1, few-shot"
_LW = "LW Table 5"
_OTHER_LABELS = "TFDS has {} classes, {}"

DATA_SETS = (
    DataSet(
        "Tiny-ImageNet",
        ("tiny_imagenet",),
        200,
        100_000,
        None,
        10_000,
        "SEAL 4.1",
        "tested on its validation images; the original test images are unlabelled",
    ),
    DataSet(
        "CIFAR-100",
        ("cifar100",),
        100,
        50_000,
        None,
        10_000,
        f"SEAL Tables 9, 10; {_LW}; PoF; FAST 6",
    ),
    DataSet("Flower", ("oxford_flowers102",), 102, 1_020, 1_020, 6_149, _PROBE),
    DataSet("CUB", ("caltech_birds2011",), 200, 5_994, None, 5_794, _PROBE),
    DataSet("Aircraft", ("fgvc_aircraft",), 100, 3_334, 3_333, 3_333, _PROBE),
    DataSet("MIT", ("mit_indoor67",), 67, 5_360, None, 1_340, _PROBE),
    DataSet("Dogs", ("stanford_dogs",), 120, 12_000, None, 8_580, f"{_PROBE}; {_LW}"),
    DataSet("ChestX", ("chestx",), 7, 25_848, None, None, _FEW_SHOT),
    DataSet("ISIC", ("isic2018",), 7, 10_015, None, None, _FEW_SHOT),
    DataSet("EuroSAT", ("image_folder/eurosat", "eurosat"), 10, 27_000, None, None, _FEW_SHOT),
    DataSet(
        "CropDisease",
        ("image_folder/cropdisease",),
        38,
        43_456,
        None,
        None,
        _FEW_SHOT,
        "episodes are drawn from its folder train alone",
    ),
    DataSet("CIFAR-10", ("cifar10",), 10, 50_000, None, 10_000, f"{_LW}; PoF"),
    DataSet("Fashion-MNIST", ("fashion_mnist",), 10, 60_000, None, 10_000, f"{_LW}; PoF"),
    DataSet("SVHN", ("svhn_cropped",), 10, 73_257, None, 26_032, "PoF"),
    DataSet("Oxford-IIIT", ("oxford_iiit_pet",), 37, 3_680, None, 3_669, _LW),
    DataSet("Cars196", ("cars196",), 196, 8_144, None, 8_041, _LW),
    DataSet("MNIST-Cor", ("mnist_corrupted",), 10, 60_000, None, 10_000, _LW),
    DataSet(
        "CIFAR10-Cor",
        ("cifar10_corrupted",),
        10,
        50_000,
        None,
        10_000,
        _LW,
        "TFDS has a test split alone",
    ),
    DataSet(
        "Caltech101",
        ("caltech101",),
        101,
        3_060,
        None,
        6_084,
        _LW,
        _OTHER_LABELS.format(102, "the background one of them"),
    ),
    DataSet(
        "Cassava",
        ("cassava",),
        4,
        5_656,
        None,
        1_885,
        _LW,
        _OTHER_LABELS.format(5, "healthy leaves one of them"),
    ),
    DataSet("CMATERdb", ("cmaterdb",), 10, 5_000, None, 1_000, _LW),
    DataSet("Birds2010", ("caltech_birds2010",), 200, 3_000, None, 3_033, _LW),
    DataSet("MNIST", ("mnist",), 10, 60_000, None, 10_000, "FAST 6.2"),
    DataSet(
        "Caltech-256",
        ("image_folder/caltech256",),
        256,
        "80 %",
        None,
        "20 %",
        "FAST 6.7",
        "has no official split: train[:80%] and train[80%:]; remove the folder 257.clutter first",
    ),
    DataSet(
        "ILSVRC-12",
        ("imagenet2012",),
        1_000,
        1_281_167,
        None,
        50_000,
        "FAST 6, source task",
        "the source of FAST's published weights; only their training needs it",
    ),
)


class Prepared(NamedTuple):
    """What a prepared folder says of itself.

    Attributes:
      folder: of the version.
      counts: images by split.
      classes: number of classes, None where it cannot be told.
      file_format: ``array_record``, or one that needs TensorFlow.
    """

    folder: Path
    counts: dict[str, int]
    classes: int | None
    file_format: str


def prepared(name: str, data_dir: Path) -> Prepared | None:
    """Return what is prepared of ``name``, the newest version; None where nothing usable is.

    Args:
      name: a data set of TFDS or this package; any configuration counts where none is named.
      data_dir: the folder of all data sets.
    """
    infos = [*_infos(data_dir / name, "*"), *_infos(data_dir / name, "*/*")]
    return max(infos, key=lambda info: _version(info.folder)) if infos else None


def _infos(folder: Path, depth: str) -> Iterator[Prepared]:
    for path in sorted(folder.glob(f"{depth}/dataset_info.json")):
        try:
            info = records.load(path, _Info, "")
            counts = {
                split["name"]: sum(int(count) for count in split["shardLengths"])
                for split in info["splits"]
            }
            yield Prepared(path.parent, counts, _classes(path.parent, info), info["fileFormat"])
        # Cut off, or not TFDS's: it does not count as prepared.
        except (UsageError, ValueError, TypeError):
            continue


# As TFDS writes them, as far as they are read here.
class _Split(TypedDict):
    name: str
    shardLengths: list[str | int]


class _Info(TypedDict):
    splits: list[_Split]
    fileFormat: str


class _Dict(TypedDict):
    features: Mapping[str, Mapping[str, Any]]


class _Features(TypedDict):
    featuresDict: _Dict


def _version(folder: Path) -> tuple[int, ...]:
    parts = folder.name.split(".")
    return tuple(int(part) if part.isdigit() else -1 for part in parts)


def _classes(folder: Path, info: dict[str, Any]) -> int | None:
    """Return the number of classes of the supervised label, or of the only one."""
    file = records.load(folder / "features.json", _Features, "")
    labels = {
        key: feature["classLabel"]
        for key, feature in file["featuresDict"]["features"].items()
        if isinstance(feature.get("classLabel"), dict)
    }
    try:
        keys = [item["featureKey"] for item in info["supervisedKeys"]["tuple"]["items"]]
    except (LookupError, TypeError):
        keys = []  # they are optional
    label: dict[str, Any] = next(
        (labels[key] for key in keys if key in labels), next(iter(labels.values()), {})
    )
    return int(label.get("numClasses") or 0) or None
