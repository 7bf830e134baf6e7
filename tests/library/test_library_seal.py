"""``make_seal_tx`` in every place it may stand, against the reference update in NumPy float64."""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from library_oracles import (
    FORGET,
    SHAPES,
    STEPS,
    E,
    K,
    NnxTree,
    S,
    assert_close,
    epoch_rate,
    flat,
    jax_gradient,
    nested,
    numpy_gradient,
    problem,
    seal_by_the_book,
)

import seal_jax
from seal_jax import masks
from seal_jax.transforms import preconditioner

RULES = ("conv1", "bn1")
CLOCK = {"steps_per_epoch": S, "epochs_per_generation": E}
RATE = functools.partial(epoch_rate, 0.1, epochs=E, warmup=2)
SCHEDULE = seal_jax.cosine(0.1, epochs=E, steps_per_epoch=S, warmup_epochs=2)


def seal(mask: Any = RULES, **options):
    # A large decay, so that a wrong one cannot hide.
    options = {"weight_decay": 0.05, **options}
    return seal_jax.make_seal_tx(mask, SCHEDULE, **CLOCK, **options)


def book(seed=0, **options):
    params, noise, coefficient = problem(seed)
    options = {"weight_decay": 0.05, "rate": RATE, **options}
    return seal_by_the_book(params, numpy_gradient(noise, coefficient), **options)


def start(seed=0):
    return jax.tree.map(jnp.asarray, tuple(map(nested, problem(seed))))


def one_step(tx, params, state, noise, coefficient):
    updates, state = tx.update(jax_gradient(params, noise, coefficient), state, params)
    return optax.apply_updates(params, updates), updates, state


def scanned(tx, params, noise, coefficient):
    """Return the histories of parameters and updates."""

    def body(carry, inputs):
        params, updates, state = one_step(tx, *carry, *inputs)
        return (params, state), (params, updates)

    return jax.lax.scan(body, (params, tx.init(params)), (noise, coefficient))[1]


def check_scan(tx, expected):
    params, updates = jax.jit(functools.partial(scanned, tx))(*start())
    assert_close(flat(params), expected[0])
    assert_close(flat(updates), expected[1])


# The phases themselves


@pytest.mark.parametrize("reset", ["phase", "generation", "never"])
@pytest.mark.parametrize("factor", [-1.0, 0.0])
def test_scan_equals_the_reference(reset, factor):
    tx = seal(reset_momentum=reset, ascent_weight_decay_factor=factor)
    check_scan(tx, book(reset=reset, factor=factor))


def test_the_reference_tells_the_options_apart():
    """The comparisons above could not see a difference that the reference does not have."""
    variants = [
        book(reset=reset, factor=factor)
        for reset in ("phase", "generation", "never")
        for factor in (-1.0, 0.0)
    ]
    variants += [book(freeze=True), book(forget=set(SHAPES) - FORGET), book(ascent_epochs=1)]
    last = [np.concatenate([v.ravel() for v in params[-1].values()]) for params, _ in variants]
    for i, a in enumerate(last):
        for b in last[:i]:
            assert np.linalg.norm(a - b) > 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("reset", ["phase", "generation", "never"])
def test_freeze(reset):
    tx = seal(fit_in_ascent="freeze", reset_momentum=reset)
    check_scan(tx, book(freeze=True, reset=reset))


@pytest.mark.parametrize("whole", [False, True])
def test_adam_of_the_frozen_knows_nothing_of_the_ascent(whole):
    """The fit subtree moves as by an Adam that is not called while it is frozen."""
    options = {"optimizer": optax.adam(0.1)} if whole else {"learning_rate": 0.1}
    if not whole:
        options |= {"preconditioner": preconditioner("adam"), "weight_decay": 0.0}
    tx = seal_jax.make_seal_tx(
        RULES, fit_in_ascent="freeze", reset_momentum="never", **CLOCK, **options
    )
    params, noise, _ = start()
    adam = optax.adam(0.1)
    state, alone, update = tx.init(params), adam.init(params["fc"]), jax.jit(tx.update)
    for t in range(2 * S * E):
        g = jax.tree.map(lambda x, t=t: x[t], noise)
        updates, state = update(g, state, params)
        if S * E <= t < S * (E + K):
            assert not any(np.any(x) for x in updates["fc"].values())
            continue
        expected, alone = adam.update(g["fc"], alone)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            updates["fc"],
            expected,
        )


def test_reverse():
    check_scan(seal(masks.invert(RULES)), book(forget=set(SHAPES) - FORGET))


def test_part_of_an_epoch_of_ascent_and_another_scale():
    tx = seal(ascent_epochs=4 / 3, ascent_scale=0.3, momentum=0.5)
    check_scan(tx, book(ascent_epochs=4 / 3, scale=0.3, momentum=0.5))


@pytest.mark.parametrize(
    ("name", "peak", "warmup", "factor"), [("paper", 0.01, 0, -1.0), ("reference", 0.1, 20, 0.0)]
)
def test_presets(name, peak, warmup, factor):
    preset = seal_jax.PRESETS[name]
    assert (preset.learning_rate, preset.warmup_epochs) == (peak, warmup)
    assert (preset.ascent_weight_decay_factor, preset.ascent_scale) == (factor, 0.01)
    assert (preset.momentum, preset.weight_decay, preset.label_smoothing) == (0.9, 5e-4, 0.1)
    assert (preset.batch_size, preset.epochs_per_generation, preset.generations) == (32, 160, 10)
    # The same hyper-parameters over short generations.
    short = dataclasses.replace(preset, epochs_per_generation=E, warmup_epochs=warmup // 10)
    expected = book(
        rate=functools.partial(epoch_rate, peak, epochs=E, warmup=warmup // 10),
        weight_decay=5e-4,
        factor=factor,
        ascent_epochs=E / 4,
    )
    check_scan(seal_jax.make_seal_tx(RULES, **short.arguments(S)), expected)


def test_a_constant_rate_by_default():
    tx = seal_jax.make_seal_tx(RULES, **CLOCK)
    check_scan(tx, book(rate=lambda epoch: 0.01, weight_decay=5e-4))


def test_an_optax_optimizer_restarts_its_schedule():
    steps = optax.piecewise_constant_schedule(0.1, {S: 0.5, 4 * S: 0.1})
    tx = seal_jax.make_seal_tx(RULES, optimizer=optax.sgd(steps, momentum=0.9), **CLOCK)

    def rate(epoch):
        return 0.1 if epoch < 1 else 0.05 if epoch < 4 else 0.005

    check_scan(tx, book(rate=rate, weight_decay=0.0))


@pytest.mark.parametrize("factor", [-1.0, 0.0])
def test_a_whole_optimizer_decays_by_the_factor(factor):
    """Coupled decay inside it is ours; the decay of the fit subtree and of descent is untouched."""
    sgd = optax.chain(optax.add_decayed_weights(0.05), optax.sgd(SCHEDULE, momentum=0.9))
    tx = seal_jax.make_seal_tx(RULES, optimizer=sgd, ascent_weight_decay_factor=factor, **CLOCK)
    check_scan(tx, book(factor=factor))


@pytest.mark.parametrize("factor", [-1.0, 0.0])
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(0.1, weight_decay=0.5),
        optax.lion(0.1, weight_decay=0.5),
        optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.5), optax.scale(-0.1)),
    ],
)
def test_decoupled_decay_shrinks_what_ascends(optimizer, factor):
    """Without a gradient only the decay moves: by 1 - S lr wd a step of ascent, 1 - lr wd otherwise."""
    tx = seal_jax.make_seal_tx(
        "w", optimizer=optimizer, ascent_scale=0.4, steps_per_epoch=10, epochs_per_generation=4,
        ascent_weight_decay_factor=factor,
    )  # fmt: skip
    params = {"w": jnp.ones(3), "fc": jnp.ones(3)}
    zero, state, update = jax.tree.map(jnp.zeros_like, params), tx.init(params), jax.jit(tx.update)
    for _ in range(50):
        before = params["w"]
        updates, state = update(zero, state, params)
        params = optax.apply_updates(params, updates)
        ratio = params["w"] / before
    assert int(state[1].count) == 50  # ten steps into the generation: the last of the ascent
    np.testing.assert_allclose(ratio, 1 + factor * 0.4 * 0.1 * 0.5, rtol=1e-5)
    np.testing.assert_allclose(params["fc"], 0.95**50, rtol=1e-4)


@pytest.mark.parametrize("optimizer", [optax.lamb(0.1), optax.lars(0.1)], ids=["lamb", "lars"])
def test_norms_do_not_see_the_factor(optimizer):
    """A trust ratio scales by |w|: the ascent is -S times the step of descent."""
    params, noise, _ = start()
    tx = seal_jax.make_seal_tx(
        RULES, optimizer=optimizer, ascent_epochs=1 / S, steps_per_epoch=S, epochs_per_generation=1
    )
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(S + 1):
        g = jax.tree.map(lambda x, t=t: x[t], noise)
        updates, state = update(g, state, params)
    expected, _ = optimizer.update(g, optimizer.init(params), params)
    for layer, scale in (("conv1", -0.01), ("bn1", -0.01), ("fc", 1.0)):
        jax.tree.map(
            lambda a, b, scale=scale: np.testing.assert_allclose(a, scale * b, rtol=1e-5),
            updates[layer],
            expected[layer],
        )


# Where the transformation may stand


def test_step_by_step_compiles_once():
    tx = seal()
    params, noise, coefficient = start()
    step = jax.jit(functools.partial(one_step, tx))
    state, seen = tx.init(params), []
    for t in range(STEPS):
        at = jax.tree.map(lambda history, t=t: history[t], (noise, coefficient))
        params, updates, state = step(params, state, *at)
        seen.append((params, updates))
    assert step._cache_size() == 1
    params, updates = jax.tree.map(lambda *leaves: np.stack(leaves), *seen)
    expected = book()
    assert_close(flat(params), expected[0])
    assert_close(flat(updates), expected[1])


def test_vmap_over_seeds():
    seeds = [start(seed) for seed in (0, 1, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    params, updates = jax.jit(jax.vmap(functools.partial(scanned, seal())))(*stacked)
    for seed in range(3):
        expected = book(seed)
        assert_close(flat(jax.tree.map(lambda x, s=seed: x[s], params)), expected[0])
        assert_close(flat(jax.tree.map(lambda x, s=seed: x[s], updates)), expected[1])


def test_vmap_over_learning_rates():
    rates = jnp.array([0.02, 0.1])

    def run(rate):
        return scanned(seal_jax.make_seal_tx(RULES, rate, weight_decay=0.05, **CLOCK), *start())[0]

    params = jax.jit(jax.vmap(run))(rates)
    for index, rate in enumerate((0.02, 0.1)):
        expected = book(rate=lambda epoch, rate=rate: rate)
        assert_close(flat(jax.tree.map(lambda x, i=index: x[i], params)), expected[0])


def test_inject_hyperparams():
    static = ("steps_per_epoch", "epochs_per_generation", "reset_momentum", "fit_in_ascent")
    tx = optax.inject_hyperparams(seal_jax.make_seal_tx, static_args=static)(
        mask="re:conv1|bn1", learning_rate=0.1, weight_decay=0.05, **CLOCK
    )
    check_scan(tx, book(rate=lambda epoch: 0.1))


def test_train_state():
    params, noise, coefficient = start()

    def body(state, inputs):
        state = state.apply_gradients(grads=jax_gradient(state.params, *inputs))
        return state, state.params

    state = TrainState.create(apply_fn=None, params=params, tx=seal())
    state, history = jax.jit(lambda s: jax.lax.scan(body, s, (noise, coefficient)))(state)
    assert int(state.step) == STEPS
    assert_close(flat(history), book()[0])


def forget_variables(state):
    return jax.tree.map_with_path(lambda path, _: path[0].key in ("conv1", "bn1"), state)


NNX_MASKS = {
    "rules": RULES,
    "filter": nnx.Any(nnx.PathContains("conv1"), nnx.PathContains("bn1")),
    "filters": (nnx.PathContains("conv1"), nnx.PathContains("bn1")),
    "predicate": lambda path, leaf: path[0] in ("conv1", "bn1"),
    "state": forget_variables(nnx.state(NnxTree(nested(problem()[0])), nnx.Param)),
}


@pytest.mark.parametrize("mask", NNX_MASKS.values(), ids=NNX_MASKS)
def test_nnx_optimizer(mask):
    params, noise, coefficient = start()
    model = NnxTree(params)
    optimizer = nnx.Optimizer(model, seal(mask), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, noise, coefficient):
        params = nnx.state(model, nnx.Param)
        # States order their leaves by name, as dictionaries do.
        optimizer.update(model, jax_gradient(params, noise, coefficient))

    history = []
    for t in range(STEPS):
        step(model, optimizer, *jax.tree.map(lambda x, t=t: x[t], (noise, coefficient)))
        history.append(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    params = jax.tree.map(lambda *leaves: np.stack(leaves), *history)
    assert_close(flat(params), book()[0])


def test_chain():
    check_scan(optax.chain(optax.clip_by_global_norm(1e9), seal(), optax.identity()), book())


PARTITION_MASKS = {
    "rules": RULES,
    "tree": {"conv1": True, "bn1": True, "fc": False},
    "whole tree": {
        "conv1": {"kernel": True},
        "bn1": {"scale": True},
        "fc": {"kernel": False, "bias": False},
    },
    "whole names": ("conv1/kernel", "bn1/scale"),
    "callable": lambda params: jax.tree.map_with_path(
        lambda path, _: path[0].key in ("conv1", "bn1"), params
    ),
    "predicate": lambda path, leaf: path[0] in ("conv1", "bn1"),
}


@pytest.mark.parametrize("mask", PARTITION_MASKS.values(), ids=PARTITION_MASKS)
@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_partition(mask, rate):
    labels = {"conv1": "seal", "bn1": "other", "fc": {"kernel": "seal", "bias": "other"}}
    other = optax.sgd(rate) if rate else optax.set_to_zero()
    outside = {"bn1/scale": rate, "fc/bias": rate}
    check_scan(optax.partition({"seal": seal(mask), "other": other}, labels), book(outside=outside))


def test_masked():
    """``optax.masked`` hands raw gradients through: the hidden parameters ascend at rate 1."""
    hidden = {"conv1": True, "bn1": True, "fc": {"kernel": True, "bias": False}}
    tx = optax.chain(
        optax.masked(seal(), hidden),
        optax.masked(
            optax.scale(-0.05),
            {"conv1": False, "bn1": False, "fc": {"kernel": False, "bias": True}},
        ),
    )
    check_scan(tx, book(outside={"fc/bias": 0.05}))


def test_multi_steps():
    """Two half-batches a step whose gradients differ and have the full batch's mean."""
    tx = optax.MultiSteps(seal(), every_k_schedule=2)
    params, noise, coefficient = start()

    def micro(carry, inputs):
        params, state = carry
        gradient, sign = inputs
        gradient = jax.tree.map(lambda g: g * (1 + 0.5 * sign), gradient)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    def body(carry, inputs):
        gradient = jax_gradient(carry[0], *inputs)
        twice = jax.tree.map(lambda g: jnp.stack([g, g]), gradient)
        carry, _ = jax.lax.scan(micro, carry, (twice, jnp.array([1.0, -1.0])))
        return carry, carry[0]

    run = jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), (noise, coefficient))[1])
    assert_close(flat(run(params)), book()[0])


class EqxLayer(eqx.Module):
    kernel: Any = None
    scale: Any = None
    bias: Any = None


class EqxNet(eqx.Module):
    """Callable, with fields that are no parameters, and leaves that may be ``None``."""

    bn1: EqxLayer
    conv1: EqxLayer
    fc: EqxLayer
    activation: Any = jax.nn.relu
    steps: Any = None

    def __call__(self, x):
        return x


def eqx_net(params):
    return EqxNet(**{name: EqxLayer(**leaves) for name, leaves in params.items()})


def eqx_bools(params):
    whole = jax.tree.map(lambda _: False, params)
    forget = (EqxLayer(kernel=True), EqxLayer(scale=True))
    return eqx.tree_at(lambda net: (net.conv1, net.bn1), whole, forget)


@pytest.mark.parametrize("form", ["rules", "tree", "callable"])
def test_equinox(form):
    params, noise, coefficient = start()
    model = eqx_net(params)
    model = eqx.tree_at(lambda net: net.steps, model, jnp.arange(3), is_leaf=lambda x: x is None)
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    mask = {"rules": RULES, "tree": eqx_bools(arrays), "callable": eqx_bools}[form]
    tx = seal(mask)
    noise, coefficient = eqx_net(noise), eqx_net(coefficient)
    noise, coefficient = eqx.filter((noise, coefficient), eqx.is_array)

    def body(carry, inputs):
        arrays, state = carry
        gradients = jax_gradient(arrays, *inputs)
        updates, state = tx.update(gradients, state, arrays)
        model = eqx.apply_updates(eqx.combine(arrays, rest), updates)
        arrays = eqx.filter(model, eqx.is_inexact_array)
        return (arrays, state), arrays

    run = jax.jit(lambda a: jax.lax.scan(body, (a, tx.init(a)), (noise, coefficient))[1])
    history = run(arrays)
    expected = book()[0]
    assert_close({name: operator(history, name) for name in SHAPES}, expected)


def operator(tree, name):
    return functools.reduce(getattr, name.split("/"), tree)


# The forms of a mask

MASKS = {
    "bools": {
        "conv1": {"kernel": True},
        "bn1": {"scale": True},
        "fc": {"kernel": False, "bias": False},
    },
    "numpy bools": {"conv1": np.bool_(True), "bn1": np.array(True), "fc": np.False_},
    "callable": lambda params: {
        name: jax.tree.map(lambda _, name=name: name != "fc", own) for name, own in params.items()
    },
    "one rule": "re:conv1|bn1",
    "list": ["conv1", "bn1/scale"],
    "pairs": [("fc", False), ("re:.*", True)],
    "rule and pair": ("conv1", ("bn1", True)),
    "nnx": nnx.Any(nnx.PathContains("conv1"), nnx.PathContains("bn1")),
    "nnx not": nnx.Not(nnx.PathContains("fc")),
    "nnx list": [nnx.PathContains("conv1"), nnx.PathContains("bn1")],
    "predicate": lambda path, leaf: path[0] != "fc",
    "inverted": masks.invert("fc"),
    "before": masks.before(("conv1", "bn1", "fc"), "fc"),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_mask_forms_train_alike(mask):
    check_scan(seal(mask), book())


# What an optax user relies on


def test_extra_args_are_accepted():
    params, noise, coefficient = start()
    tx = seal()
    first = jax.tree.map(lambda x: x[0], (noise, coefficient))
    gradient = jax_gradient(params, *first)
    updates, _ = tx.update(gradient, tx.init(params), params, value=1.0, loss_fn=None)
    plain, _ = tx.update(gradient, tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, plain)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("optimizer", [None, optax.adam(0.1)])
def test_low_precision_is_kept(dtype, optimizer):
    options = {} if optimizer is None else {"optimizer": optimizer}
    scale = np.float32(0.01)  # unlike Python's floats, not weakly typed
    tx = seal_jax.make_seal_tx(
        RULES, ascent_scale=scale, fit_in_ascent="freeze", **CLOCK, **options
    )
    params = jax.tree.map(lambda x: x.astype(dtype), start()[0])
    step = jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(S * (E + 1)):
        updates, state = step(params, state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert step._cache_size() == 1
    assert float(updates["conv1"]["kernel"][0, 0] * params["conv1"]["kernel"][0, 0]) > 0
    assert not jnp.any(updates["fc"]["kernel"])


def test_no_nan_under_debug_nans():
    with jax.debug_nans(True):
        params, updates = jax.jit(functools.partial(scanned, seal(fit_in_ascent="freeze")))(
            *start()
        )
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((params, updates)))


def test_rematerialised_steps():
    tx = seal()

    def body(carry, inputs):
        params, _, state = one_step(tx, *carry, *inputs)
        return (params, state), params

    params, noise, coefficient = start()

    def run(params):
        return jax.lax.scan(jax.checkpoint(body), (params, tx.init(params)), (noise, coefficient))[
            1
        ]

    assert_close(flat(jax.jit(run)(params)), book()[0])


def test_resume_in_mid_ascent_is_exact():
    tx = seal(optimizer=None)
    params, noise, coefficient = start()
    step = jax.jit(functools.partial(one_step, tx))
    state = tx.init(params)
    at = [jax.tree.map(lambda x, t=t: x[t], (noise, coefficient)) for t in range(STEPS)]
    middle = S * E + S * K // 2
    for t in range(middle):
        params, _, state = step(params, state, *at[t])
    leaves, structure = jax.tree.flatten((params, state))
    saved = [np.array(leaf) for leaf in leaves]
    for t in range(middle, STEPS):
        params, _, state = step(params, state, *at[t])
    resumed = jax.tree.unflatten(structure, map(jnp.asarray, saved))
    again = jax.jit(functools.partial(one_step, seal()))  # another process has another program
    for t in range(middle, STEPS):
        new_params, _, new_state = again(*resumed, *at[t])
        resumed = (new_params, new_state)
    jax.tree.map(np.testing.assert_array_equal, resumed, (params, state))


def test_ascent_raises_the_loss():
    """Logistic regression behind a linear layer: the fit part is frozen, the early one ascends."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (64, 4))
    noise = jax.random.normal(jax.random.key(2), (64,))
    y = (x[:, 0] + noise > 0).astype(jnp.int32)
    params = {"w1": jax.random.normal(jax.random.key(1), (4, 3)), "w2": jnp.eye(3, 2)}

    def loss(params):
        logits = x @ params["w1"] @ params["w2"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    tx = seal_jax.make_seal_tx(
        "w1",
        0.3,
        steps_per_epoch=20,
        epochs_per_generation=4,
        ascent_scale=1.0,
        fit_in_ascent="freeze",
    )

    def body(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), (value, params)

    run = jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), length=160)[1])
    losses, before = run(params)
    # losses[t] is taken before update t; updates 80 to 99 ascend, a quarter of the generation.
    assert losses[80] < 0.9 * losses[0]
    assert (jnp.diff(losses[80:101]) > 0).all()
    assert losses[100] > losses[80] + 1e-3
    assert (jnp.diff(losses[100:104]) < 0).all()  # no momentum is left that goes on ascending
    np.testing.assert_array_equal(before["w2"][80], before["w2"][100])
    assert (before["w2"][101] != before["w2"][100]).any()


SPAN = {"steps_per_epoch": 1, "epochs_per_generation": 4}
FACTORIES = {
    "seal": functools.partial(seal_jax.make_seal_tx, "conv", fit_in_ascent="freeze", **SPAN),
    "llf": functools.partial(seal_jax.make_llf_tx, "fc", init_fn="torch_default", **SPAN),
    "normal": functools.partial(seal_jax.make_normal_tx, **SPAN),
}


@pytest.mark.parametrize("optimizer", [None, optax.adam(0.1)], ids=["sgd", "adam"])
@pytest.mark.parametrize("name", FACTORIES)
def test_sharding_is_kept_on_eight_devices(name, optimizer):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    params = {
        "conv": jax.device_put(jnp.ones((8, 3)), split),
        "norm": jax.device_put(jnp.ones(3), whole),
        "fc": jax.device_put(jnp.ones((16, 2)), split),
    }

    def layout(tree):
        arrays = (x for x in jax.tree.leaves(tree) if jnp.ndim(x) > 0 and x.size > 1)
        return [x.sharding.spec for x in arrays]

    options = {} if optimizer is None else {"optimizer": optimizer}
    if name == "llf":
        # Typed keys add entries to the cache without a compilation.
        options["key"] = jax.device_put(jax.random.PRNGKey(0), whole)
    tx = FACTORIES[name](**options)
    state = tx.init(params)
    before = layout((params, state))
    assert sum(spec == P("data") for spec in before) >= 4

    @jax.jit
    def step(params, state):
        gradient = jax.tree.map(lambda p: p * 0.1, params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    stepped = step(*step(params, state))  # counts move from one device to all: two programs
    programs = step._cache_size()
    for _ in range(10):
        stepped = step(*stepped)
        assert layout(stepped) == before
    assert step._cache_size() == programs
    stepped, state = stepped
    kept = seal_jax.forgetting.forget_state(tx, state, stepped, "fc")
    assert layout(kept) == layout(state)
    drawn = jax.jit(
        lambda key, params: seal_jax.forgetting.reinitialise(key, params, "fc", "torch_default"),
        out_shardings=jax.tree.map(lambda x: x.sharding, stepped),
    )(jax.random.key(1), stepped)
    assert layout(drawn) == layout(stepped)
    assert (drawn["conv"] == stepped["conv"]).all()
    assert not (drawn["fc"] == stepped["fc"]).any()
