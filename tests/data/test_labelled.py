"""All labelled images as one split; channels and crop."""

from __future__ import annotations

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from seal_jax.data import load, load_labelled, prepare
from seal_jax.data.preparation import find_builder
from seal_jax.errors import UsageError

HEIGHT, WIDTH = 9, 6
COLOURS = np.random.default_rng(0).integers(0, 256, (5, HEIGHT, WIDTH, 3), dtype=np.uint8)


class PartlyLabelled(tfds.core.GeneratorBasedBuilder):
    """Colours; the images of one split have no label, which TFDS writes as -1."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(HEIGHT, WIDTH, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["a", "b"]),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples({0: 0, 1: 1}),
            "hidden": self._generate_examples({2: -1, 3: -1}),
            "extra": self._generate_examples({4: 1}),
        }

    def _generate_examples(self, labels):
        for index, label in labels.items():
            png = io.BytesIO()
            Image.fromarray(COLOURS[index]).save(png, format="PNG")
            png.seek(0)
            yield index, {"image": png, "label": label}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    for name in ("digits", "partly_labelled"):
        prepare(name, data_dir=folder)
    return folder


@pytest.fixture
def colours(data_dir):
    return lambda **options: load_labelled("partly_labelled", data_dir=data_dir, **options)[0]


def test_all_splits_in_a_row(data_dir):
    whole, names = load_labelled("digits", data_dir=data_dir)
    dataset = load("digits", data_dir=data_dir, validation_fraction=0)
    for field in ("images", "labels"):
        parts = [getattr(split, field) for split in (dataset.train, dataset.test)]
        np.testing.assert_array_equal(getattr(whole, field), np.concatenate(parts))
    assert names == dataset.class_names
    part, _ = load_labelled("digits", data_dir=data_dir, split="test[:7]")
    np.testing.assert_array_equal(part.images, dataset.test.images[:7])


def test_unlabelled_images_are_left_out(colours):
    assert colours().labels.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(colours().images, COLOURS[[0, 1, 4]])
    assert colours().labels.dtype == np.int32
    assert colours(images=False).labels.tolist() == [0, 1, 1]
    assert colours(images=False).images.shape == (3, 0, 0, 3)
    assert colours(split="train+extra").labels.tolist() == [0, 1, 1]
    for images in (True, False):
        with pytest.raises(UsageError, match="split='hidden' has unlabelled examples: choose"):
            colours(split="hidden", images=images)


def test_channels(colours, data_dir):
    grey = colours(channels=1).images
    luma = COLOURS[[0, 1, 4]] @ np.array([0.299, 0.587, 0.114])
    assert grey.shape == (3, HEIGHT, WIDTH, 1)
    np.testing.assert_allclose(grey[..., 0], luma, atol=0.51)
    np.testing.assert_array_equal(colours(channels=3).images, colours().images)
    one, three = (
        load("digits", data_dir=data_dir, channels=channels, test_split="test[:9]").test.images
        for channels in (None, 3)
    )
    assert one.shape == (9, 8, 8, 1)
    np.testing.assert_array_equal(three, np.repeat(one, 3, axis=-1))


def test_crop_is_in_the_middle(colours):
    images = COLOURS[[0, 1, 4]]
    np.testing.assert_array_equal(colours(crop=6).images, images[:, 2:8])  # half a pixel: even
    np.testing.assert_array_equal(colours(crop=5).images, images[:, 2:7, 0:5])
    np.testing.assert_array_equal(colours(crop=4).images, images[:, 2:6, 1:5])
    np.testing.assert_array_equal(colours(crop=1).images, images[:, 4:5, 2:3])


def test_few_shot_protocol(colours):
    """Bilinear to int(1.15 * 20) = 23, then the middle 20, against another implementation."""
    torch = pytest.importorskip("torch")
    images = colours(image_size=int(1.15 * 20), crop=20).images
    pixels = torch.from_numpy(COLOURS[[0, 1, 4]].astype(np.float32)).permute(0, 3, 1, 2)
    square = torch.nn.functional.interpolate(
        pixels, size=(23, 23), mode="bilinear", align_corners=False, antialias=True
    )
    expected = square.permute(0, 2, 3, 1).numpy()[:, 2:22, 2:22]  # 1.5 pixels: 2
    np.testing.assert_allclose(images, expected, atol=1.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 2}, "channels=2 must be 1 .grey. or 3"),
        ({"crop": 0}, "crop = 0 must be a whole number"),
        ({"crop": 2.5}, "crop = 2.5 must be a whole number"),
        ({"crop": 9, "image_size": 8}, "crop=9 is larger than data.image_size=8: lower it"),
        ({"crop": 9, "image_size": (12, 8)}, "crop=9 is larger than data.image_size="),
        ({"crop": 7}, r"crop=7 is larger than an image .9x6.: set data.image_size, or lower it"),
        ({"image_size": 0}, "data.image_size=0 must be"),
        ({"split": "tests"}, "split='tests': .*train, hidden, extra"),
        ({"label": "colour"}, "'colour' is not one of label"),
    ],
)
def test_unusable_arguments(colours, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        colours(progress=False, **options)
    assert "\n" not in str(caught.value)


def test_an_empty_data_dir_is_that_of_tfds():
    """And not the folder one happens to be in: "" is what settings say where nothing is given."""
    roots = {find_builder("digits", data_dir).data_dir_root for data_dir in ("", None)}
    assert len(roots) == 1
