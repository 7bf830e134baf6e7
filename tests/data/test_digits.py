from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from seal_jax.data import load, prepare
from seal_jax.data.preparation import _prepare_beside, find_builder
from seal_jax.errors import UsageError

# Runs where TensorFlow cannot be imported and nothing connected to.
SCRIPT = """
import socket, sys, warnings
warnings.simplefilter("error")
def without_tensorflow(find_spec):
    return lambda name, *rest: (
        None if name.partition(".")[0] == "tensorflow" else find_spec(name, *rest))
for finder in sys.meta_path:
    finder.find_spec = without_tensorflow(finder.find_spec)
def refuse(*args, **kwargs):
    raise AssertionError("network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import numpy as np
import seal_jax.data
assert "tensorflow_datasets" not in sys.modules and "sklearn" not in sys.modules
try:
    import tensorflow
except ImportError:
    pass
else:
    raise AssertionError("TensorFlow")
dataset = seal_jax.data.load("digits", data_dir=sys.argv[2] or None, validation_fraction=0.1)
np.savez(sys.argv[1], **{f"{part}_{field}": getattr(getattr(dataset, part), field)
    for part in ("train", "validation", "test") for field in ("images", "labels")})
"""


@pytest.mark.slow
def test_prepared_offline_by_two_processes_at_once(tmp_path):
    from sklearn.datasets import load_digits

    data_dir = tmp_path / "data"
    data_dir.mkdir()
    outputs = [tmp_path / f"{i}.npz" for i in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, output, given],
            env=os.environ | {"TFDS_DATA_DIR": str(data_dir)},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        # Given in two ways, the same folder.
        for output, given in zip(outputs, (data_dir, ""), strict=True)
    ]
    for process in processes:
        written, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert written == ""
        assert "%|" not in errors  # no progress bar

    assert [path.name for path in data_dir.iterdir()] == ["digits"]  # nothing half-done is left
    digits = load_digits()
    pixels = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]
    test = np.arange(len(pixels)) % 5 == 0
    for output in outputs:
        with np.load(output) as arrays:
            np.testing.assert_array_equal(arrays["test_images"], pixels[test])
            np.testing.assert_array_equal(arrays["test_labels"], digits.target[test])
            assert arrays["train_images"].dtype == np.uint8
            assert arrays["train_labels"].dtype == np.int32
            assert len(arrays["validation_labels"]) == 144
            trained = np.concatenate([arrays["train_images"], arrays["validation_images"]])
            assert sorted(map(bytes, trained)) == sorted(map(bytes, pixels[~test]))

    # The order in the file is scikit-learn's, and preparing again does nothing.
    whole = load("digits", data_dir=data_dir, validation_fraction=0)
    np.testing.assert_array_equal(whole.train.images, pixels[~test])
    np.testing.assert_array_equal(whole.train.labels, digits.target[~test])
    assert whole.class_names == tuple("0123456789")
    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    assert Path(prepare("digits", data_dir=data_dir)) == data_dir / "digits" / "1.0.0"
    assert {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")} == before


def test_the_slower_of_two_processes_keeps_what_is_there(tmp_path):
    builder = find_builder("digits", tmp_path)
    prepare("digits", data_dir=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record*")}
    assert len(before) == 2
    _prepare_beside("digits", builder, None, progress=False)  # it looked before the data was there
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(UsageError, match="cannot be written: give --data-dir"):
        load("digits", data_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        prepare("digits", data_dir=tmp_path / "file" / "data")
    with pytest.raises(UsageError, match="cannot be opened: give a folder or a gs:// URL"):
        prepare("mnist", data_dir="s3://bucket/data")
    with pytest.raises(UsageError, match="is in a bucket: copy it into a local folder"):
        prepare("image_folder/x", data_dir=tmp_path, manual_dir="gs://bucket/x")


def test_a_read_only_data_folder_does_not_stop_digits(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o555)
    script = "from seal_jax.data import load; load('digits'); print(len(load('digits').test))"
    environment = {"TFDS_DATA_DIR": str(shared), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "360"
    assert not any(shared.iterdir())
    assert (tmp_path / "cache/seal_jax/tfds/digits").is_dir()
