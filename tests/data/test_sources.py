from __future__ import annotations

import io
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from seal_jax.data import load, prepare
from seal_jax.errors import UsageError

REAL = Path(__file__).parents[3] / "shared" / "data" / "tfds"
HEIGHTS = [6, 9, 6, 7, 6, 9, 8, 6]


def gradient(height: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:6]
    return (20 * rows + 5 * columns).astype(np.uint8)


class MixedSizes(tfds.core.GeneratorBasedBuilder):
    """Images of several heights, two labels and no test split."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "parity": tfds.features.ClassLabel(names=["even", "odd"]),
            "height": tfds.features.ClassLabel(num_classes=10),
            "note": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "extra": self._generate_examples()}

    def _generate_examples(self):
        for index, height in enumerate(HEIGHTS):
            png = io.BytesIO()
            Image.fromarray(gradient(height)).save(png, format="PNG")
            png.seek(0)
            yield index, {"image": png, "parity": index % 2, "height": height, "note": "x"}


class Damaged(MixedSizes):
    """The first and the sixth image are cut short, and stored like that."""

    def _generate_examples(self):
        for index, example in super()._generate_examples():
            if index in (0, 5):
                example["image"] = io.BytesIO(example["image"].getvalue()[:60])
            yield index, example


class Unlabelled(tfds.core.GeneratorBasedBuilder):
    """Text without images."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"note": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        yield "0", {"note": "x"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    for name in ("digits", "mixed_sizes", "damaged", "unlabelled"):
        prepare(name, data_dir=folder)
    return folder


@pytest.fixture
def digits(data_dir, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(data_dir / "digits", tmp_path / "digits")
    return tmp_path / "digits" / "1.0.0"


MIXED = {"test_split": "extra", "label": "parity", "validation_fraction": 0}


def test_sizes_are_made_equal(data_dir):
    dataset = load("mixed_sizes", data_dir=data_dir, image_size=(6, 6), **MIXED)
    assert dataset.train.images.shape == (8, 6, 6, 3)
    # Images of the wanted size are untouched; grayscale ones are repeated over the channels.
    for row in np.flatnonzero(np.array(HEIGHTS) == 6):
        expected = np.repeat(gradient(6)[..., None], 3, axis=-1)
        np.testing.assert_array_equal(dataset.train.images[row], expected)
    # Bilinear shrinking of a linear ramp leaves a linear ramp, away from the border.
    steps = np.diff(dataset.train.images[1, 1:-1, 2, 0].astype(int))
    np.testing.assert_allclose(steps, np.full(3, 20 * 9 / 6), atol=2)
    assert load("mixed_sizes", data_dir=data_dir, image_size=5, **MIXED).image_shape == (5, 5, 3)


@pytest.mark.parametrize("placement", ["device", "stream"])
def test_label_is_chosen(data_dir, placement, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = {"data_dir": data_dir, "image_size": 6, "placement": placement, **MIXED}
    parity = load("mixed_sizes", **options)
    assert (parity.num_classes, parity.class_names) == (2, ("even", "odd"))
    assert parity.train.labels.tolist() == [0, 1] * 4
    height = load("mixed_sizes", **(options | {"label": "height"}))
    assert height.num_classes == 10
    assert height.train.labels.tolist() == HEIGHTS


def test_damaged_images(data_dir):
    options = {"data_dir": data_dir, "image_size": 6, **MIXED}
    shard = r"damaged-train.array_record-00000-of-00001"
    with pytest.raises(UsageError, match=rf"record 0 of .*{shard}: .*data.corrupt = \"skip\""):
        load("damaged", **options)
    # Rows are counted in the split, records in its file.
    with pytest.raises(UsageError, match=rf"record 5 of .*{shard}: .*truncated"):
        load("damaged", train_split="train[3:]", **options)
    whole = load("mixed_sizes", **options)
    with pytest.warns(UserWarning, match="2 of 8 images in ") as caught:
        dataset = load("damaged", corrupt="skip", **options)
    messages = [str(warning.message) for warning in caught]
    assert [message.count("record ") for message in messages] == [2, 2]  # of train, and of extra
    assert "in damaged train cannot be decoded and are left out: record 0 of" in messages[0]
    rows = [1, 2, 3, 4, 6, 7]
    np.testing.assert_array_equal(dataset.train.images, whole.train.images[rows])
    np.testing.assert_array_equal(dataset.train.labels, whole.train.labels[rows])
    with pytest.raises(UsageError, match=r"damaged train\[:1\] has no image that can be"):
        load("damaged", corrupt="skip", train_split="train[:1]", **options)


def test_parts_of_splits(data_dir):
    dataset = load(
        "digits",
        data_dir=data_dir,
        train_split="train[:100]",
        test_split="train[100:]",
        validation_fraction=0,
    )
    assert (len(dataset.train), len(dataset.test)) == (100, 1337)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("mixed_sizes", MIXED, r"differing sizes \(\(6, 6\), \(9, 6\)\): set data.image_size"),
        ("mixed_sizes", {"label": "parity"}, "neither a test nor a validation split.*test_split"),
        ("mixed_sizes", {"test_split": "extra"}, "data.label must choose one of height, parity"),
        ("mixed_sizes", MIXED | {"label": "colour"}, "'colour' is not one of height, parity"),
        ("unlabelled", {}, "has no Image feature"),
        ("digits", {"image_size": 0}, "data.image_size=0 must be"),
        ("digits", {"image_size": (8, 8, 1)}, r"data.image_size=\(8, 8, 1\) must be"),
        ("digits", {"train_split": "trian"}, "train_split='trian': .*train, test"),
        ("digits", {"test_split": "test[:5"}, r"test_split='test\[:5'"),
        ("digits", {"test_split": "test[:0]"}, "has no example"),
        ("digits", {"test_split": "train"}, "is the training split"),
        ("digits", {"validation_fraction": 1.5}, "data.validation_fraction=1.5"),
        ("digits:9.9.9", {}, "cannot be loaded at version 9.9.9"),
        ("a name", {}, "data.name='a name'"),
        ("cifr100", {}, "is not a data set that TFDS knows; nearest: cifar100"),
        ("digit", {}, "is not a data set that TFDS knows; nearest: digits"),
    ],
)
def test_unusable_arguments(data_dir, name, arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        load(name, data_dir=data_dir, progress=False, **arguments)
    assert "\n" not in str(caught.value)


def test_images_that_do_not_fit_the_memory(digits, monkeypatch):
    """1437 training and 360 test images of 16x16, each with a copy."""
    from seal_jax.data import sources

    options = {"data_dir": digits.parents[1], "image_size": 16}
    free = 2 * 1437 * 16 * 16
    monkeypatch.setattr(sources, "available_memory", lambda: free)
    load("digits", **options)
    monkeypatch.setattr(sources, "available_memory", lambda: free - 1)
    with pytest.raises(
        UsageError, match=r"data.image_size: 1437 images .* 735,744 bytes, and 735,743"
    ):
        load("digits", **options)
    # Where the stored size is kept, it is known from the first image on.
    monkeypatch.setattr(sources, "available_memory", lambda: 2 * 1437 * 8 * 8 - 1)
    with pytest.raises(
        UsageError, match=r"1437 images of 8x8x1 in 'digits train' .* lower data.image_size"
    ):
        load("digits", data_dir=digits.parents[1])
    monkeypatch.undo()
    assert sources.available_memory() is None or sources.available_memory() > 2**20
    with pytest.raises(UsageError, match="1 images of 1000000x1000000x1"):
        load("digits", data_dir=digits.parents[1], image_size=10**6, crop=8)


def test_missing_data_names_the_commands(tmp_path):
    with pytest.raises(UsageError) as caught:
        load("mnist", data_dir=tmp_path)
    message = str(caught.value)
    assert f"`python -m seal_jax prepare --dataset=mnist --data-dir={tmp_path}`" in message
    assert "tfds build mnist --file_format=array_record" in message
    assert "TFDS_DATA_DIR" in message
    assert "\n" not in message


class Broken(Unlabelled):
    """Its source is not to be had."""

    def _generate_examples(self):
        raise ConnectionError("no route\nto host")
        yield


def test_failed_preparation_says_what_to_do(tmp_path):
    with pytest.raises(UsageError) as caught:
        prepare("broken", data_dir=tmp_path)
    message = str(caught.value)
    assert f"broken could not be prepared in {tmp_path}: no route: a machine with net" in message
    assert "tfds build broken --file_format=array_record" in message
    assert "\n" not in message


def _damage(path: Path, start: int, stop: int | None) -> None:
    content = bytearray(path.read_bytes())
    content[start:stop] = b"\0" * (len(content[start:stop])) if stop else b""
    path.write_bytes(content)


TRAIN = "digits-train.array_record-00000-of-00001"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: _damage(folder / TRAIN, 40_000, None), f"{TRAIN} cannot be read .*prepare"),
        (lambda folder: _damage(folder / TRAIN, 2_000, 4_000), f"{TRAIN} cannot be read .*prepare"),
        (lambda folder: _damage(folder / TRAIN, 0, None), f"{TRAIN} cannot be read .*prepare"),
        (lambda folder: (folder / TRAIN).unlink(), f"{TRAIN} cannot be read .*prepare it again"),
        (lambda folder: (folder / "dataset_info.json").unlink(), "lacks dataset_info.json"),
        (lambda folder: _damage(folder / "dataset_info.json", 90, None), "Failed to load JSON"),
        (
            lambda folder: (folder / "dataset_info.json").write_text(
                (folder / "dataset_info.json").read_text().replace("array_record", "tfrecord")
            ),
            "is prepared as tfrecord, which needs TensorFlow: .*seal_jax prepare --dataset=digits",
        ),
    ],
    ids=["truncated", "overwritten", "empty", "gone", "no info", "cut info", "tfrecord"],
)
def test_damaged_data(digits, damage, message, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = {"data_dir": digits.parents[1], "validation_fraction": 0}
    # As a worker process gets it; opened before the damage, which a training then meets.
    streamed = pickle.dumps(load("digits", placement="stream", **options).train.images)
    damage(digits)
    with pytest.raises(UsageError, match=message) as caught:
        load("digits", **options)
    assert "\n" not in str(caught.value)
    if "cannot be read" in message:
        with pytest.raises(UsageError, match=message) as caught:
            np.asarray(pickle.loads(streamed))
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(not REAL.exists(), reason="needs the real data")
def test_fashion_mnist():
    dataset = load(
        "fashion_mnist", data_dir=REAL, train_split="train[:3000]", test_split="test[:500]"
    )
    assert dataset.image_shape == (28, 28, 1)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (2700, 300, 500)
    assert dataset.class_names[9] == "Ankle boot"
    decoded = tfds.builder("fashion_mnist", data_dir=REAL).as_data_source("test")
    for row in (0, 499):
        np.testing.assert_array_equal(dataset.test.images[row], decoded[row]["image"])
        assert dataset.test.labels[row] == decoded[row]["label"]


@pytest.mark.skipif(not REAL.exists(), reason="needs the real data")
def test_cifar100_has_two_labellings():
    parts = {"train_split": "train[:2000]", "test_split": "test[:500]", "validation_fraction": 0}
    fine = load("cifar100", data_dir=REAL, **parts)
    coarse = load("cifar100", data_dir=REAL, label="coarse_label", **parts)
    assert (fine.num_classes, coarse.num_classes) == (100, 20)
    np.testing.assert_array_equal(fine.train.images, coarse.train.images)
    # Every class lies in one superclass.
    pairs = set(zip(fine.train.labels.tolist(), coarse.train.labels.tolist(), strict=True))
    assert len(pairs) == 100
    decoded = next(iter(tfds.builder("cifar100", data_dir=REAL).as_data_source("train")))
    np.testing.assert_array_equal(fine.train.images[0], decoded["image"])
