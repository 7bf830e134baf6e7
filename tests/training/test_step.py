"""The compiled programs of a run, on up to eight fake devices."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import STRIPES, Trainer, assert_same, host, mlp, normalised, seed_of, settings

from seal_jax.core import mesh as meshes
from seal_jax.core.state import Stream, stream_key
from seal_jax.data import augment
from seal_jax.training.batches import epoch_order

COLLECTIVES = re.compile(
    r" (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(.*"
)


def communicating_devices(program):
    """Return the largest number of devices that any collective of a compiled program joins."""
    sizes = [0]
    for collective in COLLECTIVES.findall(program.as_text()):
        listed = re.search(r"replica_groups=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", collective)
        iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", collective)
        named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", collective)
        assert listed or iota or named, collective
        if named:
            lengths = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
            axes = re.findall(r"\w+", named[2])
            sizes.append(math.prod(int(lengths[axis]) for axis in axes))
        elif listed:
            sizes += [len(group.split(",")) for group in listed[1].split("},{")]
        elif iota:
            sizes.append(int(iota[2]))
    return max(sizes)


SEAL = {"name": "seal", "threshold": "dense2", "ascent_scale": 0.1}


def quick(method=None, **sections):
    """Settings of an MLP with BatchNorm, otherwise as a ResNet's: it compiles in a fifth of the time."""
    sections["data"] = {"crop_padding": 1, "flip": True} | sections.get("data", {})
    sections["run"] = {"steps_per_call": 0} | sections.get("run", {})
    return mlp(method, norm="batch", **sections)


@pytest.fixture(scope="module")
def dataset():
    return STRIPES


@pytest.fixture(scope="module")
def single(dataset):
    """One seed on one device, SEAL into the ascent of generation 1."""
    return Trainer(dataset, quick(SEAL)).run(5)


def test_train_equals_a_plain_flax_and_optax_loop(dataset):
    """Order, augmentation, loss, BatchNorm and optimizer against a loop written out by hand."""
    config = settings()
    trainer = Trainer(dataset, config)
    model = dataclasses.replace(trainer.experiment.model.module, convolution="native")
    spec = trainer.experiment.batches.augmentation
    params, stats, _ = jax.tree.map(lambda leaf: leaf[0], trainer.state.weights)
    rates = [0.5 * 0.05 * (1 + np.cos(np.pi * epoch / 4)) for epoch in range(4)]
    tx = optax.chain(optax.add_decayed_weights(5e-4), optax.trace(0.9))
    opt_state = tx.init(params)

    @jax.jit
    def update(params, stats, opt_state, images, labels, step, rate):
        draws = augment.draw(stream_key(0, Stream.AUGMENT, step), 16, spec, (8, 8, 1))
        images = augment.apply(images, draws, spec)

        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            logits, changed = model.apply(variables, images, train=True, mutable=["batch_stats"])
            targets = 0.9 * jax.nn.one_hot(labels, 4) + 0.1 / 4
            return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean(), changed["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), stats, opt_state, value

    losses = []
    for epoch in range(2):
        order, _ = epoch_order(stream_key(0, Stream.ORDER, epoch), 90, 16)
        for number, rows in enumerate(np.asarray(order)):
            step = epoch * 5 + number
            batch = dataset.train.images[rows], dataset.train.labels[rows]
            params, stats, opt_state, loss = update(
                params, stats, opt_state, *batch, step, rates[epoch]
            )
            losses.append(float(loss))
    trainer.run(2)
    np.testing.assert_allclose(np.concatenate(trainer.losses, 1)[0], losses, rtol=1e-4)
    ours = jax.tree.map(lambda leaf: leaf[0], trainer.state.weights)
    assert_same(ours.params, params, rtol=1e-3, atol=1e-5)
    assert_same(ours.batch_stats, stats, rtol=1e-3, atol=1e-5)


def test_seeds_on_devices_equal_single_runs_and_never_communicate(dataset, single):
    four = Trainer(dataset, quick(SEAL, train={"seeds": 4}), devices=4).run(5)
    assert four.experiment.mesh.shape == {"seed": 4, "data": 1}
    for seed in range(4):
        alone = single
        if seed:
            alone = Trainer(dataset, quick(SEAL, train={"seed": seed}))
            # The same programs serve every seed: only the numbers differ.
            alone.experiment = single.experiment
            alone.run(5)
        assert_same(
            jax.tree.map(lambda leaf, seed=seed: leaf[seed], four.state),
            jax.tree.map(lambda leaf: leaf[0], alone.state),
        )
    compiled = four.experiment.train.lower(four.state, four.splits["train"]).compile()
    assert communicating_devices(compiled) <= 1


@pytest.mark.slow
def test_seeds_of_one_device_together_or_in_turn_equal_single_runs(dataset, single):
    for batching in ("vmap", "map"):
        config = quick(SEAL, train={"seeds": 2}, run={"seed_batching": batching})
        both = Trainer(dataset, config).run(5)
        first = jax.tree.map(lambda leaf: leaf[:1], both.state.weights)
        assert_same(first, single.state.weights, rtol=1e-3, atol=1e-4)
        assert np.abs(both.losses[-1][0] - both.losses[-1][1]).max() > 1e-3


def test_data_parallel_equals_one_device_to_rounding(dataset, single):
    eight = Trainer(dataset, quick(SEAL), devices=8)
    assert eight.experiment.mesh.shape == {"seed": 1, "data": 8}
    before = jax.tree.map(lambda leaf: leaf.sharding, eight.state)
    eight.run(5)
    np.testing.assert_allclose(
        np.concatenate(eight.losses, 1), np.concatenate(single.losses, 1), rtol=2e-3
    )
    assert_same(eight.state.weights, single.state.weights, rtol=2e-2, atol=2e-3)
    after = jax.tree.map(lambda leaf: leaf.sharding, eight.state)
    same = jax.tree.map(
        lambda a, b, leaf: a.is_equivalent_to(b, leaf.ndim), before, after, eight.state
    )
    assert all(jax.tree.leaves(same))
    compiled = eight.experiment.train.lower(eight.state, eight.splits["train"]).compile()
    assert communicating_devices(compiled) == 8


@pytest.mark.slow
def test_statistics_of_a_device_differ_from_those_of_the_batch(dataset, single):
    config = quick(SEAL, train={"batch_norm": "device"})
    eight = Trainer(dataset, config, devices=8).run(1)
    assert np.abs(eight.losses[0] - single.losses[0]).max() > 1e-3


def test_one_program_serves_all_phases_and_generations(dataset):
    trainer = Trainer(dataset, quick(SEAL)).run(12)
    assert int(trainer.state.step[0]) == trainer.experiment.total_steps == 60
    for program in (trainer.experiment.train, trainer.experiment.start_generation):
        assert program._cache_size() == 1


def test_calls_of_part_of_an_epoch_equal_whole_epochs(dataset, single):
    parts = Trainer(dataset, quick(SEAL, run={"steps_per_call": 1})).run(5)
    np.testing.assert_allclose(
        np.concatenate(parts.losses, 1), np.concatenate(single.losses, 1), rtol=1e-3
    )
    assert_same(parts.state.metric_sums, single.state.metric_sums, rtol=1e-3)


def test_llf_event_draws_later_layers_from_the_models_own_initialisation(dataset):
    trainer = Trainer(dataset, settings({"name": "llf"})).run(1)
    before = jax.device_get(trainer.state)
    trainer.state = trainer.state._replace(step=jnp.full_like(trainer.state.step, 20))
    after = jax.device_get(
        trainer.experiment.start_generation(trainer.state, trainer.splits["train"])
    )
    fresh = jax.jit(trainer.experiment.model.init)(stream_key(0, Stream.EVENT, 1))["params"]
    for name in ("conv1", "bn1", "layer1", "layer2"):
        assert_same(after.weights.params[name], before.weights.params[name])
    old, new = before.weights.params["layer3"]["block0"], after.weights.params["layer3"]["block0"]
    assert_same(new["bn1"], old["bn1"])
    for drawn, expected in (
        (new["conv1"]["kernel"], fresh["layer3"]["block0"]["conv1"]["kernel"]),
        (new["conv2"]["kernel"], fresh["layer3"]["block0"]["conv2"]["kernel"]),
        (after.weights.params["fc"]["kernel"], fresh["fc"]["kernel"]),
        (after.weights.params["fc"]["bias"], fresh["fc"]["bias"]),
    ):
        # Up to the rounding of a program compiled as a whole and operation by operation.
        np.testing.assert_allclose(drawn[0], expected, rtol=1e-6)
    momentum = [leaf for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim > 1]
    assert momentum
    assert all(not leaf.any() for leaf in momentum)


def test_filled_batches_count_every_image_once(dataset):
    trainer = Trainer(dataset, quick(train={"drop_last": False})).run(1)
    assert trainer.losses[0].shape == (1, 6)
    assert float(trainer.state.metric_sums.weight[0]) == 90


@pytest.mark.parametrize(
    ("devices", "batch_norm"),
    [pytest.param(1, "global", marks=pytest.mark.slow), (8, "global"), (8, "device")],
)
def test_images_that_fill_a_batch_up_enter_nothing(dataset, devices, batch_norm):
    """The last batch has 26 of 32 images: of eight devices one gets half its part, one nothing."""
    config = mlp(
        norm="batch",
        optimizer={"schedule": "constant", "momentum": 0.0, "weight_decay": 0.0},
        train={"drop_last": False, "batch_size": 32, "batch_norm": batch_norm},
    )
    trainer = Trainer(dataset, config, devices=devices).calls(2)
    before = seed_of(host(trainer).weights)
    trainer.calls(1)
    rows = epoch_order(stream_key(0, Stream.ORDER, 0), 90, 32, False)[0][2][:26]
    images = jnp.asarray(normalised(dataset.train.images[rows]), jnp.float32)
    labels = dataset.train.labels[rows]
    size = 4 if batch_norm == "device" else 26  # what is normalised together
    parts = [slice(start, start + size) for start in range(0, 26, size)]
    module = dataclasses.replace(trainer.experiment.model.module, bn_axis_name=None)

    @jax.jit
    def objective(params):
        total, statistics = 0.0, []
        for part in parts:
            variables = {"params": params, "batch_stats": before.batch_stats}
            logits, changed = module.apply(variables, images[part], True, mutable=["batch_stats"])
            targets = 0.9 * jax.nn.one_hot(labels[part], 4) + 0.1 / 4
            total -= (targets * jax.nn.log_softmax(logits)).sum() / 26
            share = len(labels[part]) / 26
            statistics.append(jax.tree.map(lambda leaf: share * leaf, changed["batch_stats"]))  # noqa: B023
        return total, jax.tree.map(lambda *leaves: sum(leaves), *statistics)

    (loss, statistics), gradient = jax.value_and_grad(objective, has_aux=True)(before.params)
    params = jax.tree.map(lambda p, g: p - 0.05 * g, before.params, gradient)
    after = seed_of(host(trainer).weights)
    np.testing.assert_allclose(trainer.losses[2][0, 0], loss, rtol=1e-5)
    assert_same(after.batch_stats, statistics, rtol=1e-5, atol=1e-6)
    assert_same(after.params, params, rtol=1e-4, atol=1e-6)


def test_scores_equal_numpy(dataset):
    trainer = Trainer(dataset, settings(run={"eval_batch_size": 6})).run(1)
    state, sums = trainer.experiment.validate(trainer.state, trainer.splits["validation"])
    weights = jax.tree.map(lambda leaf: leaf[0], jax.device_get(state.weights))
    spec = trainer.experiment.batches.augmentation
    images = (dataset.validation.images / 255 - np.array(spec.mean)) / np.array(spec.std)
    infer = jax.jit(functools.partial(trainer.experiment.model.module.apply, train=False))
    logits = np.asarray(infer(weights._asdict(), np.float32(images)), np.float64)
    top = logits.max(-1, keepdims=True)
    log_total = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[:, 0]
    labels = dataset.validation.labels
    losses = log_total - logits[np.arange(10), labels]
    np.testing.assert_allclose(float(sums.loss[0]), losses.sum(), rtol=1e-4)
    assert float(sums.correct[0]) == (logits.argmax(-1) == labels).sum()
    assert float(sums.weight[0]) == 10


def test_best_weights_are_those_of_the_best_epoch_of_the_generation(dataset):
    trainer = Trainer(dataset, quick(SEAL, optimizer={"learning_rate": 0.2}))
    seen = []
    for epoch in range(4):
        trainer.run(1)
        trainer.state, sums = trainer.experiment.validate(
            trainer.state, trainer.splits["validation"]
        )
        seen.append((float(sums.correct[0]), -epoch, jax.device_get(trainer.state.weights)))
    accuracy, epoch, weights = max(seen, key=lambda entry: entry[:2])
    best = jax.device_get(trainer.state.best)
    assert best.epoch[0] == -epoch
    np.testing.assert_allclose(best.accuracy[0], accuracy / 10)
    assert_same(best.weights, weights)
    trainer.run(1)  # a new generation forgets the best of the last
    assert trainer.state.best.accuracy[0] == -1


def test_bfloat16_computes_with_float32_parameters(dataset):
    trainer = Trainer(dataset, quick(SEAL, train={"dtype": "bfloat16"})).run(2)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainer.state.weights)} == {np.dtype("float32")}
    text = trainer.experiment.train.lower(trainer.state, trainer.splits["train"]).as_text()
    assert re.search(r"dot_general.*bf16", text)
    assert trainer.losses[1].mean() < trainer.losses[0].mean()


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_programs_are_compiled_with_the_options_of_deterministic(dataset, platform, monkeypatch):
    """XLA knows GPU's options on every platform, and refuses a name that it does not know."""
    monkeypatch.setattr(meshes, "platform", lambda mesh: platform)

    def compiled(deterministic):
        experiment = Trainer.build(dataset, quick(run={"deterministic": deterministic}))
        return experiment.finite.lower(experiment.abstract_state(1)).compile()

    compiled(True)
    options = meshes.compiler_options

    def renamed(*arguments):
        return {f"{name}_unknown": value for name, value in options(*arguments).items()}

    monkeypatch.setattr(meshes, "compiler_options", renamed)
    compiled(False)
    if platform == "gpu":
        with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_deterministic_ops_unknown"):
            compiled(True)
    else:
        compiled(True)
