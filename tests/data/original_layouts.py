"""Tiny data sets in their original layouts; each returns ``{split: {file: class}}`` of what counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SKIN = ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]
LUNGS = [
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumothorax",
]


def picture(path: Path, mode: str = "RGB", side: int = 8) -> Path:
    """Write pixels that tell from which file they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (side, side, 3) if mode == "RGB" else (side, side)
    seed = sum(ord(letter) * place for place, letter in enumerate(str(path.name), 1))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def eurosat(root):
    for label in ("Forest", "AnnualCrop"):
        for index in range(3):
            picture(root / label / f"{label}_{index}.jpg")
    picture(root / "Forest" / "Forest_9.PNG", mode="L")
    (root / "Forest" / "Thumbs.db").write_text("no image")
    (root / "Forest" / "._Forest_0.jpg").write_text("no image")
    (root / ".cache").mkdir()
    return {"train": {path: path.parent.name for path in root.glob("[AF]*/[AF]*")}}


def crops(root):
    for split in ("train", "test"):
        for label in ("Rust", "Apple scab"):
            for index in range(2 if split == "train" else 1):
                picture(root / split / label / f"{split}{label}{index}.jpg")
    return {
        split: {path: path.parent.name for path in root.glob(f"{split}/*/*")}
        for split in ("train", "test")
    }


def isic2018(root):
    rows = [",".join(["image", *SKIN])]
    listed = {}
    for index, label in enumerate([*SKIN, "NV"]):
        path = picture(root / "ISIC2018_Task3_Training_Input" / f"ISIC_{index:07}.jpg")
        rows.append(",".join([path.stem, *("1.0" if each == label else "0.0" for each in SKIN)]))
        listed[path] = label
    picture(root / "ISIC2018_Task3_Training_Input" / "ISIC_9999999.jpg")  # is not in the table
    table = root / "ISIC2018_Task3_Training_GroundTruth" / "ISIC2018_Task3_Training_GroundTruth.csv"
    table.parent.mkdir()
    table.write_text("\n".join(rows) + "\n")
    return {"train": listed}


def chestx(root):
    rows = ["Image Index,Finding Labels,Follow-up #,OriginalImage[Width,Height],"]
    listed = {}
    others = ["No Finding", "Hernia", "Mass|Nodule", "Effusion|Hernia"]
    for index, findings in enumerate([*LUNGS, *others, "Mass"]):
        path = picture(root / f"images_{index % 2}" / "images" / f"{index:08}_000.png", mode="L")
        rows.append(f"{path.name},{findings},0,8,8,")
        if findings in LUNGS:
            listed[path] = findings
    (root / "Data_Entry_2017.csv").write_text("\n".join(rows) + "\n")
    assert len(listed) == 8
    return {"train": listed}


def fgvc_aircraft(root):
    splits = {}
    number = 1000
    for split, part in {"train": "train", "validation": "val", "test": "test"}.items():
        lines, splits[split] = [], {}
        for variant in ("DC-9-30", "Cessna 560", "737-200"):
            number += 1
            path = picture(root / "data" / "images" / f"{number}.jpg")
            lines.append(f"{number} {variant}")
            splits[split][path] = variant
        (root / "data" / f"images_variant_{part}.txt").write_text("\n".join(lines) + "\n")
    return splits


def mit_indoor67(root):
    splits = {}
    for split, name in {"train": "TrainImages.txt", "test": "TestImages.txt"}.items():
        listed = {
            picture(root / "Images" / label / f"{split}{index}.jpg"): label
            for label in ("kitchen", "airport_inside")
            for index in range(2)
        }
        names = [path.relative_to(root / "Images").as_posix() for path in listed]
        (root / name).write_text("\n".join(names))
        splits[split] = listed
    picture(root / "Images" / "kitchen" / "in_no_list.jpg")
    return splits


def crop_disease(root):
    return crops(root / "dataset")


def caltech256(root):
    objects = root / "256_ObjectCategories"
    listed = {
        picture(objects / label / f"{label[:3]}_{index:04}.jpg"): label
        for label in ("001.ak47", "002.american-flag")
        for index in range(1, 6)
    }
    # As in the original: files that are no images, a folder beside images, and the clutter.
    (objects / "001.ak47" / "RENAME2").write_text("no image")
    picture(objects / "002.american-flag" / "greg" / "002_0001.jpg")
    picture(objects / "257.clutter" / "257_0001.jpg")
    tested = ("001_0003.jpg", "002_0005.jpg")  # a fifth of each class, the same for ever
    return {
        "train": {path: label for path, label in listed.items() if path.name not in tested},
        "test": {path: label for path, label in listed.items() if path.name in tested},
    }


def tiny_imagenet_c(root):
    splits = {}
    for corruption in ("fog", "jpeg_compression"):
        for severity in (1, 5):
            folder = root / "Tiny-ImageNet-C" / corruption / str(severity)
            splits[f"{corruption}_{severity}"] = {
                picture(folder / wnid / f"val_{severity}{index}.JPEG", side=64): wnid
                for wnid in ("n01", "n02")
                for index in range(2)
            }
    return splits


LAYOUTS = {
    "image_folder/eurosat": (eurosat, ["AnnualCrop", "Forest"]),
    "image_folder/crops": (crops, ["Apple scab", "Rust"]),
    "crop_disease": (crop_disease, ["Apple scab", "Rust"]),
    "caltech256": (caltech256, ["001.ak47", "002.american-flag"]),
    "tiny_imagenet_c": (tiny_imagenet_c, ["n01", "n02"]),
    "isic2018": (isic2018, SKIN),
    "chestx": (chestx, LUNGS),
    "fgvc_aircraft": (fgvc_aircraft, ["737-200", "Cessna 560", "DC-9-30"]),
    "mit_indoor67": (mit_indoor67, ["airport_inside", "kitchen"]),
}
