"""IMP against a loop in NumPy: which weights go, what stays zero, where the others return to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from library_oracles import (
    SHAPES,
    STEPS,
    E,
    NnxTree,
    S,
    assert_close,
    flat,
    jax_gradient,
    nested,
    numpy_gradient,
    problem,
)

from seal_jax import UsageError, forgetting, pruning
from seal_jax.transforms.imp import hold_pruned, make_imp_tx

CLOCK = {"steps_per_epoch": S, "epochs_per_generation": E}
KERNELS = [name for name in SHAPES if name.endswith("kernel")]
STARTS = [S * E, 2 * S * E]


def start():
    return jax.tree.map(jnp.asarray, tuple(map(nested, problem())))


def one_step(tx, params, state, noise, coefficient):
    updates, state = tx.update(jax_gradient(params, noise, coefficient), state, params)
    return optax.apply_updates(params, updates), state, updates


def scanned(tx, params, noise, coefficient):
    def body(carry, inputs):
        params, state, updates = one_step(tx, *carry, *inputs)
        return (params, state), (params, updates)

    return jax.lax.scan(body, (params, tx.init(params)), (noise, coefficient))


def prune_by_the_book(params, kept, snapshot, fraction, scope):
    """Sort what remains, drop the first of it; return the rewound parameters."""
    groups = [KERNELS] if scope == "global" else [[name] for name in KERNELS]
    kept = {name: flags.copy() for name, flags in kept.items()}
    for group in groups:
        left = [
            (abs(params[name][index]), name, index)
            for name in group
            for index in zip(*np.nonzero(kept[name]), strict=True)
        ]
        left.sort(key=lambda entry: entry[0])
        for _, name, index in left[: int(fraction * len(left) + 0.5)]:
            kept[name][index] = False
    new = {name: np.where(kept.get(name, True), snapshot[name], 0.0) for name in params}
    return new, kept


@pytest.mark.parametrize(
    ("scope", "rewind_step", "nesterov"), [("global", 0, False), ("tensor", 5, True)]
)
def test_imp_equals_the_reference(scope, rewind_step, nesterov):
    params, noise, coefficient = problem()
    tx = make_imp_tx(
        0.1,
        fraction=0.3,
        scope=scope,
        rewind_step=rewind_step,
        weight_decay=0.05,
        nesterov=nesterov,
        **CLOCK,
    )
    (_, state), (history, updates) = jax.device_get(jax.jit(lambda *a: scanned(tx, *a))(*start()))
    history, updates = flat(history), flat(updates)
    gradient = numpy_gradient(noise, coefficient)
    p = {n: v.astype(np.float64) for n, v in params.items()}
    buf = {n: np.zeros_like(v) for n, v in p.items()}
    kept = {n: np.ones(SHAPES[n], bool) for n in KERNELS}
    snapshot, expected = None, []
    for t in range(STEPS):
        if t == rewind_step:
            snapshot = p
        g = gradient(p, t)
        if t in STARTS:
            buf = {n: np.zeros_like(v) for n, v in p.items()}
            p, kept = prune_by_the_book(p, kept, snapshot, 0.3, scope)
        else:
            g = {n: g[n] + 0.05 * p[n] for n in p}
            buf = {n: 0.9 * buf[n] + g[n] for n in p}
            move = {n: g[n] + 0.9 * buf[n] for n in p} if nesterov else buf
            p = {n: (p[n] - 0.1 * move[n]) * kept.get(n, True) for n in p}
            for n in KERNELS:
                np.testing.assert_array_equal(updates[n][t][~kept[n]], 0)
        expected.append(p)
        for n in KERNELS:
            np.testing.assert_array_equal(history[n][t][~kept[n]], 0)
            assert (history[n][t][kept[n]] != 0).all()
    assert_close(history, expected, tolerance=2e-6)
    for n in KERNELS:
        np.testing.assert_array_equal(flat(state[1].kept)[n], kept[n])
    size = sum(flags.size for flags in kept.values())
    left = sum(flags.sum() for flags in kept.values())
    assert abs(left - 0.7**2 * size) <= 2  # two roundings, or four
    np.testing.assert_allclose(pruning.remaining(state[1]), left / size, rtol=1e-6)


OPTIMIZERS = {
    "sgd": {"weight_decay": 0.05},
    "adam": {"optimizer": optax.adam(0.05)},
    "adamw": {"optimizer": optax.adamw(0.05, weight_decay=0.1)},
}


@pytest.mark.parametrize("rewind_step", [0, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_exact_events_between_steps(name, rewind_step):
    """Rewound weights are the snapshot's bits, pruned ones stay zero, and one program does it all."""
    tx = make_imp_tx(rewind_step=rewind_step, events=False, **CLOCK, **OPTIMIZERS[name])
    params, noise, coefficient = start()
    step = jax.jit(lambda *a: one_step(tx, *a)[:2])
    event = jax.jit(lambda params, state: pruning.prune(params, state, 0.2))
    state, snapshot = tx.init(params), None
    kept = {n: np.ones(SHAPES[n], bool) for n in KERNELS}
    for t in range(STEPS):
        if t == rewind_step:
            snapshot = jax.tree.map(np.array, flat(params))
        if t in STARTS:
            before = jax.tree.map(np.array, flat(params))
            params, state = event(params, state)
            wanted, kept = prune_by_the_book(before, kept, snapshot, 0.2, "global")
            for n, leaf in flat(params).items():
                np.testing.assert_array_equal(leaf, wanted[n])
        params, state = step(
            params, state, *jax.tree.map(lambda x, t=t: x[t], (noise, coefficient))
        )
        for n in KERNELS:
            leaf = np.asarray(flat(params)[n])
            np.testing.assert_array_equal(leaf[~kept[n]], 0)
            assert (leaf[kept[n]] != 0).all()
    assert step._cache_size() == event._cache_size() == 1
    # The clocks and the memory of the optimizer passed through the events.
    assert int(state[-1].count) == STEPS


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_what_remains_after_many_events(scope):
    params = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(50, 40)), jnp.float32)}
    params["b"] = 10 * params["a"][:20]
    state = hold_pruned().init(params)
    event = jax.jit(lambda p, s: pruning.prune(p, s, 0.2, scope))
    for r in range(1, 11):
        new, state = event(params, state)
        assert abs(float(pruning.remaining(state)) - 0.8**r) < 1e-3
    share = {n: float(flags.mean()) for n, flags in state.kept.items()}
    if scope == "tensor":
        assert abs(share["a"] - share["b"]) < 2e-3
    else:
        assert share["a"] < 0.1 < 0.2 < share["b"]
    for n in params:
        np.testing.assert_array_equal(new[n], np.where(state.kept[n], params[n], 0))


def test_seeds_that_are_vmapped():
    many = jax.tree.map(lambda p: jnp.stack([p, jnp.flip(p)]), start()[0])
    tx = make_imp_tx(fraction=0.4, weight_decay=0.05, **CLOCK)
    run = jax.jit(jax.vmap(lambda p: scanned(tx, p, *start()[1:])[0][1][1].kept))
    kept = flat(run(many))
    assert (kept["fc/kernel"][0] != kept["fc/kernel"][1]).any()
    assert kept["fc/kernel"].sum((1, 2)).tolist() != [64, 64]
    alone = flat(scanned(tx, *start())[0][1][1].kept)
    np.testing.assert_array_equal(kept["fc/kernel"][0], alone["fc/kernel"])


@pytest.mark.parametrize("among", [None, nnx.PathContains("fc")])
def test_nnx_optimizer(among):
    params, noise, coefficient = start()
    rules = None if among is None else "fc"
    tx = make_imp_tx(among=rules, rewind_step=2, weight_decay=0.05, **CLOCK)
    (wanted, _), _ = jax.jit(lambda *a: scanned(tx, *a))(params, noise, coefficient)
    model = NnxTree(params)
    tx = make_imp_tx(among=among, rewind_step=2, weight_decay=0.05, **CLOCK)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, noise, coefficient):
        optimizer.update(model, jax_gradient(nnx.state(model, nnx.Param), noise, coefficient))

    for t in range(STEPS):
        step(model, optimizer, *jax.tree.map(lambda x, t=t: x[t], (noise, coefficient)))
    got = flat(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    for n, leaf in flat(wanted).items():
        np.testing.assert_allclose(got[n], leaf, rtol=1e-5, atol=1e-6)
    zeros = {n: int((leaf == 0).sum()) for n, leaf in got.items()}
    assert zeros["fc/kernel"] > 0
    assert zeros["bn1/scale"] == 0
    assert (zeros["conv1/kernel"] > 0) == (among is None) == (zeros["fc/bias"] == 0)


def test_low_precision_is_rewound_to_the_early_weights():
    """From weights a thousand times as large, under which they would round away."""
    tx = hold_pruned(when=lambda count: count == 1, fraction=0.25)
    early = {"kernel": jnp.array([[0.1, 0.2, 0.3, 0.4]], jnp.bfloat16)}
    params, state = early, tx.init(early)
    for move in ([1.0, 300.0, 300.0, 300.0], [0.0] * 4):
        updates, state = tx.update({"kernel": jnp.array([move], jnp.bfloat16)}, state, params)
        params = optax.apply_updates(params, updates)
    assert params["kernel"].dtype == jnp.bfloat16
    expected = np.array([[0, 0.2, 0.3, 0.4]])
    np.testing.assert_allclose(params["kernel"].astype(jnp.float32), expected, rtol=2**-7)


def test_momentum_resets_leave_pruning_alone():
    tx = make_imp_tx(weight_decay=0.05, **CLOCK)
    params, noise, coefficient = start()
    (params, state), _ = scanned(tx, params, noise, coefficient)
    for policy in ("fresh", "zero", "keep"):
        new = forgetting.forget_state(tx, state, params, "fc", policy)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, new[1], state[1])
    fresh = forgetting.forget_state(tx, state, params, "fc")
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(fresh[0][1].inner))
    assert not bool(flat(state[1].kept)["fc/kernel"].all())


def test_a_donated_state_shares_no_buffer_with_the_parameters():
    tx = make_imp_tx(**CLOCK)
    params, noise, coefficient = start()
    inputs = jax.tree.map(lambda x: x[0], (noise, coefficient))
    state = tx.init(params)
    expected = jax.tree.map(np.asarray, one_step(tx, params, state, *inputs)[0])
    step = jax.jit(lambda *a: one_step(tx, *a)[:2], donate_argnums=(0, 1))
    new, _ = step(params, state, *inputs)  # JAX refuses a buffer that is donated twice
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), new, expected)


def test_narrow_gradients_end_at_zero_in_the_event():
    tx = hold_pruned(when=lambda count: count == 1, fraction=0.5)
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update({"w": jnp.ones((8, 8), jnp.bfloat16)}, state, params)
        assert updates["w"].dtype == jnp.float32
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["w"] == 0, ~state.kept["w"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0}, "fraction = 0 must lie between 0 and 1"),
        ({"fraction": 1e-5}, "fraction = 1e-05 must be at least 1/30000"),
        ({"fraction": jnp.float32(0.2)}, "fraction must be a number of Python"),
        ({"scope": "all"}, "scope = 'all' must be one of tensor, global"),
        ({"rewind_step": -1}, "rewind_step = -1 must be a whole number"),
        ({"rewind_step": 0.5}, "rewind_step = 0.5 must be a whole number"),
        ({"rewind_step": S * E}, "rewind_step = 24 must lie in generation 0, before step 24"),
        ({"among": "cnv"}, "matches no parameter path; nearest: conv"),
    ],
)
def test_arguments_that_cannot_be(options, message):
    with pytest.raises(UsageError, match=message):
        make_imp_tx(**CLOCK, **options).init(start()[0])


def test_prune_needs_one_state():
    params = start()[0]
    state = hold_pruned().init(params)
    with pytest.raises(UsageError, match="state holds 0 pruning states"):
        pruning.prune(params, optax.adam(0.1).init(params))
    with pytest.raises(UsageError, match="state holds 2 pruning states"):
        pruning.prune(params, (state, state))
    with pytest.raises(ValueError, match=r"call update\(updates, state, params\)"):
        hold_pruned().update(params, state)
