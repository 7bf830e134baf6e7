"""Hare & Tortoise against momentum SGD and an average in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from library_oracles import assert_close, flat, jax_gradient, nested, numpy_gradient, problem

from seal_jax import UsageError, transforms

STEPS = 14


def book(every, decay):
    """Return hare and tortoise after every update; the momentum outlives the hare's returns."""
    params, noise, coefficient = problem()
    gradient = numpy_gradient(noise, coefficient)
    hare = {n: p.astype(np.float64) for n, p in params.items()}
    tortoise, trace = dict(hare), {n: 0.0 * p for n, p in hare.items()}
    hares, tortoises = [], []
    for t in range(STEPS):
        slopes = gradient(hare, t)
        trace = {n: 0.9 * trace[n] + slopes[n] for n in hare}
        hare = {n: hare[n] - 0.05 * trace[n] for n in hare}
        tortoise = {n: decay * tortoise[n] + (1 - decay) * hare[n] for n in hare}
        if (t + 1) % every == 0:
            hare = dict(tortoise)
        hares.append(hare)
        tortoises.append(tortoise)
    return hares, tortoises


@pytest.mark.parametrize(("every", "decay"), [(1, 0.5), (3, 0.8), (5, 0.0), (STEPS + 1, 0.9)])
def test_against_numpy(every, decay):
    params, noise, coefficient = problem()
    noise, coefficient = ({n: x[:STEPS] for n, x in part.items()} for part in (noise, coefficient))
    params, noise, coefficient = jax.tree.map(
        jnp.asarray, tuple(map(nested, (params, noise, coefficient)))
    )

    @jax.jit
    def train(decay):
        tx = transforms.hare_and_tortoise(optax.sgd(0.05, momentum=0.9), every, decay)

        def body(carry, data):
            params, state = carry
            updates, state = tx.update(jax_gradient(params, *data), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, state.tortoise)

        return jax.lax.scan(body, (params, tx.init(params)), (noise, coefficient))[1]

    for found, wanted in zip(train(jnp.float32(decay)), book(every, decay), strict=True):
        assert_close(flat(found), wanted, 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every = 0 must be a whole number of at least 1"),
        ({"decay": 1.0}, r"decay = 1 must lie in \[0, 1\)"),
    ],
)
def test_arguments_that_cannot_be(options, message):
    with pytest.raises(UsageError, match=message):
        transforms.hare_and_tortoise(optax.sgd(0.1), **{"every": 1, **options})
