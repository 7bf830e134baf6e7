"""Original layouts, prepared without TensorFlow: what lies in the folder is what is loaded."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from original_layouts import LAYOUTS, chestx, eurosat, picture
from PIL import Image

from seal_jax.cli import configs
from seal_jax.data import load, load_labelled, prepare, shards
from seal_jax.data.builders.originals import encoded
from seal_jax.data.preparation import find_builder
from seal_jax.errors import UsageError
from seal_jax.training import experiment, loop, manifest

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT.parent / "shared" / "data" / "eurosat-sample"


def as_pairs(split):
    return sorted(
        (image.tobytes(), int(label))
        for image, label in zip(split.images, split.labels, strict=True)
    )


def from_files(listed, classes):
    return sorted(
        (np.asarray(Image.open(path).convert("RGB")).tobytes(), classes.index(label))
        for path, label in listed.items()
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_listed_is_loaded(tmp_path, name):
    layout, classes = LAYOUTS[name]
    root, data_dir = tmp_path / "original", tmp_path / "data"
    root.mkdir()
    splits = layout(root)
    for _ in range(2):  # the second time it is there
        where = prepare(name, data_dir=data_dir, manual_dir=root)
        assert Path(where) == data_dir / name / "1.0.0"
    assert not list(data_dir.glob(".*"))
    builder = find_builder(name, data_dir)
    assert {split: info.num_examples for split, info in builder.info.splits.items()} == {
        split: len(listed) for split, listed in splits.items()
    }
    for split, listed in splits.items():
        found, names = load_labelled(name, data_dir=data_dir, split=split)
        assert names == tuple(classes)
        assert as_pairs(found) == from_files(listed, classes)
    if "test" in splits:
        dataset = load(name, data_dir=data_dir, validation_fraction=0)
        assert dataset.class_names == tuple(classes)
        assert as_pairs(dataset.test) == from_files(splits["test"], classes)
    whole, _ = load_labelled(name, data_dir=data_dir)
    everything = {path: label for listed in splits.values() for path, label in listed.items()}
    assert as_pairs(whole) == from_files(everything, classes)

    # TFDS alone reads it, too, and the bytes are the files' own.
    split = next(iter(splits))
    source = tfds.builder_from_directory(where).as_data_source(
        split, decoders={"image": tfds.decode.SkipDecoding()}
    )
    stored = sorted(source[index]["image"] for index in range(len(source)))
    assert stored == sorted(path.read_bytes() for path in splits[split])


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_config_trains_on_each(tmp_path, name):
    root = tmp_path / "original"
    root.mkdir()
    first, *others = LAYOUTS[name][0](root)
    prepare(name, data_dir=tmp_path, manual_dir=root)
    data = {
        "name": name,
        "data_dir": tmp_path,
        "image_size": 8,
        "normalisation": "imagenet",
        "train_split": first,
        "test_split": others[-1] if others else f"{first}[:50%]",
        "validation_fraction": 0.0,
    }
    overrides = [f"--config.data.{field}={value}" for field, value in data.items()]
    overrides += [f"--config.train.{field}=1" for field in ("generations", "epochs_per_generation")]
    overrides += ["--config.train.batch_size=2"]
    settings = configs.load(f"{ROOT}/configs/digits.py:normal", overrides)
    dataset = experiment.load_data(settings.data)
    assert loop.train(settings, tmp_path / "run", dataset, devices=1).finished
    (entry,) = manifest.read(tmp_path / "run")
    assert entry["data"]["checksum"] == shards.fingerprint(tmp_path / name / "1.0.0")


def test_the_order_depends_on_names_alone(tmp_path):
    found = []
    for number in range(2):
        root, data_dir = tmp_path / f"original{number}", tmp_path / f"data{number}"
        root.mkdir()
        chestx(root)
        if number:  # all images in one folder, as other copies have them
            for path in sorted(root.glob("images_*/images/*.png")):
                (root / "images").mkdir(exist_ok=True)
                path.rename(root / "images" / path.name)
        prepare("chestx", data_dir=data_dir, manual_dir=root)
        found.append(load_labelled("chestx", data_dir=data_dir)[0])
    np.testing.assert_array_equal(found[0].images, found[1].images)
    np.testing.assert_array_equal(found[0].labels, found[1].labels)


def test_other_formats_are_stored_losslessly(tmp_path):
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    for suffix, image in {
        "bmp": Image.fromarray(pixels),
        "tif": Image.fromarray(pixels),
        "ppm": Image.fromarray(pixels),
        "gif": Image.fromarray(pixels[..., 0]),
    }.items():
        path = tmp_path / f"image.{suffix}"
        image.save(path)
        again = Image.open(io.BytesIO(encoded(path)))
        assert again.format == "PNG"
        expected = pixels if suffix != "gif" else np.repeat(pixels[..., :1], 3, axis=-1)
        np.testing.assert_array_equal(np.asarray(again.convert("RGB")), expected)
    deep = tmp_path / "deep.tif"
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(deep)
    again = Image.open(io.BytesIO(encoded(deep)))
    assert set(np.asarray(again).ravel()) == {40_000 // 256}
    Image.fromarray(np.zeros((8, 8), np.float32)).save(deep)
    with pytest.raises(UsageError, match=r"deep.tif is not a readable image .*floats.* 8 or 16"):
        encoded(deep)


def edit(pattern, old, new):
    """Return a damage that replaces text in the one file of this pattern."""

    def damage(root):
        (path,) = root.glob(pattern)
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return damage


def remove(pattern):
    def damage(root):
        for path in list(root.glob(pattern)):
            path.unlink()

    return damage


def empty_class(root):
    remove("Forest/*")(root)
    (root / "Forest" / "Thumbs.db").write_text("")


def wrapped(root):
    for path in list(root.iterdir()):
        (root / "2750").mkdir(exist_ok=True)
        path.rename(root / "2750" / path.name)


def cut(root):
    path = root / "Forest" / "Forest_1.jpg"
    path.write_bytes(path.read_bytes()[:300])


BAD = [
    ("image_folder/eurosat", shutil.rmtree, "original is not a folder: give that"),
    ("image_folder/eurosat", empty_class, "Forest has no image: restore it, or remove"),
    ("image_folder/eurosat", lambda root: shutil.rmtree(root / "Forest"), r"holds 1 class\(es\)"),
    (
        "image_folder/eurosat",
        wrapped,
        "2750 holds folders, no image: give as manual_dir the folder",
    ),
    (
        "image_folder/eurosat",
        lambda root: (root / "Forest/a").mkdir(),
        "holds a/ beside its images",
    ),
    ("image_folder/eurosat", cut, r"Forest_1.jpg is not a readable image \(.*\): restore"),
    (
        "image_folder/crops",
        lambda root: shutil.rmtree(root / "train" / "Rust"),
        "no training image of class 'Rust'",
    ),
    (
        "image_folder/crops",
        lambda root: shutil.copytree(root / "test", root / "Testing"),
        "has two folders of the test split: keep one",
    ),
    ("isic2018", remove("*/*.csv"), "lacks ISIC2018_Task3_Training_GroundTruth.csv: give"),
    ("isic2018", edit("*/*.csv", "BKL", "BKX"), "lacks the column 'BKL' .it has image, MEL"),
    ("isic2018", edit("*/*.csv", "1.0", "0.0"), "ISIC_0000000 has 0.0, 0.0, .*not a single one"),
    ("isic2018", edit("*/*.csv", "0.0", "1.0"), "ISIC_0000000 has 1.0, 1.0, .*not a single one"),
    ("isic2018", edit("*/*.csv", "0.0", "x"), "ISIC_0000000 has 1.0, x, .*not a single one"),
    ("isic2018", edit("*/*.csv", "0.0", ""), "'NV' is empty in row 1 below the header .'ISIC_"),
    ("isic2018", edit("*/*.csv", "0000007", "0000001"), "lists NV/ISIC_0000001.jpg twice"),
    ("isic2018", remove("*/*_0000003.jpg"), "lacks the image ISIC_0000003.jpg, which ISIC2018_T"),
    ("chestx", edit("*.csv", "Finding Labels", "Findings"), "lacks the column 'Finding Labels'"),
    (
        "chestx",
        edit("*.csv", "Cardiomegaly", "Hernia"),
        "no training image of class 'Cardiomegaly'",
    ),
    ("chestx", remove("*/*/00000004_000.png"), "lacks the image 00000004_000.png, which Data_E"),
    (
        "chestx",
        lambda root: shutil.copytree(root / "images_0", root / "small"),
        "00000000_000.png is stored in .*images_0/images and .*small/images: keep one",
    ),
    ("fgvc_aircraft", remove("data/*_val.txt"), "lacks images_variant_val.txt: give the folder"),
    ("fgvc_aircraft", edit("data/*_test.txt", " DC-9-30", ""), "'1007' names no variant"),
    (
        "fgvc_aircraft",
        remove("data/images/1005.jpg"),
        "1005.jpg is missing, which images_variant_v",
    ),
    (
        "fgvc_aircraft",
        edit("data/*_test.txt", "DC-9-30", "A380"),
        "no training image of class 'A380'",
    ),
    (
        "caltech256",
        lambda root: (root / "256_ObjectCategories/ak47").mkdir(),
        "ak47 is no folder of a class, such as 001.ak47: give the folder",
    ),
    ("caltech256", remove("*/001.ak47/*"), "001.ak47 has no image: restore it"),
    (
        "caltech256",
        lambda root: shutil.rmtree(root / "256_ObjectCategories"),
        "no folder of a class",
    ),
    (
        "crop_disease",
        lambda root: shutil.rmtree(root / "dataset/test"),
        "no folders train and test",
    ),
    ("crop_disease", remove("dataset/train/Rust/*"), "train/Rust has no image: restore it"),
    (
        "tiny_imagenet_c",
        lambda root: shutil.rmtree(root / "Tiny-ImageNet-C"),
        "no folders CORRUPTION",
    ),
    (
        "tiny_imagenet_c",
        lambda root: (root / "Tiny-ImageNet-C/fog/1").rename(root / "Tiny-ImageNet-C/fog/6"),
        "fog/6 is no severity, 1 to 5: give the folder",
    ),
    (
        "tiny_imagenet_c",
        lambda root: shutil.rmtree(root / "Tiny-ImageNet-C/fog/5/n02"),
        "fog_5 has no image of class 'n02': restore it",
    ),
    ("mit_indoor67", remove("TestImages.txt"), "lacks TestImages.txt: give the folder"),
    (
        "mit_indoor67",
        edit("TrainImages.txt", "/", "_"),
        "'kitchen_train0.jpg' is not <class>/<file>",
    ),
    ("mit_indoor67", remove("Images/kitchen/test1.jpg"), "test1.jpg is missing, which TestImages"),
    ("mit_indoor67", lambda root: (root / "TestImages.txt").write_text("\n"), "has no line"),
]


@pytest.mark.parametrize(("name", "damage", "message"), BAD)
def test_unusable_folder(tmp_path, name, damage, message):
    root = tmp_path / "original"
    root.mkdir()
    LAYOUTS[name][0](root)
    damage(root)
    with pytest.raises(UsageError, match=message) as caught:
        prepare(name, data_dir=tmp_path / "data", manual_dir=root)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("data/*"))  # nothing half-done is left
    assert not list(tmp_path.glob("data/.*"))


def test_the_folder_above_will_do(tmp_path):
    root = tmp_path / "original"
    root.mkdir()
    splits = LAYOUTS["mit_indoor67"][0](root)
    listing = tfds.builder_cls("mit_indoor67").scan(tmp_path)
    assert listing.counts == {split: len(listed) for split, listed in splits.items()}


@pytest.mark.parametrize(
    "name", ["image_folder", "image_folder/", "image_folder/a/b", "image_folder/1"]
)
def test_an_image_folder_needs_a_name(tmp_path, name):
    with pytest.raises(UsageError, match="must be image_folder/NAME with a NAME of your choice"):
        prepare(name, data_dir=tmp_path, manual_dir=tmp_path)


def test_missing_data_names_the_command(tmp_path):
    message = (
        f"image_folder/eurosat needs the folder with one subfolder a class, .*run `python -m seal_jax "
        f"prepare --dataset=image_folder/eurosat --manual-dir=FOLDER --data-dir={tmp_path}`"
    )
    with pytest.raises(UsageError, match=message):
        prepare("image_folder/eurosat", data_dir=tmp_path)
    with pytest.raises(UsageError, match=r"image_folder/eurosat is not prepared in .*=FOLDER"):
        load("image_folder/eurosat", data_dir=tmp_path)
    with pytest.raises(UsageError, match="nearest: isic2018"):
        load("isic2019", data_dir=tmp_path)


def test_other_data_is_not_taken_for_the_same(tmp_path):
    root, name = tmp_path / "original", "image_folder/mine"
    root.mkdir()
    eurosat(root)
    prepare(name, data_dir=tmp_path / "data", manual_dir=root)
    picture(root / "Forest" / "more.png")
    with pytest.raises(UsageError, match=r"other images .*'train': 7.*, not .*'train': 8"):
        prepare(name, data_dir=tmp_path / "data", manual_dir=root)
    os.rename(root / "Forest", root / "River")
    with pytest.raises(UsageError, match="holds other classes than manual_dir"):
        prepare(name, data_dir=tmp_path / "data", manual_dir=root)
    prepare("image_folder/other", data_dir=tmp_path / "data", manual_dir=root)
    assert load_labelled("image_folder/other", data_dir=tmp_path / "data")[1][1] == "River"


@pytest.mark.skipif(not SAMPLE.exists(), reason="needs the real sample")
def test_real_sample(tmp_path):
    prepare("image_folder/eurosat", data_dir=tmp_path, manual_dir=SAMPLE)
    split, classes = load_labelled("image_folder/eurosat", data_dir=tmp_path)
    assert split.images.shape == (1500, 64, 64, 3)
    assert list(classes) == sorted(os.listdir(SAMPLE))
    np.testing.assert_array_equal(np.bincount(split.labels), np.full(10, 150))
    for label in (2, 7):
        path = sorted((SAMPLE / classes[label]).iterdir())[0]
        same = (split.images == np.asarray(Image.open(path))).all(axis=(1, 2, 3))
        assert split.labels[same].tolist() == [label]
    dataset = load(
        "image_folder/eurosat",
        data_dir=tmp_path,
        train_split="train[:80%]",
        test_split="train[80%:]",
        image_size=36,
        crop=32,
        channels=1,
    )
    assert dataset.image_shape == (32, 32, 1)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (1080, 120, 300)
