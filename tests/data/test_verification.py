"""`prepare --verify`: data that is as it was prepared passes, and every kind of damage is one line."""

from __future__ import annotations

import io
import json
import re
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from original_layouts import caltech256, picture
from PIL import Image

from seal_jax.cli import main
from seal_jax.data import prepare, shards
from seal_jax.data.verification import verify
from seal_jax.errors import UsageError

TRAIN = "digits-train.array_record-00000-of-00001"


class Misfiled(tfds.core.GeneratorBasedBuilder):
    """Two classes have no training image, and one image is cut short."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=5),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index, label in enumerate((0, 3, 3, 1)):
            png = io.BytesIO()
            Image.fromarray(np.full((8, 8), 9 * index, np.uint8)).save(png, format="PNG")
            stop = 50 if index == 2 else None
            yield index, {"image": io.BytesIO(png.getvalue()[:stop]), "label": label}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    prepare("digits", data_dir=folder)
    return folder


@pytest.fixture
def digits(prepared, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(prepared / "digits", tmp_path / "digits")
    return tmp_path / "digits" / "1.0.0"


def command(folder, capfd, name="digits"):
    """Run the command; return its exit code, its lines of errors and its output."""
    code = main.run(["prepare", f"--dataset={name}", "--verify", f"--data-dir={folder}"])
    captured = capfd.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    return code, lines, captured.out


def test_what_is_right_passes(digits, capfd):
    code, lines, output = command(digits.parents[1], capfd)
    assert (code, lines) == (main.OK, [])
    assert f"{digits}: train 1,437, test 360 images decoded; 10 classes; checksums equal" in output
    (digits / shards.CHECKSUMS).unlink()  # prepared by TFDS's own command
    code, lines, output = command(digits.parents[1], capfd)
    assert (code, lines) == (main.OK, [])
    assert "10 classes; checksums were not recorded; fingerprint " in output


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:40_000])


def fewer(path):
    path.write_text(path.read_text().replace('"1437"', '"1436"'))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            lambda folder: flip(folder / TRAIN, 60_000),
            [f"{TRAIN} has another sha256", f"records 256 to 511 of .*{TRAIN} cannot be read"],
        ),
        (
            lambda folder: cut(folder / TRAIN),
            [f"{TRAIN} has another sha256", f"{TRAIN} cannot be read .*64KB", "no image of 10 cl"],
        ),
        (
            lambda folder: (folder / TRAIN).unlink(),
            [f"{TRAIN} is missing", f"{TRAIN} cannot be read .*No such file", "no image of 10 cl"],
        ),
        (
            lambda folder: fewer(folder / "dataset_info.json"),
            ["dataset_info.json has another sha256", f"{TRAIN} holds 1,437 records, not 1,436"],
        ),
        (
            lambda folder: (folder / "label.labels.txt").write_text("0\n1\n"),
            [
                "label.labels.txt was not there when the data was prepared",
                r"record \d+ of .*its label is 7, and there are 2 classes",
                "^error: and 1,[0-9]{3} more$",
            ],
        ),
    ],
    ids=["flipped bit", "cut", "gone", "other count", "other classes"],
)
def test_damage(digits, capfd, damage, expected):
    damage(digits)
    code, lines, _ = command(digits.parents[1], capfd)
    assert code == main.USAGE
    problems = "\n".join(lines)
    for message in expected:
        assert re.search(message, problems, re.MULTILINE), message


def test_images_and_labels(tmp_path):
    prepare("misfiled", data_dir=tmp_path)
    found = verify("misfiled", data_dir=tmp_path)
    assert found.counts == {"train": 3}
    damaged, missing = found.problems
    assert re.search(r"record 2 of .*misfiled-train.*-00000-of-00001: .*truncated", damaged)
    assert missing.endswith("train has no image of 2 classes (2, 4)")


def test_a_part_is_not_the_whole(tmp_path):
    original = tmp_path / "original"
    original.mkdir()
    caltech256(original)
    prepare("caltech256", data_dir=tmp_path, manual_dir=original)
    assert verify("caltech256", data_dir=tmp_path).problems == [
        "caltech256 has 2 classes; the whole data set has 256",
        "caltech256 has 8 images in train; the whole data set has 23,824",
        "caltech256 has 2 images in test; the whole data set has 5,956",
    ]
    # One's own data has no other numbers to compare with.
    picture(original / "mine" / "a" / "0.png")
    picture(original / "mine" / "b" / "0.png")
    prepare("image_folder/mine", data_dir=tmp_path, manual_dir=original / "mine")
    assert verify("image_folder/mine", data_dir=tmp_path).problems == []


def test_what_is_missing_says_what_to_download(tmp_path, capfd):
    code, (line,), _ = command(tmp_path, capfd, "caltech256")
    assert code == main.USAGE
    assert "caltech256 is not prepared in" in line
    assert "run `python -m seal_jax prepare --dataset=caltech256 --manual-dir=FOLDER" in line
    assert "256_ObjectCategories folder (256_ObjectCategories.tar of https://data.caltech" in line
    arguments = ["prepare", "--dataset=digits", "--verify", "--manual-dir=x"]
    assert main.run(arguments) == main.USAGE
    assert "leave --manual-dir out" in capfd.readouterr().err


def test_fingerprint(digits):
    first = shards.fingerprint(digits)
    assert shards.fingerprint(shutil.copytree(digits, digits.parents[2] / "copy")) == first
    checksums = json.loads((digits / shards.CHECKSUMS).read_text())["sha256"]
    assert set(checksums) == {path.name for path in digits.iterdir()} - {shards.CHECKSUMS}
    fingerprints = {first}
    for name in (TRAIN, "dataset_info.json", shards.CHECKSUMS):
        with (digits / name).open("a") as file:
            file.write(" ")
        fingerprints.add(shards.fingerprint(digits))
    assert len(fingerprints) == 4
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        shards.fingerprint(digits / "nowhere")
