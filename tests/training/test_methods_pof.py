"""PoF and FOCA through the compiled programs, against NumPy loops."""

import itertools

import jax
import numpy as np
import numpy_mlp as oracle
import pytest
from programs import STRIPES, Trainer, assert_same, batch, host, mlp, seed_of
from trainer_runs import leaves

from seal_jax.core.state import Stream, stream_key
from seal_jax.training import loop, pretrained

WEAK = 4
OPTIMIZER = {"nesterov": True, "weight_decay": 0.01}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A short run of SAM to start from, with the momentum it ended with."""
    workdir = tmp_path_factory.mktemp("sam")
    config = mlp({"name": "sam"}, train={"generations": 1, "epochs_per_generation": 2})
    assert loop.train(config, workdir, STRIPES, devices=1).finished
    return workdir


def pof(options, source="given", **sections):
    return mlp(
        {"name": "pof", "weak_batch_size": WEAK, **options},
        optimizer=OPTIMIZER,
        train={"pretrained": str(source), "generations": 1},
        **sections,
    )


def trace_of(opt_state):
    """The momentum, by the path of its parameter."""
    found = jax.tree_util.tree_leaves_with_path(opt_state)
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}
    return {name.partition("trace/")[2]: leaf for name, leaf in names.items() if "trace/" in name}


def valley(classifier, features, labels):
    """Direction and distance of the weak batch's minimum, by bisection; distance 0 where none is."""
    slope = oracle.head_gradient(classifier, features, labels, smoothing=0)[0]
    unit = jax.tree.map(lambda leaf: leaf / oracle.norm(slope), slope)

    def falls(xi):
        there = oracle.add(classifier, -xi, unit)
        slope = oracle.head_gradient(there, features, labels, smoothing=0)[0]
        return sum((s * u).sum() for s, u in zip(*map(jax.tree.leaves, (slope, unit)), strict=True))

    low, high = 0.0, 2.0**20  # the loss is convex along a line
    if falls(high) < 0:
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if falls(middle) > 0 else (low, middle)
    above = [
        oracle.cross_entropy(oracle.logits(head, features), labels, smoothing=0)
        for head in (oracle.add(classifier, -(2.0**20), unit), classifier)
    ]
    return (unit, low) if above[0] > above[1] else (unit, 0.0)


def pof_loop(params, trace, config, steps, gamma):
    """Sato et al. 2022, Algorithm 1: a line search, then a step of the features alone."""
    head, losses, lengths = params["fc"], [], []
    for step in range(steps):
        images, labels = batch(step, config, stream=Stream.EXTRA_ORDER, size=WEAK)
        unit, xi = valley(head, oracle.forward(params, images)[0][-1], labels)
        weak = oracle.add(head, -gamma * xi, unit)
        lengths.append(gamma * xi)
        loss, gradient = oracle.loss_and_gradient({**params, "fc": weak}, *batch(step, config))
        losses.append(loss)
        gradient = oracle.add(gradient, 0.01, params)
        trace = oracle.add(gradient, 0.9, trace)
        ahead = oracle.add(gradient, 0.9, trace)
        params = {**oracle.add(params, -oracle.rate(step), ahead), "fc": head}
    return params, losses, lengths


def measured(trainer, steps):
    """Run step by step; return the measures of each."""
    found = {"rejected": [], "perturbation": []}
    for step in range(steps):
        before = trainer.state.metric_sums.measures if step % 5 else {}
        before = {name: float(value[0]) for name, value in before.items()}
        trainer.calls(1)
        for name, own in found.items():
            own.append(float(trainer.state.metric_sums.measures[name][0]) - before.get(name, 0.0))
    return found


@pytest.mark.parametrize(("gamma", "devices"), [(1.0, 4), (0.0, 1)])
def test_features_learn_under_perturbations_and_the_classifier_stays(source, gamma, devices):
    """Gamma 0 is plain Nesterov SGD on the features. The momentum of the source run goes on."""
    policy = {"gamma": "constant", "gamma_high": gamma}
    config = pof(policy, source)

    def init_from(experiment):
        run = pretrained.read(config, source)
        return pretrained.take(config, run, experiment.abstract_state(1), momentum=True)

    trainer = Trainer(STRIPES, config, devices=devices, init_from=init_from)
    start = seed_of(host(trainer).weights.params)
    checkpoint = leaves(source, 10)
    for name, leaf in trace_of(trainer.state.opt_state).items():
        (theirs,) = (key for key in checkpoint if key.endswith(f"trace/{name}"))
        np.testing.assert_array_equal(leaf, checkpoint[theirs])
        assert np.abs(leaf).max() > 0
    for layer in ("dense1/linear/kernel", "fc/bias"):
        own = start
        for key in layer.split("/"):
            own = own[key]
        np.testing.assert_array_equal(own, checkpoint[f"weights/params/{layer}"][0])

    trace = oracle.zeros(oracle.wide(start))
    for name, leaf in trace_of(host(trainer).opt_state).items():
        *layers, last = name.split("/")
        node = trace
        for layer in layers:
            node = node[layer]
        node[last] = leaf[0].astype(np.float64)
    expected, losses, lengths = pof_loop(oracle.wide(start), trace, config, 7, gamma)
    found = measured(trainer, 7)
    np.testing.assert_allclose(np.concatenate(trainer.losses, 1)[0], losses, rtol=2e-3)
    np.testing.assert_allclose(found["perturbation"], lengths, rtol=2e-3)
    after = seed_of(host(trainer).weights.params)
    assert_same(after, expected, rtol=5e-3, atol=1e-4)
    assert_same(after["fc"], start["fc"])
    for name in oracle.HIDDEN:
        assert oracle.norm(oracle.add(after[name], -1, start[name])) > 1e-2
    assert set(found["rejected"]) <= {0.0, 1.0}
    if gamma:
        rejected = [float(length == 0) for length in lengths]
        assert found["rejected"] == rejected
        assert 0 < sum(rejected) < 7


def test_a_damped_momentum_goes_on_as_a_sum(tmp_path):
    """FAST's average at ten times the rate is the sum of an undamped training, to be continued."""
    momenta, abstract = {}, Trainer(STRIPES, pof({})).experiment.abstract_state(1)
    for damped, rate in ((True, 0.05), (False, 0.005)):
        workdir = tmp_path / str(damped)
        config = mlp(
            {"name": "fast", "damped_momentum": damped},
            optimizer={"learning_rate": rate},
            model={"head_bias": True},
            train={"generations": 1, "epochs_per_generation": 2},
        )
        assert loop.train(config, workdir, STRIPES, devices=1).finished
        started = pof({}, workdir)
        run = pretrained.read(started, workdir)
        taken = pretrained.take(started, run, abstract, momentum=True)
        momenta[damped] = {name: leaf for name, leaf in taken.items() if "trace/" in name}
    assert len(momenta[True]) == 6
    for name, leaf in momenta[True].items():
        np.testing.assert_allclose(leaf, momenta[False][name], rtol=1e-3, atol=1e-6)
        assert np.abs(leaf).max() > 1e-3


RESAMPLED = {
    "weak_batch_size": 8,
    "resample": 2,
    "weak_statistics": True,
    "classifier_learning_rate": 0.01,
    "gamma": "linear",
}


@pytest.fixture(scope="module")
def resampled():
    """PoF with all its options, on a network with BatchNorm: the weights before and after steps."""
    trainer = Trainer(STRIPES, pof(RESAMPLED, norm="batch"))
    seen, found = [host(trainer).weights], []
    for step in range(10):
        before = float(trainer.state.metric_sums.measures["perturbation"][0]) if step % 5 else 0.0
        trainer.calls(1)
        found.append(float(trainer.state.metric_sums.measures["perturbation"][0]) - before)
        seen.append(host(trainer).weights)
    return trainer, seen, found


def passed(trainer, weights, images):
    """The features of a batch in training mode, and the statistics after it."""
    variables = {"params": weights.params, "batch_stats": weights.batch_stats}
    mutable = ["batch_stats", "intermediates"]
    module = trainer.experiment.model.module
    _, changed = module.apply(variables, np.float32(images), train=True, mutable=mutable)
    return np.asarray(changed["intermediates"]["features"][0], np.float64), changed["batch_stats"]


def test_options_of_pof_step_by_step(resampled):
    """Weak batches are tried in turn; they may move statistics; the classifier may follow SGD."""
    trainer, seen, found = resampled
    config, accepted = trainer.experiment.settings, []
    for step, (before, after) in enumerate(itertools.pairwise(seen)):
        before, after = seed_of(before), seed_of(after)
        head = oracle.wide(before.params["fc"])
        options = {"stream": Stream.EXTRA_ORDER, "size": 8, "turns": 3}
        distances, weak_statistics = [], None
        for images, labels in batch(step, config, **options):
            features, statistics = passed(trainer, before, images)
            distances.append(valley(head, features, labels)[1])
            weak_statistics = statistics if weak_statistics is None else weak_statistics
        gamma = 2 * step / 20
        if gamma:
            found_xi = found[step] / gamma
            candidates = distances[:1] if distances[0] else [0.0, *distances[1:]]
            assert np.isclose(found_xi, candidates, rtol=5e-3).any(), (found_xi, distances)
            accepted.append([bool(distances[0]), bool(found_xi)])
        else:
            assert found[step] == 0
        images, labels = batch(step, config)
        main = before._replace(batch_stats=weak_statistics)
        features, statistics = passed(trainer, main, images)
        assert_same(after.batch_stats, statistics, rtol=1e-4, atol=1e-6)
        slope = oracle.head_gradient(head, features, labels)[0]
        expected = oracle.add(head, -0.01, slope)
        assert_same(after.params["fc"], expected, rtol=1e-4, atol=1e-6)
    assert [False, True] in accepted  # a second batch helped


def test_perturbations_of_eight_devices_are_those_of_one(resampled):
    trainer, seen, found = resampled
    eight = Trainer(STRIPES, pof(RESAMPLED, norm="batch"), devices=8)
    assert eight.experiment.mesh.shape == {"seed": 1, "data": 8}
    first = measured(eight, 5)["perturbation"]
    np.testing.assert_allclose(first, found[:5], rtol=2e-2)
    np.testing.assert_allclose(
        np.concatenate(eight.losses, 1)[0], np.concatenate(trainer.losses, 1)[0, :5], rtol=5e-3
    )
    assert_same(eight.state.weights, seen[5], rtol=2e-2, atol=2e-3)


def foca_loop(params, config, steps, *, weak_steps=4, weak_rate=0.1, sigma=0.1):
    """Weak classifiers from a random start teach the features; the own one learns on these."""
    losses, trace = [], oracle.zeros(params)
    for step in range(steps):
        images, labels = batch(step, config, stream=Stream.EXTRA_ORDER, size=WEAK)
        key = stream_key(0, Stream.GRADIENT, step)
        weak = {}
        for index, name in enumerate(("bias", "kernel")):
            shape = params["fc"][name].shape
            noise = np.asarray(jax.random.normal(jax.random.fold_in(key, index), shape), float)
            weak[name] = sigma * noise if name == "kernel" else 0 * noise
        features = oracle.forward(params, images)[0][-1]
        for _ in range(weak_steps):
            weak = oracle.add(
                weak, -weak_rate, oracle.head_gradient(weak, features, labels, smoothing=0)[0]
            )
        images, labels = batch(step, config)
        loss, gradient = oracle.loss_and_gradient({**params, "fc": weak}, images, labels)
        losses.append(loss)
        gradient["fc"] = oracle.loss_and_gradient(params, images, labels)[1]["fc"]
        trace = jax.tree.map(lambda g, p, t: g + 5e-4 * p + 0.9 * t, gradient, params, trace)
        params = oracle.add(params, -oracle.rate(step), trace)
    return params, losses


def test_features_of_foca_do_not_see_the_own_classifier():
    config = mlp({"name": "foca", "weak_batch_size": WEAK})
    trainer = Trainer(STRIPES, config, devices=2)
    start = host(trainer)
    trainer.calls(6)
    expected, losses = foca_loop(oracle.wide(seed_of(start.weights.params)), config, 6)
    np.testing.assert_allclose(np.concatenate(trainer.losses, 1)[0], losses, rtol=1e-4)
    found = host(trainer).weights.params
    assert_same(seed_of(found), expected, rtol=1e-3, atol=1e-5)

    other = jax.tree.map(lambda leaf: leaf[:, ::-1], start.weights.params["fc"])
    weights = start.weights._replace(params={**start.weights.params, "fc": other})
    trainer.put(start._replace(weights=weights)).calls(6)
    after = host(trainer).weights.params
    for name in oracle.HIDDEN:
        assert_same(after[name], found[name])
        assert oracle.norm(oracle.add(after[name], -1, start.weights.params[name])) > 1e-2
    assert oracle.norm(oracle.add(after["fc"], -1, found["fc"])) > 0.1
    assert oracle.norm(oracle.add(after["fc"], -1, other)) > 1e-2


@pytest.mark.parametrize("name", ["pof", pytest.param("foca", marks=pytest.mark.slow)])
def test_weak_batches_pass_through_dropout(name):
    """Their dropout has keys of its own, which follow from the seed and the step."""
    config = mlp(
        {"name": name, "weak_batch_size": WEAK},
        model={"dropout": 0.5},
        train={"pretrained": "given"},
    )
    trainer = Trainer(STRIPES, config, devices=2)
    start = host(trainer)
    losses = trainer.calls(2).losses
    assert np.isfinite(losses).all()
    assert_same(trainer.put(start).calls(2).losses[2:], losses[:2])
