"""Clipping, accumulation, the average of the weights, and optax's optimizers, through the compiled programs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_mlp as oracle
import optax
import pytest
from programs import STRIPES, Trainer, assert_same, batch, differ, host, mlp, seed_of, settings
from trainer_runs import Runs

from seal_jax import UsageError
from seal_jax.cli import configs
from seal_jax.core.state import Stream, stream_key
from seal_jax.evaluators.loaded_run import LoadedRun
from seal_jax.training import experiment as experiments
from seal_jax.training import loop, metrics
from seal_jax.training.batches import epoch_order
from seal_jax.transforms import aliases

PLAIN = {"schedule": "constant", "momentum": 0.0, "weight_decay": 0.0}


def test_clipping_and_the_average_equal_numpy():
    """Over a forgetting event, where the average starts again from the weights after it."""
    config = mlp(
        {"name": "llf", "threshold": "dense2"},
        norm="batch",
        optimizer={**PLAIN, "clip_norm": 0.3, "ema": 0.8},
        train={"epochs_per_generation": 1},
    )
    trainer = Trainer(STRIPES, config)
    mean = oracle.wide(seed_of(trainer.state.weights))
    clipped = []
    for step in range(8):
        if step == 5:
            trainer.event()
            mean = oracle.wide(seed_of(trainer.state.weights))
        before = oracle.wide(seed_of(trainer.state.weights.params))
        # By itself, since `calls` would repeat the event.
        trainer.state, _ = trainer.experiment.train(trainer.state, trainer.splits["train"])
        after = oracle.wide(seed_of(trainer.state.weights))
        mean = jax.tree.map(lambda m, w: 0.8 * m + 0.2 * w, mean, after)
        assert_same(seed_of(trainer.state.ema), mean, rtol=1e-4, atol=1e-6)
        clipped.append(oracle.norm(oracle.add(after.params, -1, before)) / 0.05)
    assert max(clipped) < 0.3001
    assert sum(norm > 0.2999 for norm in clipped) >= 4


def test_a_gradient_is_clipped_as_a_whole():
    config = mlp(optimizer={**PLAIN, "clip_norm": 0.2})
    trainer = Trainer(STRIPES, config)
    params = oracle.wide(seed_of(trainer.state.weights.params))
    for step in range(3):
        _, gradient = oracle.loss_and_gradient(params, *batch(step, config))
        scale = min(1.0, 0.2 / oracle.norm(gradient))
        assert scale < 1
        params = oracle.add(params, -0.05 * scale, gradient)
    assert_same(seed_of(trainer.calls(3).state.weights.params), params, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "devices"),
    [
        ({"name": "sam", "rho": 0.3}, 2),
        pytest.param({"name": "normal"}, 1, marks=pytest.mark.slow),
        pytest.param({"name": "born_again", "temperature": 2.0}, 1, marks=pytest.mark.slow),
        pytest.param({"name": "foca", "weak_batch_size": 8}, 2, marks=pytest.mark.slow),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else None,
)
def test_a_batch_in_parts_equals_the_whole(method, devices):
    """Without BatchNorm; also in a batch that is filled up, and after a generation has ended."""
    train = {"drop_last": False, "epochs_per_generation": 1}
    one, four = (
        Trainer(STRIPES, mlp(method, train=train, optimizer={"accumulate": count}), devices)
        for count in (1, 4)
    )
    for trainer in (one, four):
        trainer.calls(8)
    assert_same(four.losses, one.losses, rtol=1e-4)
    assert_same(four.state.weights, one.state.weights, rtol=1e-3, atol=1e-5)
    assert_same(four.state.metric_sums, one.state.metric_sums, rtol=1e-4)


def test_statistics_of_a_batch_in_parts_are_those_of_each():
    """The last batch has 26 of 32 images: two of four parts have 7, two have 6."""
    config = mlp(
        norm="batch",
        optimizer={**PLAIN, "accumulate": 4},
        train={"drop_last": False, "batch_size": 32},
    )
    trainer = Trainer(STRIPES, config).calls(2)
    before = seed_of(host(trainer).weights)
    trainer.calls(1)
    rows = np.asarray(epoch_order(stream_key(0, Stream.ORDER, 0), 90, 32, False)[0][2][:26])
    module = trainer.experiment.model.module

    @jax.jit
    def objective(params):
        total, statistics = 0.0, []
        for own in (rows[index::4] for index in range(4)):
            images = (STRIPES.train.images[own] / 255 - 0.3053) / 0.3762
            variables = {"params": params, "batch_stats": before.batch_stats}
            logits, changed = module.apply(
                variables, jnp.asarray(images, jnp.float32), True, mutable=["batch_stats"]
            )
            targets = 0.9 * jax.nn.one_hot(STRIPES.train.labels[own], 4) + 0.1 / 4
            total -= (targets * jax.nn.log_softmax(logits)).sum() / 26
            share = len(own) / 26
            statistics.append(jax.tree.map(lambda leaf: share * leaf, changed["batch_stats"]))  # noqa: B023
        return total, jax.tree.map(lambda *leaves: sum(leaves), *statistics)

    (loss, statistics), gradient = jax.value_and_grad(objective, has_aux=True)(before.params)
    after = seed_of(host(trainer).weights)
    np.testing.assert_allclose(trainer.losses[2][0, 0], loss, rtol=1e-5)
    assert_same(after.batch_stats, statistics, rtol=1e-5, atol=1e-6)
    expected = jax.tree.map(lambda p, g: p - 0.05 * g, before.params, gradient)
    assert_same(after.params, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_parts_take_less_memory():
    """Of a ResNet, whose activations are most of it: eight parts take under a third."""
    sizes = []
    for count in (1, 8):
        config = settings(train={"batch_size": 64}, optimizer={"accumulate": count})
        trainer = Trainer(STRIPES, config)
        program = trainer.experiment.train.lower(trainer.state, trainer.splits["train"]).compile()
        sizes.append(program.memory_analysis().temp_size_in_bytes)
    assert sizes[1] < sizes[0] / 3


@pytest.mark.slow
def test_one_schedule_for_all_generations_has_one_average():
    options = {"schedule": "single", "ema": 0.9}
    trainer = Trainer(STRIPES, mlp(optimizer=options, train={"epochs_per_generation": 1})).calls(5)
    mean = host(trainer).ema
    assert_same(trainer.event().state.ema, mean)
    assert differ(mean, trainer.state.weights)


def test_adamw_equals_optax_over_the_gradients_of_numpy():
    """Two generations: moments, their count and the cosine start again."""
    options = {"name": "adamw", "args": {"b2": 0.99, "weight_decay": 0.1}, "learning_rate": 0.01}
    config = mlp(optimizer=options, train={"epochs_per_generation": 2})
    trainer = Trainer(STRIPES, config)
    params = seed_of(trainer.state.weights.params)
    trainer.calls(13)
    for step in range(13):
        rate = oracle.rate(step, peak=0.01, epochs=2)
        # The rate outside, so that nothing of ours is used.
        tx = optax.adamw(1.0, b2=0.99, weight_decay=0.1)
        if step % 10 == 0:
            state = tx.init(params)
        _, gradient = oracle.loss_and_gradient(oracle.wide(params), *batch(step, config))
        updates, state = tx.update(jax.tree.map(np.float32, gradient), state, params)
        params = jax.tree.map(lambda p, u: p + rate * u, params, updates)  # noqa: B023
    # Adam divides by roots of gradients that are nearly zero: rounding counts for more than elsewhere.
    assert_same(seed_of(trainer.state.weights.params), params, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("adafactor", "dog") else pytest.mark.slow)
        for name in aliases.names()
    ],
)
def test_steps_in_a_scan_take_every_optimizer(name):
    """Also one that sets a part of its state to a constant; traced only."""
    config = mlp(optimizer={"name": name})
    experiment = Trainer.build(STRIPES, config)
    state = experiment.abstract_state(1)
    after, _ = jax.eval_shape(experiment.train, state, experiment.abstract_data())
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_the_average_is_scored_and_evaluated(tmp_path, shared_folder):
    config = configs.load(f"{Runs(shared_folder).config}:normal", ["--config.optimizer.ema=0.9"])
    train = dataclasses.replace(config.train, generations=1, epochs_per_generation=2)
    config = dataclasses.replace(config, train=train)
    loop.train(config, tmp_path, experiments.load_data(config.data), devices=1)
    rows = metrics.read(tmp_path)
    assert all("validation_ema/accuracy" in row for row in rows)
    assert ["test_ema/accuracy" in row for row in rows] == [False, True]
    loaded_run = LoadedRun(tmp_path)
    assert [network.weights for network in loaded_run.networks] == ["last", "best", "ema"]
    (network,) = LoadedRun(tmp_path, weights=("ema",)).networks
    test = loaded_run.dataset.test
    logits = loaded_run.logits(network, test.images)
    found = (logits.argmax(-1) == test.labels).mean()
    assert found == pytest.approx(rows[-1]["test_ema/accuracy"][0], abs=1e-6)
    assert found != pytest.approx(rows[-1]["test_last/accuracy"][0], abs=1e-6)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("args.b2=0.99", "optimizer.args.b2 is for optimizers of optax; sgd takes optimizer.mom"),
        ("args=1", "optimizer.args is a section; set one of its fields"),
        ("name=adamw args.b2=high", "optimizer.args.b2 = 'high' must be of type float"),
        ("name=adamw weight_decay=0.1", "optimizer.weight_decay = 0.1 has no effect on adamw"),
        ("name=adamw nesterov=true", "optimizer.nesterov = True has no effect on adamw: set it to"),
        ("name=addam", "optimizer.name = 'addam' is neither sgd, adam or radam nor"),
        ("clip_norm=-1", "optimizer.clip_norm = -1 must be 0 or positive"),
        ("ema=1", "optimizer.ema = 1 must lie in [0, 1)"),
        ("accumulate=0", "optimizer.accumulate = 0 must be at least 1"),
    ],
)
def test_errors(shared_folder, overrides, says):
    load = functools.partial(configs.load, f"{Runs(shared_folder).config}:seal")
    with pytest.raises(UsageError) as caught:
        load([f"--config.optimizer.{override}" for override in overrides.split()])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    # The order of overrides does not matter.
    given = ["--config.optimizer.args.b2=0.99", "--config.optimizer.name=adamw"]
    assert load(given) == load(given[::-1])
    assert load(given).optimizer.args == {"b2": 0.99}
