"""The benchmarks run, print their tables and write their JSON; how fast is not asserted."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Benchmark, its first column, and the rows of its first table.
BENCHMARKS = [
    ("multistep", "program", ["compiled", "loop", "bare loop"]),
    ("seeds", "seeds as", ["runs", "vmap", "map"]),
    ("overhead", "optimizer", ["sgd", "sgd again", "seal"]),
    ("convolution", "convolution", ["native", "native", "canonical", "canonical"]),
    ("methods", "method", ["normal", "normal again", "seal", "sam", "pof", "feature extraction"]),
    ("neighbours", "neighbours by", ["scikit-learn", "ours", "small budget"]),
    ("few_shot", "episodes as", ["loop", "one program"]),
    ("eigenvalues", "solver", ["lanczos", "power", "power, torch"]),
    ("cpu_vs_torch", "network", ["resnet8", "wrn10-1"]),
    ("input", "images by", ["DataLoader", "stream", "Grain", "stream, threads", "device"]),
]
NEEDS = {
    "few_shot": "torch",
    "cpu_vs_torch": "torch",
    "eigenvalues": "torch",
    "input": "torchvision",
}


@pytest.fixture(autouse=True)
def _import_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "column", "rows"), BENCHMARKS)
def test_quick_run_prints_and_writes_its_table(name, column, rows, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    figures = tmp_path / "figures.json"
    # Compiled without optimisation, which takes a third of the time.
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    run = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(figures)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(figures.read_text())
    assert found["benchmark"] == name
    assert set(found["machine"]) == {"cpus", "load", "device", "jax"}
    table = found["tables"][0]
    assert [row[column] for row in table["rows"]] == rows
    printed = run.stdout.splitlines()
    assert table["title"] in printed
    header = next(line for line in printed if line.startswith(column))
    for field, value in table["rows"][0].items():
        assert field in header
        assert isinstance(value, str | float | int)
    for label in rows:
        assert any(line.startswith(f"{label} ") for line in printed)


def test_setting_is_that_of_the_quickstart():
    from benchmarks import common
    from seal_jax import methods
    from seal_jax.cli import configs
    from seal_jax.core import settings

    def complete(found):
        options = dict(found.method)
        kind = type(methods.options(options.pop("name")))
        return dataclasses.replace(found, method={"name": "seal"}), settings.read(
            kind, options, "method"
        )

    expected = configs.load(str(ROOT / "configs" / "quickstart.py"), ["--config.train.seeds=1"])
    assert complete(common.quickstart()) == complete(expected)


def test_images_are_those_of_the_data_set(tmp_path):
    import numpy as np

    from benchmarks import common
    from seal_jax import data

    prepared = data.load("digits", data_dir=tmp_path, validation_fraction=0.75, progress=False)
    plain = common.digits(0.75)
    for split in ("train", "validation", "test"):
        ours, theirs = getattr(plain, split), getattr(prepared, split)
        np.testing.assert_array_equal(ours.images, theirs.images)
        np.testing.assert_array_equal(ours.labels, theirs.labels)


def test_every_row_of_methods_is_a_method():
    """Those that a quick run leaves out can at least be built, and differ from plain training."""
    from benchmarks import common, methods
    from seal_jax.errors import UsageError

    dataset = methods.synthetic(methods.STEPS * 20, side=8)
    for name in methods.chosen(""):
        config = methods.settings(name, "mlp", batch=20, weak=10, side=8)
        experiment = common.build(config, dataset)
        assert experiment.clock.steps_per_epoch == methods.STEPS
        assert config.method["name"] == methods.METHODS[name].get("name", name)
    assert set(methods.AIMS) | {name for (name,) in methods.PAPER.rows} <= set(methods.METHODS)
    assert methods.chosen("pof,sam") == ["normal", "sam", "pof"]
    with pytest.raises(UsageError, match="'pf' is not a row; nearest: pof"):
        methods.chosen("pf")
