"""L2-Init against momentum SGD with a pull in NumPy, and what no reset may change."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from library_oracles import (
    SHAPES,
    assert_close,
    flat,
    jax_gradient,
    nested,
    numpy_gradient,
    problem,
)

import seal_jax
from seal_jax import UsageError, forgetting, transforms

S, E, STEPS = 2, 3, 12  # two generations
PULLED = [*SHAPES]


def start():
    params, noise, coefficient = problem()
    noise, coefficient = ({n: x[:STEPS] for n, x in part.items()} for part in (noise, coefficient))
    return jax.tree.map(jnp.asarray, tuple(map(nested, (params, noise, coefficient))))


def book(pulled=PULLED, decay=0.2):
    """g + decay (w - w0), then momentum, which a generation's start resets, then the rate."""
    params, noise, coefficient = problem()
    gradient = numpy_gradient(noise, coefficient)
    initial = {n: p.astype(np.float64) for n, p in params.items()}
    params, history = dict(initial), []
    for t in range(STEPS):
        if t % (S * E) == 0:
            buffer = {n: np.zeros_like(p) for n, p in params.items()}
        slopes = gradient(params, t)
        for n in pulled:
            slopes[n] = slopes[n] + decay * (params[n] - initial[n])
        buffer = {n: 0.9 * buffer[n] + slopes[n] for n in params}
        params = {n: params[n] - 0.1 * buffer[n] for n in params}
        history.append(params)
    return history


def trained(tx, decay=None):
    """Return the parameters of every step; with ``decay`` the transformation is made inside of the program."""
    initial, noise, coefficient = start()

    @jax.jit
    def train(decay):
        link = tx if decay is None else tx(decay)

        def body(carry, data):
            params, state = carry
            updates, state = link.update(jax_gradient(params, *data), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(body, (initial, link.init(initial)), (noise, coefficient))[1]

    return flat(train(decay))


@pytest.mark.parametrize("mask", [None, "fc", ["conv1", "bn1"]])
def test_against_numpy(mask):
    tx = seal_jax.make_l2_init_tx(
        0.1, weight_decay=0.2, mask=mask, steps_per_epoch=S, epochs_per_generation=E
    )
    chosen = ("",) if mask is None else tuple([mask] if isinstance(mask, str) else mask)
    wanted = book([n for n in SHAPES if n.startswith(chosen)])
    assert_close(trained(tx), wanted, 1e-5)
    plain = book([])[-1]
    assert all(
        (np.abs(wanted[-1][n] - plain[n]).max() > 0.01) for n in SHAPES if n.startswith(chosen)
    )


def test_the_strength_may_be_traced():
    def tx(decay):
        return seal_jax.make_l2_init_tx(
            0.1, weight_decay=decay, steps_per_epoch=S, epochs_per_generation=E
        )

    assert_close(trained(tx, jnp.float32(0.2)), book(), 1e-5)


def test_without_a_gradient_it_returns_to_the_start():
    """By the factor 1 - rate * decay in each step, under whatever optimizer follows."""
    tx = seal_jax.make_l2_init_tx(weight_decay=0.25, optimizer=optax.sgd(1.0), steps_per_epoch=S)
    initial, _, _ = start()
    params = jax.tree.map(lambda leaf: leaf + 1, initial)
    state = tx.init(initial)
    for _ in range(3):
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, state = tx.update(zeros, state, params)
        params = optax.apply_updates(params, updates)
    for got, first in zip(jax.tree.leaves(params), jax.tree.leaves(initial), strict=True):
        np.testing.assert_allclose(got, first + 0.75**3, rtol=1e-5)


def test_no_reset_changes_where_it_pulls_to():
    initial, _, _ = start()
    moved = jax.tree.map(lambda leaf: leaf + 1, initial)
    chain = optax.chain(transforms.decay_towards_initial(0.5), optax.trace(0.9))
    state = forgetting.forget_state(chain, chain.init(initial), moved, "fc", "fresh")
    inside = transforms.reset_state(chain, lambda count: count >= 0)
    for tx, before in ((chain, state), (inside, inside.init(initial))):
        _, after = tx.update(jax.tree.map(jnp.zeros_like, moved), before, moved)
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, moved), after, moved)
        assert min(leaf.min() for leaf in jax.tree.leaves(updates)) > 0.49


def test_arguments_that_cannot_be():
    with pytest.raises(UsageError, match="weight_decay = -1 must be 0 or positive"):
        transforms.decay_towards_initial(-1.0)
    with pytest.raises(UsageError, match="matches no parameter path; nearest: fc"):
        transforms.decay_towards_initial(mask="fx").init(start()[0])
    with pytest.raises(ValueError, match="needs the parameters"):
        transforms.decay_towards_initial().update({}, transforms.InitialState(()))
