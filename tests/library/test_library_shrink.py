"""Shrink and perturb against NumPy, at its two ends against no event and a fresh draw, as a method."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from library_oracles import SHAPES, flat, nested, problem

from seal_jax import UsageError, forgetting, methods, models
from seal_jax.core.settings import Optimizer, Train
from seal_jax.core.state import Weights
from seal_jax.methods.method import HookContext

KEY = jax.random.key(5)
FRESH = {
    n: np.random.default_rng(9).normal(size=shape).astype(np.float32) for n, shape in SHAPES.items()
}


def draw(key):
    """A tree that follows from the key, but by one factor only, so that NumPy can have it, too."""
    factor = jax.random.uniform(key, minval=1.0, maxval=2.0)
    return jax.tree.map(lambda leaf: factor * leaf, nested(FRESH))


def start():
    return jax.tree.map(jnp.asarray, nested(problem()[0]))


@pytest.mark.parametrize("mask", [None, "fc", ["conv1", "bn1"]])
def test_against_numpy(mask):
    old = problem()[0]
    factor = float(jax.random.uniform(KEY, minval=1.0, maxval=2.0))
    got = flat(
        forgetting.shrink_and_perturb(KEY, start(), draw, shrink=0.7, perturb=0.2, mask=mask)
    )
    chosen = tuple(SHAPES) if mask is None else tuple([mask] if isinstance(mask, str) else mask)
    for n in SHAPES:
        if n.startswith(chosen):
            np.testing.assert_allclose(got[n], 0.7 * old[n] + 0.2 * factor * FRESH[n], rtol=1e-5)
        else:
            np.testing.assert_array_equal(got[n], old[n])


def test_ends_are_exact():
    params = start()
    kept = forgetting.shrink_and_perturb(KEY, params, "torch_default", shrink=1, perturb=0)
    jax.tree.map(np.testing.assert_array_equal, kept, params)
    new = forgetting.shrink_and_perturb(KEY, params, draw, shrink=0, perturb=1, mask="fc")
    wanted = forgetting.reinitialise(KEY, params, "fc", draw)
    jax.tree.map(np.testing.assert_array_equal, new, wanted)


def test_factors_may_be_traced_and_seeds_vmapped():
    @jax.jit
    def events(keys, params, shrink, perturb):
        def one(key):
            return forgetting.shrink_and_perturb(key, params, draw, shrink=shrink, perturb=perturb)

        return jax.vmap(one)(keys)

    keys = jax.random.split(KEY, 2)
    for factors in ((0.5, 0.5), (0.9, 0.01)):
        both = events(keys, start(), *factors)
        for index in range(2):
            alone = forgetting.shrink_and_perturb(
                keys[index], start(), draw, shrink=factors[0], perturb=factors[1]
            )
            for got, wanted in zip(*map(jax.tree.leaves, (both, alone)), strict=True):
                np.testing.assert_allclose(got[index], wanted, rtol=1e-5, atol=1e-6)
    assert events._cache_size() == 1
    first, second = (np.asarray(both["fc"]["kernel"][index]) for index in range(2))
    assert (first != second).all()


def test_equinox_and_narrow_types():
    layer = eqx.nn.Linear(3, 2, dtype=jnp.bfloat16, key=KEY)
    new = forgetting.shrink_and_perturb(
        KEY, layer, lambda key: eqx.nn.Linear(3, 2, key=key), shrink=jnp.float32(0.5), perturb=1.0
    )
    assert new.weight.dtype == jnp.bfloat16
    wanted = 0.5 * np.float32(layer.weight) + np.asarray(eqx.nn.Linear(3, 2, key=KEY).weight)
    np.testing.assert_allclose(np.float32(new.weight), wanted, rtol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shrink": 1.1}, r"shrink = 1.1 must lie in \[0, 1\]"),
        ({"shrink": float("nan")}, "shrink = nan must lie"),
        ({"perturb": -0.1}, "perturb = -0.1 must be 0 or positive"),
        ({"mask": "fx"}, "matches no parameter path; nearest: fc"),
        ({"init_fn": lambda key: {"fc": 0.0}}, "result of init_fn must be a tree like"),
    ],
)
def test_arguments_that_cannot_be(options, message):
    with pytest.raises(UsageError, match=message):
        forgetting.shrink_and_perturb(KEY, start(), **{"init_fn": draw, **options})


def context(**optimizer):
    model = models.create("mlp", num_classes=3, image_shape=(2, 2, 1), hidden=(4,))
    params = jax.eval_shape(model.init, KEY)["params"]
    return methods.Context(model, params, 2, Optimizer(**optimizer), Train())


def test_the_method_draws_from_the_model():
    own = context()
    method = methods.build({"name": "shrink_perturb", "perturb": 0.3}, own)
    params = jax.tree.map(jnp.ones_like, own.model.init(KEY)["params"])
    before = HookContext(KEY, jnp.int32(1), Weights(params, {}, {}), "momentum", (), None)
    after = method.on_generation_start(before)
    fresh = own.model.init(KEY)["params"]
    for got, drawn in zip(*map(jax.tree.leaves, (after.weights.params, fresh)), strict=True):
        np.testing.assert_allclose(got, 0.4 + 0.3 * np.asarray(drawn), rtol=1e-6)
    assert after == before._replace(weights=after.weights)


@pytest.mark.parametrize(
    ("values", "optimizer", "message"),
    [
        ({"shrink": 2.0}, {}, "method.shrink = 2 must lie"),
        ({"perturb": -1.0}, {}, "method.perturb = -1 must be 0 or positive"),
        ({"noise": 0.1}, {}, "method.noise is not a setting"),
        ({}, {"schedule": "single"}, "does not go with method 'shrink_perturb'"),
    ],
)
def test_options_that_cannot_be(values, optimizer, message):
    with pytest.raises(UsageError, match=message):
        methods.build({"name": "shrink_perturb", **values}, context(**optimizer))
