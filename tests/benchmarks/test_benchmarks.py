"""The benchmarks run, print their tables and write their JSON; how fast is not asserted."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]

OURS = ["seal_jax", "seal_jax, 2 seeds by vmap", "seal_jax, 2 seeds by map"]
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
    ("gpu", "by", ["torch, eager", "torch, compile", *OURS]),
    ("cpu_vs_torch", "network", ["resnet8", "wrn10-1"]),
    ("vary", "points as", ["map", "vmap", "runs", "processes"]),
    ("input", "images by", ["DataLoader", "stream", "Grain", "stream, threads", "device"]),
]
NEEDS = {
    "gpu": "torch",
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


def test_setting_is_that_of_digits_resnet8():
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

    expected = configs.load(str(ROOT / "configs" / "digits_resnet8.py"), ["--config.train.seeds=1"])
    assert complete(common.digits_resnet8()) == complete(expected)


def test_images_are_those_of_the_data_set(tmp_path):
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

    dataset = common.synthetic(methods.STEPS * 20, side=8, classes=methods.CLASSES)
    for name in methods.chosen(""):
        config = methods.settings(name, "mlp", batch=20, weak=10, side=8)
        experiment = common.build(config, dataset)
        assert experiment.clock.steps_per_epoch == methods.STEPS
        assert config.method["name"] == methods.METHODS[name].get("name", name)
    assert set(methods.AIMS) | {name for (name,) in methods.PAPER.rows} <= set(methods.METHODS)
    assert methods.chosen("pof,sam") == ["normal", "sam", "pof"]
    with pytest.raises(UsageError, match="'pf' is not a row; nearest: pof"):
        methods.chosen("pf")


@pytest.fixture
def gpu():
    pytest.importorskip("torch")
    from benchmarks import gpu

    return gpu


@pytest.mark.parametrize(
    ("network", "changed"),
    [
        ("resnet8", "layer3/block0/conv2/kernel"),
        ("resnet26", "layer4/block0/downsample_bn/bias"),
        ("wrn10-1", "layer2/block0/downsample_conv/kernel"),
    ],
)
def test_copy_in_torch_is_the_same_network(network, changed, gpu, monkeypatch):
    import jax
    from flax import traverse_util

    from benchmarks import torch_networks
    from seal_jax import models

    bottlenecks = models.ResNet(
        num_classes=3, stage_sizes=(1, 1, 1, 1), block="bottleneck", width=4, stem="cifar"
    )
    model = (
        models.from_module(bottlenecks, name=network, image_shape=(8, 8, 3))
        if network == "resnet26"
        else models.create(network, num_classes=3, image_shape=(8, 8, 3))
    )
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    variables = jax.tree.map(
        # Variances must be positive.
        lambda leaf: np.float32(
            random.uniform(0.5, 1.5, leaf.shape)
            if leaf.ndim < 2
            else random.normal(size=leaf.shape)
        ),
        shapes,
    )
    images = random.normal(size=(4, 8, 8, 3)).astype(np.float32)
    torch_networks.check_equal(model, variables, images)

    # One kernel of another value is another network.
    copy = torch_networks.copy

    def spoilt(model, variables):
        flat = traverse_util.flatten_dict(variables, sep="/")
        flat[f"params/{changed}"] = np.flip(flat[f"params/{changed}"])
        return copy(model, traverse_util.unflatten_dict(flat, sep="/"))

    monkeypatch.setattr(torch_networks, "copy", spoilt)
    with pytest.raises(AssertionError, match="Not equal"):
        torch_networks.check_equal(model, variables, images)


def test_operations_are_those_that_torch_counts(gpu):
    """Up to the padding, which XLA leaves out, and what is no convolution or product, which torch does."""
    import jax
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import torch_networks
    from seal_jax import models

    model = models.create("resnet8", num_classes=10, image_shape=(32, 32, 3))
    variables = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    network = torch_networks.copy(model, variables).train()
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(2, 3, 32, 32)).sum().backward()
    assert 0.85 < gpu.flops(model, variables, 2) / counter.get_total_flops() < 1.1


def test_both_augment_alike(gpu):
    import jax.numpy as jnp
    import torch

    from benchmarks import common
    from seal_jax.data import augment
    from seal_jax.training import experiment

    dataset = common.synthetic(12, 8, gpu.CLASSES)
    training = gpu.TorchTraining(torch.nn.Linear(1, 1), dataset, 6, 2, "eager", False)
    rows, offsets, flips = (part[1] for part in training._draws(2))
    spec = experiment.augmentation_of(gpu.settings("resnet8", 6, 1, 1, "auto", False), (8, 8, 3))
    params = augment.AugmentationParams(jnp.array(offsets), jnp.array(flips))
    expected = augment.apply(jnp.array(dataset.train.images[rows]), params, spec)
    actual = training.pixels(rows, offsets, flips).permute(0, 2, 3, 1)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_training_that_fails_has_a_row_that_says_so(gpu, monkeypatch):
    import argparse
    import time

    from seal_jax import models

    class Trains:
        def train(self):
            time.sleep(1e-3)

    def fails():
        raise MemoryError("out of memory\nwith details")

    makers = {"torch, eager": (1, Trains), "torch, compile": (1, fails), "seal_jax": (8, Trains)}
    monkeypatch.setattr(gpu, "candidates", lambda *arguments: makers)
    monkeypatch.setattr(gpu, "flops", lambda *arguments: 1e9)
    model = models.create("resnet8", num_classes=10, image_shape=(8, 8, 3))
    options = argparse.Namespace(side=8, rounds=2)

    def rows(minutes):
        deadline = time.monotonic() + 60 * minutes
        return gpu.compare(model, {}, 32, 2, options, deadline).rows

    theirs, failed, ours = rows(1)
    assert failed["note"] == "failed: out of memory"
    assert failed["images/s"] is None
    assert theirs["ratio"] == 1
    assert ours["aim"] == ">= 3"
    assert ours["images/s"] == pytest.approx(8 * 32 / (ours["ms/step"] / 1e3))
    assert ours["ratio"] == pytest.approx(ours["images/s"] / theirs["images/s"])
    assert {row["note"] for row in rows(-1)} == {"not begun: --minutes are over"}


def test_peaks_are_of_the_device_that_has_the_name(gpu):
    assert gpu.peak("NVIDIA H100 80GB HBM3") == gpu.peak("NVIDIA GH200 480GB") == 989e12
    assert gpu.peak("NVIDIA H100 PCIe") == 756e12
    assert gpu.peak("NVIDIA H100 NVL") == 835e12
    assert gpu.peak("NVIDIA A100-SXM4-40GB") == 312e12
    assert gpu.peak("NVIDIA A10G") is gpu.peak("cpu") is None
