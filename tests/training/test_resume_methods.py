"""Every method, stopped right after it has forgotten or in mid-course, ends with the same bits."""

import json
import os
import signal
import threading

import pytest
from programs import STRIPES, mlp
from trainer_runs import Runs, assert_same_run, leaves, row_count

from seal_jax import methods
from seal_jax.training import experiment as experiments
from seal_jax.training import loop
from seal_jax.training.checkpoints import Checkpoints
from seal_jax.training.progress import Progress

EPOCHS, PER_EPOCH, LAST = 2, 3, 12  # two generations of two epochs of three steps
EVENT = 6
# All but SEAL, which test_resume.py kills.
METHODS = {name: {} for name in methods.NAMES if name != "seal"} | {
    "llf": {"threshold": "dense2"},
    "sa_gd": {"temperature": 0.01},
    "welsr": {"redraw": True},
    "kels": {"keep": 0.5},
    "fc": {"threshold": "dense2"},
    "imp": {"rewind_step": 2},
    "sam": {"adaptive": True, "rho": 0.5, "eta": 0.01, "last_epochs": 1},
    "pof": {"weak_batch_size": 8, "resample": 1},
    "foca": {"weak_batch_size": 8},
    "hare_tortoise": {"decay": 0.8, "every_epochs": 1},
    # A warm-up of steps 0 to 8: how long it has gone on must outlive both stops.
    "fast": {"head": "kaiming_fan_in", "warmup": True, "warmup_gain": 0.9, "warmup_steps": 8},
    "born_again": {"tolerance": 0.2, "tolerant_classes": 3},
    "redo": {"every": 7, "threshold": 0.5},  # right after the event, before which both resume
    "continual_backprop": {"replacement_rate": 0.1, "maturity": 1},
}
NAMES = {"welsr": "wels"}
# What is in the optimizer's state, or beside it, must outlive both stops too.
OPTIMIZERS = {
    "llf": {"name": "adamw", "args": {"b2": 0.99}, "ema": 0.9},
    "fc": {"name": "muon", "accumulate": 2, "clip_norm": 1.0},
    "sa_gd": {"name": "lion"},
    "fast": {"name": "lamb", "args": {"weight_decay": 0.1}, "ema": 0.5},
    "redo": {"name": "adam", "accumulate": 2},
}
STARTED = ("pof", "fast")  # from the weights of another run


class Killed(Exception):
    pass


def kill():
    raise Killed


def terminate():
    assert threading.current_thread() is threading.main_thread()  # who else would answer?
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def train(monkeypatch):
    """Train, until ``how`` is called after step ``at``; the programs of a test are built once."""
    update, build, built = Progress.update, experiments.build, {}

    def build_once(settings, *data_and_devices):
        name = repr(settings)
        if name not in built:
            built[name] = build(settings, *data_and_devices)
        return built[name]

    def train(config, workdir, at=None, how=None):
        def update_and_stop(self, step, **latest):
            update(self, step, **latest)
            if step == at:
                how()

        monkeypatch.setattr(Progress, "update", update_and_stop)
        monkeypatch.setattr(experiments, "build", build_once)
        return loop.train(config, workdir, STRIPES, devices=1)

    return train


def settings(method, seeds=1, **sections):
    train = {"generations": 2, "epochs_per_generation": EPOCHS, "batch_size": 30, "seeds": seeds}
    sections["train"] = train | sections.get("train", {})
    return mlp(method, **sections)


@pytest.mark.parametrize("name", METHODS)
def test_stopped_after_an_event(name, train, tmp_path):
    start = {}
    if name in STARTED:
        train(settings({"name": "normal"}, train={"generations": 1}), tmp_path / "start")
        start = {"train": {"pretrained": str(tmp_path / "start"), "validate_every": 1}}
    method = {"name": NAMES.get(name, name), **METHODS[name]}
    config = settings(method, optimizer=OPTIMIZERS.get(name, {}), **start)
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    assert train(config, reference).finished
    # Before the next checkpoint, so that the event is repeated; then after one in its epoch.
    with pytest.raises(Killed):
        train(config, workdir, EVENT + 1, kill)
    assert Checkpoints(workdir / "checkpoints").steps()[-1] == EVENT
    outcome = train(config, workdir, EVENT + 2, terminate)
    assert (outcome.step, outcome.finished) == (EVENT + 2, False)
    assert leaves(workdir, EVENT + 2)["step"].tolist() == [EVENT + 2]
    assert train(config, workdir).finished
    assert_same_run(workdir, reference, epochs=2 * EPOCHS, last=LAST)


@pytest.mark.slow
def test_stopped_while_one_of_two_seeds_has_stopped(train, tmp_path):
    """Generations end early, seed by seed, and the learning rate falls meanwhile."""
    config = settings(
        {"name": "normal"},
        seeds=2,
        train={"patience": 2, "epochs_per_generation": 8},
        optimizer={"plateau_epochs": 1, "learning_rate": 0.02},
    )
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    assert train(config, reference).finished
    rows = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) < 16
    half = [row["step"] for row in rows if sum(row["stopped"]) == 1]
    assert half
    assert min(rows[-1]["rate_scale"]) < 1
    with pytest.raises(Killed):
        train(config, workdir, half[0] + 1, kill)
    outcome = train(config, workdir, half[0] + 2, terminate)
    assert outcome.step == half[0] + 2
    assert train(config, workdir, 25, terminate).step == 25  # generation 1 starts at 24
    assert train(config, workdir).finished
    assert_same_run(workdir, reference, epochs=len(rows), last=48)


CONFIG = """\
from seal_jax.cli.configs import base

VARIANTS = ("lw", "born_again")


def get_config(method):
    config = base(method)
    config.data.data_dir = {data_dir!r}
    config.data.validation_fraction = 0.9
    config.model.name = "mlp"
    config.train.generations = 2
    config.train.epochs_per_generation = 2
    config.run.steps_per_call = 1
    return config
"""


@pytest.fixture(scope="session")
def runs(shared_folder):
    runs = Runs(shared_folder)
    runs.config = shared_folder / "methods.py"
    part = shared_folder / f"methods.{os.getpid()}"
    part.write_text(CONFIG.format(data_dir=str(shared_folder / "digits")))
    part.rename(runs.config)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lw", "born_again"])
def test_killed_after_an_event(runs, tmp_path, method):
    reference = runs.reference(method=method)
    # Epochs have four steps; the event is at step 8, whose checkpoint may or may not be complete.
    killed = {"signalled_at": (9, signal.SIGKILL), "code": -signal.SIGKILL}
    runs.finish(tmp_path / "run", method=method, **killed)
    assert row_count(tmp_path / "run") == 2
    runs.finish(tmp_path / "run", method=method)
    assert_same_run(tmp_path / "run", reference, epochs=4, last=16)
