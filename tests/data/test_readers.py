"""Folders of images and of Hugging Face data sets, read where they are; labels; what goes wrong."""

import io

import numpy as np
import pytest
from PIL import Image

from seal_jax.data import load, readers
from seal_jax.data.readers import open_data
from seal_jax.errors import UsageError


def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


CLASSES = ("cat", "dog", "eel")
# By split and class, the grey values of its images.
VALUES = {
    "train": {"cat": [1, 2, 3], "dog": [11, 12], "eel": [21, 22, 23]},
    "test": {"cat": [4], "dog": [14], "eel": [24]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split, classes in VALUES.items():
        for name, values in classes.items():
            (root / split / name).mkdir(parents=True)
            for value in values:
                (root / split / name / f"{value}.png").write_bytes(png(value))
    return root


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine": datasets.ClassLabel(names=list(CLASSES)),
            "parity": datasets.ClassLabel(names=["even", "odd"]),
        }
    )
    splits = {}
    for split, classes in VALUES.items():
        pairs = [(v, CLASSES.index(name)) for name, values in classes.items() for v in values]
        splits[split] = datasets.Dataset.from_dict(
            {
                "img": [{"bytes": png(v), "path": None} for v, _ in pairs],
                "fine": [label for _, label in pairs],
                "parity": [v % 2 for v, _ in pairs],
            },
            features=features,
        )
    root = tmp_path_factory.mktemp("hf") / "pets"
    datasets.DatasetDict(splits).save_to_disk(root)
    return root


@pytest.mark.parametrize("placement", ["device", "stream"])
@pytest.mark.parametrize("kind", ["folder", "hf"])
def test_data_is_read_where_it_is(kind, placement, request):
    root = request.getfixturevalue("folder" if kind == "folder" else "hugging_face")
    label = "fine" if kind == "hf" else None
    options = {"data_dir": root, "label": label, "validation_fraction": 0, "placement": placement}
    dataset = load(f"{kind}/pets", **options)
    assert dataset.class_names == CLASSES
    assert dataset.train.streamed == (placement == "stream")
    for split, expected in ((dataset.train, VALUES["train"]), (dataset.test, VALUES["test"])):
        assert split.images.shape[1:] == (4, 5, 3)
        pairs = [(v, CLASSES.index(name)) for name, values in expected.items() for v in values]
        assert sorted(zip(split.images[:][:, 0, 0, 0], split.labels, strict=True)) == sorted(pairs)
    # Parts are of one order. Of a folder it mixes the classes, which a listing has one after the other.
    part = load(f"{kind}/pets", train_split="train[:25%]+train[-1:]", **options).train
    np.testing.assert_array_equal(part.images[:], dataset.train.images[[0, 1, 7]])
    np.testing.assert_array_equal(part.labels, dataset.train.labels[[0, 1, 7]])
    in_order = dataset.train.labels.tolist() == sorted(dataset.train.labels)
    assert in_order == (kind == "hf")


def test_auto_streams_what_does_not_fit(folder):
    options = {"data_dir": folder, "validation_fraction": 0, "placement": "auto"}
    needed = (8 + 3) * 4 * 5 * 3
    assert not load("folder/pets", room=needed, **options).train.streamed
    assert load("folder/pets", room=needed - 1, **options).train.streamed


def test_labels_of_prepared_data_are_kept(tmp_path, monkeypatch, digits_dir):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = load("digits", data_dir=digits_dir)

    def streamed():
        dataset = load("digits", data_dir=digits_dir, placement="stream")
        for split in ("train", "validation", "test"):
            ours, theirs = getattr(dataset, split), getattr(expected, split)
            np.testing.assert_array_equal(ours.labels, theirs.labels)
        return dataset

    dataset = streamed()
    np.testing.assert_array_equal(dataset.train.images[::50], expected.train.images[::50])
    kept = sorted((tmp_path / "seal_jax" / "labels").iterdir())
    assert len(kept) == 2  # train and test
    numbers = []
    read = readers._Prepared.read
    monkeypatch.setattr(
        readers._Prepared, "read", lambda self, which: numbers.extend(which) or read(self, which)
    )
    streamed()
    assert len(numbers) == 2  # the first image of each part, which tells the size
    # What is damaged is made again.
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    streamed()
    assert len(numbers) > 300


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("folder/pets", {"data_dir": None}, "set data.data_dir to its folder"),
        ("hf/pets", {"data_dir": None}, "set data.data_dir to its folder"),
        ("folder/pets", {"label": "fine"}, "data.label='fine': folder/pets has one label"),
        (
            "folder/pets",
            {"train_split": "valid"},
            "train_split='valid': .*the splits are train, test",
        ),
        ("folder/pets", {"train_split": "train[5:2]"}, "has no example"),
        ("hf/pets", {}, "is no Hugging Face data set on disk .*save_to_disk"),
        ("folder/pets", {"placement": "disk"}, "data.placement"),
    ],
)
def test_bad_input(name, options, message, folder):
    if name.startswith("hf"):
        pytest.importorskip("datasets")
    with pytest.raises(UsageError, match=message) as caught:
        load(name, **{"data_dir": folder, **options})
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_decoded_is_named(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(4):
            (tmp_path / name / f"{number}.png").write_bytes(png(number))
    (tmp_path / "dog" / "2.png").write_bytes(b"no image")
    options = {"data_dir": tmp_path, "test_split": "train[:1]", "train_split": "train[1:]"}
    options["validation_fraction"] = 0
    with pytest.raises(UsageError, match=r"dog/2.png: .*data.corrupt"):
        load("folder/mine", **options)
    streamed = load("folder/mine", placement="stream", **options)
    with pytest.raises(UsageError, match=r"dog/2.png: .*data.corrupt"):
        streamed.train.images[np.arange(7)]
    with pytest.warns(UserWarning, match=r"1 of 7 images .*dog/2.png"):
        skipped = load("folder/mine", placement="stream", corrupt="skip", **options)
    rows = [
        row
        for row, number in enumerate(streamed.train.images.rows)
        if "dog/2" not in streamed.train.images.reader.where(number)
    ]
    np.testing.assert_array_equal(skipped.train.images[:], streamed.train.images[rows])
    assert len(rows) == 6


def test_test_splits(folder):
    opened = open_data("folder/pets", folder)
    assert (opened.test_split, opened.counts) == ("test", {"train": 8, "test": 3})
