"""Generations that end early, and rates that fall, as the compiled steps apply the rules."""

import json
import shutil

import jax
import numpy as np
import numpy_mlp as oracle
import pytest
from programs import STRIPES, Trainer, assert_same, batch, differ, host, mlp, seed_of
from trainer_runs import assert_same_run, leaves

from seal_jax.core.state import EarlyStoppingState
from seal_jax.training import loop
from seal_jax.training.experiment import Experiment

SEAL = {"name": "seal", "threshold": "dense2", "ascent_scale": 0.2}


@pytest.fixture(scope="module")
def trainer():
    """Two seeds under all the rules."""
    train = {"seeds": 2, "patience": 3, "until_accuracy": 0.8}
    optimizer = {"plateau_epochs": 2, "plateau_factor": 0.5}
    return Trainer(STRIPES, mlp(norm="batch", train=train, optimizer=optimizer))


@pytest.fixture(scope="module")
def start(trainer):
    return host(trainer)


def test_rules_equal_numpy(trainer, start):
    random = np.random.default_rng(0)
    outcomes = set()
    for _ in range(40):
        epoch = random.integers(1, 12)
        stopped = random.random(2) < 0.1
        scale = 0.5 ** random.integers(0, 3, 2)
        since, best = random.integers(0, epoch + 1, (2, 2))
        weight = np.full(2, 80.0)
        correct = random.integers(56, 68, 2).astype(float)
        state = start._replace(
            step=np.full(2, 5 * (epoch + 1), np.int32),
            metric_sums=start.metric_sums._replace(
                correct=np.float32(correct), weight=np.float32(weight)
            ),
            best=start.best._replace(epoch=np.int32(best)),
            early_stopping=EarlyStoppingState(stopped, np.float32(scale), np.int32(since)),
        )
        trainer.put(state)
        found = jax.device_get(
            trainer.experiment.update_early_stopping(trainer.state).early_stopping
        )
        for seed in range(2):
            ends = stopped[seed] or correct[seed] / 80 >= 0.8 or epoch - best[seed] >= 3
            last = max(since[seed], best[seed])
            falls = not stopped[seed] and epoch - last >= 2
            expected = (ends, scale[seed] * (0.5 if falls else 1), epoch if falls else last)
            assert tuple(leaf[seed] for leaf in found) == expected
            outcomes.add((bool(ends), bool(falls)))
    assert len(outcomes) == 4


def test_a_stopped_seed_is_frozen_and_a_plateau_halves_the_step(trainer, start):
    early_stopping = EarlyStoppingState(
        np.array([True, False]), np.ones(2, np.float32), np.zeros(2, np.int32)
    )
    after_two = host(trainer.put(start._replace(early_stopping=early_stopping)).calls(2)).weights
    assert_same(seed_of(after_two, 0), seed_of(start.weights, 0))
    assert differ(seed_of(after_two, 1).params, seed_of(start.weights, 1).params)
    assert differ(seed_of(after_two, 1).batch_stats, seed_of(start.weights, 1).batch_stats)

    early_stopping = EarlyStoppingState(
        np.zeros(2, bool), np.array([1.0, 0.5], np.float32), np.zeros(2, np.int32)
    )
    both = jax.tree.map(lambda leaf: np.stack([leaf[0]] * 2), start)._replace(
        early_stopping=early_stopping
    )
    after = host(trainer.put(both).calls(1)).weights.params
    full, half = (
        oracle.add(oracle.wide(seed_of(after, seed)), -1, seed_of(start.weights.params))
        for seed in (0, 1)
    )
    assert_same(half, jax.tree.map(lambda leaf: leaf / 2, full), rtol=1e-3, atol=1e-7)
    assert oracle.norm(full) > 1e-3


NEVER = {"reset_momentum": "never"}


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        ({"name": "normal"}, {**NEVER, "name": "adam", "learning_rate": 0.01}),
        pytest.param(
            {"name": "llf", "threshold": "dense2", "optimizer_state": "keep"},
            {},
            marks=pytest.mark.slow,
        ),
        ({"name": "llf", "threshold": "dense2", "optimizer_state": "zero"}, {}),
        *(
            pytest.param(method, NEVER, marks=pytest.mark.slow)
            for method in (
                {"name": "sa_gd", "temperature": 0.01},
                {"name": "sam", "last_epochs": 2},
                {"name": "looksam"},
                {"name": "zapping", "classes": 2},
            )
        ),
        pytest.param({"name": "msam"}, {}, marks=pytest.mark.slow),
    ],
)
def test_stopped_seeds_do_not_see_how_long_a_third_goes_on(method, optimizer):
    """Two seeds stop after five steps; beside a third, which needs ten more, they end the same."""

    def trained(seeds, more):
        train = {"seeds": seeds, "patience": 3}
        trainer = Trainer(STRIPES, mlp(method, norm="batch", optimizer=optimizer, train=train))
        state = host(trainer.calls(5))
        stopped = np.arange(seeds) < 2
        trainer.put(
            state._replace(early_stopping=state.early_stopping._replace(stopped=stopped))
        ).calls(more)
        trainer.state = trainer.experiment.end_generation(trainer.state)
        return host(trainer.calls(3))

    alone, beside = trained(2, 0), trained(3, 10)
    for seed in range(2):
        for part in ("weights", "opt_state", "method_state"):
            assert_same(*(seed_of(getattr(state, part), seed) for state in (alone, beside)))
    assert alone.step[0] == 23
    if optimizer.get("name") == "adam":
        adams = jax.tree.leaves(beside.opt_state, is_leaf=lambda node: hasattr(node, "mu"))
        (adam,) = [node for node in adams if hasattr(node, "mu")]
        assert adam.count.tolist() == [8, 8, 18]  # as many as there were updates


def test_the_memory_of_a_stopped_seed_stays():
    """The validation split goes on being scored, but for others."""
    method = {"name": "fast", "warmup": True}
    train = {"seeds": 2, "patience": 3, "generations": 1, "sampling": "balanced"}
    trainer = Trainer(STRIPES, mlp(method, train=train))
    start = host(trainer)
    trainer.put(
        start._replace(
            early_stopping=start.early_stopping._replace(stopped=np.array([True, False]))
        )
    )
    trainer.state, _ = trainer.experiment.validate(trainer.state, trainer.splits["validation"])
    method_state = host(trainer).method_state
    assert_same(seed_of(method_state, 0), seed_of(start.method_state, 0))
    assert differ(seed_of(method_state, 1), seed_of(start.method_state, 1))


def clocks(named_leaves):
    """The counts of updates in an optimizer's state."""
    return [leaf for name, leaf in named_leaves if "opt_state" in name and name.endswith("count")]


def test_a_generation_that_ends_early_goes_on_with_the_next():
    """The step and the optimizer's clocks jump: SEAL ascends at once."""
    config = mlp({**SEAL, "ascent_epochs": 1.0}, train={"until_accuracy": 0.01})
    trainer = Trainer(STRIPES, config).calls(5)
    trainer.state = trainer.experiment.end_generation(trainer.state)
    state = host(trainer)
    assert state.step[0] == 20
    found = jax.tree_util.tree_leaves_with_path(state.opt_state)
    counts = clocks((f"opt_state/{path[-1]}", leaf) for path, leaf in found)
    assert len(counts) >= 3
    assert all(count[0] == 20 for count in counts)

    params = oracle.wide(seed_of(state.weights.params))
    images, labels = batch(20, config)
    _, gradient = oracle.loss_and_gradient(params, images, labels)
    expected = {
        name: oracle.add(
            params[name],
            *(
                (0.2 * 0.05, oracle.add(gradient[name], -5e-4, params[name]))
                if name == "dense1"
                else (-0.05, oracle.add(gradient[name], 5e-4, params[name]))
            ),
        )
        for name in params
    }
    trainer.calls(1)
    assert_same(seed_of(trainer.state.weights.params), expected, rtol=1e-4, atol=1e-6)
    # Ended where it would have ended anyhow, nothing jumps.
    trainer.put(state._replace(step=state.step + 20))
    assert int(trainer.experiment.end_generation(trainer.state).step[0]) == 40


def test_a_run_with_early_ends_is_taken_up_where_it_stopped(tmp_path, monkeypatch):
    """Every generation ends after its first epoch; a run cut off after the first ends the same."""
    config = mlp({**SEAL, "ascent_epochs": 1.0}, train={"until_accuracy": 0.01})
    assert loop.train(config, tmp_path / "whole", STRIPES, devices=1).step == 60
    rows = (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(row) for row in rows]
    assert [(row["step"], row["generation"]) for row in rows] == [(5, 0), (25, 1), (45, 2)]
    assert all(row["stopped"] == [True] and "test_last/accuracy" in row for row in rows)
    saved = tmp_path / "whole/checkpoints"
    for step in (20, 40, 60):
        assert {int(count[0]) for count in clocks(leaves(saved.parent, step).items())} == {step}

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (40, 60):
        shutil.rmtree(tmp_path / "cut/checkpoints" / str(step))
    assert loop.train(config, tmp_path / "cut", STRIPES, devices=1).finished
    assert_same_run(tmp_path / "cut", tmp_path / "whole", epochs=3, last=60)

    # A step that was skipped cannot be the one that diverged.
    monkeypatch.setattr(Experiment, "finite", lambda self, state: np.zeros(1, bool))
    with pytest.raises(loop.NonFiniteError, match=r"at step 4 \(generation 0, epoch 0\)"):
        loop.train(config, tmp_path / "diverged", STRIPES, devices=1)
