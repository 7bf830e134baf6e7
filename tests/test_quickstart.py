"""The quickstart's SEAL: accuracy falls in every ascent and recovers (SEAL paper, section 3)."""

import numpy as np
import pytest

from seal_jax import reports
from seal_jax.cli import configs
from seal_jax.training import experiment, loop, metrics

pytestmark = pytest.mark.slow


def test_training_accuracy_falls_and_recovers_in_every_generation_but_the_first(tmp_path):
    # All four seeds: how far a single one falls depends on how the processor rounds.
    settings = configs.load("configs/quickstart.py:seal", [f"--config.data.data_dir={tmp_path}"])
    dataset = experiment.load_data(settings.data)
    outcome = loop.train(settings, tmp_path / "run", dataset, devices=4)
    assert outcome.finished
    rows = metrics.read(tmp_path / "run")
    generations, epochs = settings.train.generations, settings.train.epochs_per_generation
    assert [row["epoch"] for row in rows] == list(range(generations * epochs))
    accuracy = np.mean([row["train/accuracy"] for row in rows], axis=1)
    accuracy = accuracy.reshape(generations, epochs)
    assert accuracy[0, -1] > 0.97
    assert (np.diff(accuracy[0, 8:]) > -0.03).all()  # plain training does not fall
    for generation in range(1, generations):
        start = accuracy[generation - 1, -1]
        fall = accuracy[generation, : epochs // 4 + 2].min()
        assert fall < start - 0.05, (generation, start, fall)
        assert accuracy[generation, -1] > start - 0.02
    table = reports.compare([tmp_path / "run"]).as_text()
    assert all(f"\n{generation:3d} │" in table for generation in range(1, generations + 1))
