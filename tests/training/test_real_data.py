"""Real data sets train, where they lie beside the project."""

from pathlib import Path

import numpy as np
import pytest

from seal_jax.cli import configs, main
from seal_jax.training import experiment, loop, metrics

SHARED = Path(__file__).parents[3] / "shared" / "data"
PREPARED = SHARED / "tfds"
TINY = SHARED / "tiny-imagenet-sample"


def train(workdir, config, *overrides):
    """Return the training loss of two short generations, by epoch."""
    shortened = [
        "model.name=resnet8",
        "model.width=8",
        "data.test_split=train[:100]",
        "data.train_split=train[100:500]",
        "train.batch_size=32",
        "train.generations=2",
        "train.epochs_per_generation=4",
        "optimizer.warmup_epochs=1",
    ]
    overrides = [f"--config.{override}" for override in (*shortened, *overrides)]
    settings = configs.load(f"configs/{config}", overrides)
    outcome = loop.train(settings, workdir, experiment.load_data(settings.data), devices=1)
    assert outcome.finished
    rows = metrics.read(workdir)
    assert len(rows) == 8
    assert 0 <= rows[-1]["test_last/accuracy"][0] <= 1
    return np.array([row["train/loss"][0] for row in rows])


@pytest.mark.slow
@pytest.mark.skipif(not PREPARED.is_dir(), reason="the prepared data sets are not here")
@pytest.mark.parametrize("name", ["fashion_mnist", "cifar100"])
def test_prepared_tfds_data_train(tmp_path, name):
    variant = {"fashion_mnist": "seal", "cifar100": "seal_resnet110"}[name]
    config = f"seal_{name}.py:{variant}"
    losses = train(tmp_path, config, f"data.data_dir={PREPARED}")
    assert losses[3] < losses[0] - 0.1


@pytest.mark.slow
@pytest.mark.skipif(not TINY.is_dir(), reason="the Tiny-ImageNet sample is not here")
def test_tiny_imagenet_in_its_original_layout_trains(tmp_path):
    prepare = ["prepare", "--dataset=tiny_imagenet", f"--manual-dir={TINY}"]
    assert main.run([*prepare, f"--data-dir={tmp_path}"]) == main.OK
    ours = [f"data.data_dir={tmp_path}", "data.image_size=16"]
    losses = train(tmp_path / "run", "seal_ablations.py:descend", *ours)
    assert losses[3] < losses[0] - 0.1
