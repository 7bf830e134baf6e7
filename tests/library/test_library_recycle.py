"""ReDo and continual backpropagation against loops over single units, in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import seal_jax
from seal_jax import optimizer_state
from seal_jax.transforms import continual_backprop, redo
from seal_jax.units import Units

KEY = jax.random.key(7)
LAYERS = ("l1", "l2", "l3")
WIDTHS = (3, 6, 5, 2)
UNITS = [Units(name, (name,), (above,)) for name, above in (("l1", "l2"), ("l2", "l3"))]
STEPS, RATE, MOMENTUM, DECAY = 24, 0.1, 0.8, 0.01


def init(key):
    keys = jax.random.split(key, 6)
    return {
        name: {
            "kernel": jax.random.normal(keys[i], (WIDTHS[i], WIDTHS[i + 1])) * 0.7,
            "bias": jax.random.normal(keys[i + 3], (WIDTHS[i + 1],)) * 0.3,
        }
        for i, name in enumerate(LAYERS)
    }


def wide(tree):
    return jax.tree.map(lambda leaf: np.array(leaf, np.float64), tree)


DRAWS = [wide(init(jax.random.fold_in(KEY, step))) for step in range(STEPS)]
RANDOM = np.random.default_rng(0)
GRADIENTS = [
    jax.tree.map(lambda leaf: 0.2 * RANDOM.normal(size=leaf.shape), DRAWS[0]) for _ in range(STEPS)
]
# Mean magnitudes are given, so that they decide which units are replaced.
ACTIVITIES = [
    {
        name: RANDOM.exponential(size=size).astype(np.float32) * RANDOM.choice([0.01, 1.0], size)
        for name, size in (("l1", 6), ("l2", 5))
    }
    for _ in range(STEPS)
]


def by_the_book(params, replaced_after):
    """Momentum SGD, and after each update the replacement of single units, one weight after the other."""
    momentum = jax.tree.map(np.zeros_like, params)
    course = []
    for step in range(STEPS):
        for name in LAYERS:
            for kind in ("kernel", "bias"):
                gradient = GRADIENTS[step][name][kind] + DECAY * params[name][kind]
                momentum[name][kind] = MOMENTUM * momentum[name][kind] + gradient
                params[name][kind] = params[name][kind] - RATE * momentum[name][kind]
        replaced = replaced_after(step, params)
        # All that reads first: a new unit then reads whatever is below it, new or not.
        for layer, unit in replaced:
            above = LAYERS[LAYERS.index(layer) + 1]
            params[above]["kernel"][unit, :] = 0
            momentum[above]["kernel"][unit, :] = 0
        for layer, unit in replaced:
            params[layer]["kernel"][:, unit] = DRAWS[step][layer]["kernel"][:, unit]
            params[layer]["bias"][unit] = DRAWS[step][layer]["bias"][unit]
            momentum[layer]["kernel"][:, unit] = 0
            momentum[layer]["bias"][unit] = 0
        course.append((sorted(replaced), jax.tree.map(np.copy, params)))
    return course


def ours(tx):
    """Return the parameters after each step, from one compiled program."""
    params = init(KEY)
    state = tx.init(params)

    @jax.jit
    def step(params, state, gradient, activations):
        updates, state = tx.update(gradient, state, params, activations=activations)
        return optax.apply_updates(params, updates), state

    course = []
    for gradient, activations in zip(GRADIENTS, ACTIVITIES, strict=True):
        params, state = step(params, state, gradient, activations)
        course.append(params)
    assert step._cache_size() == 1
    return course, state


OPTIONS = {
    "init_fn": init,
    "key": KEY,
    "steps_per_epoch": 100,
    "epochs_per_generation": 1,
    "momentum": MOMENTUM,
    "weight_decay": DECAY,
}


def assert_same_course(found, expected):
    assert sum(len(replaced) for replaced, _ in expected) > 6
    for params, (_, by_hand) in zip(found, expected, strict=True):
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(by_hand), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# A traced threshold is one that many settings in one program share.
@pytest.mark.parametrize("threshold", [0.1, jnp.float32(0.1)])
def test_redo_replaces_what_its_scores_say(threshold):
    def dormant(step, params):
        if (step + 1) % 4:
            return []
        return [
            (name, unit)
            for name, values in ACTIVITIES[step].items()
            for unit, value in enumerate(values)
            if value / np.mean(values) <= 0.1
        ]

    tx = seal_jax.make_redo_tx(UNITS, RATE, threshold=threshold, every=4, **OPTIONS)
    assert_same_course(ours(tx)[0], by_the_book(wide(init(KEY)), dormant))


def test_continual_backprop_replaces_the_least_useful_mature_units():
    utility = {name: np.zeros(len(values)) for name, values in ACTIVITIES[0].items()}
    age = {name: np.zeros(len(values), int) for name, values in ACTIVITIES[0].items()}
    due = dict.fromkeys(utility, 0.0)
    eta, rho, maturity = 0.9, 0.06, 3

    def least_useful(step, params):
        """Algorithm 1, one unit at a time."""
        replaced = []
        for name, above in (("l1", "l2"), ("l2", "l3")):
            eligible = []
            for unit in range(len(utility[name])):
                age[name][unit] += 1
                contribution = (
                    ACTIVITIES[step][name][unit] * np.abs(params[above]["kernel"][unit]).sum()
                )
                utility[name][unit] = eta * utility[name][unit] + (1 - eta) * contribution
                if age[name][unit] > maturity:
                    eligible.append(unit)
            due[name] += rho * len(eligible)
            while due[name] >= 1:
                worst = min(eligible, key=lambda unit, name=name: utility[name][unit])
                eligible.remove(worst)
                utility[name][worst], age[name][worst] = 0, 0
                due[name] -= 1
                replaced.append((name, worst))
        return replaced

    tx = seal_jax.make_continual_backprop_tx(
        UNITS, RATE, replacement_rate=rho, decay=eta, maturity=maturity, **OPTIONS
    )
    found, state = ours(tx)
    assert_same_course(found, by_the_book(wide(init(KEY)), least_useful))
    for name, values in age.items():
        np.testing.assert_array_equal(state.kept.age[name], values)
        np.testing.assert_allclose(state.kept.utility[name], utility[name], rtol=1e-4)


def test_moments_of_replaced_weights_start_again_and_counts_go_on():
    params = init(KEY)
    tx = redo(optax.adamw(0.1), UNITS, init_fn=init, every=1, threshold=0.0)
    silent = {"l1": jnp.arange(6.0), "l2": jnp.ones(5)}  # unit 0 of l1
    _, state = tx.update(params, tx.init(params), params, activations=silent, key=KEY)
    adam = state.inner[0]
    for moment in (adam.mu, adam.nu):
        zero = jax.tree.map(lambda leaf: np.asarray(leaf) == 0, moment)
        assert zero["l1"]["kernel"][:, 0].all()
        assert zero["l1"]["bias"][0]
        assert zero["l2"]["kernel"][0].all()
        assert sum(leaf.sum() for leaf in jax.tree.leaves(zero)) == 3 + 1 + 5
    assert int(adam.count) == 1
    # A memory of another shape, such as Adafactor's of rows and columns, has no entries to reset.
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    state = factored.init(params)
    everything = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    fresh = jax.tree.map(lambda leaf: leaf + 1, state)
    found = optimizer_state.reinitialise_entries(state, fresh, params, everything)
    assert float(found.v["l1"]["bias"][0]) == 1
    assert float(found.v_row["l1"]["kernel"][0]) == 0


def test_trainings_side_by_side_draw_new_weights_only_where_one_needs_them():
    """The branch stays a branch, and each training has its own outcome."""
    tx = redo(optax.sgd(0.1), UNITS, init_fn=init, every=1, threshold=0.0)
    params = init(KEY)

    def update(activations, key):
        return tx.update(params, tx.init(params), params, activations=activations, key=key)[0]

    silent = {"l1": jnp.arange(6.0), "l2": jnp.ones(5)}
    active = jax.tree.map(lambda leaf: leaf + 1, silent)
    pair = jax.tree.map(lambda *leaves: jnp.stack(leaves), active, silent)
    keys = jax.random.split(KEY, 2)
    together = jax.vmap(update)
    found = jax.jit(together)(pair, keys)
    for index, activations in enumerate((active, silent)):
        expected = jax.jit(update)(activations, keys[index])
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a[index], b)
    assert "stablehlo.case" in jax.jit(together).lower(pair, keys).as_text()


def test_what_is_wrong_is_said():
    params = init(KEY)
    call = {"init_fn": init, "key": KEY}
    with pytest.raises(seal_jax.UsageError, match="threshold = -1 must be 0 or positive"):
        redo(optax.sgd(0.1), UNITS, threshold=-1, **call)
    with pytest.raises(seal_jax.UsageError, match="replacement_rate = 2 must lie in"):
        continual_backprop(optax.sgd(0.1), UNITS, replacement_rate=2, **call)
    with pytest.raises(seal_jax.UsageError, match=r"units = \(\) names no layer"):
        redo(optax.sgd(0.1), (), **call)
    with pytest.raises(seal_jax.UsageError, match="incoming names 'l4'"):
        redo(optax.sgd(0.1), [Units("l4", ("l4",), ("l3",))], **call).init(params)
    tx = redo(optax.sgd(0.1), UNITS, init_fn=init)
    with pytest.raises(ValueError, match="update needs activations"):
        tx.update(params, tx.init(params), params, key=KEY)
    with pytest.raises(ValueError, match="update needs key"):
        tx.update(params, tx.init(params), params, activations=ACTIVITIES[0])
