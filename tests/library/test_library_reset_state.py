"""``reset_state``: what an optimizer forgets, what it keeps, and when."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import seal_jax
from seal_jax import optimizer_state, reset_state
from seal_jax.generations import Clock
from seal_jax.transforms import split_state

PARAMS = {
    "conv": {"kernel": jnp.arange(1.0, 13.0).reshape(3, 4)},
    "fc": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
}
CONV = {"conv": {"kernel": True}, "fc": {"kernel": False, "bias": False}}


def gradients(count, like=PARAMS, seed=0):
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), like)
        for _ in range(count)
    ]


OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1),
    "radam": optax.radam(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2, momentum=0.9),
    "lion": optax.lion(0.1),
    "rmsprop": optax.rmsprop(0.1, centered=True, momentum=0.9),
    "sm3": optax.sm3(0.1),  # several arrays for each parameter
    "dog": optax.contrib.dog(),  # a float and a flag for all parameters
    "schedule_free": optax.contrib.schedule_free_sgd(0.1),
    "multi": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
}


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return any(not np.array_equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("inner", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_after_a_reset_the_optimizer_is_fresh(inner):
    inner = optax.with_extra_args_support(inner)
    tx = reset_state(inner, when=lambda count: count == 3)
    update = jax.jit(tx.update)
    steps = gradients(3)
    state, seen = tx.init(PARAMS), []
    for g in steps * 2:
        updates, state = update(g, state, PARAMS)
        seen.append((updates, state.inner))
    assert differ(seen[2][1], inner.init(PARAMS))
    # The same gradients once more: the second half repeats the first bit for bit.
    for t in range(3):
        assert_equal(seen[t], seen[t + 3])
    assert differ(seen[0][0], seen[1][0])
    assert int(state.count) == 6
    assert update._cache_size() == 1
    fresh = inner.init(PARAMS)
    again = optimizer_state.reinitialise(state.inner, fresh, PARAMS, None, when=True, restart=False)
    assert_equal(again, fresh)


@pytest.mark.parametrize("params", [PARAMS["conv"]["kernel"], jnp.ones(()), [jnp.ones(2)] * 2])
@pytest.mark.parametrize("name", ["momentum", "adam", "adafactor"])
def test_lone_arrays_and_lists_as_parameters(name, params):
    inner = OPTIMIZERS[name]
    state = inner.init(params)
    for g in gradients(2, params):
        _, state = inner.update(g, state, params)
    fresh = inner.init(params)
    again = optimizer_state.reinitialise(state, fresh, params, None, when=True, restart=False)
    assert_equal(again, fresh)
    nothing = optimizer_state.reinitialise(state, fresh, params, None, when=False, restart=False)
    assert_equal(nothing, state)


def by_parameter(state, layer):
    """The leaves of a state that lie in a layer, and those that lie in none."""
    flat = jax.tree_util.tree_leaves_with_path(state)
    own = [leaf for path, leaf in flat if f"'{layer}'" in jax.tree_util.keystr(path)]
    layers = [f"'{name}'" for name in PARAMS]
    shared = [leaf for p, leaf in flat if not any(n in jax.tree_util.keystr(p) for n in layers)]
    return own, shared


@pytest.mark.parametrize("name", ["momentum", "adam", "radam", "adafactor", "lion", "sm3"])
def test_a_masked_reset_leaves_the_others_bit_identical(name):
    inner = OPTIMIZERS[name]
    state = inner.init(PARAMS)
    for g in gradients(3):
        _, state = inner.update(g, state, PARAMS)
    fresh = inner.init(PARAMS)
    partial = jax.jit(
        lambda state: optimizer_state.reinitialise(
            state, fresh, PARAMS, CONV, when=True, restart=False
        )
    )(state)
    (conv, shared), (fc, _) = by_parameter(partial, "conv"), by_parameter(partial, "fc")
    assert conv
    assert_equal(conv, by_parameter(fresh, "conv")[0])
    assert_equal(fc, by_parameter(state, "fc")[0])
    assert differ(fc, by_parameter(fresh, "fc")[0])
    assert_equal(shared, by_parameter(state, "conv")[1])  # Adam's count has other users


def test_a_masked_reset_through_the_transformation():
    tx = reset_state(optax.trace(0.5), when=lambda count: count == 2, mask="conv")
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    state, seen = tx.init(PARAMS), []
    for _ in range(4):
        updates, state = tx.update(ones, state, PARAMS)
        seen.append((float(updates["conv"]["kernel"][0, 0]), float(updates["fc"]["bias"][0])))
    assert seen == [(1.0, 1.0), (1.5, 1.5), (1.0, 1.75), (1.5, 1.875)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_masked_reset_makes_its_part_a_fresh_optimizer(name):
    """Each part moves as its own optimizer would: one that starts at the reset, one that goes on."""
    inner = optax.with_extra_args_support(OPTIMIZERS[name])
    # The first steps of optax's RAdam lose digits, others when compiled; see rectification.
    tolerance = 1e-2 if name == "radam" else 2e-5
    tx = reset_state(inner, when=lambda count: count == 3, mask="conv")
    alone = {layer: inner.init({layer: PARAMS[layer]}) for layer in PARAMS}
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for step, g in enumerate(gradients(6)):
        if step == 3:
            alone["conv"] = inner.init({"conv": PARAMS["conv"]})
        updates, state = update(g, state, PARAMS)
        for layer in PARAMS:
            expected, alone[layer] = inner.update(
                {layer: g[layer]}, alone[layer], {layer: PARAMS[layer]}
            )
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=1e-6),
                updates[layer],
                expected[layer],
            )
    assert update._cache_size() == 1


def test_adam_never_steps_further_than_torch_after_a_masked_reset():
    torch = pytest.importorskip("torch")
    tx = reset_state(optax.adam(0.1, eps=1e-8), when=lambda count: count == 50, mask="conv")
    state, kernel = tx.init(PARAMS), torch.zeros(3, 4, requires_grad=True)
    adam = torch.optim.Adam([kernel], lr=0.1)
    for step, g in enumerate(gradients(60)):
        updates, state = jax.jit(tx.update)(g, state, PARAMS)
        if step >= 50:
            before = kernel.detach().clone()
            kernel.grad = torch.tensor(np.array(g["conv"]["kernel"]))
            adam.step()
            moved = (kernel.detach() - before).numpy()
            np.testing.assert_allclose(updates["conv"]["kernel"], moved, rtol=1e-4, atol=1e-6)


def test_memory_of_frozen_parameters_stays():
    """The steps in which a part is frozen do not exist for it, its count included."""

    def frozen(count):
        return (count >= 2) & (count < 4)

    for name in ("momentum", "adam", "adafactor"):
        inner = OPTIMIZERS[name]
        tx = reset_state(inner, lambda count: False, frozen="conv", frozen_when=frozen)
        state, alone = tx.init(PARAMS), inner.init({"conv": PARAMS["conv"]})
        for step, g in enumerate(gradients(6)):
            updates, state = jax.jit(tx.update)(g, state, PARAMS)
            if not frozen(step):
                expected, alone = inner.update({"conv": g["conv"]}, alone, {"conv": PARAMS["conv"]})
                np.testing.assert_allclose(
                    updates["conv"]["kernel"], expected["conv"]["kernel"], rtol=1e-5
                )


def test_only_what_shares_a_count_is_held_twice():
    for name, twice in {"momentum": False, "rmsprop": False, "adam": True, "radam": True}.items():
        inner = OPTIMIZERS[name]
        plain, split = inner.init(PARAMS), split_state(inner, "conv").init(PARAMS)
        assert (jax.tree.structure(plain) != jax.tree.structure(split)) == twice
        arrays = [sum(x.size for x in jax.tree.leaves(s) if x.ndim) for s in (plain, split)]
        assert arrays[0] == arrays[1]


def test_counts_are_reset_with_the_last_of_their_parameters():
    adam = optax.adam(0.1)
    state = adam.init(PARAMS)
    for g in gradients(3):
        _, state = adam.update(g, state, PARAMS)

    def count(mask):
        new = optimizer_state.reinitialise(
            state, adam.init(PARAMS), PARAMS, mask, when=True, restart=False
        )
        return int(new[0].count)

    assert count(CONV) == 3
    assert count({"conv": {"kernel": False}, "fc": {"kernel": True, "bias": True}}) == 3
    assert count(jax.tree.map(lambda _: True, PARAMS)) == 0
    assert count(None) == 0


def test_partitions_have_counts_of_their_own():
    tx = optax.partition(
        {"a": optax.adam(0.1), "b": optax.adam(optax.linear_schedule(0.1, 0.0, 9))},
        {"conv": "a", "fc": "b"},
    )
    state = tx.init(PARAMS)
    for g in gradients(3):
        _, state = tx.update(g, state, PARAMS)

    def reset(mask, restart):
        fresh = tx.init(PARAMS)
        new = optimizer_state.reinitialise(state, fresh, PARAMS, mask, when=True, restart=restart)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        return {label: inner.inner_state for label, inner in new.inner_states.items()}

    new = reset(CONV, False)
    assert (int(new["a"][0].count), int(new["b"][0].count)) == (0, 3)
    assert not jnp.any(new["a"][0].mu["conv"]["kernel"])
    assert_equal(new["b"][0].mu["fc"], state.inner_states["b"].inner_state[0].mu["fc"])
    assert int(new["b"][1].count) == 3
    new = reset(CONV, True)
    assert int(new["b"][1].count) == 0
    assert int(new["b"][0].count) == 3
    some = {"conv": {"kernel": False}, "fc": {"kernel": True, "bias": False}}
    new = reset(some, False)
    assert (int(new["a"][0].count), int(new["b"][0].count)) == (3, 3)
    assert not jnp.any(new["b"][0].nu["fc"]["kernel"])
    assert jnp.all(new["b"][0].nu["fc"]["bias"] > 0)


@pytest.mark.parametrize("outside", [True, False])
def test_under_masked_and_around_it(outside):
    """Parameters that ``optax.masked`` hides are no hindrance on either side of it."""
    shown = {"conv": False, "fc": {"kernel": True, "bias": False}}  # one node hides all of conv

    def when(count):
        return count == 2

    if outside:
        tx = optax.masked(reset_state(optax.trace(0.5), when), shown)
    else:
        tx = reset_state(optax.masked(optax.trace(0.5), shown), when)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    state, seen = tx.init(PARAMS), []
    for _ in range(4):
        updates, state = jax.jit(tx.update)(ones, state, PARAMS)
        seen.append((float(updates["fc"]["kernel"][0, 0]), float(updates["fc"]["bias"][0])))
    assert seen == [(1.0, 1.0), (1.5, 1.0), (1.0, 1.0), (1.5, 1.0)]


def test_clocks_follow_restart_and_nothing_else():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    inner = optax.chain(optax.trace(0.0), optax.scale_by_schedule(schedule))
    ones = jax.tree.map(jnp.ones_like, PARAMS)

    def rates(**options):
        tx = reset_state(inner, **options)
        state, seen = tx.init(PARAMS), []
        for _ in range(6):
            updates, state = tx.update(ones, state, PARAMS)
            seen.append(round(float(updates["fc"]["bias"][0]), 6))
        return seen

    running = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    assert rates(when=lambda count: count == 3) == running
    assert rates(when=lambda count: count < 0, restart=lambda count: count == 3) == [
        *running[:3],
        *running[:3],
    ]


@pytest.mark.parametrize("name", ["adam", "momentum", "adafactor"])
def test_generations_repeat_themselves(name):
    """With the same gradients and parameters, every generation of a wrapped optimizer is the same."""
    clock = Clock(2, 3)
    schedule = optax.linear_schedule(0.1, 0.0, 6)
    inner = {
        "adam": optax.adam(schedule),
        "momentum": optax.sgd(schedule, momentum=0.9),
        "adafactor": optax.adafactor(schedule, min_dim_size_to_factor=2),
    }[name]
    tx = seal_jax.make_normal_tx(optimizer=inner, steps_per_epoch=2, epochs_per_generation=3)
    update = jax.jit(tx.update)
    state, seen = tx.init(PARAMS), []
    for g in gradients(clock.steps_per_generation) * 3:
        updates, state = update(g, state, PARAMS)
        seen.append(updates)
    for t in range(6):
        assert_equal(seen[t], seen[t + 6])
        assert_equal(seen[t], seen[t + 12])
    assert differ(seen[0], seen[1])
    assert update._cache_size() == 1


def test_random_keys_and_hyperparameters_stay():
    noisy = optax.inject_hyperparams(
        lambda learning_rate: optax.chain(
            optax.add_noise(0.1, 0.5, key=jax.random.key(3)), optax.adam(learning_rate)
        )
    )(learning_rate=0.1)
    state = noisy.init(PARAMS)
    state.hyperparams["learning_rate"] = jnp.asarray(0.7)
    for g in gradients(2):
        _, state = noisy.update(g, state, PARAMS)
    new = optimizer_state.reinitialise(
        state, noisy.init(PARAMS), PARAMS, None, when=True, restart=True
    )
    assert float(new.hyperparams["learning_rate"]) == np.float32(0.7)
    before, after = (jax.random.key_data(s.inner_state[0].rng_key) for s in (state, new))
    np.testing.assert_array_equal(before, after)
    assert not jnp.any(new.inner_state[1][0].mu["conv"]["kernel"])
    assert int(new.inner_state[1][0].count) == 0


def test_a_wrapped_optimizer_resumes_in_mid_ascent():
    tx = seal_jax.make_seal_tx(
        "conv",
        optimizer=optax.adam(optax.linear_schedule(0.1, 0.01, 8)),
        steps_per_epoch=2,
        epochs_per_generation=4,
    )
    steps = gradients(20)

    def train(params, state, steps, update):
        for g in steps:
            updates, state = update(g, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    whole = train(PARAMS, tx.init(PARAMS), steps, jax.jit(tx.update))
    half = train(PARAMS, tx.init(PARAMS), steps[:9], jax.jit(tx.update))
    saved = jax.tree.map(lambda x: jnp.asarray(np.array(x)), half)
    assert_equal(train(*saved, steps[9:], jax.jit(tx.update)), whole)


def test_extra_args_reach_the_inner_optimizer():
    def update(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda u: u * value, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = reset_state(inner, when=lambda count: count == 1)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=2.0)
    assert float(updates["fc"]["bias"][0]) == 2.0


def test_errors():
    with pytest.raises(seal_jax.UsageError, match="'adam' must be an optax transformation"):
        reset_state("adam", when=lambda count: False)
    with pytest.raises(seal_jax.UsageError, match="matches no parameter path; nearest: conv"):
        reset_state(optax.adam(0.1), when=lambda count: False, mask="cnv").init(PARAMS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: reset_state(optax.trace(0.9), when=lambda count: False),
        lambda: seal_jax.make_seal_tx("conv", steps_per_epoch=4),
        lambda: seal_jax.make_normal_tx(steps_per_epoch=4),
        lambda: seal_jax.make_llf_tx(
            "fc", init_fn="torch_default", key=jax.random.key(0), steps_per_epoch=4
        ),
    ],
)
def test_the_parameters_must_be_given(make):
    tx = make()
    with pytest.raises(ValueError, match=r"call update\(updates, state, params\)"):
        tx.update(PARAMS, tx.init(PARAMS))
