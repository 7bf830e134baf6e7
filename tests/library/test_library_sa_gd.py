"""SA-GD against NumPy with the same uniforms, and against its own probability."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from library_oracles import assert_close, flat, jax_gradient, nested, numpy_gradient, problem

from seal_jax.errors import UsageError
from seal_jax.generations import Clock
from seal_jax.transforms.preconditioners import preconditioner
from seal_jax.transforms.sa_gd import AnnealState, anneal, make_sa_gd_tx
from seal_jax.transforms.sgd import make_normal_tx

STEPS, S, E = 24, 2, 6  # two generations
CLOCK = {"steps_per_epoch": S, "epochs_per_generation": E}
DECAY = 0.05
KEY = jax.random.key(7)
HEAT = {"temperature": 2.0, "epsilon": 0.3, "q": 0.5, "ascent_cap": 0.6}


def start(seed=0):
    params, noise, coefficient = problem(seed)
    noise, coefficient = ({n: x[:STEPS] for n, x in part.items()} for part in (noise, coefficient))
    return jax.tree.map(jnp.asarray, tuple(map(nested, (params, noise, coefficient))))


def losses(seed=0):
    return np.random.default_rng(100 + seed).normal(size=STEPS).astype("f")


def uniforms(keys=None):
    """What each step draws: from its own key, or from the state's key and its number."""
    keys = [jax.random.fold_in(KEY, t) for t in range(STEPS)] if keys is None else keys
    return [float(jax.random.uniform(key)) for key in keys]


def ascents(draws, losses, epsilon=lambda step: 0.3, temperature=2.0, q=0.5, ascent_cap=0.6):
    """Which steps ascend, by the formula."""
    found = [False]
    for t in range(1, STEPS):
        change = abs(float(losses[t]) - float(losses[t - 1]))
        n = t // S + 1
        chance = math.exp(-(change**q) / (temperature * epsilon(t % (S * E)) * math.log(n + 1)))
        found.append(draws[t] >= max(chance, 1 - ascent_cap))
    return found


def book(up, seed=0):
    params, noise, coefficient = problem(seed)
    gradient = numpy_gradient(noise, coefficient)
    params = {n: p.astype(np.float64) for n, p in params.items()}
    buffer, history = {}, []
    for t in range(STEPS):
        if t % (S * E) == 0:
            buffer = {n: np.zeros_like(p) for n, p in params.items()}
        slopes = gradient(params, t)
        buffer = {n: 0.9 * buffer[n] + slopes[n] + DECAY * p for n, p in params.items()}
        # The whole update turns round, momentum and decay with it, and the momentum stays as it is.
        params = {n: p + (0.1 if up[t] else -0.1) * buffer[n] for n, p in params.items()}
        history.append(params)
    return history


def sa_gd(**options):
    return make_sa_gd_tx(0.1, **{"weight_decay": DECAY, "key": KEY, **HEAT, **CLOCK, **options})


def scanned(tx, values, params, noise, coefficient, keys=None):
    def body(carry, inputs):
        params, state = carry
        value, noise, coefficient, key = inputs
        extra = {} if key is None else {"key": key}
        gradient = jax_gradient(params, noise, coefficient)
        updates, state = tx.update(gradient, state, params, value=value, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    first = params, tx.init(params)
    return jax.lax.scan(body, first, (values, noise, coefficient, keys))[1]


def test_scan_equals_the_reference():
    up = ascents(uniforms(), losses())
    assert 3 < sum(up) < STEPS - 3  # enough of both
    found = jax.jit(functools.partial(scanned, sa_gd()))(losses(), *start())
    assert_close(flat(found), book(up))


def test_a_key_for_each_step_comes_first():
    keys = jax.random.split(jax.random.key(3), STEPS)
    up = ascents(uniforms(list(keys)), losses())
    assert up != ascents(uniforms(), losses())
    for tx in (sa_gd(key=None), sa_gd()):
        found = jax.jit(functools.partial(scanned, tx))(losses(), *start(), keys)
        assert_close(flat(found), book(up))


def test_epsilon_by_schedule_restarts_with_the_generation():
    def epsilon(step):
        return 0.02 + 0.1 * step

    up = ascents(uniforms(), losses(), epsilon)
    assert up != ascents(uniforms(), losses(), lambda step: 0.02)
    found = jax.jit(functools.partial(scanned, sa_gd(epsilon=epsilon)))(losses(), *start())
    assert_close(flat(found), book(up))


def test_vmap_over_seeds_and_temperatures():
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(start, (0, 1)))
    values, heat = np.stack([losses(0), losses(1)]), jnp.array([2.0, 0.5])

    def run(temperature, values, *problem):
        return scanned(sa_gd(temperature=temperature), values, *problem)

    found = jax.jit(jax.vmap(run))(heat, values, *stacked)
    for seed in (0, 1):
        up = ascents(uniforms(), losses(seed), temperature=float(heat[seed]))
        own = jax.tree.map(lambda x, s=seed: x[s], found)
        assert_close(flat(own), book(up, seed))


@pytest.mark.parametrize(
    ("epoch", "change", "q"), [(1, 0.1, 1), (1, -0.1, 1), (20, 0.3, 1), (3, 0.04, 0.5), (1, 9.0, 1)]
)
def test_ascents_are_as_frequent_as_the_formula_says(epoch, change, q):
    draws = 20_000
    tx = anneal(Clock(S, 100), 1.0, 0.5, q=q)
    state = AnnealState(jnp.int32((epoch - 1) * S + 1), jnp.float32(2.0), None)

    def ascends(key):
        return tx.update(jnp.ones(()), state, value=2.0 + change, key=key)[0] < 0

    share = jnp.mean(jax.jit(jax.vmap(ascends))(jax.random.split(KEY, draws)))
    chance = 1 - math.exp(-(abs(change) ** q) / (0.5 * math.log(epoch + 1)))
    chance = min(chance, 0.33)
    assert abs(share - chance) < 4.5 * math.sqrt(chance * (1 - chance) / draws)


def test_the_first_step_descends():
    tx = anneal(Clock(S, E), 1e-6, 1.0, ascent_cap=1.0)
    state = tx.init(jnp.ones(()))

    def two_steps(key):
        first, after = tx.update(jnp.ones(()), state, value=50.0, key=key)
        return first, tx.update(jnp.ones(()), after, value=70.0, key=key)[0]

    first, second = jax.vmap(two_steps)(jax.random.split(KEY, 50))
    assert (first == 1).all()
    assert (second == -1).all()


def test_never_up_is_plain_training():
    base = make_normal_tx(0.1, weight_decay=DECAY, **CLOCK)
    runs = [
        jax.jit(functools.partial(scanned, tx))(losses(), *start())
        for tx in (sa_gd(ascent_cap=0.0), base)
    ]
    for ours, theirs in zip(*map(jax.tree.leaves, runs), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_no_number_descends():
    tx = anneal(Clock(S, E), 1e-6, 1.0, ascent_cap=1.0, key=KEY)
    state, signs = tx.init(jnp.ones(())), []
    for loss in (1.0, math.nan, 2.0, 3.0):
        update, state = tx.update(jnp.ones(()), state, value=loss)
        signs.append(float(update))
    assert signs == [1.0, 1.0, 1.0, -1.0]


def test_another_optimizer_or_preconditioner():
    whole = make_sa_gd_tx(optimizer=optax.adam(0.1), key=KEY, **HEAT, **CLOCK)
    part = sa_gd(preconditioner=preconditioner("adam"), weight_decay=0.0)
    runs = [jax.jit(functools.partial(scanned, tx))(losses(), *start()) for tx in (whole, part)]
    for ours, theirs in zip(*map(jax.tree.leaves, runs), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("own_key", [True, False])
def test_nnx_optimizer_compiles_once(own_key):
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, sa_gd(key=KEY if own_key else None), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, key):
        loss, gradient = nnx.value_and_grad(lambda model: (model(jnp.ones(2)) ** 2).sum())(model)
        optimizer.update(model, gradient, value=loss, **({} if own_key else {"key": key}))
        return loss

    seen = [float(step(model, optimizer, jax.random.key(t))) for t in range(3)]
    assert step.jitted_fn._cache_size() == 1
    assert seen[1] < seen[0]
    assert float(optimizer.opt_state[-1].loss[...]) == seen[2]


def test_a_scan_in_a_shard_map_over_seeds():
    """Started inside, where the parameters differ between the devices and a constant does not."""
    mesh = jax.make_mesh((2,), ("seed",), axis_types=(jax.sharding.AxisType.Auto,))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(start, (0, 1)))
    values = np.stack([losses(0), losses(1)])

    def run(*inputs):
        return jax.tree.map(
            lambda x: x[None], scanned(sa_gd(), *jax.tree.map(lambda x: x[0], inputs))
        )

    spread = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=jax.sharding.PartitionSpec("seed"),
        out_specs=jax.sharding.PartitionSpec("seed"),
    )
    found = jax.jit(spread)(values, *stacked)
    for seed in (0, 1):
        own = jax.tree.map(lambda x, s=seed: x[s], found)
        assert_close(flat(own), book(ascents(uniforms(), losses(seed)), seed))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, "temperature = 0 must be positive"),
        ({"epsilon": -1.0}, "epsilon = -1 must be positive"),
        ({"q": math.inf}, "q = inf must be positive"),
        ({"ascent_cap": 1.5}, r"ascent_cap = 1.5 must lie in \[0, 1\]"),
        ({"key": 0}, "key = 0 must be a random key"),
        ({"reset_momentum": "phases"}, "reset_momentum"),
    ],
)
def test_errors(options, words):
    with pytest.raises(UsageError, match=words):
        sa_gd(**options)


def test_update_says_what_it_lacks():
    w = jnp.ones(2)
    tx = sa_gd(key=None)
    with pytest.raises(ValueError, match=r"update needs value: call update\(\.\.\., value="):
        tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match=r"update needs key: call update\(\.\.\., key="):
        tx.update(w, tx.init(w), w, value=1.0)
