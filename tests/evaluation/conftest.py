"""Runs of a second on digits, for the commands to evaluate."""

import dataclasses
import fcntl
import json
import os
import shutil

import pytest

from seal_jax.core import settings as settings_lib
from seal_jax.training import experiment, loop


def settings(data_dir, method="normal", model=None, **train):
    """A ResNet-8 of width 4, or another ``model``, on 180 digits, one epoch; 2 seeds."""
    train = {"generations": 1, "epochs_per_generation": 1, "seeds": 2, "batch_size": 30, **train}
    return settings_lib.Settings(
        data=settings_lib.Data(name="digits", data_dir=str(data_dir), validation_fraction=0.87),
        model=model or settings_lib.Model(name="resnet8", width=4),
        method={"name": method},
        optimizer=settings_lib.Optimizer(learning_rate=0.1, label_smoothing=0.0),
        train=settings_lib.Train(**train),
        run=settings_lib.Run(checkpoint_every_epochs=1),
    )


@pytest.fixture(scope="session")
def trained(shared_folder, digits_dir):
    """``trained(name, **settings)``: a run's folder, trained once for all processes of a session."""
    root = shared_folder / "evaluated"
    root.mkdir(exist_ok=True)

    def train(name, **options):
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / name).exists():
                chosen = settings(digits_dir, **options)
                dataset = experiment.load_data(chosen.data)
                loop.train(chosen, root / f"{name}.part", dataset, devices=1)
                os.rename(root / f"{name}.part", root / name)
        return root / name

    return train


@pytest.fixture(scope="session")
def run(trained):
    """A plain run of two epochs, so of two checkpoints."""
    return trained("normal", epochs_per_generation=2)


@pytest.fixture(scope="session")
def loaded_run(run):
    from seal_jax.evaluators.loaded_run import LoadedRun

    return LoadedRun(run)


@pytest.fixture
def as_streamed(tmp_path):
    """``as_streamed(folder)``: a copy of a run, whose images are streamed."""

    def copy(folder):
        streamed = shutil.copytree(folder, tmp_path / "streamed" / folder.name)
        config = json.loads((streamed / "config.json").read_text())
        config["data"]["placement"] = "stream"
        (streamed / "config.json").write_text(json.dumps(config))
        return streamed

    return copy


@pytest.fixture
def evaluated(tmp_path):
    """``evaluated(name, folder, **options)``: rows, and the folder of the results."""
    from seal_jax import evaluators
    from seal_jax.evaluators import command

    def evaluate(name, folder, *, weights=(), steps="newest", output=None, **options):
        evaluator = evaluators.load(name)
        output = tmp_path / "results" if output is None else output
        chosen = dataclasses.replace(evaluator.options(), **options)
        rows = command.evaluate(evaluator, folder, chosen, output, weights=weights, steps=steps)
        return rows, output

    return evaluate
