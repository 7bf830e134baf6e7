"""The records of the data sets that this package knows by name, and what of them a folder holds.

Adding a data set is one :class:`DatasetInfo` here, and a builder where TFDS has none. Nothing here
imports TFDS, which takes seconds.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from seal_jax import records
from seal_jax.errors import UsageError, nearest


class Statistics(NamedTuple):
    """Mean and standard deviation of the training images' pixel values divided by 255, by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class DatasetInfo(NamedTuple):
    """One data set, with what the papers say of it.

    Attributes:
      paper: its name in the papers.
      names: values of ``data.name`` and ``--dataset``; a further name is another way to have it.
      classes: as the paper counts them.
      train: images the papers train on; text where a paper splits the images itself.
      test: images they test on; None where few-shot episodes are drawn from all images.
      used: by which paper, and where it says so.
      validation: images of an official validation split that is neither trained nor tested on.
      note: how the data set here differs from the paper's.
      image_shape: ``(height, width, channels)``, where it is known without loading the images.
      statistics: channel means and standard deviations, where they are known.
      normalisation: what ``data.normalisation`` calls the statistics; by default the first name.
      builder: TFDS's name of one in ``seal_jax.data.builders``, where TFDS has none in the papers' form.
      manual_dir: the folder of original files that the builder, ours or TFDS's, reads; a builder of ours
        without needs only installed packages, and its small data is prepared where it is first used.
      download: where the files of ``manual_dir`` come from.
      episode_split: split that few-shot episodes are drawn from; by default all images.
      stored: images by TFDS's name of the split, where these are not ``train``, ``validation`` and ``test``.
      stored_classes: where the source has more than the paper counts.
    """

    paper: str
    names: tuple[str, ...]
    classes: int
    train: int | str
    test: int | str | None
    used: str = ""
    validation: int | None = None
    note: str = ""
    image_shape: tuple[int, int, int] | None = None
    statistics: Statistics | None = None
    normalisation: str = ""
    builder: str = ""
    manual_dir: str = ""
    download: str = ""
    episode_split: str | None = None
    stored: Mapping[str, int] | None = None
    stored_classes: int | None = None


_PROBE = "SEAL Table 3"
_FEW_SHOT = "SEAL 4.1, few-shot"
_LW = "LW Table 5"
_CLASS_FOLDERS = "the folder with one subfolder a class, or with train and test folders of such"
# The 15 of Hendrycks and Dietterich 2019, section 4.
_CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)

# One data set a row, in the columns paper, names, classes, train, test, used.
# fmt: off
DIGITS = DatasetInfo(
    "digits", ("digits",), 10, 1_437, 360,
    # np.mean and np.std over all pixels of the uint8 training split (every sample whose index is
    # not a multiple of five), divided by 255.
    image_shape=(8, 8, 1), statistics=Statistics((0.3053,), (0.3762,)), builder="digits",
)

# Those of the papers.
DATA_SETS = (
    DatasetInfo(
        "Tiny-ImageNet", ("tiny_imagenet",), 200, 100_000, 10_000, "SEAL 4.1",
        note="tested on its validation images; the original test images are unlabelled",
        image_shape=(64, 64, 3),
        builder="tiny_imagenet", manual_dir="the unpacked tiny-imagenet-200 folder",
        download="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        stored={"train": 100_000, "validation": 10_000},
    ),
    DatasetInfo(
        "Tiny-ImageNet-C", ("tiny_imagenet_c",), 200, "-", 10_000, "Hendrycks & Dietterich 2019",
        note="a split for each of 15 corruptions and 5 severities, such as gaussian_noise_3",
        builder="tiny_imagenet_c", manual_dir="the unpacked Tiny-ImageNet-C folder",
        download="Tiny-ImageNet-C.tar of https://zenodo.org/records/2536630",
        stored=dict.fromkeys(
            (f"{corruption}_{severity}" for corruption in _CORRUPTIONS for severity in range(1, 6)),
            10_000,
        ),
    ),
    DatasetInfo(
        "CIFAR-100", ("cifar100",), 100, 50_000, 10_000, f"SEAL Tables 9, 10; {_LW}; PoF; FAST 6",
        image_shape=(32, 32, 3),
        statistics=Statistics((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ),
    DatasetInfo("Flower", ("oxford_flowers102",), 102, 1_020, 6_149, _PROBE, validation=1_020),
    DatasetInfo("CUB", ("caltech_birds2011",), 200, 5_994, 5_794, _PROBE),
    DatasetInfo(
        "Aircraft", ("fgvc_aircraft",), 100, 3_334, 3_333, _PROBE, validation=3_333,
        builder="fgvc_aircraft", manual_dir="the unpacked fgvc-aircraft-2013b folder",
        download="fgvc-aircraft-2013b.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
    ),
    DatasetInfo(
        "MIT", ("mit_indoor67",), 67, 5_360, 1_340, _PROBE,
        builder="mit_indoor67",
        manual_dir="the folder of TrainImages.txt, TestImages.txt and Images",
        download="indoorCVPR_09.tar and both lists of https://web.mit.edu/torralba/www/indoor.html",
    ),
    DatasetInfo("Dogs", ("stanford_dogs",), 120, 12_000, 8_580, f"{_PROBE}; {_LW}"),
    DatasetInfo(
        "ChestX", ("chestx",), 7, 25_848, None, _FEW_SHOT,
        builder="chestx",
        manual_dir="the folder of Data_Entry_2017.csv and the images of ChestX-ray8",
        download="images_*.tar.gz and the table of https://nihcc.app.box.com/v/ChestXray-NIHCC",
    ),
    DatasetInfo(
        "ISIC", ("isic2018",), 7, 10_015, None, _FEW_SHOT,
        builder="isic2018",
        manual_dir="the folder of ISIC2018_Task3_Training_GroundTruth.csv and the images",
        download="training data and ground truth of task 3, https://challenge.isic-archive.com/data/#2018",
    ),
    DatasetInfo(
        "EuroSAT", ("image_folder/eurosat", "eurosat"), 10, 27_000, None, _FEW_SHOT,
        builder="image_folder", manual_dir=_CLASS_FOLDERS,
        download="EuroSAT_RGB.zip of https://zenodo.org/records/7711810",
    ),
    DatasetInfo(
        "CropDisease", ("crop_disease", "image_folder/cropdisease"), 38, 43_456, None, _FEW_SHOT,
        note="episodes are drawn from its folder train alone",
        episode_split="train",  # Guo et al. 2020, appendix
        builder="crop_disease", manual_dir="the unpacked plant-disease folder",
        download="https://www.kaggle.com/datasets/saroz014/plant-disease",
    ),
    DatasetInfo(
        "CIFAR-10", ("cifar10",), 10, 50_000, 10_000, f"{_LW}; PoF",
        image_shape=(32, 32, 3),
        statistics=Statistics((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    ),
    DatasetInfo(
        "Fashion-MNIST", ("fashion_mnist",), 10, 60_000, 10_000, f"{_LW}; PoF",
        image_shape=(28, 28, 1), statistics=Statistics((0.2859,), (0.3530,)),
    ),
    DatasetInfo(
        "SVHN", ("svhn_cropped",), 10, 73_257, 26_032, "PoF",
        image_shape=(32, 32, 3), normalisation="svhn",
        statistics=Statistics((0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197)),
    ),
    DatasetInfo("Oxford-IIIT", ("oxford_iiit_pet",), 37, 3_680, 3_669, _LW),
    DatasetInfo("Cars196", ("cars196",), 196, 8_144, 8_041, _LW),
    DatasetInfo("MNIST-Cor", ("mnist_corrupted",), 10, 60_000, 10_000, _LW),
    DatasetInfo(
        "CIFAR10-Cor", ("cifar10_corrupted",), 10, 50_000, 10_000, _LW,
        note="TFDS has a test split alone",
        stored={"test": 10_000},
    ),
    DatasetInfo(
        "Caltech101", ("caltech101",), 101, 3_060, 6_084, _LW,
        note="TFDS has 102 classes, the background one of them", stored_classes=102,
    ),
    DatasetInfo(
        "Cassava", ("cassava",), 4, 5_656, 1_885, _LW,
        note="TFDS has 5 classes, healthy leaves one of them", stored_classes=5,
    ),
    DatasetInfo("CMATERdb", ("cmaterdb",), 10, 5_000, 1_000, _LW),
    DatasetInfo("Birds2010", ("caltech_birds2010",), 200, 3_000, 3_033, _LW),
    DatasetInfo("MNIST", ("mnist",), 10, 60_000, 10_000, "FAST 6.2", image_shape=(28, 28, 1)),
    DatasetInfo(
        "Caltech-256", ("caltech256", "image_folder/caltech256"), 256, 23_824, 5_956, "FAST 6.7",
        note="a fixed split, stratified, since there is no official one; the paper's images are 74x74",
        builder="caltech256", manual_dir="the unpacked 256_ObjectCategories folder",
        download="256_ObjectCategories.tar of https://data.caltech.edu/records/nyy15-4j048",
    ),
    DatasetInfo(
        "ILSVRC-12", ("imagenet2012",), 1_000, 1_281_167, 50_000, "FAST 6, source task",
        note="the source of FAST's published weights; only their training needs it",
        manual_dir="the folder of ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar",
        download="https://www.image-net.org/challenges/LSVRC/2012/, after registration",
        stored={"train": 1_281_167, "validation": 50_000},
        normalisation="imagenet",
        statistics=Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ),
)
# fmt: on
RECORDS = (*DATA_SETS, DIGITS)

STATISTICS = {
    info.normalisation or info.names[0]: info.statistics for info in RECORDS if info.statistics
}


def normalisation(name: str) -> str:
    """Return what ``data.normalisation`` calls the statistics of the data set ``name``, "" if unknown.

    >>> normalisation("svhn_cropped"), normalisation("cifar10:3.0.2"), normalisation("cassava")
    ('svhn', 'cifar10', '')
    """
    info = find_info(name)
    return info.normalisation or info.names[0] if info and info.statistics else ""


def statistics(name: str) -> Statistics:
    """Return the statistics that ``data.normalisation`` calls ``name``, or that it spells as ``MEAN/STD``.

    >>> statistics("fashion_mnist").mean
    (0.2859,)
    >>> statistics("0.5,0.5,0.4/0.25,0.25,0.2")
    Statistics(mean=(0.5, 0.5, 0.4), std=(0.25, 0.25, 0.2))
    """
    if name in STATISTICS:
        return STATISTICS[name]
    try:
        mean, std = (tuple(map(float, part.split(","))) for part in name.split("/"))
        if not (all(map(math.isfinite, mean)) and all(0 < part < math.inf for part in std)):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"data.normalisation={name!r} is not one of {', '.join(STATISTICS)}"
            f"{nearest(name, STATISTICS, count=1)}; means and positive deviations are written as "
            "0.5,0.5,0.5/0.5,0.5,0.5"
        ) from None
    return Statistics(mean, std)


def name_of(statistics: Statistics) -> str:
    """Return what ``data.normalisation`` calls statistics.

    >>> name_of(Statistics((0.5,) * 3, (0.25,) * 3)), name_of(STATISTICS["cifar100"])
    ('0.5,0.5,0.5/0.25,0.25,0.25', 'cifar100')
    """
    names = [name for name, known in STATISTICS.items() if known == statistics]
    return names[0] if names else "/".join(",".join(map(str, part)) for part in statistics)


def find_info(name: str) -> DatasetInfo | None:
    """Return the record of the data set ``name``, perhaps with ``:version``; None for another.

    >>> find_info("image_folder/eurosat:1.0.0").paper, find_info("image_folder/mine")
    ('EuroSAT', None)
    """
    return next((info for info in RECORDS if name.split(":")[0] in info.names), None)


def builder_record(name: str) -> DatasetInfo | None:
    """Return a record with the builder of this package that builds ``name``; None for TFDS's own.

    >>> builder_record("image_folder/mine").builder, builder_record("digits:1.0.0").builder
    ('image_folder', 'digits')
    """
    base = re.split("[/:]", name, maxsplit=1)[0]
    return next((info for info in RECORDS if info.builder == base), None)


def original_files(name: str) -> str:
    """Return which folder of original files ``name`` is built from, and where they come from; "" for none.

    >>> original_files("tiny_imagenet")
    'the unpacked tiny-imagenet-200 folder (http://cs231n.stanford.edu/tiny-imagenet-200.zip)'
    >>> original_files("image_folder/mine"), original_files("cifar10")
    ('the folder with one subfolder a class, or with train and test folders of such', '')
    """
    info, builder = find_info(name), builder_record(name)
    # A name of the user's choice has a builder, but no record of its own.
    if info is None or not info.manual_dir:
        return builder.manual_dir if builder else ""
    return f"{info.manual_dir} ({info.download})"


def expected_counts(info: DatasetInfo) -> dict[str, int]:
    """Return how many images a whole data set has, by TFDS's name of the split, as far as it is known.

    >>> expected_counts(DATA_SETS[0])
    {'train': 100000, 'validation': 10000}
    """
    if info.stored is not None:
        return dict(info.stored)
    sizes = {"train": info.train, "validation": info.validation, "test": info.test}
    return {split: size for split, size in sizes.items() if isinstance(size, int)}


class Prepared(NamedTuple):
    """Folder and metadata of a prepared version."""

    folder: Path
    counts: dict[str, int]  # images by split
    classes: int | None  # None where it cannot be told
    file_format: str  # "array_record", or one that needs TensorFlow


_INFO = "dataset_info.json"


# As TFDS writes dataset_info.json and features.json, as far as they are read here.
class _Split(TypedDict):
    name: str
    shardLengths: list[str | int]


class _Info(TypedDict):
    splits: list[_Split]
    fileFormat: str


class _Features(TypedDict):
    featuresDict: Mapping[str, Mapping[str, Mapping[str, Any]]]


def prepared(name: str, data_dir: Path) -> Prepared | None:
    """Return the newest usable version of ``name`` below ``data_dir``; None where there is none.

    Any configuration counts where ``name`` has none.
    """

    def version(info: Prepared) -> tuple[int, ...]:
        # By number: as text 1.10.0 would come before 1.9.0.
        return tuple(int(part) if part.isdigit() else -1 for part in info.folder.name.split("."))

    # Those without a configuration first: max returns the first of equal versions.
    folder = data_dir / name
    files = [path for depth in ("*", "*/*") for path in sorted(folder.glob(f"{depth}/{_INFO}"))]
    return max(filter(None, map(_read, files)), key=version, default=None)


def _read(path: Path) -> Prepared | None:
    """Read a ``dataset_info.json``; return None where it is truncated, or not TFDS's."""
    try:
        info = records.load(path, _Info, "")
        counts = {
            # TFDS writes protobuf's JSON, in which 64-bit integers are text.
            split["name"]: sum(int(count) for count in split["shardLengths"])
            for split in info["splits"]
        }
        return Prepared(path.parent, counts, _num_classes(path.parent, info), info["fileFormat"])
    except (UsageError, LookupError, ValueError, TypeError):
        return None


def _num_classes(folder: Path, info: Mapping[str, Any]) -> int | None:
    """Return the number of classes of the supervised label, or of the only one."""
    features = records.load(folder / "features.json", _Features, "")["featuresDict"]["features"]
    labels = {
        key: feature["classLabel"]
        for key, feature in features.items()
        if isinstance(feature.get("classLabel"), dict)
    }
    try:
        keys = [item["featureKey"] for item in info["supervisedKeys"]["tuple"]["items"]]
    except (LookupError, TypeError):
        keys = []  # they are optional
    label: dict[str, Any] = next((labels[key] for key in [*keys, *labels] if key in labels), {})
    return int(label.get("numClasses") or 0) or None
