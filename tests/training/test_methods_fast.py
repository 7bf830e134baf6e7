"""FAST and its baselines through the compiled programs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_mlp as oracle
import pytest
from programs import (
    STRIPES,
    Trainer,
    assert_same,
    differ,
    host,
    mlp,
    normalised,
    seed_of,
)

from seal_jax.core.state import Stream, stream_key
from seal_jax.errors import UsageError
from seal_jax.training import loop, workdir
from seal_jax.training.batches import balanced_order

CONSTANT = {"schedule": "constant", "weight_decay": 0.0, "label_smoothing": 0.0}


def fast(options=None, norm=None, **sections):
    train = {"sampling": "balanced", "generations": 1} | sections.pop("train", {})
    method = {"name": "fast", **(options or {})}
    return mlp(method, norm=norm, optimizer=CONSTANT, train=train, **sections)


def balanced_rows(step):
    key = stream_key(0, Stream.ORDER, step // 5)
    rows, weights = balanced_order(key, jnp.asarray(STRIPES.train.labels), 4, 16)
    assert (np.asarray(weights) == 1).all()
    return np.asarray(rows)[step % 5]


def test_fast_from_its_known_first_step_on():
    """ln N, features that wait for one step, W = (1 - M) alpha / M Delta^T A; then a NumPy loop."""
    trainer = Trainer(STRIPES, fast({"alpha": 0.2, "beta": 0.02}), devices=2)
    start = seed_of(host(trainer).weights.params)
    assert not start["fc"]["kernel"].any()
    params, trace = oracle.wide(start), oracle.zeros(oracle.wide(start))
    for step in range(7):
        rows = balanced_rows(step)
        labels = STRIPES.train.labels[rows]
        images = normalised(STRIPES.train.images[rows])
        loss, gradient = oracle.loss_and_gradient(params, images, labels, smoothing=0)
        trace = jax.tree.map(lambda g, v: 0.9 * v + 0.1 * g, gradient, trace)
        params = {
            name: oracle.add(own, -(0.2 if name == "fc" else 0.02), trace[name])
            for name, own in params.items()
        }
        trainer.calls(1)
        found = seed_of(host(trainer).weights.params)
        np.testing.assert_allclose(trainer.losses[step][0, 0], loss, rtol=1e-5)
        assert_same(found, params, rtol=1e-3, atol=1e-6)
        if step == 0:
            np.testing.assert_allclose(trainer.losses[0][0, 0], np.log(4), rtol=3e-7)
            for name in oracle.HIDDEN:
                assert_same(found[name], start[name])
            features = oracle.forward(oracle.wide(start), images)[0][-1]
            delta = np.eye(4)[labels] - 1 / 4
            expected = 0.1 * 0.2 / 16 * features.T @ delta
            np.testing.assert_allclose(found["fc"]["kernel"], expected, rtol=1e-4, atol=1e-8)
        if step == 1:
            assert differ(found["dense1"], start["dense1"])


def flops(trainer):
    program = trainer.experiment.train.lower(trainer.state, trainer.splits["train"]).compile()
    return program.cost_analysis()["flops"]


def moved_statistics(trainer):
    """Give the features other statistics than those they start with."""
    state = host(trainer)
    shifted = jax.tree.map(lambda leaf: leaf + np.float32(0.3), state.weights.batch_stats)
    return trainer.put(state._replace(weights=state.weights._replace(batch_stats=shifted)))


def loss_of(trainer, weights, step, train):
    """The mean cross entropy of a step's batch in training or in inference mode, by NumPy."""
    images = jnp.asarray(normalised(STRIPES.train.images[balanced_rows(step)]), jnp.float32)
    variables = seed_of(weights)._asdict()
    features = trainer.experiment.model.extract(variables, images, train)[0]
    logits = oracle.logits(oracle.wide(seed_of(weights).params["fc"]), np.asarray(features))
    return oracle.cross_entropy(logits, STRIPES.train.labels[balanced_rows(step)], smoothing=0)


def test_the_head_has_no_bias_unless_asked_for():
    assert set(Trainer(STRIPES, fast()).state.weights.params["fc"]) == {"kernel"}
    asked = Trainer(STRIPES, fast(model={"head_bias": True}))
    assert set(asked.state.weights.params["fc"]) == {"kernel", "bias"}


def test_a_run_records_what_the_method_chose(tmp_path):
    config = fast(norm="batch", train={"epochs_per_generation": 1})
    model = dataclasses.replace(config.model, head_bias=None)
    train = dataclasses.replace(config.train, batch_statistics=None)
    left_open = dataclasses.replace(config, model=model, train=train)
    done = loop.train(left_open, tmp_path, STRIPES, devices=1)
    assert set(done.state.weights.params["fc"]) == {"kernel"}
    record = workdir.read(tmp_path)
    assert record["model"]["head_bias"] is False
    assert record["train"]["batch_statistics"] == "frozen"


def test_feature_extraction_moves_the_head_alone():
    """The features stay bit for bit, in inference mode too: so do the statistics."""
    frozen = {"train": {"batch_statistics": "frozen"}}
    everything = Trainer(STRIPES, fast({"head": "kaiming_fan_in"}, norm="batch", **frozen))
    trainer = Trainer(STRIPES, fast({"head": "kaiming_fan_in", "beta": 0.0}, norm="batch"))
    start = host(moved_statistics(trainer)).weights
    moved_statistics(everything)
    assert_same(start, everything.state.weights)
    # The gradient of the features is not computed: two of three products of the hidden layers.
    assert flops(trainer) < 0.7 * flops(everything)
    # In the first step the head moves as it does where everything learns.
    heads = (t.calls(1).state.weights.params["fc"] for t in (trainer, everything))
    assert_same(*heads, rtol=1e-5, atol=1e-7)
    expected = loss_of(trainer, start, 0, train=False)
    np.testing.assert_allclose(trainer.losses[0][0, 0], expected, rtol=1e-5)
    assert abs(loss_of(trainer, start, 0, train=True) - expected) > 1e-2
    trainer.calls(2)
    found = host(trainer).weights
    assert_same(found.batch_stats, start.batch_stats)
    assert_same(host(everything).weights.batch_stats, start.batch_stats)
    for name in oracle.HIDDEN:
        assert_same(found.params[name], start.params[name])
    assert differ(found.params["fc"], start.params["fc"])


def test_statistics_of_feature_extraction_move_if_asked_for():
    batch = {"train": {"batch_statistics": "batch"}}
    trainer = Trainer(STRIPES, fast({"beta": 0.0}, norm="batch", **batch))
    start = host(trainer).weights.batch_stats
    assert differ(trainer.calls(1).state.weights.batch_stats, start)


def test_frozen_statistics_are_the_same_bits_on_three_devices_and_in_every_pass_of_sam():
    """Thirds of a number need not add up to it."""
    train = {"batch_statistics": "frozen", "batch_size": 15}
    trainer = Trainer(STRIPES, mlp({"name": "sam"}, norm="batch", train=train), devices=3)
    start = host(moved_statistics(trainer)).weights
    found = host(trainer.calls(3)).weights
    assert_same(found.batch_stats, start.batch_stats)
    assert differ(found.params, start.params)


def test_a_frozen_head_stays():
    trainer = Trainer(STRIPES, fast({"head": "normal", "sigma": 0.1, "alpha": 0.0}))
    start = host(trainer).weights.params
    trainer.calls(3)
    found = host(trainer).weights.params
    assert_same(found["fc"], start["fc"])
    assert 0.05 < start["fc"]["kernel"].std() < 0.15
    for name in oracle.HIDDEN:
        assert differ(found[name], start[name])


@pytest.mark.parametrize("counts", [(10, 10, 10), (3, 17, 25)])
def test_balanced_batches_have_equal_counts_of_each_class(counts):
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat(np.arange(3), counts)).astype(np.int32)
    draw = jax.jit(functools.partial(balanced_order, num_classes=3, batch=6))
    epochs = []
    for epoch in range(2):
        rows, weights = map(np.asarray, draw(jax.random.key(epoch), labels))
        assert rows.shape == weights.shape == (len(labels) // 6, 6)
        assert (np.sort(labels[rows], axis=1) == [0, 0, 1, 1, 2, 2]).all()
        assert (weights == 1).all()
        for which, count in enumerate(counts):
            own = rows[labels[rows] == which]  # in the order they come
            turns = [own[start : start + count] for start in range(0, len(own), count)]
            assert len(set(turns[0])) == len(turns[0])
            for turn in turns[1:]:  # the same way round again
                np.testing.assert_array_equal(turn, turns[0][: len(turn)])
            if count <= len(own):
                assert set(turns[0]) == set(np.flatnonzero(labels == which))
        epochs.append(rows)
    assert (epochs[0] != epochs[1]).any()


def test_rule_of_the_warm_up():
    """Over when the accuracy has not risen by the gain for so many steps; over for good."""
    method = {"warmup": True, "warmup_gain": 0.05, "warmup_steps": 7}
    trainer = Trainer(STRIPES, fast(method))
    judge = jax.jit(trainer.experiment.method.on_validation)
    random = np.random.default_rng(1)
    lengths = set()
    for _ in range(20):
        method_state = jax.tree.map(lambda leaf: leaf[0], trainer.state.method_state)
        best, since, warming, over = -np.inf, 0, True, None
        rising = 0.9 - 0.8 * np.exp(-np.arange(12) / random.uniform(0.5, 4))
        accuracies = rising + random.normal(0, 0.02, 12)
        for number, accuracy in enumerate(accuracies.astype(np.float32)):
            step = 2 * (number + 1)
            if accuracy >= np.float32(best) + np.float32(0.05):
                best, since = accuracy, step
            elif warming and step - since >= 7:
                warming, over = False, step
            method_state = judge(method_state, accuracy, np.int32(step))
            assert bool(method_state.warming) == warming
        lengths.add(over)
    assert len(lengths) > 2


@pytest.mark.parametrize("statistics", [True, False])
def test_features_wait_for_the_warm_up(statistics):
    method = {"head": "kaiming_fan_in", "warmup": True, "warmup_gain": 0.3, "warmup_steps": 3}
    method["warmup_statistics"] = statistics
    train = {"validate_every": 1, "batch_statistics": "batch"}
    trainer = Trainer(STRIPES, fast(method, norm="batch", train=train))
    seen, warm = [host(moved_statistics(trainer))], []
    for _ in range(10):
        trainer.calls(1)
        trainer.state, _ = trainer.experiment.validate(trainer.state, trainer.splits["validation"])
        seen.append(host(trainer))
        warm.append(bool(seen[-2].method_state.warming[0]))
    assert 3 <= sum(warm) < 9
    assert warm == sorted(warm, reverse=True)
    # Without them the features are in inference mode for as long as it lasts, and no longer.
    for step in (0, sum(warm)):
        expected = loss_of(trainer, seen[step].weights, step, train=statistics or not warm[step])
        np.testing.assert_allclose(trainer.losses[step][0, 0], expected, rtol=1e-4)
    for before, after, warming in zip(seen[:-1], seen[1:], warm, strict=True):
        old, new = before.weights, after.weights
        assert differ(new.params["fc"], old.params["fc"])
        for name in oracle.HIDDEN:
            assert differ(new.params[name], old.params[name]) != warming
            moved = differ(new.batch_stats[name], old.batch_stats[name])
            assert moved == (statistics or not warming)
    # The features start without a momentum from the time when they waited.
    first = sum(warm)
    assert not any(leaf.any() for leaf in momenta(seen[first].opt_state))
    assert any(leaf.any() for leaf in momenta(seen[first + 1].opt_state))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_probing_then_fine_tuning_is_two_trainings(optimizer):
    """Feature extraction for 8 of 20 steps; then everything, the features with a fresh optimizer."""
    settings = CONSTANT | {"name": optimizer, "schedule": "steps", "decay_epochs": "1"}
    if optimizer == "adamw":
        settings |= {"momentum": 0.0}
    train = {"generations": 1, "batch_statistics": "batch", "seeds": 2}

    def trainer(**options):
        method = {"name": "fast", "head": "kaiming_fan_in", "alpha": 0.02, **options}
        return Trainer(STRIPES, mlp(method, norm="batch", optimizer=settings, train=train))

    both = trainer(probe_share=0.39, beta=0.01)  # 7.8 steps
    frozen = {"batch_statistics": "frozen"}
    alone = Trainer(
        STRIPES,
        mlp(
            {"name": "fast", "head": "kaiming_fan_in", "alpha": 0.02, "beta": 0.0},
            norm="batch",
            optimizer=settings,
            train=train | frozen,
        ),
    )
    both.calls(8)
    alone.calls(8)
    assert_same(both.state.weights, alone.state.weights, rtol=1e-6, atol=1e-7)
    assert not any(leaf.any() for leaf in momenta(host(both).opt_state))
    # From here on the weights are those of ordinary training that the head's optimizer enters with its memory.
    plain = trainer(beta=0.01)
    start = host(both)
    plain.put(
        host(plain)._replace(weights=start.weights, step=start.step, opt_state=start.opt_state)
    )
    both.calls(5)
    plain.calls(5)
    assert_same(both.state.weights, plain.state.weights, rtol=1e-6, atol=1e-7)
    assert differ(both.state.weights.batch_stats, start.weights.batch_stats)
    assert differ(both.state.weights.params["dense1"], start.weights.params["dense1"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"probe_share": 1.0}, r"method.probe_share = 1 must lie in \[0, 1\)"),
        ({"probe_share": 0.5, "warmup": True}, "method.probe_share does not go with method.warmup"),
        (
            {"probe_share": 0.5, "beta": 0.0},
            "method.probe_share needs method.alpha and method.beta",
        ),
    ],
)
def test_probing_that_cannot_be(options, words):
    with pytest.raises(UsageError, match=words):
        Trainer.build(STRIPES, fast(options))


def momenta(opt_state):
    """The optimizer's memory of the features."""
    found = jax.tree_util.tree_leaves_with_path(opt_state)
    return [leaf for path, leaf in found if "dense" in jax.tree_util.keystr(path)]


@pytest.mark.parametrize("schedule", ["single", "restart", "steps"])
def test_the_rate_in_the_log_is_the_rate_of_the_features(schedule):
    """Two generations of two epochs: without momentum an update is the rate times the gradient."""
    optimizer = {"schedule": schedule, "momentum": 0.0, "weight_decay": 0.0, "decay_epochs": "1"}
    config = mlp(
        {"name": "fast", "alpha": 0.5, "beta": 0.1, "head": "normal", "sigma": 0.1},
        optimizer=optimizer,
        train={"generations": 2, "epochs_per_generation": 2},
    )
    experiment = Trainer(STRIPES, config).experiment
    params = experiment.model.init(jax.random.key(0))["params"]
    ones = jax.tree.map(jnp.ones_like, params)
    state, update = experiment.method.tx.init(params), jax.jit(experiment.method.tx.update)
    for step in range(experiment.total_steps):
        updates, state = update(ones, state, params)
        logged = experiment.learning_rate(step)
        np.testing.assert_allclose(updates["dense1"]["linear"]["kernel"], -logged, rtol=1e-5)
        np.testing.assert_allclose(updates["fc"]["kernel"], -5 * logged, rtol=1e-5)
