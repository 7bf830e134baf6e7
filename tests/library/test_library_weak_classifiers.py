"""PoF's perturbation and FOCA's weak classifiers, against NumPy and SciPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from scipy.optimize import minimize_scalar

from seal_jax import UsageError
from seal_jax.weak_classifiers import (
    direction,
    foca,
    perturb,
    perturbation,
    sample_gamma,
    shifted,
)

B, D, N = 16, 4, 3


def classify(head, features):
    return features @ head["kernel"] + head["bias"]


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def squared_error(outputs, targets):
    return ((outputs - targets) ** 2).sum(-1).mean()


@jax.jit
def search(head, features, labels):
    return perturbation(head, features, labels, classify, cross_entropy)


def problem(seed=0):
    """A head, the features of a batch and its labels; no class is separable."""
    rng = np.random.default_rng(seed)
    head = {"kernel": rng.normal(size=(D, N)), "bias": rng.normal(size=N)}
    head = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), head)
    features = jnp.asarray(rng.normal(size=(B, D)), jnp.float32)
    return head, features, jnp.asarray(np.arange(B) % N)


def flat(head):
    return np.concatenate([np.asarray(head["kernel"], np.float64).ravel(), head["bias"]])


def loss64(theta, features, labels):
    """Return the loss and its gradient."""
    a, y = np.asarray(features, np.float64), np.asarray(labels)
    z = a @ theta[: D * N].reshape(D, N) + theta[D * N :]
    z -= z.max(1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    rest = (p - np.eye(N)[y]) / B
    loss = -np.log(p[np.arange(B), y]).mean()
    return loss, np.concatenate([(a.T @ rest).ravel(), rest.sum(0)])


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def bits(tree):
    return jax.tree.map(lambda x: np.asarray(x).view(np.uint32), tree)


# The direction and the distance


def test_direction_is_the_gradient_with_norm_1():
    head, features, labels = problem()
    value, unit = direction(head, features, labels, classify, cross_entropy)
    expected, gradient = loss64(flat(head), features, labels)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(flat(unit), gradient / np.linalg.norm(gradient), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(flat(unit)), 1.0, rtol=1e-6)


def test_distance_equals_scipy_over_vmapped_seeds():
    problems = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(problem, range(8)))
    found = jax.vmap(search)(*problems)
    assert found.accepted.all()
    for seed in range(8):
        head, features, labels = jax.tree.map(lambda x, seed=seed: x[seed], problems)
        value, gradient = loss64(flat(head), features, labels)
        unit = gradient / np.linalg.norm(gradient)
        best = minimize_scalar(
            lambda xi, head=head, unit=unit, data=(features, labels): loss64(
                flat(head) - xi * unit, *data
            )[0],
            bounds=(0, 100),
            method="bounded",
            options={"xatol": 1e-9},
        )
        np.testing.assert_allclose(found.xi[seed], best.x, rtol=1e-3)
        np.testing.assert_allclose(found.loss[seed], value, rtol=1e-5)


def test_quadratic_loss():
    """The minimum in closed form; at gamma = 2 the batch's loss is what it was (section 3.2)."""
    head, features, _ = problem()
    targets = jnp.asarray(np.random.default_rng(5).normal(size=(B, N)), jnp.float32)
    found = perturbation(head, features, targets, classify, squared_error)
    moves = classify(found.direction, features)
    rest = classify(head, features) - targets
    np.testing.assert_allclose(found.xi, (moves * rest).sum() / (moves**2).sum(), rtol=1e-5)
    losses = [
        squared_error(classify(shifted(head, found, gamma), features), targets)
        for gamma in (0.0, 0.9, 1.0, 1.1, 2.0)
    ]
    np.testing.assert_allclose(losses[4], losses[0], rtol=1e-5)
    assert losses[2] < min(losses[1], losses[3]) <= max(losses[1], losses[3]) < losses[0]


def test_affine_heads_take_the_short_way():
    """The same result, and the classifier is not part of the search."""
    calls = []

    def counted(head, features):
        calls.append(1)
        return classify(head, features)

    found = {
        linear: perturbation(*problem(), counted, cross_entropy, linear=linear)
        for linear in (True, False, None)
        if not calls.append(linear)
    }
    marks = [calls.index(linear) for linear in (True, False)] + [calls.index(None), len(calls)]
    short, long, by_default = np.diff(marks) - 1
    assert short == by_default == 2 < long
    np.testing.assert_allclose(found[True].xi, found[False].xi, rtol=1e-4)
    assert_equal(found[None], found[True])


def test_a_head_of_several_layers():
    head, features, labels = problem()
    deep = {"hidden": {"kernel": jnp.eye(D) * 1.5}, "out": head}

    def through(head, features):
        return classify(head["out"], jnp.tanh(features @ head["hidden"]["kernel"]))

    found = perturbation(deep, features, labels, through, cross_entropy)
    assert found.accepted
    losses = [
        cross_entropy(through(shifted(deep, found, gamma), features), labels)
        for gamma in (0.98, 1.0, 1.02)
    ]
    assert losses[1] < min(losses[0], losses[2])
    assert losses[1] < found.loss


# What must leave the head alone


def test_gamma_0_is_the_head_bit_for_bit():
    head, features, labels = problem()
    head["bias"] = jnp.array([0.0, -0.0, 1.0])
    found = search(head, features, labels)
    for gamma in (0.0, -0.0, jnp.float32(0)):
        assert_equal(bits(shifted(head, found, gamma)), bits(head))
    assert (shifted(head, found, 1e-3)["kernel"] != head["kernel"]).all()


def separable():
    labels = jnp.arange(B) % N
    return problem()[0], 100 * jax.nn.one_hot(labels, D), labels


LOSSES = {
    "cross entropy": cross_entropy,
    "zero gradient": lambda logits, labels: 0.0 * logits.sum(),
    "NaN": lambda logits, labels: logits.sum() * jnp.nan,
    "infinite": lambda logits, labels: logits.sum() + jnp.inf,
    "overflowing gradient": lambda logits, labels: 1e30 * (logits**2).sum(),
}
HOPELESS = {
    "asymmetric": ("cross entropy", *separable()),
    "NaN features": ("cross entropy", problem()[0], jnp.full((B, D), jnp.nan), problem()[2]),
    "infinite features": ("cross entropy", problem()[0], jnp.full((B, D), jnp.inf), problem()[2]),
    **{name: (name, *problem()) for name in LOSSES if name != "cross entropy"},
}


@jax.jit
def search_by_number(number, head, features, labels):
    def loss(logits, labels):
        return jax.lax.switch(number, list(LOSSES.values()), logits, labels)

    found = perturbation(head, features, labels, classify, loss)
    return found, shifted(head, found, 2.0)


@pytest.mark.parametrize("name", HOPELESS)
def test_a_rejected_perturbation_leaves_the_head(name):
    loss, *arguments = HOPELESS[name]
    found, weak = search_by_number(list(LOSSES).index(loss), *arguments)
    assert not found.accepted
    assert found.xi == 0
    assert_equal(bits(weak), bits(arguments[0]))


def test_a_zero_gradient_gives_no_nan():
    _, unit = direction(*problem(), classify, lambda logits, labels: 0.0 * logits.sum())
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(unit))


def test_dtypes_are_kept():
    head, features, labels = problem()
    head = jax.tree.map(lambda x: x.astype(jnp.bfloat16), head)
    found = perturbation(head, features.astype(jnp.bfloat16), labels, classify, cross_entropy)
    assert found.xi.dtype == found.loss.dtype == jnp.float32
    assert found.accepted
    assert {x.dtype for x in jax.tree.leaves(shifted(head, found))} == {jnp.dtype(jnp.bfloat16)}


def test_no_derivative_flows_through_it():
    """Eq. 5: the derivative of the perturbation by the features is set to zero."""
    head, features, labels = problem()

    def reach(features, head):
        weak, found, _ = perturb(
            jax.random.key(0),
            head,
            features,
            labels,
            classify,
            cross_entropy,
            resample=lambda key, attempt: (features + 1, labels),
            attempts=2,
        )
        random = foca(
            jax.random.key(0),
            head,
            features,
            labels,
            classify,
            cross_entropy,
            steps=2,
            learning_rate=0.1,
        )
        kernels = [weak["kernel"] - head["kernel"], found.direction["kernel"], random["kernel"]]
        return sum(kernel.sum() for kernel in kernels) + found.xi

    gradients = jax.jit(jax.grad(reach, (0, 1)))(features, head)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))


# The expansion factor


def test_gamma():
    keys = jax.random.split(jax.random.key(3), 2000)
    uniform = jax.vmap(sample_gamma)(keys)
    assert uniform.dtype == jnp.float32
    assert 0 <= uniform.min() < 0.01 < 1.99 < uniform.max() <= 2
    np.testing.assert_allclose(uniform.mean(), 1.0, atol=0.05)
    np.testing.assert_allclose(uniform.std(), 2 / np.sqrt(12), atol=0.03)
    narrow = jax.vmap(lambda key: sample_gamma(key, "uniform", 0.5, 1.0))(keys)
    assert 0.5 <= narrow.min() < narrow.max() <= 1.0
    assert sample_gamma(keys[0], "constant", high=1.5) == 1.5

    def growing(progress):
        return sample_gamma(keys[0], "linear", 0.5, 1.5, progress=progress)

    grown = jax.vmap(growing)(jnp.array([-1.0, 0.0, 0.25, 1.0, 7.0]))
    np.testing.assert_array_equal(grown, [0.5, 0.5, 0.75, 1.5, 1.5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "unifrom"}, "policy = 'unifrom' must be one of uniform, constant, linear"),
        ({"policy": "linear"}, "progress = None must be"),
        ({"low": -0.5}, "low = -0.5 must be 0 or positive"),
        ({"low": 1.0, "high": 0.5}, "high = 0.5 must be finite, at least low"),
        ({"high": float("nan")}, "high = nan must be finite"),
    ],
)
def test_gammas_that_cannot_be_used(arguments, message):
    with pytest.raises(UsageError, match=message):
        sample_gamma(jax.random.key(0), **arguments)


# All of it at once


def test_perturb_is_its_parts():
    head, features, labels = problem()
    gamma = functools.partial(sample_gamma, policy="constant", high=0.5)
    weak, found, factor = perturb(
        jax.random.key(0), head, features, labels, classify, cross_entropy, gamma=gamma
    )
    alone = perturbation(head, features, labels, classify, cross_entropy)
    assert factor == 0.5
    assert_equal(found, alone)
    assert_equal(weak, shifted(head, alone, 0.5))


@pytest.mark.parametrize("attempts", [2, 4])
def test_resampling_until_a_batch_is_accepted(attempts):
    """Half of the batches that may be drawn will do, the first will not."""
    head, features, labels = problem()
    bad = separable()[1:]

    def resample(key, attempt):
        good = jax.random.bernoulli(key)
        return jnp.where(good, features, bad[0]), jnp.where(good, labels, bad[1])

    def draw(key):
        options = {"resample": resample, "attempts": attempts}
        return perturb(key, head, *bad, classify, cross_entropy, **options)

    weak, found, _ = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 400))
    np.testing.assert_allclose(found.accepted.mean(), 1 - 0.5 ** (attempts - 1), atol=0.06)
    distance = search(head, features, labels).xi
    np.testing.assert_allclose(found.xi, jnp.where(found.accepted, distance, 0.0), rtol=1e-5)
    same = (weak["kernel"] == head["kernel"]).all((1, 2))
    np.testing.assert_array_equal(same, ~found.accepted)


def test_resampling_wants_both():
    arguments = (jax.random.key(0), *problem(), classify, cross_entropy)
    with pytest.raises(UsageError, match="attempts = 2 must go with resample"):
        perturb(*arguments, attempts=2)
    with pytest.raises(UsageError, match="attempts = 1 must go with resample"):
        perturb(*arguments, resample=lambda key, attempt: problem()[1:])
    with pytest.raises(UsageError, match="attempts = 0 must be a whole number of at least 1"):
        perturb(*arguments, attempts=0)
    with pytest.raises(UsageError, match=r"loss returns shape \(16,\); it must return the mean"):
        direction(*problem(), classify, optax.softmax_cross_entropy_with_integer_labels)


def test_scan_without_recompilation():
    traces = []

    @jax.jit
    def run(head, features, labels, key):
        traces.append(1)

        def step(carry, key):
            weak, found, gamma = perturb(key, head, features, labels, classify, cross_entropy)
            return carry, (weak, found.accepted, gamma)

        return jax.lax.scan(step, None, jax.random.split(key, 3))[1]

    for seed in range(2):
        weak, accepted, gamma = run(*problem(seed), jax.random.key(seed))
        assert accepted.all()
        assert len(set(gamma.tolist())) == 3
        assert (jnp.diff(weak["kernel"], axis=0) != 0).all()
    assert len(traces) == 1


# Over devices


def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.parametrize("spec", [P(), P("data")], ids=["replicated", "sharded"])
def test_one_perturbation_for_all_devices(spec):
    head, features, labels = problem()
    expected = perturb(jax.random.key(0), head, features, labels, classify, cross_entropy)
    expected_foca = foca(
        jax.random.key(0),
        head,
        features,
        labels,
        classify,
        cross_entropy,
        steps=3,
        learning_rate=0.5,
    )

    def loss(logits, labels):
        own = cross_entropy(logits, labels)
        return own if spec == P() else jax.lax.pmean(own, "data")

    def body(key, head, features, labels):
        found = perturb(
            key,
            head,
            features,
            labels,
            classify,
            loss,
            resample=lambda key, attempt: (features[::-1], labels[::-1]),
            attempts=2,
        )
        random = foca(key, head, features, labels, classify, loss, steps=3, learning_rate=0.5)
        return found, random

    found, random = jax.jit(
        jax.shard_map(
            body, mesh=mesh(), in_specs=(P(), P(), spec, spec), out_specs=P(), check_vma=True
        )
    )(jax.random.key(0), head, features, labels)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        (found, random),
        (expected, expected_foca),
    )


def test_a_seed_on_each_device():
    problems = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(problem, range(8)))
    keys = jax.random.split(jax.random.key(0), 8)

    def own(key, head, features, labels):
        return (
            perturb(key, head, features, labels, classify, cross_entropy),
            foca(key, head, features, labels, classify, cross_entropy, steps=2, learning_rate=0.5),
        )

    expected = jax.jit(jax.vmap(own))(keys, *problems)
    spread = jax.shard_map(
        jax.vmap(own), mesh=mesh(), in_specs=P("data"), out_specs=P("data"), check_vma=True
    )
    found = jax.jit(spread)(keys, *problems)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
    )


# FOCA


@pytest.mark.parametrize("steps", [1, 4])
def test_foca_is_gradient_descent_from_its_start(steps):
    head, features, labels = problem()

    def weak(steps):
        return foca(
            jax.random.key(1),
            head,
            features,
            labels,
            classify,
            cross_entropy,
            steps=steps,
            learning_rate=0.7,
        )

    theta = flat(weak(0))
    for _ in range(steps):
        theta -= 0.7 * loss64(theta, features, labels)[1]
    np.testing.assert_allclose(flat(weak(steps)), theta, rtol=1e-5, atol=1e-6)


def test_a_bias_of_two_dimensions_starts_at_zero():
    head = {"weight": jnp.ones((2, 3)), "bias": jnp.ones((2, 1))}
    classify, loss = lambda head, features: head["weight"], lambda logits, labels: logits.mean()
    weak = foca(jax.random.key(0), head, 0.0, 0, classify, loss, steps=0, learning_rate=0.1)
    assert not weak["bias"].any()
    assert weak["weight"].all()


def test_foca_starts_at_random():
    like = {"kernel": jnp.ones((100, 50)), "bias": jnp.ones(50)}

    def start(seed, sigma=0.1):
        return foca(
            jax.random.key(seed),
            like,
            jnp.zeros((1, 100)),
            jnp.zeros(1, jnp.int32),
            classify,
            cross_entropy,
            steps=0,
            learning_rate=0.1,
            sigma=sigma,
        )

    kernel = start(0)["kernel"]
    np.testing.assert_allclose([kernel.mean(), kernel.std()], [0.0, 0.1], atol=0.005)
    np.testing.assert_allclose((kernel**4).mean() / 0.1**4, 3.0, rtol=0.1)  # normal
    assert (start(0)["bias"] == 0).all()
    assert (start(1)["kernel"] != kernel).all()
    np.testing.assert_allclose(start(0, 0.3)["kernel"], 3 * kernel, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps = -1 must be a whole number of at least 0"),
        ({"steps": 1.5}, "steps = 1.5 must be a whole number"),
        ({"learning_rate": float("inf")}, "learning_rate = inf must be 0 or positive"),
        ({"sigma": -0.1}, "sigma = -0.1 must be 0 or positive"),
    ],
)
def test_foca_refuses(arguments, message):
    with pytest.raises(UsageError, match=message):
        foca(
            jax.random.key(0),
            *problem(),
            classify,
            cross_entropy,
            **{"steps": 1, "learning_rate": 0.1, **arguments},
        )
