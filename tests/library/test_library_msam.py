"""Momentum-SAM against Algorithm 1 in NumPy, which stores the perturbed weights, and against PyTorch's Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from library_oracles import assert_close, flat, jax_gradient, nested, numpy_gradient, problem

from seal_jax import make_normal_tx, perturb_along_momentum
from seal_jax.errors import UsageError
from seal_jax.generations import Clock
from seal_jax.transforms import aliases, momentum

CLOCK = Clock(steps_per_epoch=2, epochs_per_generation=3)
STEPS, DECAY, RATE = 12, 0.05, 0.1  # two generations


def start(seed=0):
    params, noise, coefficient = problem(seed)
    noise, coefficient = ({n: x[:STEPS] for n, x in part.items()} for part in (noise, coefficient))
    return jax.tree.map(jnp.asarray, tuple(map(nested, (params, noise, coefficient))))


def length(tree):
    return np.sqrt(sum((x**2).sum() for x in tree.values())) + 1e-12


def book(rho, seed=0, reset=True):
    """Algorithm 1 of Becker et al. 2024: remove the last perturbation, step, perturb for the next."""
    params, noise, coefficient = problem(seed)
    gradient = numpy_gradient(noise, coefficient)
    perturbed = {n: p.astype(np.float64) for n, p in params.items()}
    v, offset = ({n: np.zeros_like(p) for n, p in perturbed.items()} for _ in range(2))
    history = []
    for t in range(STEPS):
        g = gradient(perturbed, t)
        w = {n: perturbed[n] + offset[n] for n in g}
        v = {n: 0.9 * v[n] + g[n] + DECAY * w[n] for n in g}
        w = {n: w[n] - RATE * v[n] for n in g}
        history.append(w)
        if reset and (t + 1) % CLOCK.steps_per_generation == 0:
            v = {n: np.zeros_like(x) for n, x in v.items()}
        offset = {n: rho * v[n] / length(v) for n in v}
        perturbed = {n: w[n] - offset[n] for n in w}
    return history


def scanned(rho, params, noise, coefficient, reset_momentum="generation"):
    tx = make_normal_tx(
        RATE,
        weight_decay=DECAY,
        reset_momentum=reset_momentum,
        steps_per_epoch=CLOCK.steps_per_epoch,
        epochs_per_generation=CLOCK.epochs_per_generation,
    )

    def step(carry, inputs):
        params, state, t = carry
        resets = CLOCK.starts_generation(t) & (reset_momentum == "generation")
        point = perturb_along_momentum(params, state, jnp.where(resets, 0.0, rho))
        updates, state = tx.update(jax_gradient(point, *inputs), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state, t + 1), params

    return jax.lax.scan(step, (params, tx.init(params), 0), (noise, coefficient))[1]


@pytest.mark.parametrize("reset", [True, False])
def test_seeds_and_radii_together_equal_algorithm_1(reset):
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), start(0), start(1))
    mode = "generation" if reset else "never"
    run = jax.jit(jax.vmap(lambda rho, *p: scanned(rho, *p, reset_momentum=mode)))
    history = run(jnp.array([0.3, 2.0]), *stacked)
    for seed, rho in ((0, 0.3), (1, 2.0)):
        found = jax.tree.map(lambda leaf, s=seed: leaf[s], history)
        assert_close(flat(found), book(rho, seed, reset))
    # The sign and the reset matter here.
    last = [
        book(rho, 1, resets)[-1] for rho, resets in ((2.0, reset), (-2.0, reset), (2.0, not reset))
    ]
    for other in last[1:]:
        assert length({n: other[n] - last[0][n] for n in other}) > 0.1


def test_radius_0_is_the_optimizer_bit_for_bit():
    params, noise, _ = start()
    tx = optax.sgd(RATE, momentum=0.9)
    _, state = tx.update(jax.tree.map(lambda leaf: leaf[0], noise), tx.init(params), params)
    for rho in (0.0, jnp.array(0.0)):
        point = perturb_along_momentum(params, state, rho)
        jax.tree.map(np.testing.assert_array_equal, point, params)


def test_adam_uses_its_first_moment_as_in_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(8, 3)).astype("f"), rng.normal(size=(8, 2)).astype("f")
    kernel = rng.normal(size=(3, 2)).astype("f")
    theirs = torch.tensor(kernel, requires_grad=True)
    adam = torch.optim.Adam([theirs], lr=0.05)
    for _ in range(5):
        center = theirs.detach().clone()
        if adam.state:
            v = adam.state[theirs]["exp_avg"]
            with torch.no_grad():
                theirs.sub_(0.2 * v / v.norm())
        adam.zero_grad()
        ((torch.tensor(inputs) @ theirs - torch.tensor(targets)) ** 2).mean().backward()
        with torch.no_grad():
            theirs.copy_(center)
        adam.step()

    gradient = jax.jit(jax.grad(lambda w: jnp.mean((inputs @ w - targets) ** 2)))
    tx, ours = optax.adam(0.05), jnp.asarray(kernel)
    state = tx.init(ours)
    for _ in range(5):
        point = perturb_along_momentum(ours, state, 0.2)
        updates, state = tx.update(gradient(point), state, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_the_momentum_of_every_optimizer_points_uphill():
    params = {"fc": jnp.ones((4, 3))}
    gradient, found = jax.tree.map(lambda leaf: 0.5 * leaf, params), set()
    for name in aliases.names():
        tx = aliases.make(name, lambda step: 0.1, {})
        try:
            momentum(jax.eval_shape(tx.init, params), params)
        except UsageError:
            continue
        state = tx.init(params)
        for _ in range(2):  # the first step of adopt has no momentum
            _, state = tx.update(gradient, state, params)
        uphill = (momentum(state, params)["fc"] > 0).all()
        assert uphill == (name not in aliases.SUMS_STEPS), name
        found.add(name)
    assert found > {"adamw", "lion", "lamb", "lars"}


def test_what_has_no_momentum():
    params = {"trace": jnp.ones(2), "fc": jnp.ones(3)}
    parts = optax.partition(
        {"a": optax.sgd(0.1, 0.9), "b": optax.adam(0.1)}, {"trace": "a", "fc": "b"}
    )
    for tx in (optax.sgd(0.1), optax.adafactor(0.1), parts):
        with pytest.raises(
            UsageError, match="no momentum of all parameters; Momentum-SAM needs one"
        ):
            perturb_along_momentum(params, tx.init(params))
    with pytest.raises(UsageError, match="several momenta"):
        perturb_along_momentum(params, [tx.init(params) for tx in [optax.adam(0.1)] * 2])
    state = optax.chain(optax.clip(1.0), optax.lion(0.1)).init(params)
    jax.tree.map(np.testing.assert_array_equal, perturb_along_momentum(params, state), params)
    with pytest.raises(UsageError, match="rho = -1"):
        perturb_along_momentum(params, state, -1.0)
