"""Trainings by every method equal those of a NumPy transcription."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lw_oracle import QUICK, Network, gradient

from papers import lw_synthetic
from papers.lw_synthetic import BLOCKS, Plan, Settings, init, sample
from seal_jax import selections

ALPHA, STEPS, RATE, ROUNDS, SHARE = 2.0, 4, 0.05, 9, 0.2
KEY = jax.random.key(7)
DATA, TEST = sample(jax.random.key(1), 32), sample(jax.random.key(2), 64)
# The logits are normalised too, so that all three normalisers are compared.
TRAIN = Settings(train_size=32, learning_rate=RATE, steps=STEPS, share=SHARE, head="normalised")
METHODS = ("BL", "WELSR", "DSD", "DSD global", "WELS", "FC", "LW", "LW train")
# Each with its penalty: they need not share one.
PENALTY = {"BL": 0.01, "LW train": 0.02}


@functools.cache
def trained():
    before = dataclasses.replace(TRAIN, first_round="algorithm")
    by_method = {**lw_synthetic.events("1", TRAIN), "LW": lw_synthetic.events("1", before)["LW"]}
    by_method["LW train"] = lw_synthetic.events("1", TRAIN)["LW"]
    by_method["DSD global"] = by_method["DSD"]
    plans = [
        Plan(np.float32(ALPHA), np.int32(1), np.float32(PENALTY.get(name, 0)), by_method[name])
        for name in METHODS
    ]
    stacked = jax.tree.map(lambda *fields: jnp.stack(fields), *plans)

    @functools.partial(jax.jit, static_argnums=0)
    def run(settings, plans):
        train = lw_synthetic.train
        return jax.vmap(lambda plan: train(settings, plan, KEY, DATA, TEST))(plans)

    results = dict(zip(METHODS, np.stack(run(TRAIN, stacked), -1), strict=True))
    dsd = jax.tree.map(lambda field: field[None], plans[METHODS.index("DSD global")])
    settings = dataclasses.replace(TRAIN, dsd="global")
    return {**results, "DSD global": np.stack(run(settings, dsd), -1)[0]}


def layers(params):
    """Return the layers as the oracle has them: kernel ``[out, in]`` and bias ``[out, 1]``."""
    return [(params[name]["kernel"], params[name]["bias"][:, None]) for name in BLOCKS]


@functools.cache
def drawn():
    """Return what is random: the first network, and each round's fresh one and masks."""
    first_key, fixed_key, round_key = jax.random.split(KEY, 3)
    first = init(first_key, 1)
    rounds = []
    for index in range(ROUNDS):
        fresh_key, new_key, _ = jax.random.split(jax.random.fold_in(round_key, index), 3)
        masks = [
            [mask for mask, _ in layers(selections.random_subset(key, first, SHARE))]
            for key in (fixed_key, new_key)
        ]
        rounds.append((layers(init(fresh_key, 1)), *masks))
    return layers(first), rounds


def smallest(kernels, share):
    count = round(share * sum(kernel.size for kernel in kernels))
    limit = np.sort(np.concatenate([np.abs(kernel).ravel() for kernel in kernels]))[count]
    return [np.abs(kernel) < limit for kernel in kernels]


def event(name, network, index):
    fresh, same, new = drawn()[1][index]
    kernels = [kernel for kernel, _ in network.params]
    if name.startswith("LW"):
        at = index - (name == "LW train")
        if at >= 0:
            k = at // 3 + 1
            network.rescale(range(k))
            network.normalise(k - 1)
            network.reinitialise(fresh, range(k, 3))
    elif index and name == "FC":
        network.reinitialise(fresh, [1, 2])
    elif index and name == "WELS":
        network.reinitialise_kernels(fresh, same)
    elif index and name == "WELSR":
        network.reinitialise_kernels(fresh, new)
    elif index and name == "DSD":
        masks = [smallest([kernel], SHARE)[0] for kernel in kernels]
        network.reinitialise_kernels(fresh, masks)
    elif index and name == "DSD global":
        network.reinitialise_kernels(fresh, smallest(kernels, SHARE))


@pytest.mark.parametrize("name", METHODS)
def test_every_method(name):
    network = Network(drawn()[0], ALPHA, DATA, penalty=PENALTY.get(name, 0))
    expected = []
    for index in range(ROUNDS):
        event(name, network, index)
        network.steps(STEPS, RATE)
        expected.append(network.measured(TEST))
    expected = np.array(expected)
    got = trained()[name]
    np.testing.assert_allclose(got[:, 2], expected[:, 2], rtol=2e-4)
    # A logit on the edge may fall to the other side.
    np.testing.assert_allclose(got[:, :2], expected[:, :2], atol=1.5 / 32)
    assert np.ptp(expected[:, 2]) > 0.05


def test_normalisers_before_the_relu():
    network = Network(drawn()[0], 1.0, DATA, position="before")
    for block in range(3):
        network.normalise(block)
    normalisers = jnp.float32(jnp.array(network.normaliser)).T
    params = init(jax.random.split(KEY, 3)[0], 1)

    @jax.jit
    def loss(params):
        _, logits = lw_synthetic.forward(params, normalisers, DATA[0], 1.0, "before")
        return optax.softmax_cross_entropy_with_integer_labels(logits.T, DATA[1]).mean()

    np.testing.assert_allclose(loss(params), network.measured(DATA)[2], rtol=1e-5)
    expected = gradient(network.params, network.normaliser, network.x, DATA[1], "before", 0)
    for actual, layer in zip(layers(jax.grad(loss)(params)), expected, strict=True):
        np.testing.assert_allclose(actual[0], layer[0], atol=1e-6)
        np.testing.assert_allclose(actual[1], layer[1], atol=1e-6)


def test_seeds():
    settings = Settings(**QUICK)
    plans = jax.tree.map(lambda field: field[:3], lw_synthetic.plans("1", settings, ["glorot"]))
    eight = lw_synthetic.train_all(settings, plans, 8)
    compiled = lw_synthetic._train_chunk._cache_size()
    eleven = lw_synthetic.train_all(settings, plans, 11)
    assert eight.test.shape == (8, 3, 9)
    assert eleven.test.shape == (11, 3, 9)
    np.testing.assert_array_equal(eight.loss, eleven.loss[:8])
    assert len(np.unique(eleven.loss[:, 0, 0])) == 11
    assert lw_synthetic._train_chunk._cache_size() == compiled


def test_examples_of_seeds():
    own, shared = (Settings(train_size=8, test_size=4, data=data) for data in ("own", "shared"))
    first, second = (lw_synthetic.examples(own, jnp.uint32(seed)) for seed in (0, 1))
    assert [inputs.shape for inputs, _ in first] == [(128, 8), (128, 4)]
    assert not np.array_equal(first[0][0], second[0][0])
    assert not np.array_equal(first[0][0][:, :4], first[1][0])
    for seed in (0, 1):
        for got, expected in zip(
            jax.tree.leaves(lw_synthetic.examples(shared, jnp.uint32(seed))),
            jax.tree.leaves(first),
            strict=True,
        ):
            np.testing.assert_array_equal(got, expected)


def test_batches_make_up_an_epoch():
    settings = Settings(train_size=12, batch_size=4)
    x, y = jnp.arange(12)[None], jnp.arange(12)
    seen = [
        lw_synthetic.batch(settings, jax.random.key(0), jnp.int32(step), x, y) for step in range(6)
    ]
    for inputs, labels in seen:
        assert inputs.shape == (1, 4)
        np.testing.assert_array_equal(inputs[0], labels)
    epochs = [np.concatenate([seen[3 * epoch + i][0][0] for i in range(3)]) for epoch in (0, 1)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(12))
    assert list(epochs[0]) != list(epochs[1])
