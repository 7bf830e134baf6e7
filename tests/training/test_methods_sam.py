"""SAM, its relatives and SA-GD through the compiled programs, against NumPy loops and plain training."""

import jax
import numpy as np
import numpy_mlp as oracle
import pytest
from programs import STRIPES, Trainer, assert_same, batch, host, mlp, seed_of

from seal_jax.core.state import Stream, stream_key
from seal_jax.errors import UsageError


@pytest.fixture(scope="module")
def plain():
    """Three epochs of plain training, step by step."""
    return Trainer(STRIPES, mlp()).run(3)


def uphill(params, gradient, rho, adaptive=False):
    """Foret et al. 2021, eq. 2; Kwon et al. 2021, eq. 8 with eta = 0."""
    scale = jax.tree.map(np.abs, params) if adaptive else jax.tree.map(np.ones_like, params)
    scaled = jax.tree.map(np.multiply, scale, gradient)
    direction = jax.tree.map(np.multiply, scale, scaled)
    return oracle.add(params, rho / oracle.norm(scaled), direction)


def sam_loop(params, config, steps, *, parts=1, adaptive=False, plain_steps=0, seed=0):
    """Two gradients a step, the second of each part of the batch at a point of its own."""
    rho, losses, trace = config.method["rho"], [], oracle.zeros(params)
    for step in range(steps):
        images, labels = batch(step, config, seed=seed)
        losses.append(oracle.loss_and_gradient(params, images, labels)[0])
        total = oracle.zeros(params)
        for part in np.split(np.arange(len(labels)), parts):
            own = images[part], labels[part]
            first = oracle.loss_and_gradient(params, *own)[1]
            moved = uphill(params, first, rho if step >= plain_steps else 0.0, adaptive)
            total = oracle.add(total, 1 / parts, oracle.loss_and_gradient(moved, *own)[1])
        trace = jax.tree.map(
            lambda g, p, t: g + 5e-4 * p + 0.9 * t,
            total,
            params,
            trace,
        )
        params = oracle.add(params, -oracle.rate(step), trace)
    return params, losses


@pytest.mark.parametrize(
    ("options", "devices", "parts"),
    [
        ({"rho": 0.3}, 1, 1),
        ({"rho": 1.0, "adaptive": True}, 1, 1),
        pytest.param({"rho": 0.3}, 8, 1, marks=pytest.mark.slow),
        ({"rho": 0.3, "sharpness": "device"}, 8, 8),
    ],
)
def test_sam_equals_a_loop_of_two_gradients(options, devices, parts):
    """On eight devices one perturbation for all, or one for each; they lead elsewhere."""
    config = mlp({"name": "sam", **options})
    trainer = Trainer(STRIPES, config, devices=devices)
    start = oracle.wide(seed_of(trainer.state.weights.params))
    trainer.calls(6)  # into the second epoch, whose rate is lower
    adaptive = options.get("adaptive", False)
    expected, losses = sam_loop(start, config, 6, parts=parts, adaptive=adaptive)
    found = seed_of(trainer.state.weights.params)
    np.testing.assert_allclose(np.concatenate(trainer.losses, 1)[0], losses, rtol=1e-4)
    assert_same(found, expected, rtol=1e-3, atol=2e-5)
    other, _ = sam_loop(start, config, 6, parts=9 - parts if devices == 8 else 2, adaptive=adaptive)
    assert oracle.norm(oracle.add(expected, -1, other)) > 1e-2


def test_radius_zero_is_plain_training_bit_for_bit(plain):
    sam = Trainer(STRIPES, mlp({"name": "sam", "rho": 0.0})).run(3)
    assert_same(sam.state, plain.state)
    assert_same(sam.losses, plain.losses)


@pytest.mark.parametrize("sharpness", ["synchronised", "device"])
def test_statistics_are_those_of_the_first_pass(sharpness):
    method = {"name": "sam", "rho": 2.0, "sharpness": sharpness}
    sam = Trainer(STRIPES, mlp(method, norm="batch"))
    start = seed_of(host(sam).weights)
    plain = Trainer(STRIPES, mlp(norm="batch")).calls(1)
    sam.calls(1)
    assert_same(
        sam.state.weights.batch_stats, plain.state.weights.batch_stats, rtol=1e-5, atol=1e-7
    )
    # The second pass would leave others.
    model = sam.experiment.model.module
    images, labels = batch(0, sam.experiment.settings)

    def loss(params):
        variables = {"params": params, "batch_stats": start.batch_stats}
        logits, changed = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return -(oracle.smoothed(labels) * jax.nn.log_softmax(logits)).sum(-1).mean(), changed

    moved = uphill(start.params, jax.grad(loss, has_aux=True)(start.params)[0], 2.0)
    second = loss(moved)[1]["batch_stats"]["dense2"]["norm"]["var"]
    first = seed_of(sam.state.weights.batch_stats)["dense2"]["norm"]["var"]
    assert np.abs(first - second).max() > 1e-2


@pytest.mark.slow
def test_sa_gd_without_ascent_is_plain_training_bit_for_bit(plain):
    sa_gd = Trainer(STRIPES, mlp({"name": "sa_gd", "ascent_cap": 0.0})).run(3)
    assert_same(sa_gd.state.weights, plain.state.weights)
    assert_same(sa_gd.losses, plain.losses)


def sa_gd_loop(params, config, steps, seed):
    """Cai 2021 with a draw from the key of each step; the signs, and where they lead."""
    options = {"temperature": 10.0, "epsilon": 1.0, "q": 1.0, "ascent_cap": 0.33} | config.method
    heat = options["temperature"] * options["epsilon"]
    trace, last, signs = oracle.zeros(params), None, []
    for step in range(steps):
        images, labels = batch(step, config, seed=seed)
        loss, gradient = oracle.loss_and_gradient(params, images, labels)
        trace = jax.tree.map(lambda g, p, t: g + 5e-4 * p + 0.9 * t, gradient, params, trace)
        key = stream_key(seed, Stream.UPDATE, step)
        ascends = False
        if last is not None:
            change = abs(loss - last) ** options["q"]
            chance = np.exp(-change / (heat * np.log(step // 5 + 2)))
            chance = max(chance, 1 - options["ascent_cap"])
            ascends = float(jax.random.uniform(key)) >= chance
        signs.append(-1 if ascends else 1)
        params = oracle.add(params, -signs[-1] * oracle.rate(step), trace)
        last = loss
    return params, signs


def test_seeds_of_sa_gd_choose_apart(plain):
    config = mlp({"name": "sa_gd", "temperature": 0.3, "ascent_cap": 0.5}, train={"seeds": 2})
    trainer = Trainer(STRIPES, config)
    starts = [oracle.wide(seed_of(trainer.state.weights.params, seed)) for seed in (0, 1)]
    trainer.calls(10)
    chosen = []
    for seed in (0, 1):
        expected, signs = sa_gd_loop(starts[seed], config, 10, seed)
        assert_same(seed_of(trainer.state.weights.params, seed), expected, rtol=1e-3, atol=2e-5)
        chosen.append(signs)
    assert chosen[0] != chosen[1]
    assert all({-1, 1} == set(signs) for signs in chosen)


def msam_loop(params, config, steps):
    """Becker et al. 2024, Algorithm 1, with the loss of each step: one gradient, at the perturbed weights."""
    trace, losses = oracle.zeros(params), []
    for step in range(steps):
        if step % 20 == 0:  # a generation starts
            trace = oracle.zeros(params)
        offset = config.method["rho"] / (oracle.norm(trace) + 1e-12)
        perturbed = oracle.add(params, -offset, trace)
        loss, gradient = oracle.loss_and_gradient(perturbed, *batch(step, config))
        losses.append(loss)
        trace = jax.tree.map(lambda g, p, t: g + 5e-4 * p + 0.9 * t, gradient, params, trace)
        params = oracle.add(params, -oracle.rate(step % 20), trace)
    return params, losses


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_msam_equals_a_loop_of_one_gradient(devices):
    """Into the second generation, whose first step has no momentum to go along."""
    config = mlp({"name": "msam", "rho": 0.5})
    trainer = Trainer(STRIPES, config, devices=devices)
    start = oracle.wide(seed_of(trainer.state.weights.params))
    trainer.calls(22)
    expected, losses = msam_loop(start, config, 22)
    np.testing.assert_allclose(np.concatenate(trainer.losses, 1)[0], losses, rtol=1e-3)
    assert_same(seed_of(trainer.state.weights.params), expected, rtol=1e-3, atol=1e-4)


def test_msam_with_radius_zero_is_plain_training_bit_for_bit(plain):
    msam = Trainer(STRIPES, mlp({"name": "msam", "rho": 0.0})).run(3)
    assert_same(msam.state, plain.state)
    assert_same(msam.losses, plain.losses)


@pytest.mark.parametrize(
    ("name", "words"),
    [("adafactor", "the optimizer has no momentum"), ("lars", "does not go with method 'msam'")],
)
def test_msam_needs_a_momentum_of_gradients(name, words):
    optimizer = {"name": name, "momentum": 0.0, "weight_decay": 0.0}
    with pytest.raises(UsageError, match=rf"optimizer\.name = '{name}'.*{words}"):
        Trainer.build(STRIPES, mlp({"name": "msam"}, optimizer=optimizer))


def looksam_loop(params, config, steps):
    """Liu et al. 2022, Algorithm 1."""
    rho, alpha, every = (config.method[name] for name in ("rho", "alpha", "every"))
    trace = oracle.zeros(params)
    for step in range(steps):
        images, labels = batch(step, config)
        first = oracle.loss_and_gradient(params, images, labels)[1]
        if step % every == 0:
            used = oracle.loss_and_gradient(uphill(params, first, rho), images, labels)[1]
            products = jax.tree.map(lambda a, b: (a * b).sum(), used, first)
            share = sum(jax.tree.leaves(products)) / oracle.norm(first) ** 2
            across = oracle.add(used, -share, first)
        else:
            used = oracle.add(first, alpha * oracle.norm(first) / oracle.norm(across), across)
        trace = jax.tree.map(lambda g, p, t: g + 5e-4 * p + 0.9 * t, used, params, trace)
        params = oracle.add(params, -oracle.rate(step), trace)
    return params


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_looksam_equals_a_loop(devices):
    config = mlp({"name": "looksam", "rho": 0.5, "alpha": 0.7, "every": 3})
    trainer = Trainer(STRIPES, config, devices=devices)
    start = oracle.wide(seed_of(trainer.state.weights.params))
    trainer.calls(8)
    found = seed_of(trainer.state.weights.params)
    assert_same(found, looksam_loop(start, config, 8), rtol=1e-3, atol=1e-4)


def test_sam_in_the_last_epochs_of_batched_seeds():
    config = mlp(
        {"name": "sam", "rho": 0.5, "last_epochs": 3},
        train={"seeds": 2},
        run={"seed_batching": "vmap"},
    )
    trainer = Trainer(STRIPES, config)
    starts = [oracle.wide(seed_of(trainer.state.weights.params, seed)) for seed in (0, 1)]
    trainer.calls(7)
    for seed in (0, 1):
        expected, _ = sam_loop(starts[seed], config, 7, plain_steps=5, seed=seed)
        found = seed_of(trainer.state.weights.params, seed)
        assert_same(found, expected, rtol=1e-3, atol=2e-5)
        other, _ = sam_loop(starts[seed], config, 7, seed=seed)
        assert oracle.norm(oracle.add(expected, -1, other)) > 1e-2
    for last in (0, 5):
        with pytest.raises(UsageError, match=rf"method\.last_epochs = {last} must be .* in 1\.\.4"):
            Trainer.build(STRIPES, mlp({"name": "sam", "last_epochs": last}))
    with pytest.raises(UsageError, match=r"method\.last_epochs does not go with"):
        Trainer.build(STRIPES, mlp({"name": "sam", "last_epochs": 1, "sharpness": "device"}))
