"""Accuracy on other test sets: the classes are matched by name, whatever their order."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
from PIL import Image

from seal_jax import UsageError
from seal_jax.data import load_labelled, prepare
from seal_jax.evaluators import robustness

CORRUPTIONS = {"invert": (1, 2), "plain": (1,)}
CLASSES = np.array([3, 5, 7])  # labels 0, 1 and 2 of the test sets


@pytest.fixture(scope="module")
def corrupted(digits_dir, loaded_run, tmp_path_factory):
    """Test images of digits as a data set of corruptions, in a folder with digits."""
    root = tmp_path_factory.mktemp("corrupted")
    test = loaded_run.dataset.test
    names = loaded_run.dataset.class_names
    for corruption, severities in CORRUPTIONS.items():
        for severity in severities:
            for label in CLASSES:
                for row in np.flatnonzero(test.labels == label)[:10]:
                    pixels = test.images[row, ..., 0]
                    pixels = 255 - pixels if corruption == "invert" else pixels
                    path = root / corruption / str(severity) / names[label] / f"{row}.JPEG"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).resize((64, 64)).save(path, "JPEG")
    prepare("tiny_imagenet_c", data_dir=digits_dir, manual_dir=root)
    return "tiny_imagenet_c"


def test_accuracies(run, loaded_run, corrupted, digits_dir, evaluated):
    rows, output = evaluated("robustness", run, weights=("last",), datasets=(corrupted,))
    places = {(row["seed"], row["dataset"], row["split"]): row for row in rows}
    for network in loaded_run.networks[:2]:  # the last weights of both seeds
        assert network.weights == "last"
        of_network = {
            split: row for (seed, _, split), row in places.items() if seed == network.seed
        }
        assert [*of_network] == ["of the run", "invert", "plain", "mean"]
        found = {}
        for split in ("invert_1", "invert_2", "plain_1"):
            images, _ = load_labelled(
                corrupted, data_dir=digits_dir, split=split, image_size=8, channels=1
            )
            logits = loaded_run.logits(network, images.images)
            found[split] = (logits.argmax(-1) == CLASSES[images.labels]).mean()
        expected = {
            "invert": (found["invert_1"] + found["invert_2"]) / 2,
            "plain": found["plain_1"],
            "of the run": (
                loaded_run.logits(network, loaded_run.dataset.test.images).argmax(-1)
                == loaded_run.dataset.test.labels
            ).mean(),
        }
        expected["mean"] = (expected["invert"] + expected["plain"]) / 2
        for split, accuracy in expected.items():
            assert of_network[split]["accuracy"] == pytest.approx(accuracy)
        assert of_network["invert"]["splits"] == 2
        assert of_network["mean"]["images"] == 90
    table = robustness.table(rows).as_text()
    assert table.count("tiny_imagenet_c") == 3
    assert (output / "robustness.png").stat().st_size > 1000

    options = {"weights": ("last",), "datasets": (corrupted,), "splits": ("plain_1",)}
    rows, _ = evaluated("robustness", run, output=output / "part", **options)
    assert sorted(row["split"] for row in rows) == ["of the run"] * 2 + ["plain"] * 2


def test_classes_are_matched_by_name():
    own = ("tench", "goldfish", "shark")
    np.testing.assert_array_equal(robustness.class_labels("x", ("shark", "tench"), own), [2, 0])
    np.testing.assert_array_equal(robustness.class_labels("x", ("0", "1", "2"), own), [0, 1, 2])
    with pytest.raises(UsageError, match="--datasets=x has the class 'cat', which the run was not"):
        robustness.class_labels("x", ("tench", "cat"), own)


def test_splits_are_checked_before_any_work(loaded_run, corrupted):
    with pytest.raises(UsageError, match=r"--splits='fog_3': .*invert_1"):
        robustness.work_items(loaded_run, robustness.Options((corrupted,), ("fog_3",)))


def test_other_data_of_a_run_on_a_folder_is_where_all_is_prepared(loaded_run):
    of_folder = copy.copy(loaded_run)
    fields = dataclasses.replace(loaded_run.settings.data, name="folder/mine", data_dir="/mine")
    of_folder.settings = dataclasses.replace(loaded_run.settings, data=fields)
    assert of_folder.data_dir("folder/mine") == "/mine"
    assert of_folder.data_dir("digits") is None
    assert loaded_run.data_dir("cifar10") == loaded_run.settings.data.data_dir
