"""What a run was made with: an entry where it starts, and one where anything of it has changed."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pytest

from seal_jax.core import mesh as meshes
from seal_jax.core.settings import Data, Settings
from seal_jax.data import from_arrays
from seal_jax.data.dataset import Origin
from seal_jax.errors import UsageError
from seal_jax.training import manifest
from seal_jax.training import workdir as workdirs

ROOT = Path(__file__).parents[2]
ARRAYS = np.zeros((20, 8, 8, 1), np.uint8), np.arange(20) % 2
SETTINGS = Settings(data=Data(normalisation="digits"))


@pytest.fixture
def start(tmp_path):
    """Write the manifest as a start at a step does; return its entries."""
    workdirs.claim(tmp_path, SETTINGS)

    def start(step, origin=None, devices=1):
        dataset = from_arrays(ARRAYS, ARRAYS, name="stripes")
        dataset = dataclasses.replace(dataset, origin=origin)
        mesh = meshes.make(SETTINGS, jax.devices()[:devices])
        manifest.write(tmp_path, SETTINGS, dataset, mesh, step)
        return manifest.read(tmp_path)

    return start


def test_what_an_entry_holds(start, tmp_path):
    (entry,) = start(0, Origin("1.0.0", "/data/stripes/1.0.0", "sizes:12"))
    assert entry["step"] == 0
    assert entry["config"] == hashlib.sha256((tmp_path / "config.json").read_bytes()).hexdigest()
    assert entry["packages"]["jax"] == jax.__version__
    assert entry["packages"]["optax"] == metadata.version("optax")
    assert entry["devices"] == {"kind": "cpu", "count": 1, "processes": 1}
    assert entry["data"] == {
        "name": "stripes",
        "version": "1.0.0",
        "folder": "/data/stripes/1.0.0",
        "checksum": "sizes:12",
        "classes": 2,
        "images": {"train": 18, "validation": 2, "test": 20},
        "normalisation": {"mean": [0.3053], "std": [0.3762]},
    }
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        assert entry["commit"].removesuffix(" with changes") == head
    assert manifest.summary(tmp_path) == f"jax {jax.__version__}, 1 x cpu"


def test_an_entry_for_each_change(start, tmp_path, monkeypatch):
    origin = Origin("1.0.0", "/data", "sizes:12")
    start(0, origin)
    written = (tmp_path / manifest.MANIFEST).read_bytes()
    assert len(start(8, origin)) == 1
    assert (tmp_path / manifest.MANIFEST).read_bytes() == written  # not even touched
    assert [entry["step"] for entry in start(16, origin, devices=2)] == [0, 16]
    assert len(start(24, origin._replace(folder="/moved"), devices=2)) == 3
    with pytest.warns(UserWarning, match="the data is not that of the run's last start"):
        entries = start(32, origin._replace(fingerprint="sizes:34"), devices=2)
    assert [entry["data"]["checksum"] for entry in entries][2:] == ["sizes:12", "sizes:34"]
    # Not a clone, or git is not there: no commit, and no failure.
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match="the data is not"):
        assert start(40, origin)[-1]["commit"] is None


@pytest.mark.parametrize("text", ["", "[]", '{"entries": [{"step": 1}]}', '{"entries": 3}'])
def test_what_is_no_manifest(start, tmp_path, text):
    (tmp_path / manifest.MANIFEST).write_text(text)
    with pytest.raises(UsageError, match=r"manifest.json cannot be read: .*; delete it"):
        start(0)
    assert (tmp_path / manifest.MANIFEST).read_text() == text


def test_a_run_without_one(tmp_path):
    assert manifest.read(tmp_path) == []
    assert manifest.summary(tmp_path) is None
