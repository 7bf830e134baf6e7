"""What the quickstart shows, and what ascent does to a small ResNet (SEAL paper, section 3)."""

import numpy as np
import pytest

from seal_jax import reports
from seal_jax.cli import configs
from seal_jax.reports import runs
from seal_jax.reports.studies import memorisation
from seal_jax.training import experiment, loop, metrics

pytestmark = pytest.mark.slow


def test_training_accuracy_falls_and_recovers_in_every_generation_but_the_first(tmp_path):
    # All four seeds: how far a single one falls depends on how the processor rounds.
    settings = configs.load(
        "configs/digits_resnet8.py:seal", [f"--config.data.data_dir={tmp_path}"]
    )
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


def test_the_quickstart_shows_that_forgetting_undoes_memorisation(tmp_path):
    last = {}
    for variant in configs.variants("configs/quickstart.py"):
        options = [f"--config.data.data_dir={tmp_path}", "--config.train.seeds=4"]
        settings = configs.load(f"configs/quickstart.py:{variant}", options)
        loop.train(settings, tmp_path / variant, experiment.load(settings), devices=4)
        last[variant] = metrics.read(tmp_path / variant)[-1]
    test, learnt = (
        {variant: np.array(row[key]) for variant, row in last.items()}
        for key in ("test_last/accuracy", "train/memorised")
    )
    assert (learnt["normal"] > 0.95).all()
    for variant in ("llf", "seal"):
        # By far more than how a processor rounds: 13 points in the README.
        assert (test[variant] - test["normal"]).mean() > 0.06
        assert learnt[variant].mean() < 0.6
    section = memorisation.section(runs.read_all([tmp_path / variant for variant in last])).drawn()
    assert section.picture
    (table,) = section.tables
    assert len(table.rows) == 3 * settings.train.generations
    assert table.rows[-1][:2] == ["seal", "4"]
