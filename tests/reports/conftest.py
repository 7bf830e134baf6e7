"""Run folders made by hand."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest

from seal_jax.core import settings as settings_lib

# SEAL on the data and model of Table 2, in 2 generations of 4 epochs, with 2 seeds.
CONFIG = dataclasses.asdict(
    settings_lib.Settings(
        data=settings_lib.Data(name="tiny_imagenet"),
        model=settings_lib.Model(name="resnet50"),
        method={"name": "seal", "threshold": "layer3", "ascent_epochs": None, "fit": "descend"},
        train=settings_lib.Train(generations=2, epochs_per_generation=4, seeds=2),
    )
)


@pytest.fixture
def config():
    return copy.deepcopy(CONFIG)


@pytest.fixture
def make_run(tmp_path):
    """Write a run folder; ``test`` has (last, best) of the generations that are finished.

    Validation accuracy is 0.1 but for the third epoch of each generation, which has ``validation``.
    """

    def make(name="seal", *, test=(), validation=(), epochs=None, **sections):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = copy.deepcopy(CONFIG)
        for section, values in sections.items():
            config[section] = {**config.get(section, {}), **values}
        (folder / "config.json").write_text(json.dumps(config))
        length, seeds = config["train"]["epochs_per_generation"], config["train"]["seeds"]
        rows = []
        for epoch in range(len(test) * length if epochs is None else epochs):
            generation, within = divmod(epoch, length)
            row = {
                "step": 10 * (epoch + 1),
                "epoch": epoch,
                "generation": generation,
                "epoch_in_generation": within,
                "learning_rate": 0.01 / (1 + within),
                "train/loss": [2 / (epoch + 1)] * seeds,
                "train/accuracy": [epoch / (epoch + 2)] * seeds,
            }
            if validation:
                best = validation[generation] if within == 2 else [0.1] * seeds
                row |= {"validation/loss": [1.0] * seeds, "validation/accuracy": best}
            if within == length - 1 and generation < len(test):
                row |= {"test_last/loss": [1.0] * seeds, "test_last/accuracy": test[generation][0]}
                if validation:
                    row |= {
                        "test_best/loss": [1.0] * seeds,
                        "test_best/accuracy": test[generation][1],
                        "best_epoch": [generation * length + 2] * seeds,
                    }
            rows.append(row)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text(lines)
        return folder

    return make


@pytest.fixture
def seal(make_run):
    """The whole run; generation 0 validates better and generation 1 tests better."""
    return make_run(
        test=[([0.50, 0.52], [0.53, 0.55]), ([0.60, 0.64], [0.61, 0.67])],
        validation=[[0.56, 0.62], [0.57, 0.59]],
    )
