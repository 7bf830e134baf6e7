"""Reinitialise-and-relearn: what each method selects at its events, and that the rest is SGD."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from library_oracles import (
    SHAPES,
    STEPS,
    E,
    G,
    NnxTree,
    S,
    assert_close,
    flat,
    jax_gradient,
    nested,
    numpy_gradient,
    problem,
)

import seal_jax
from seal_jax import UsageError, forgetting, layerwise, masks, paths, pruning, selections
from seal_jax.transforms.imp import hold_pruned, make_imp_tx
from seal_jax.transforms.relearn import dsd, is_select, kels, make_relearn_tx, wels, welsr

CLOCK = {"steps_per_epoch": S, "epochs_per_generation": E}
STARTS = [S * E * generation for generation in range(1, G)]
FRESH = 50.0


def draw(key):
    """Values far from all trained ones, different for every key."""
    u = jax.random.uniform(key)
    return nested({n: jnp.full(shape, FRESH) + u for n, shape in SHAPES.items()})


def tx_for(select, key=None, **options):
    key = jax.random.key(7) if key is None else key
    options = {"init_fn": draw, "weight_decay": 0.05, **CLOCK, **options}
    return make_relearn_tx(select, 0.1, key=key, **options)


def start():
    return jax.tree.map(jnp.asarray, tuple(map(nested, problem())))


def one_step(tx, params, state, noise, coefficient):
    updates, state = tx.update(jax_gradient(params, noise, coefficient), state, params)
    return optax.apply_updates(params, updates), state


def scanned(tx, params, noise, coefficient):
    def body(carry, inputs):
        params, state = one_step(tx, *carry, *inputs)
        return (params, state), params

    return jax.lax.scan(body, (params, tx.init(params)), (noise, coefficient))[1]


def history(tx):
    return flat(jax.device_get(jax.jit(lambda *a: scanned(tx, *a))(*start())))


def forgotten(run):
    """For each event the entries that were drawn anew; all others must not have moved."""
    events = []
    for t in STARTS:
        chosen = {}
        for n, leaf in run.items():
            chosen[n] = np.abs(leaf[t] - FRESH - 0.5) < 0.51
            np.testing.assert_array_equal(leaf[t][~chosen[n]], leaf[t - 1][~chosen[n]])
            # Drawn anew with one number, which the event's key gives.
            if chosen[n].any():
                number = draw(jax.random.fold_in(jax.random.key(7), t))["fc"]["bias"][0]
                np.testing.assert_allclose(leaf[t][chosen[n]], number, rtol=1e-6)
        events.append(chosen)
    return events


def counts(chosen):
    return {n: int(flags.sum()) for n, flags in chosen.items()}


def test_wels_is_fixed_and_welsr_is_not():
    key = jax.random.key(3)
    first, second = forgotten(history(tx_for(wels(0.5, key))))
    wanted = flat(selections.random_subset(key, nested(problem()[0]), 0.5))
    for n in SHAPES:
        np.testing.assert_array_equal(first[n], wanted[n])
        np.testing.assert_array_equal(second[n], wanted[n])
    first, second = forgotten(history(tx_for(welsr(0.5))))
    assert (first["fc/kernel"] != second["fc/kernel"]).any()
    for chosen in (first, second):
        assert counts(chosen) == {"bn1/scale": 0, "conv1/kernel": 16, "fc/bias": 0, "fc/kernel": 32}
    again = forgotten(history(tx_for(welsr(0.5))))
    np.testing.assert_array_equal(again[1]["fc/kernel"], second["fc/kernel"])


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_dsd_takes_the_smallest_at_the_time(scope):
    run = history(tx_for(dsd(0.2, scope=scope)))
    kernels = ["conv1/kernel", "fc/kernel"]
    for t, chosen in zip(STARTS, forgotten(run), strict=True):
        if scope == "tensor":
            assert counts(chosen) == {
                "bn1/scale": 0,
                "conv1/kernel": 6,  # of 32
                "fc/bias": 0,
                "fc/kernel": 13,  # of 64
            }
            groups = [[n] for n in kernels]
        else:
            assert sum(counts(chosen).values()) == 19  # of 96
            groups = [kernels]
        for group in groups:
            size = np.concatenate([np.abs(run[n][t - 1]).ravel() for n in group])
            flags = np.concatenate([chosen[n].ravel() for n in group])
            assert size[flags].max() < size[~flags].min()


def test_kels_and_fc():
    for chosen in forgotten(history(tx_for(kels(0.5, first="conv1", head="fc")))):
        assert chosen["conv1/kernel"].all(0).tolist() == [False] * 4 + [True] * 4
        assert not chosen["conv1/kernel"][:, :4].any()
        assert chosen["bn1/scale"].tolist() == [False] * 4 + [True] * 4
        assert chosen["fc/kernel"].all(1).tolist() == [False] * 4 + [True] * 4
        assert not chosen["fc/kernel"][:4].any()
        assert not chosen["fc/bias"].any()
    for chosen in forgotten(history(tx_for("fc"))):
        assert counts(chosen) == {"bn1/scale": 0, "conv1/kernel": 0, "fc/bias": 8, "fc/kernel": 64}


@pytest.mark.parametrize("classes", [None, 3])
def test_zapping_is_sgd_whose_classifier_is_replaced(classes):
    """A loop in NumPy with an event after the first step of every third epoch, of whole classes."""
    key, every = jax.random.key(7), 3 * S
    options = {"every": 3, "classes": classes, "weight_decay": 0.05, **CLOCK}
    run = history(seal_jax.make_zapping_tx("fc", 0.1, init_fn=draw, key=key, **options))
    params, noise, coefficient = problem()
    gradient = numpy_gradient(noise, coefficient)
    params, expected, seen = {n: p.astype(np.float64) for n, p in params.items()}, [], set()
    for t in range(STEPS):
        if t % (S * E) == 0:
            buffer = {n: np.zeros_like(p) for n, p in params.items()}
        slopes = gradient(params, t)
        for n, p in params.items():
            buffer[n] = 0.9 * buffer[n] + slopes[n] + 0.05 * p
            params[n] = p - 0.1 * buffer[n]
        if t > 0 and t % every == 0:
            number = float(draw(jax.random.fold_in(key, t))["fc"]["bias"][0])
            zapped = np.isclose(run["fc/bias"][t], number, rtol=1e-6)
            assert zapped.sum() == (classes or 8)
            seen.add(tuple(zapped))
            for n in ("fc/kernel", "fc/bias"):
                params[n] = np.where(zapped, number, params[n])
        expected.append(dict(params))
    assert (len(seen) > 1) == (classes is not None)
    assert_close(run, expected, tolerance=1e-5)


def test_zapping_takes_the_key_of_each_step():
    params = start()[0]
    tx = seal_jax.make_zapping_tx("fc", init_fn=draw, steps_per_epoch=1)
    state = tx.init(params)
    for t in range(3):
        updates, state = tx.update(params, state, params, key=jax.random.key(t))
    number = draw(jax.random.fold_in(jax.random.key(2), 2))["fc"]["bias"]
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after["fc"]["bias"], number, rtol=1e-6)
    with pytest.raises(ValueError, match="update needs key"):
        tx.update(params, state, params)
    for options, words in (
        ({"every": 0}, "every = 0"),
        ({"classes": 8}, "classes = 8 must be fewer"),
    ):
        with pytest.raises(UsageError, match=words):
            seal_jax.make_zapping_tx("fc", init_fn=draw, steps_per_epoch=1, **options).init(params)


def test_a_static_mask_is_llf_bit_for_bit():
    runs = [
        history(tx_for("fc")),
        history(tx_for(lambda key, params, generation: masks.resolve("fc", params))),
        history(
            seal_jax.make_llf_tx(
                "fc", 0.1, init_fn=draw, key=jax.random.key(7), weight_decay=0.05, **CLOCK
            )
        ),
    ]
    for run in runs[1:]:
        jax.tree.map(np.testing.assert_array_equal, run, runs[0])


@pytest.mark.parametrize("optimizer", [None, optax.adam(0.1)])
def test_generations_between_events_are_plain_training(optimizer):
    """From an event's result on, the optimizer does what it does from a fresh start."""
    options = {} if optimizer is None else {"optimizer": optimizer}
    decay = {"weight_decay": 0.05 if optimizer is None else 5e-4}
    rate = (0.1,) if optimizer is None else ()
    key = jax.random.key(7)
    tx = make_relearn_tx(welsr(0.3), *rate, init_fn=draw, key=key, **decay, **CLOCK, **options)
    plain = seal_jax.make_normal_tx(*rate, **decay, **CLOCK, **options)
    run = history(tx)
    t = STARTS[0]
    params = nested({n: jnp.asarray(leaf[t]) for n, leaf in run.items()})
    noise, coefficient = jax.tree.map(lambda x: x[t + 1 : 2 * t], start()[1:])
    rest = flat(jax.jit(lambda *a: scanned(plain, *a))(params, noise, coefficient))
    for n in SHAPES:
        np.testing.assert_allclose(run[n][t + 1 : 2 * t], rest[n], rtol=2e-5, atol=1e-5)


def test_select_is_told_key_parameters_and_generation():
    seen = []

    def select(key, params, generation):
        seen.append(jax.tree.structure(params))
        every = jax.tree.map(lambda _: jnp.zeros((), bool), params)
        return {**every, "bn1": {"scale": generation == 2}}

    first, second = forgotten(history(tx_for(select)))
    assert not any(flags.any() for flags in first.values())
    assert counts(second) == {"bn1/scale": 8, "conv1/kernel": 0, "fc/bias": 0, "fc/kernel": 0}
    assert len(seen) == 2  # once in init, once in the traced step: one program for all events


def test_one_compilation():
    tx = tx_for(dsd(0.2))
    step = jax.jit(lambda *a: one_step(tx, *a))
    params, noise, coefficient = start()
    state = tx.init(params)
    for t in range(STEPS):
        params, state = step(
            params, state, *jax.tree.map(lambda x, t=t: x[t], (noise, coefficient))
        )
    assert step._cache_size() == 1
    run = history(tx)
    for n, leaf in flat(params).items():
        np.testing.assert_allclose(leaf, run[n][-1], rtol=1e-5)


def test_seeds_that_are_vmapped_select_apart():
    def one(seed):
        return scanned(tx_for(welsr(0.5), key=jax.random.key(seed)), *start())

    many = flat(jax.jit(jax.vmap(one))(jnp.array([7, 8])))
    chosen = [
        forgotten({n: np.asarray(leaf[0]) for n, leaf in many.items()}),
        [np.asarray(many["fc/kernel"][1][t]) > 20 for t in STARTS],
    ]
    assert (chosen[0][0]["fc/kernel"] != chosen[1][0]).any()
    alone = forgotten(history(tx_for(welsr(0.5))))
    for a, b in zip(alone, chosen[0], strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("kind", ["relearn", "imp"])
@pytest.mark.parametrize("inside", [True, False])
def test_seeds_over_devices(kind, inside):
    """The types of ``shard_map`` agree in a scan, with the state made inside of it or outside."""
    mesh = jax.make_mesh((2,), ("seed",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    params, noise, coefficient = start()
    many = jax.tree.map(lambda p: jnp.stack([p, jnp.flip(p)]), params)

    def tx():
        if kind == "imp":
            return make_imp_tx(0.1, rewind_step=3, weight_decay=0.05, **CLOCK)
        return tx_for(welsr(0.5))

    def train(params, state):
        params, state = jax.tree.map(lambda leaf: leaf[0], (params, state))
        if inside:
            state = tx().init(params)

        def body(carry, inputs):
            return one_step(tx(), *carry, *inputs), None

        params, _ = jax.lax.scan(body, (params, state), (noise, coefficient))[0]
        return jax.tree.map(lambda leaf: leaf[None], params)

    state = jax.vmap(tx().init)(many)
    run = jax.jit(jax.shard_map(train, mesh=mesh, in_specs=P("seed"), out_specs=P("seed")))
    got = flat(run(many, state))
    alone = flat(jax.jit(lambda *a: scanned(tx(), *a))(params, noise, coefficient))
    for n in SHAPES:
        np.testing.assert_allclose(got[n][0], alone[n][-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("select", "init"),
    [(welsr(0.5), "torch_default"), (dsd(0.2), "state"), ("fc", "state")],
    ids=["welsr", "dsd", "fc"],
)
def test_nnx_optimizer(select, init):
    params, noise, coefficient = start()
    model = NnxTree(params)
    init_fn = {
        "torch_default": "torch_default",
        "state": lambda key: nnx.state(NnxTree(draw(key)), nnx.Param),
    }[init]
    optimizer = nnx.Optimizer(model, tx_for(select, init_fn=init_fn), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, noise, coefficient):
        optimizer.update(model, jax_gradient(nnx.state(model, nnx.Param), noise, coefficient))

    for t in range(STARTS[0] + 3):
        step(model, optimizer, *jax.tree.map(lambda x, t=t: x[t], (noise, coefficient)))
    got = flat(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    wanted = history(tx_for(select, init_fn=draw if init == "state" else init))
    for n in SHAPES:
        np.testing.assert_allclose(got[n], wanted[n][STARTS[0] + 2], rtol=1e-5, atol=1e-5)


class Linear(eqx.Module):
    weight: jax.Array
    bias: jax.Array


FOREIGN = {
    "nnx": lambda: nnx.state(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.Param),
    "linen": lambda: nn.Dense(5).init(jax.random.key(0), jnp.ones((1, 6)))["params"],
    "equinox": lambda: Linear(jnp.arange(1.0, 31.0).reshape(6, 5), jnp.ones(5)),
    "list": lambda: [jnp.arange(1.0, 31.0).reshape(6, 5), jnp.ones(5)],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_exact_events_on_foreign_trees(kind):
    params = FOREIGN[kind]()
    chosen = dsd(0.2)(None, params, 0)
    new = forgetting.reinitialise_selected(jax.random.key(1), params, chosen, "torch_default")
    assert jax.tree.structure(new) == jax.tree.structure(params)
    changed = [
        np.asarray(a != b) for a, b in zip(*map(jax.tree.leaves, (new, params)), strict=True)
    ]
    assert sorted(int(flags.sum()) for flags in changed) == [0, 6]
    new, state = pruning.prune(params, hold_pruned().init(params), 0.2)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert sorted(int((leaf == 0).sum()) for leaf in jax.tree.leaves(new))[-1] >= 6
    assert float(pruning.remaining(state)) == np.float32(0.8)
    order = [path for path, _ in paths.named_leaves(params)]
    norms = layerwise.kernel_norms(params)
    back = layerwise.rescale(jax.tree.map(lambda p: 2 * p, params), norms, order, k=len(order))
    for got, was in zip(*map(jax.tree.leaves, (back, params)), strict=True):
        np.testing.assert_allclose(got, was if was.ndim == 2 else 2 * was, rtol=1e-6)


def test_what_counts_as_a_select_function():
    assert is_select(wels(0.5, jax.random.key(0)))
    for static in ("fc", ["fc"], lambda params: params, lambda path, leaf: True, nnx.Param, None):
        assert not is_select(static)
    assert not is_select(nnx.PathContains("fc"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wels(0, jax.random.key(0)), "fraction = 0 must lie between"),
        (lambda: welsr(1.0), "fraction = 1 must lie between"),
        (lambda: dsd(-0.2), "fraction = -0.2 must lie between"),
        (lambda: dsd(0.2, scope="net"), "scope = 'net' must be one of"),
        (lambda: kels(2, "conv1", "fc"), "keep = 2 must lie between"),
        (lambda: kels(0.5, "conv", "fc"), "first = 'conv' is no layer .* nearest: conv1"),
        (lambda: "cnv", "matches no parameter path"),
        (
            lambda: lambda key, params, generation: {"fc": True},
            "must be a tree like the parameters",
        ),
    ],
)
def test_selects_that_cannot_be(make, message):
    with pytest.raises(UsageError, match=message):
        tx_for(make()).init(start()[0])
