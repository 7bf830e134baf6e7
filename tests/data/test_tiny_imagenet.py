from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seal_jax.data import load, prepare
from seal_jax.data.preparation import find_builder
from seal_jax.errors import UsageError

SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "tiny-imagenet-sample"
WNIDS = ["n02", "n01"]  # label order is the file's, not the alphabet's


def save(path: Path, seed: int, mode: str = "RGB", size: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size, size, 3) if mode == "RGB" else (size, size)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="JPEG")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "tiny"
    for number, wnid in enumerate(WNIDS):
        for index in (2, 0, 1):
            mode = "L" if (wnid, index) == ("n01", 1) else "RGB"
            save(
                root / "train" / wnid / "images" / f"{wnid}_{index}.JPEG", 10 * number + index, mode
            )
    lines = []
    for index, wnid in enumerate(["n01", "n02", "n01"]):
        save(root / "val" / "images" / f"val_{index}.JPEG", 100 + index)
        lines.append(f"val_{index}.JPEG\t{wnid}\t0\t0\t62\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "words.txt").write_text("n01\ttench, Tinca tinca\nn02\tgoldfish\nn03\tshark\n")
    return root


def as_pairs(split):
    return sorted((image.tobytes(), int(label)) for image, label in zip(*split, strict=True))


def from_files(files):
    return sorted(
        (np.asarray(Image.open(path).convert("RGB")).tobytes(), WNIDS.index(wnid))
        for path, wnid in files
    )


def test_folder_is_read_as_it_is(folder, tmp_path):
    prepared = prepare("tiny_imagenet", data_dir=tmp_path / "data", manual_dir=folder)
    assert Path(prepared) == tmp_path / "data" / "tiny_imagenet" / "1.0.0"
    dataset = load("tiny_imagenet", data_dir=tmp_path / "data", validation_fraction=0)
    assert dataset.class_names == ("n02", "n01")
    assert dataset.image_shape == (64, 64, 3)  # also the grayscale image
    train = [(path, path.parts[-3]) for path in folder.glob("train/*/images/*.JPEG")]
    assert len(train) == 6
    assert as_pairs((dataset.train.images, dataset.train.labels)) == from_files(train)
    val = [
        (folder / "val" / "images" / f"val_{i}.JPEG", w)
        for i, w in enumerate(["n01", "n02", "n01"])
    ]
    assert as_pairs((dataset.test.images, dataset.test.labels)) == from_files(val)
    info = find_builder("tiny_imagenet", tmp_path / "data").info
    assert info.metadata["words"] == {"n01": "tench, Tinca tinca", "n02": "goldfish"}
    assert list(info.splits) == ["train", "validation"]


def test_order_is_the_same_from_a_copy_made_in_another_order(folder, tmp_path):
    copy = tmp_path / "copy"
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            target = copy / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    (copy / "words.txt").unlink()  # optional
    loaded = []
    for number, source in enumerate((folder, copy)):
        data_dir = tmp_path / f"data{number}"
        prepare("tiny_imagenet", data_dir=data_dir, manual_dir=source)
        loaded.append(load("tiny_imagenet", data_dir=data_dir, validation_fraction=0).train)
    np.testing.assert_array_equal(loaded[0].images, loaded[1].images)
    np.testing.assert_array_equal(loaded[0].labels, loaded[1].labels)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "wnids.txt").unlink(), "lacks wnids.txt"),
        (lambda root: (root / "wnids.txt").write_text("n01\nn01\n"), "each WordNet id once"),
        (lambda root: shutil.rmtree(root / "train" / "n01"), "train/n01/images has no .JPEG"),
        (
            lambda root: [p.unlink() for p in (root / "train/n01/images").iterdir()],
            "train/n01/images has no .JPEG",
        ),
        (lambda root: (root / "val" / "val_annotations.txt").unlink(), "val/val_annotations.txt"),
        (lambda root: (root / "val/val_annotations.txt").write_text("\n"), "lists no image"),
        (lambda root: (root / "val" / "images" / "val_1.JPEG").unlink(), "val/images/val_1.JPEG"),
        (lambda root: (root / "wnids.txt").write_text("n01\n"), "val_1.JPEG has class 'n02'"),
        (lambda root: _truncate(root / "train/n01/images/n01_0.JPEG"), "n01_0.JPEG is not a read"),
        (lambda root: save(root / "val/images/val_0.JPEG", 0, size=32), "is 32x32, not 64x64"),
        (shutil.rmtree, "is not a folder"),
    ],
)
def test_unusable_folder(folder, tmp_path, damage, message):
    damage(folder)
    with pytest.raises(UsageError, match=message) as caught:
        prepare("tiny_imagenet", data_dir=tmp_path / "data", manual_dir=folder)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("data/*"))  # nothing half-done is left
    assert not list(tmp_path.glob("data/.*"))


def test_missing_data_names_the_command(tmp_path):
    command = (
        r"`python -m seal_jax prepare --dataset=tiny_imagenet --manual-dir=FOLDER --data-dir="
        f"{tmp_path}`"
    )
    with pytest.raises(UsageError, match=command):
        load("tiny_imagenet", data_dir=tmp_path)
    with pytest.raises(UsageError, match=command):
        prepare("tiny_imagenet", data_dir=tmp_path)


def test_other_classes_are_not_taken_for_the_same(folder, tmp_path):
    prepare("tiny_imagenet", data_dir=tmp_path / "data", manual_dir=folder)
    prepare("tiny_imagenet", data_dir=tmp_path / "data", manual_dir=folder)  # the same: no error
    (folder / "wnids.txt").write_text("n01\nn02\n")
    with pytest.raises(UsageError, match="holds other classes than manual_dir"):
        prepare("tiny_imagenet", data_dir=tmp_path / "data", manual_dir=folder)


@pytest.mark.skipif(not SAMPLE.exists(), reason="needs the real sample")
def test_real_sample(tmp_path):
    prepare("tiny_imagenet", data_dir=tmp_path, manual_dir=SAMPLE)
    dataset = load("tiny_imagenet", data_dir=tmp_path, validation_fraction=0.1)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (1800, 200, 500)
    assert list(dataset.class_names) == (SAMPLE / "wnids.txt").read_text().split()
    np.testing.assert_array_equal(np.bincount(dataset.test.labels), np.full(10, 50))
    wnid = dataset.class_names[3]
    path = sorted((SAMPLE / "train" / wnid / "images").iterdir())[0]
    pixels = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))
    whole = np.concatenate([dataset.train.images, dataset.validation.images])
    labels = np.concatenate([dataset.train.labels, dataset.validation.labels])
    found = np.flatnonzero((whole == pixels).all(axis=(1, 2, 3)))
    assert labels[found].tolist() == [3]
