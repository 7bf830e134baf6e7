"""The table of the papers' data sets, and what it says is prepared."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from seal_jax.cli import main
from seal_jax.data import catalogue, prepare
from seal_jax.data.catalogue import DATA_SETS, builder_record

ROOT = Path(__file__).parents[2]
# The words of SEAL Table 3: classes, train, valid, test.
SEAL_TABLE_3 = {
    "Flower": "102 1,020 1,020 6,149",
    "CUB": "200 5,994 - 5,794",
    "Aircraft": "100 3,334 3,333 3,333",
    "MIT": "67 5,360 - 1,340",
    "Dogs": "120 12,000 - 8,580",
}
LW_TABLE_5 = {
    "Oxford-IIIT": "37 3,680 - 3,669",
    "Dogs": "120 12,000 - 8,580",
    "Fashion-MNIST": "10 60,000 - 10,000",
    "Cars196": "196 8,144 - 8,041",
    "MNIST-Cor": "10 60,000 - 10,000",
    "CIFAR10-Cor": "10 50,000 - 10,000",
    "CIFAR-10": "10 50,000 - 10,000",
    "Caltech101": "101 3,060 - 6,084",
    "Cassava": "4 5,656 - 1,885",
    "CMATERdb": "10 5,000 - 1,000",
    "Birds2010": "200 3,000 - 3,033",
    "CIFAR-100": "100 50,000 - 10,000",
}


@pytest.fixture
def table(capfd):
    """Run the command; return its rows by data set, and all it printed."""

    def run(*arguments):
        assert main.run(["datasets", *arguments]) == main.OK
        captured = capfd.readouterr()
        assert captured.err == ""
        lines = captured.out.splitlines()
        rows = [re.split(r"\s{2,}", line.strip()) for line in lines[2 : lines.index("")]]
        return {row[0]: row for row in rows}, captured.out

    return run


def sample(root):
    for label in ("a", "b"):
        for index in range(2):
            path = root / label / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), index, np.uint8)).save(path)
    return root


def test_the_rows_are_the_papers(table, tmp_path):
    rows, _ = table(f"--data-dir={tmp_path}")
    assert list(rows) == [each.paper for each in DATA_SETS]
    for source, expected in (("SEAL Table 3", SEAL_TABLE_3), ("LW Table 5", LW_TABLE_5)):
        assert {name for name, row in rows.items() if source in row[5]} == set(expected)
        for name, words in expected.items():
            assert rows[name][1:5] == words.split()
    assert {name for name, row in rows.items() if "few-shot" in row[5]} == {
        "ChestX",
        "ISIC",
        "EuroSAT",
        "CropDisease",
    }
    in_pof = {name for name, row in rows.items() if "PoF" in row[5]}
    assert in_pof == {"CIFAR-10", "CIFAR-100", "SVHN", "Fashion-MNIST"}
    in_fast = {name for name, row in rows.items() if "FAST" in row[5]}
    assert in_fast == {"CIFAR-100", "MNIST", "Caltech-256", "ILSVRC-12"}


def test_every_name_can_be_prepared(table, tmp_path):
    known = set(tfds.list_builders(with_community_datasets=False))
    assert all(each.download for each in DATA_SETS if each.manual_dir)
    for name in (name for each in DATA_SETS for name in each.names):
        assert builder_record(name) or name in known
    _, text = table(f"--data-dir={tmp_path}")
    for each in DATA_SETS:
        name = each.names[0]
        folder = " --manual-dir=FOLDER" if each.manual_dir else ""
        command = f"python -m seal_jax prepare --dataset={name}{folder} --data-dir={tmp_path}\n"
        assert f"  {command}" in f"{text}\n"


def test_what_is_prepared(table, tmp_path, monkeypatch, capfd):
    prepare("image_folder/eurosat", data_dir=tmp_path, manual_dir=sample(tmp_path / "original"))
    capfd.readouterr()
    rows, text = table(f"--data-dir={tmp_path}")
    assert rows["EuroSAT"][-2:] == ["image_folder/eurosat", "train 4; 2 classes"]
    assert "prepare --dataset=image_folder/eurosat" not in text
    assert all(row[-1] == "no" for name, row in rows.items() if name != "EuroSAT")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert table() == (rows, text)

    # Another way to have it, with a configuration between name and version; the newest counts.
    shutil.move(tmp_path / "image_folder" / "eurosat", tmp_path / "eurosat" / "rgb")
    shutil.copytree(tmp_path / "eurosat/rgb/1.0.0", tmp_path / "eurosat/rgb/10.0.0")
    info = tmp_path / "eurosat/rgb/10.0.0/dataset_info.json"
    record = json.loads(info.read_text())
    record["splits"][0]["shardLengths"] = ["13000", "14000"]
    info.write_text(json.dumps(record))
    assert table()[0]["EuroSAT"][-2:] == ["eurosat", "train 27,000; 2 classes"]
    record["fileFormat"] = "tfrecord"
    info.write_text(json.dumps(record))
    rows, text = table()
    assert rows["EuroSAT"][-1].endswith("; as tfrecord, which needs TensorFlow")
    assert "prepare --dataset=image_folder/eurosat" in text
    info.write_text("{")
    assert table()[0]["EuroSAT"][-1] == "train 4; 2 classes"
    (tmp_path / "eurosat/rgb/1.0.0/features.json").unlink()
    assert catalogue.prepared("eurosat", tmp_path) is None


def test_what_is_loaded():
    """Neither TFDS, which takes seconds, nor anything else of the trainer."""
    heavy = "{'tensorflow', 'tensorflow_datasets', 'PIL', 'matplotlib', 'flax', 'ml_collections'}"
    script = (
        "import sys\nfrom seal_jax.cli import main\nassert main.run(['datasets']) == 0\n"
        f"assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"TFDS_DATA_DIR": "nowhere"},
    )
