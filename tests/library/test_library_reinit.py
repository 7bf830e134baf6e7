"""Re-initialisation inside a chain and between steps, against NumPy and closed forms."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from library_oracles import (
    SHAPES,
    STEPS,
    E,
    G,
    S,
    assert_close,
    flat,
    jax_gradient,
    nested,
    numpy_gradient,
    problem,
    seal_by_the_book,
)

import seal_jax
from seal_jax import UsageError, forgetting, masks, transforms

LATER = {"fc/kernel", "fc/bias"}
STARTS = [S * E * generation for generation in range(1, G)]


def draw(key):
    """A tree whose leaves all show the one number the key gave."""
    u = jax.random.uniform(key)
    return {
        "conv1": {"kernel": jnp.full(SHAPES["conv1/kernel"], 100.0)},
        "bn1": {"scale": jnp.full(SHAPES["bn1/scale"], 100.0)},
        "fc": {
            "kernel": u + jnp.arange(64.0).reshape(8, 8) / 64,
            "bias": u - jnp.arange(8.0),
        },
    }


def run(tx, params, noise, coefficient):
    def body(carry, inputs):
        params, state = carry
        updates, state = tx.update(jax_gradient(params, *inputs), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, updates)

    return jax.lax.scan(body, (params, tx.init(params)), (noise, coefficient))[1]


def compiled(tx, *args):
    return jax.device_get(jax.jit(lambda *a: run(tx, *a))(*args))


def start():
    return jax.tree.map(jnp.asarray, tuple(map(nested, problem())))


def llf(key=None, **options):
    common = {"steps_per_epoch": S, "epochs_per_generation": E, "weight_decay": 0.05}
    key = jax.random.key(7) if key is None else key
    return seal_jax.make_llf_tx("fc", 0.1, init_fn=draw, key=key, **common, **options)


@pytest.mark.parametrize("reset", ["generation", "phase", "never"])
def test_llf_equals_the_reference(reset):
    """SGD in NumPy whose every generation from 1 on spends its first step on the event."""
    params, noise, coefficient = problem()
    history, updates = compiled(llf(reset_momentum=reset), *start())
    history, updates = flat(history), flat(updates)
    gradient = numpy_gradient(noise, coefficient)
    p = {n: v.astype(np.float64) for n, v in params.items()}
    buf = {n: np.zeros_like(v) for n, v in p.items()}
    expected, numbers = [], []
    for t in range(STEPS):
        g = gradient(p, t)
        if t in STARTS:
            if reset == "never":
                buf = {n: 0.9 * buf[n] + g[n] + 0.05 * p[n] for n in p}
            else:
                buf = {n: np.zeros_like(v) for n, v in p.items()}
            # The draw's one number must explain every re-initialised value.
            u = float(history["fc/bias"][t][0])
            fresh = flat(jax.tree.map(np.asarray, draw_from(u)))
            p = {n: fresh[n] if n in LATER else p[n] for n in p}
            numbers.append(u)
            for n in set(SHAPES) - LATER:
                np.testing.assert_array_equal(updates[n][t], 0)
                np.testing.assert_array_equal(history[n][t], history[n][t - 1])
        else:
            buf = {n: 0.9 * buf[n] + g[n] + 0.05 * p[n] for n in p}
            p = {n: p[n] - 0.1 * buf[n] for n in p}
        expected.append(p)
    assert_close(history, expected)
    assert all(0 <= u < 1 for u in numbers)
    assert len({round(u, 4) for u in numbers}) == G - 1  # no generation draws another's weights


def draw_from(u):
    return {
        "conv1": {"kernel": np.zeros(SHAPES["conv1/kernel"])},
        "bn1": {"scale": np.zeros(SHAPES["bn1/scale"])},
        "fc": {"kernel": u + np.arange(64.0).reshape(8, 8) / 64, "bias": u - np.arange(8.0)},
    }


def test_draws_follow_the_key_and_only_the_key():
    def numbers(key):
        return flat(compiled(llf(key), *start())[0])["fc/bias"][STARTS, 0]

    first = numbers(jax.random.key(7))
    np.testing.assert_array_equal(numbers(jax.random.key(7)), first)
    assert (np.abs(numbers(jax.random.key(8)) - first) > 1e-4).all()
    np.testing.assert_array_equal(numbers(jax.random.PRNGKey(7)), first)


def test_seeds_that_are_vmapped_draw_apart():
    def one(seed):
        return run(llf(jax.random.key(seed)), *start())[0]["fc"]["bias"][jnp.array(STARTS), 0]

    drawn = jax.jit(jax.vmap(one))(jnp.arange(3))
    assert len(np.unique(np.round(drawn, 4))) == drawn.size
    np.testing.assert_allclose(drawn[2], one(2), rtol=1e-6)


def test_the_key_outlives_a_donated_state():
    key = jax.random.key(7)
    tx = llf(key)
    params, noise, coefficient = start()
    gradient = jax_gradient(params, *jax.tree.map(lambda x: x[0], (noise, coefficient)))
    jax.jit(tx.update, donate_argnums=1)(gradient, tx.init(params), params)
    assert not key.is_deleted()
    tx.update(gradient, tx.init(params), params)


def test_seal_with_the_fit_subtree_reinitialised():
    """SEAL+Reinit of Table 7: the event takes a step, the rest is SEAL."""
    tx = seal_jax.make_seal_tx(
        ("conv1", "bn1"),
        0.1,
        steps_per_epoch=S,
        epochs_per_generation=E,
        weight_decay=0.05,
        fit_in_ascent="reinit",
        init_fn=draw,
        key=jax.random.key(7),
    )
    history, updates = compiled(tx, *start())
    history, updates = flat(history), flat(updates)
    params, noise, coefficient = problem()
    plain = numpy_gradient(noise, coefficient)
    first = seal_by_the_book(params, plain, rate=lambda epoch: 0.1, weight_decay=0.05)[0]
    assert_close({n: v[: S * E] for n, v in history.items()}, first[: S * E])
    for t in STARTS:
        u = float(history["fc/bias"][t][0])
        np.testing.assert_allclose(history["fc/kernel"][t], draw_from(u)["fc"]["kernel"], rtol=1e-6)
        np.testing.assert_array_equal(history["conv1/kernel"][t], history["conv1/kernel"][t - 1])
        # No momentum outlives the event: one step on, the update is the gradient's alone.
        before = {n: v[t].astype(np.float64) for n, v in history.items()}
        g = plain(before, t + 1)
        for n in SHAPES:
            sign = 0.01 if n not in LATER else -1.0
            decay = -0.05 if n not in LATER else 0.05
            step = sign * 0.1 * (g[n] + decay * before[n])
            np.testing.assert_allclose(updates[n][t + 1], step, rtol=2e-5, atol=1e-7)


def test_masked_reinit_alone():
    tx = seal_jax.masked_reinit(
        "fc", draw, when=lambda count: count % 2 == 1, key=jax.random.key(1)
    )
    params = start()[0]
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
    jax.tree.map(np.testing.assert_array_equal, updates, params)  # no event yet
    drawn = []
    for _ in range(4):
        updates, state = tx.update(params, state, params)
        drawn.append(optax.apply_updates(params, updates))
    np.testing.assert_array_equal(drawn[0]["conv1"]["kernel"], params["conv1"]["kernel"])
    np.testing.assert_array_equal(drawn[1]["fc"]["bias"], 2 * params["fc"]["bias"])
    u, v = float(drawn[0]["fc"]["bias"][0]), float(drawn[2]["fc"]["bias"][0])
    assert u != v
    np.testing.assert_allclose(drawn[0]["fc"]["kernel"], draw_from(u)["fc"]["kernel"], rtol=1e-6)


WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.identity()),
    "finite": lambda tx: optax.apply_if_finite(tx, 3),
    "multi": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
}


@pytest.mark.parametrize(
    ("wrapper", "dtype"), [("alone", jnp.float16), *[(name, jnp.bfloat16) for name in WRAPPERS]]
)
def test_low_precision_reaches_the_fresh_values(wrapper, dtype):
    """From weights a hundred times as large, under which they would round away."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), start()[0])
    params = jax.tree.map(lambda x: jnp.full(x.shape, 100.0, dtype), shapes)
    clock, key = {"steps_per_epoch": 1, "epochs_per_generation": 1}, jax.random.key(3)
    later = {**clock, "init_fn": draw, "key": key}
    whole = {**later, "weight_decay": 0.0}
    transformations = {
        "masked_reinit": seal_jax.masked_reinit("fc", draw, lambda count: count == 1, key=key),
        "llf": seal_jax.make_llf_tx("fc", 1e-3, **whole),
        "relearn": seal_jax.make_relearn_tx(transforms.dsd(0.99), 1e-3, **whole),
        "seal": seal_jax.make_seal_tx(
            ("conv1", "bn1"), 1e-3, fit_in_ascent="reinit", ascent_epochs=1, **whole
        ),
    }
    # optax.apply_if_finite chooses between updates and zeros of the gradient's dtype.
    kind = jnp.float32 if wrapper == "finite" else dtype
    gradient = jax.tree.map(lambda x: jnp.full(x.shape, 0.5, kind), shapes)

    def run(tx, params):
        def body(carry, _):
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), length=2)[0][0]

    fresh = draw(jax.random.fold_in(key, 1))["fc"]["kernel"].astype(dtype)
    for name in transformations if wrapper == "alone" else ("llf",):
        tx = WRAPPERS[wrapper](transformations[name])
        after = jax.jit(run, static_argnums=0)(tx, params)["fc"]["kernel"]
        assert after.dtype == dtype
        moved = after != params["fc"]["kernel"]
        ulp = np.abs(np.asarray(fresh, np.float32)) * float(jnp.finfo(dtype).eps)
        error = np.abs(np.asarray(after, np.float32) - np.asarray(fresh, np.float32))
        assert (error[moved] <= ulp[moved] + 1e-5).all()
        assert moved.mean() > 0.9


# Exact events


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_reinitialise_is_bit_exact(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), start()[0])
    key = jax.random.key(5)

    def init(key):
        keys = iter(jax.random.split(key, 4))
        return jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape, p.dtype), params)

    event = jax.jit(lambda key, params: forgetting.reinitialise(key, params, "fc", init))
    new, wanted = event(key, params), init(key)
    jax.tree.map(np.testing.assert_array_equal, new["fc"], wanted["fc"])
    for kept in ("conv1", "bn1"):
        jax.tree.map(np.testing.assert_array_equal, new[kept], params[kept])
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype(dtype)}
    other = event(jax.random.key(6), params)
    assert (other["fc"]["kernel"] != new["fc"]["kernel"]).any()


def test_reinitialise_keeps_the_dtype_of_the_parameters():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), start()[0])
    new = forgetting.reinitialise(jax.random.key(5), params, "fc", draw)
    assert new["fc"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (lambda key: {"conv1": 0.0}, "result of init_fn must be a tree like"),
        (lambda key: {**draw(key), "fc": {"kernel": jnp.ones(3), "bias": 0.0}}, "shape"),
        ("he_normal", "'he_normal' must be a function of a key"),
        (None, "None must be a function of a key"),
    ],
)
def test_initialisers_that_do_not_fit(init, message):
    params = start()[0]
    with pytest.raises(UsageError, match=message):
        forgetting.reinitialise(jax.random.key(0), params, "fc", init)
    tx = seal_jax.masked_reinit("fc", init, when=lambda count: True, key=jax.random.key(0))
    with pytest.raises(UsageError, match=message):
        tx.init(params)


def test_torch_default_against_the_uniform_distribution():
    """Bounds and first moments of U(-1/sqrt(f), 1/sqrt(f)), f the inputs of one output unit."""
    params = {
        "conv": {"kernel": jnp.zeros((3, 3, 16, 128)), "bias": jnp.zeros(128)},
        "fc": {"kernel": jnp.zeros((100, 400)), "bias": jnp.zeros(400)},
        "bn": {"scale": jnp.zeros(7), "bias": jnp.ones(7)},
    }
    fresh = jax.jit(lambda key: forgetting.torch_default(key, params))(jax.random.key(0))
    for layer, fan_in in (("conv", 3 * 3 * 16), ("fc", 100)):
        bound = 1 / np.sqrt(fan_in)
        for leaf in ("kernel", "bias"):
            x = np.asarray(fresh[layer][leaf], np.float64).ravel()
            assert np.abs(x).max() <= bound * (1 + 1e-6)
            assert np.abs(x).max() > bound * 0.95
            deviation = bound / np.sqrt(3)
            assert abs(x.mean()) < 5 * deviation / np.sqrt(x.size)
            # The standard error of a uniform's standard deviation is sigma * sqrt(0.2 / n).
            assert abs(x.std() / deviation - 1) < 5 * np.sqrt(0.2 / x.size)
    np.testing.assert_array_equal(fresh["bn"]["scale"], 1)
    np.testing.assert_array_equal(fresh["bn"]["bias"], 0)
    # No two leaves share their draws.
    assert abs(float(fresh["conv"]["bias"][0] * 12 - fresh["fc"]["bias"][0] * 10)) > 1e-6
    spec = jax.eval_shape(lambda: params)
    again = forgetting.torch_default(jax.random.key(0), spec)
    np.testing.assert_allclose(again["fc"]["kernel"], fresh["fc"]["kernel"], rtol=1e-6)


def assert_uniform(leaf, torch_parameter, bound):
    """Check that ``leaf`` spreads over the bounds that PyTorch's own layer has."""
    for values in (np.asarray(leaf), torch_parameter.detach().numpy()):
        assert 0.8 * bound < np.abs(values).max() <= bound * (1 + 1e-6)


def test_torch_default_of_equinox_is_torchs():
    torch = pytest.importorskip("torch")
    keys = jax.random.split(jax.random.key(0), 2)
    net = {
        "linear": (eqx.nn.Linear(400, 30, key=keys[0]), torch.nn.Linear(400, 30), 400),
        "conv": (eqx.nn.Conv2d(16, 30, 3, key=keys[1]), torch.nn.Conv2d(16, 30, 3), 16 * 9),
        "grouped": (
            eqx.nn.Conv2d(16, 32, 3, groups=4, key=keys[1]),
            torch.nn.Conv2d(16, 32, 3, groups=4),
            4 * 9,
        ),
    }
    params = eqx.filter({name: module for name, (module, _, _) in net.items()}, eqx.is_array)
    fresh = forgetting.torch_default(jax.random.key(1), params)
    for name, (_, module, fan_in) in net.items():
        assert_uniform(fresh[name].weight, module.weight, 1 / np.sqrt(fan_in))
        assert_uniform(fresh[name].bias, module.bias, 1 / np.sqrt(fan_in))
    norms = {
        "layer": eqx.filter(eqx.nn.LayerNorm((4, 5)), eqx.is_array),
        "group": eqx.filter(eqx.nn.GroupNorm(2, 8), eqx.is_array),
        "haiku": {"scale": jnp.zeros(3), "offset": jnp.ones(3)},
    }
    fresh = forgetting.torch_default(jax.random.key(1), jax.tree.map(lambda leaf: leaf + 5, norms))
    for norm in ("layer", "group"):
        np.testing.assert_array_equal(fresh[norm].weight, 1)
        np.testing.assert_array_equal(fresh[norm].bias, 0)
    assert fresh["haiku"]["scale"].tolist() == [1, 1, 1]
    assert fresh["haiku"]["offset"].tolist() == [0, 0, 0]


def test_torch_default_of_other_layouts():
    params = {"weight": jnp.zeros((400, 10)), "b": jnp.zeros(1000)}
    for layout, fan_in in ((None, 10), ("out_in", 10), ("in_out", 400)):
        fresh = forgetting.torch_default(jax.random.key(0), params, layout=layout)
        for leaf in fresh.values():
            assert 0.95 < np.abs(leaf).max() * np.sqrt(fan_in) <= 1 + 1e-6
    with pytest.raises(UsageError, match="layout = 'HWIO' must be one of in_out, out_in, None"):
        forgetting.torch_default(jax.random.key(0), params, layout="HWIO")


def test_torch_default_leaves_alone_what_is_not_floating():
    params = {
        "embed": {"table": jnp.arange(6).reshape(2, 3)},
        "fc": {"kernel": jnp.ones((2, 2)), "mask": jnp.ones((2, 2), bool)},
        "hidden": optax.MaskedNode(),
        "rng": jax.random.key(3),
        "steps": jnp.int32(7),
    }
    for run in (forgetting.torch_default, jax.jit(forgetting.torch_default)):
        fresh = run(jax.random.key(0), params)
        assert (fresh["fc"]["kernel"] != 1).all()
        assert fresh["embed"]["table"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert fresh["fc"]["mask"].all()
        assert fresh["steps"] == 7
        assert fresh["rng"] == params["rng"]
    new = forgetting.reinitialise(jax.random.key(0), params, "fc/kernel", "torch_default")
    np.testing.assert_array_equal(new["embed"]["table"], params["embed"]["table"])


# The optimizer's memory beside an exact event


def trained(tx, params, steps=3):
    state = tx.init(params)
    for t in range(steps):
        gradient = jax.tree.map(lambda p, t=t: jnp.cos(p * (t + 1)), params)
        _, state = tx.update(gradient, state, params)
    return state


def clocks(state):
    """Counts that stand in no node with memory of parameters."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        text = jax.tree_util.keystr(path)
        if jnp.ndim(leaf) == 0 and jnp.issubdtype(leaf.dtype, jnp.integer) and ".inner" not in text:
            found.append(int(leaf))
    return found


@pytest.mark.parametrize("kind", ["sgd", "seal", "llf"])
def test_forget_state_policies(kind):
    params = start()[0]
    clock = {"steps_per_epoch": S, "epochs_per_generation": E}
    tx = {
        "sgd": lambda: seal_jax.make_normal_tx(**clock),
        "seal": lambda: seal_jax.make_seal_tx("conv1", **clock),
        "llf": lambda: llf(),
    }[kind]()
    state = trained(tx, params)

    def traces(state):
        nodes = jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, optax.TraceState))
        return next(n.trace for n in nodes if isinstance(n, optax.TraceState))

    def event(policy):
        return jax.jit(lambda s: forgetting.forget_state(tx, s, params, "fc", policy))(state)

    held = traces(state)
    fresh, zero, keep = event("fresh"), event("zero"), event("keep")
    for new in (fresh, zero, keep):
        assert jax.tree.structure(new) == jax.tree.structure(state)
        assert clocks(new) == clocks(state) == [3] * len(clocks(state))
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(traces(fresh)))
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(traces(zero)["fc"]))
    jax.tree.map(
        np.testing.assert_array_equal,
        traces(zero)["conv1"],
        jax.tree.map(np.asarray, held["conv1"]),
    )
    jax.tree.map(np.testing.assert_array_equal, traces(keep), held)
    assert all(jnp.all(leaf != 0) for leaf in jax.tree.leaves(held))


def test_forget_state_of_adam():
    params = start()[0]
    tx = optax.adam(optax.linear_schedule(0.1, 0.0, 9))
    state = trained(tx, params)
    fresh = forgetting.forget_state(tx, state, params, "fc")
    assert (int(fresh[0].count), int(fresh[1].count)) == (0, 3)
    # Adam's step after t updates is corrected for t: a moment back at zero needs its own count.
    with pytest.raises(UsageError, match=r"'zero' needs a count of.*split_state\(optimizer"):
        forgetting.forget_state(tx, state, params, "fc", "zero")
    with pytest.raises(UsageError, match="'drop' must be one of fresh, zero, keep"):
        forgetting.forget_state(tx, state, params, "fc", "drop")


def test_forget_state_of_an_adam_in_two_parts():
    schedule = optax.linear_schedule(0.1, 0.0, 9)
    params, adam = start()[0], optax.adam(schedule)
    tx = transforms.split_state(adam, "fc")
    state, whole = trained(tx, params), trained(adam, params)
    state = forgetting.forget_state(tx, state, params, "fc", "zero")
    fresh = optax.adam(lambda count: schedule(count + 3)).init(params)  # its clock goes on
    gradient = jax.tree.map(jnp.cos, params)
    updates, _ = tx.update(gradient, state, params)
    start_again, _ = optax.adam(schedule(3)).update(gradient, fresh, params)
    going_on, _ = adam.update(gradient, whole, params)
    for layer, expected in (("fc", start_again), ("conv1", going_on), ("bn1", going_on)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
            updates[layer],
            expected[layer],
        )


def test_a_mask_may_leave_the_norms_alone():
    order = ("conv1", "bn1", "fc")
    mask = masks.restrict(masks.since(order, "bn1"), biases=False)
    params = start()[0]
    new = forgetting.reinitialise(jax.random.key(0), params, mask, draw)
    np.testing.assert_array_equal(new["bn1"]["scale"], params["bn1"]["scale"])
    np.testing.assert_array_equal(new["fc"]["bias"], params["fc"]["bias"])
    assert (new["fc"]["kernel"] != params["fc"]["kernel"]).all()
