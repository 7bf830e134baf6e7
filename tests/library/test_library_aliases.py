"""Optimizers of optax by name: in plain training optax's own, in ascent negated, and decaying all the while."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import seal_jax
from seal_jax.errors import UsageError
from seal_jax.transforms import aliases, make_fast_tx, make_sa_gd_tx, make_seal_tx, reset_state

S, E = 1, 3  # steps in an epoch, epochs in a generation
CLOCK = {"steps_per_epoch": S, "epochs_per_generation": E}


def rate(step):
    return 0.05 * 0.5**step


def optax_function(name):
    return getattr(contrib, name) if hasattr(contrib, name) else getattr(optax, name)


def draw(seed):
    shapes = {"w": {"kernel": (3, 4), "bias": (4,)}, "fc": {"kernel": (4, 2)}}
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def assert_same(found, expected, scale=1.0):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, scale * b, rtol=1e-6, atol=1e-9), found, expected
    )


def decays(name):
    """The arguments of an optimizer that are its weight decay."""
    known = ("weight_decay", "weight_decay_rate", "adam_weight_decay")
    arguments = inspect.signature(optax_function(name)).parameters
    return [argument for argument in known if argument in arguments]


# One of each kind of state; the others are slow.
QUICK = ("adamw", "lamb", "adafactor", "novograd", "muon", "prodigy")


def each(names):
    return [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in sorted(names)
    ]


def test_the_names():
    names = {*aliases.names()}
    assert {"adamw", "lion", "lamb", "lars", "adafactor", "rmsprop", "muon", "prodigy"} <= names
    assert names >= aliases.MEASURES_PARAMS
    # Each one refused is still there to be refused.
    assert all(hasattr(contrib, name) or hasattr(optax, name) for name in aliases._REFUSED)


@pytest.mark.parametrize("name", each(aliases.names()))
def test_plain_training_is_optaxs_own_and_starts_afresh_with_a_generation(name):
    """Bit for bit, over five steps in generations of three."""
    tx = seal_jax.make_normal_tx(optimizer=aliases.make(name, rate, {}), **CLOCK)
    theirs = optax.with_extra_args_support(optax_function(name)(learning_rate=rate))
    params = draw(0)
    state = tx.init(params)
    for step in range(E + 2):
        if step % E == 0:
            expected_state = theirs.init(params)
        gradient, loss = draw(1 + step), jnp.asarray(1.0 + step)
        expected, expected_state = theirs.update(gradient, expected_state, params, value=loss)
        updates, state = tx.update(gradient, state, params, value=loss)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
        params = optax.apply_updates(params, updates)
    found = state.inner.inner if name in aliases._SHARE_A_COUNT else state.inner
    jax.tree.map(np.testing.assert_array_equal, found, expected_state)


@pytest.mark.parametrize("name", each(aliases.names()))
def test_schedules_go_on_where_the_memory_starts_afresh(name):
    tx = reset_state(aliases.make(name, rate, {}), when=lambda count: count == 2)
    params = draw(0)
    state = tx.init(params)
    for step in range(3):
        updates, state = tx.update(draw(1 + step), state, params, value=jnp.asarray(2.0))
    fresh = optax.with_extra_args_support(optax_function(name)(learning_rate=lambda n: rate(n + 2)))
    expected, _ = fresh.update(draw(3), fresh.init(params), params, value=jnp.asarray(2.0))
    assert_same(updates, expected)


@pytest.mark.parametrize("name", each({*aliases.names()} - aliases.MEASURES_PARAMS))
def test_ascent_is_the_negated_step_and_decay_shrinks_all_the_while(name):
    make = functools.partial(aliases.make, name, lambda step: jnp.full((), 0.1))
    seal = functools.partial(make_seal_tx, "w", ascent_epochs=1, ascent_scale=0.5, **CLOCK)
    none = {argument: None if argument.endswith("rate") else 0.0 for argument in decays(name)}
    plain, params, gradient = make(none), draw(0), draw(1)
    if name == "fromage":
        params = zeros(params)  # its decay is no argument
    expected, _ = plain.update(gradient, plain.init(params), params)
    for factor in (-1.0,) if name in aliases.SCALES_BY_NORM else (-1.0, 0.0):
        tx = seal(optimizer=make(none), ascent_weight_decay_factor=factor)
        state = tx.init(params)
        for _ in range(E):
            _, state = tx.update(zeros(params), state, params)
        updates, _ = tx.update(gradient, state, params)  # the first of generation 1
        assert_same(updates["w"], expected["w"], -0.5)
        assert_same(updates["fc"], expected["fc"])
    if decays(name):
        # Without a gradient the decay alone moves what is positive: in descent, a step of ascent and descent.
        tx = seal(optimizer=make(dict.fromkeys(decays(name), 0.2)))
        ones = jax.tree.map(jnp.ones_like, params)
        state = tx.init(ones)
        for _ in range(E + 2):
            updates, state = tx.update(zeros(ones), state, ones)
            assert all((np.asarray(update) < 0).all() for update in jax.tree.leaves(updates))


def test_random_ascents_do_not_grow_by_decay():
    """SA-GD: a loss that jumps makes every step but the first ascend."""
    tx = make_sa_gd_tx(
        optimizer=optax.adamw(0.1, weight_decay=0.5),
        temperature=1e-6,
        epsilon=1.0,
        ascent_cap=1.0,
        key=jax.random.key(0),
        **CLOCK,
    )
    params, gradient = jnp.ones(3), jnp.array([0.0, 1.0, -1.0])
    state, update = tx.init(params), jax.jit(tx.update)
    for loss, sign in ((1.0, 1.0), (2.0, -1.0), (3.0, -1.0)):
        updates, state = update(gradient, state, params, value=jnp.asarray(loss))
        # Adam's step on a constant gradient is its sign.
        np.testing.assert_allclose(
            updates, -0.1 * (sign * gradient + 0.5 * params), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("beta", [0.02, 0.0])
def test_fast_has_an_optimizer_for_head_and_features_each(beta):
    adamw = functools.partial(optax.adamw, weight_decay=0.3)
    tx = make_fast_tx("fc", lambda step: 0.1 * 0.5**step, beta, optimizer=adamw, **CLOCK)
    params = draw(0)
    state = tx.init(params)
    for step in range(E + 1):
        if step % E == 0:
            head, features = adamw(lambda step: 0.1 * 0.5**step), adamw(beta)
            head_state, features_state = head.init(params["fc"]), features.init(params["w"])
        gradient = draw(1 + step)
        updates, state = tx.update(gradient, state, params)
        expected, head_state = head.update(gradient["fc"], head_state, params["fc"])
        assert_same(updates["fc"], expected)
        expected, features_state = features.update(gradient["w"], features_state, params["w"])
        assert_same(updates["w"], expected)
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"momentum": 0.5}, "momentum has no effect beside optimizer="),
        ({"weight_decay": 0.1}, "weight_decay has no effect beside optimizer="),
        ({"alpha": 0.0, "beta": 0.0}, "alpha = 0 and beta = 0 leave nothing to train"),
        ({"alpha": -1.0}, "alpha = -1 must be 0"),
    ],
)
def test_fast_refuses(options, says):
    with pytest.raises(UsageError, match=says):
        make_fast_tx("fc", optimizer=optax.adamw, **options, **CLOCK)


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("adamv", {}, "neither sgd, adam or radam nor an optimizer of optax; nearest: ada"),
        ("lbfgs", {}, "it searches along a line, .* These can: .*adamw.*, muon"),
        ("schedule_free_adamw", {}, "use optimizer.ema"),
        ("adamw", {"beta": 0.9}, "optimizer.args.beta is not an argument of adamw; nearest: "),
        ("adamw", {"learning_rate": 0.1}, "optimizer.args.learning_rate is not an argument"),
        ("adamw", {"b2": "high"}, "optimizer.args.b2 = 'high' must be of type float"),
        ("adamw", {"nesterov": 1}, "optimizer.args.nesterov = 1 must be of type bool"),
        ("adamw", {"eps": float("nan")}, "optimizer.args.eps = nan must be finite"),
        (
            "lion",
            {"weight_decay": -0.1},
            "optimizer.args.weight_decay = -0.1 must be 0 or positive",
        ),
        ("adamw", {"mask": "fc"}, "optimizer.args.mask = 'fc' must be"),
        ("adamw", {"mu_dtype": "float17"}, "optimizer.args of adamw: mu_dtype = 'float17': "),
        ("muon", {"preconditioning": "none"}, "optimizer.args of muon: "),
    ],
)
def test_errors(name, args, says):
    with pytest.raises(UsageError, match=says) as error:
        aliases.check(name, args)
    aliases.check("adamw", {"nesterov": True, "b2": 0, "weight_decay": 0})
    assert "\n" not in str(error.value)
