"""SAM, ASAM and LookSAM against NumPy in float64, and SAM against two passes of PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from library_oracles import (
    NnxTree,
    assert_close,
    flat,
    jax_gradient,
    nested,
    numpy_gradient,
    problem,
)

from seal_jax.core import mesh as meshes
from seal_jax.errors import UsageError
from seal_jax.transforms.looksam import make_looksam_tx
from seal_jax.transforms.preconditioners import preconditioner
from seal_jax.transforms.sam import (
    make_sam_tx,
    perturb,
    sharpness_aware,
    sharpness_aware_gradient,
)
from seal_jax.transforms.sgd import make_normal_tx

STEPS, S, E = 12, 2, 3  # two generations
CLOCK = {"steps_per_epoch": S, "epochs_per_generation": E}
DECAY = 0.05


def start(seed=0):
    params, noise, coefficient = problem(seed)
    noise, coefficient = ({n: x[:STEPS] for n, x in part.items()} for part in (noise, coefficient))
    return jax.tree.map(jnp.asarray, tuple(map(nested, (params, noise, coefficient))))


def perturbed(params, gradient, rho, adaptive=False, eta=0.0, decay=0.0):
    """The perturbed point by the papers' formulas, on dictionaries of float64."""
    gradient = {n: g + decay * params[n] for n, g in gradient.items()}
    scale = {n: np.abs(p) + eta if adaptive else np.ones_like(p) for n, p in params.items()}
    norm = np.sqrt(sum(np.sum((scale[n] * g) ** 2) for n, g in gradient.items()))
    return {n: p + rho * scale[n] ** 2 * gradient[n] / (norm + 1e-12) for n, p in params.items()}


def book(
    seed=0, *, rho=0.3, nesterov=True, reset=True, decay_in_perturbation=False, last=E, **options
):
    params, noise, coefficient = problem(seed)
    gradient = numpy_gradient(noise, coefficient)
    params = {n: p.astype(np.float64) for n, p in params.items()}
    buffer = {n: np.zeros_like(p) for n, p in params.items()}
    history = []
    for t in range(STEPS):
        if reset and t % (S * E) == 0:
            buffer = {n: np.zeros_like(p) for n, p in params.items()}
        decay = DECAY if decay_in_perturbation else 0.0
        late = t % (S * E) >= S * (E - last)
        radius = rho if late else 0.0
        point = perturbed(params, gradient(params, t), radius, decay=decay, **options)
        slopes = gradient(point, t)
        for n, p in params.items():
            slope = slopes[n] + DECAY * p
            buffer[n] = 0.9 * buffer[n] + slope
            params[n] = p - 0.1 * (slope + 0.9 * buffer[n] if nesterov else buffer[n])
        history.append(dict(params))
    return history


def one_step(tx, params, state, noise, coefficient):
    def grad_fn(params):
        return jax_gradient(params, noise, coefficient)

    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state


def scanned(tx, params, noise, coefficient):
    def body(carry, inputs):
        params, state = one_step(tx, *carry, *inputs)
        return (params, state), params

    return jax.lax.scan(body, (params, tx.init(params)), (noise, coefficient))[1]


def sam(**options):
    return make_sam_tx(**{"rho": 0.3, "weight_decay": DECAY, **CLOCK, **options})


VARIANTS = {
    "sam": ({}, {}),
    "asam": ({"adaptive": True, "eta": 0.01}, {"adaptive": True, "eta": 0.01}),
    "decay": ({"decay_in_perturbation": True}, {"decay_in_perturbation": True}),
    "plain momentum": ({"nesterov": False}, {"nesterov": False}),
    "no reset": ({"reset_momentum": "never"}, {"reset": False}),
    "no perturbation": ({"rho": 0.0}, {"rho": 0.0}),
    "last epochs": ({"last_epochs": 2}, {"last": 2}),
}


@pytest.mark.parametrize(("options", "by_the_book"), VARIANTS.values(), ids=VARIANTS)
def test_scan_equals_the_reference(options, by_the_book):
    assert_close(
        flat(jax.jit(functools.partial(scanned, sam(**options)))(*start())), book(**by_the_book)
    )


def test_the_reference_tells_the_variants_apart():
    runs = [book(**options) for _, options in VARIANTS.values()]
    last = [np.concatenate([value.ravel() for value in run[-1].values()]) for run in runs]
    for i, a in enumerate(last):
        for b in last[:i]:
            assert np.linalg.norm(a - b) > 1e-4 * np.linalg.norm(b)


@pytest.mark.parametrize("adaptive", [False, True])
def test_perturbation(adaptive):
    params, noise, _ = problem()
    gradient = {n: x[0] for n, x in noise.items()}
    found = perturb(params, gradient, 0.5, adaptive=adaptive, eta=0.02 if adaptive else 0.0)
    expected = perturbed(params, gradient, 0.5, adaptive, 0.02 if adaptive else 0.0)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-6, atol=1e-7)
    if not adaptive:
        moved = sum(np.sum((np.asarray(found[n]) - params[n]) ** 2) for n in params)
        assert np.sqrt(moved) == pytest.approx(0.5, rel=1e-5)


# The radius 0 and the gradient 0


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("rho", [0.0, jnp.array(0.0)], ids=["static", "traced"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_radius_0_stays_put(rho, adaptive):
    params = {"w": jnp.array([-0.0, 0.0, 1.5, -2.0])}
    for gradient in (jnp.arange(4.0), jnp.full(4, jnp.inf)):
        found = jax.jit(functools.partial(perturb, adaptive=adaptive))(params, {"w": gradient}, rho)
        assert bits(found) == bits(params)


def test_static_radius_0_is_the_base_and_asks_for_no_second_gradient():
    params, noise, coefficient = start()
    base = make_normal_tx(0.1, weight_decay=DECAY, nesterov=True, **CLOCK)

    def without(tx):
        def body(carry, inputs):
            params, state = carry
            updates, state = tx.update(jax_gradient(params, *inputs), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        run = jax.jit(lambda *inputs: jax.lax.scan(body, (params, tx.init(params)), inputs)[1])
        return run(noise, coefficient)

    assert bits(without(sam(rho=0.0))) == bits(without(base))


def test_traced_radius_0_is_the_base():
    params, noise, coefficient = start()
    base = make_normal_tx(0.1, weight_decay=DECAY, nesterov=True, **CLOCK)
    expected = jax.jit(functools.partial(scanned, base))(params, noise, coefficient)
    run = jax.jit(lambda rho, *problem: scanned(sam(rho=rho), *problem))
    assert bits(run(0.0, params, noise, coefficient)) == bits(expected)
    assert_close(flat(run(0.3, params, noise, coefficient)), book())
    assert run._cache_size() == 1


def test_traced_radius_0_takes_the_first_gradient():
    """Two passes may round differently: only the first is that of the base."""
    w = jnp.ones(2)

    @jax.jit
    def both(rho):
        tx = sharpness_aware(optax.sgd(1.0), rho)
        updates, _ = tx.update(w, tx.init(w), w, grad_fn=lambda w: 1.001 * w)
        _, gradient = sharpness_aware_gradient(lambda w: (0.0, calls.pop() * w), w, rho)
        return -updates, gradient

    calls = [1.001, 1.0]
    for found in both(0.0):
        np.testing.assert_array_equal(found, w)


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_zero_gradient_gives_no_nan(adaptive):
    params = {"w": jnp.array([0.0, 1.0]), "b": jnp.zeros(())}
    zero = jax.tree.map(jnp.zeros_like, params)
    point = functools.partial(perturb, adaptive=adaptive)
    assert bits(point(params, zero, 0.05)) == bits(params)

    def total(params, gradient, rho):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(point(params, gradient, rho)))

    slopes = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(params, zero, 0.05)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    tx = make_sam_tx(adaptive=adaptive, **CLOCK)
    updates, _ = tx.update(zero, tx.init(zero), zero, grad_fn=lambda params: zero)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(updates))


def test_gradients_too_small_to_square():
    """By the formula, 1e-12 in the denominator is then all that counts."""
    point = perturb({"w": jnp.zeros(2)}, {"w": jnp.array([1e-25, 0.0])}, 0.5)["w"]
    np.testing.assert_allclose(point, [5e-14, 0.0], rtol=1e-5)


# A second gradient in some steps only


def look_by_the_book(seed=0, *, rho=0.3, alpha=0.7, every=4):
    """Liu et al. 2022, Algorithm 1, on vectors of float64, over momentum SGD whose generations restart."""
    params, noise, coefficient = problem(seed)
    gradient = numpy_gradient(noise, coefficient)
    params = {n: p.astype(np.float64) for n, p in params.items()}
    shapes = {n: p.shape for n, p in params.items()}
    ends = np.cumsum([p.size for p in params.values()])[:-1]

    def vector(tree):
        return np.concatenate([tree[n].ravel() for n in shapes])

    def tree(vector):
        parts = np.split(vector, ends)
        return {n: part.reshape(shapes[n]) for n, part in zip(shapes, parts, strict=True)}

    history = []
    for t in range(STEPS):
        if t % (S * E) == 0:
            buffer = np.zeros(sum(p.size for p in params.values()))
        w, g = vector(params), vector(gradient(params, t))
        unit = g / np.linalg.norm(g)
        if t % (S * E) % every == 0:
            step = vector(gradient(tree(w + rho * unit), t))
            cosine = unit @ step / np.linalg.norm(step)
            across = step - np.linalg.norm(step) * cosine * unit
        else:
            step = g + alpha * np.linalg.norm(g) / np.linalg.norm(across) * across
        buffer = 0.9 * buffer + step + DECAY * w
        params = tree(w - 0.1 * buffer)
        history.append(params)
    return history


def looksam(**options):
    return make_looksam_tx(
        0.1, **{"rho": 0.3, "every": 4, "weight_decay": DECAY, **CLOCK, **options}
    )


def test_looksam_of_seeds_and_settings_together_equals_the_reference():
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), start(0), start(1))
    settings = jnp.array([3.0, 2.0]), jnp.array([0.7, 0.2])
    run = jax.jit(jax.vmap(lambda rho, alpha, *p: scanned(looksam(rho=rho, alpha=alpha), *p)))
    params = run(*settings, *stacked)
    for seed, (rho, alpha) in enumerate(((3.0, 0.7), (2.0, 0.2))):
        found = jax.tree.map(lambda x, s=seed: x[s], params)
        # What is left of two gradients that are almost the same loses a digit.
        assert_close(flat(found), look_by_the_book(seed, rho=rho, alpha=alpha), tolerance=1e-5)
    last = [look_by_the_book(alpha=alpha)[-1]["fc/kernel"] for alpha in (0.7, 0.0)]
    assert np.abs(last[0] - last[1]).max() > 0.1


def test_looksam_at_its_ends_is_sam_or_the_base():
    problem = start()
    base = make_normal_tx(0.1, weight_decay=DECAY, **CLOCK)
    run = jax.jit(lambda rho, *problem: scanned(looksam(rho=rho, every=3), *problem))
    expected = jax.jit(functools.partial(scanned, base))(*problem)
    assert bits(run(0.0, *problem)) == bits(expected)
    assert bits(jax.jit(functools.partial(scanned, looksam(rho=0.0)))(*problem)) == bits(expected)
    every_step = jax.jit(functools.partial(scanned, looksam(every=1)))(*problem)
    assert_close(flat(every_step), book(nesterov=False))


@pytest.mark.parametrize("tx", [looksam(), sam(last_epochs=1)], ids=["looksam", "late"])
def test_batched_seeds_skip_the_second_gradient(tx):
    """The gradient is counted as it is computed, in steps of two seeds that agree or do not."""
    calls = []

    def grad_fn(w):
        jax.debug.callback(lambda: calls.append(1))
        return 2 * w

    def step(state, w):
        return tx.update(3 * w, state, w, grad_fn=grad_fn)

    w = jnp.ones((2, 3))
    state = jax.vmap(tx.init)(w)
    run, counts = jax.jit(jax.vmap(step)), []
    for _ in range(S * E):
        _, state = run(state, w)
        jax.effects_barrier()
        counts.append(len(calls))
        calls.clear()
    # One call of the host for each seed.
    due = [0, 4] if tx.init(w[0])._fields[0] == "clock" else [4, 5]
    assert [count > 0 for count in counts] == [t in due for t in range(S * E)]


def test_looksam_at_a_zero_gradient():
    zero = {"w": jnp.zeros(3)}
    tx = looksam()
    updates, state = tx.update(zero, tx.init(zero), zero, grad_fn=lambda params: zero)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves((updates, state.across)))


# Any base, any place


def test_two_passes_of_torch_adam():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(8, 3)).astype("f"), rng.normal(size=(8, 2)).astype("f")
    kernel = rng.normal(size=(3, 2)).astype("f")

    theirs = torch.tensor(kernel, requires_grad=True)
    adam = torch.optim.Adam([theirs], lr=0.05)
    for _ in range(5):
        slopes = []
        center = theirs.detach().clone()
        for _ in range(2):
            adam.zero_grad()
            loss = ((torch.tensor(inputs) @ theirs - torch.tensor(targets)) ** 2).mean()
            loss.backward()
            slopes.append(theirs.grad.clone())
            with torch.no_grad():
                theirs.copy_(center + 0.2 * slopes[0] / (slopes[0].norm() + 1e-12))
        with torch.no_grad():
            theirs.copy_(center)
        adam.step()

    gradient = jax.jit(jax.grad(lambda w: jnp.mean((inputs @ w - targets) ** 2)))
    tx, ours = sharpness_aware(optax.adam(0.05), 0.2), jnp.asarray(kernel)
    state = tx.init(ours)
    for _ in range(5):
        updates, state = tx.update(gradient(ours), state, ours, grad_fn=gradient)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_another_optimizer_or_preconditioner():
    problem = start()
    whole = jax.jit(functools.partial(scanned, make_sam_tx(optimizer=optax.adam(0.1), **CLOCK)))
    part = make_sam_tx(preconditioner=preconditioner("adam"), weight_decay=0.0, rho=0.05, **CLOCK)
    found = jax.jit(functools.partial(scanned, part))(*problem)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(whole(*problem)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_vmap_over_seeds_and_radii():
    seeds = [start(seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    rho = jnp.array([0.3, 0.1])
    params = jax.jit(jax.vmap(lambda rho, *p: scanned(sam(rho=rho), *p)))(rho, *stacked)
    for seed, radius in ((0, 0.3), (1, 0.1)):
        found = jax.tree.map(lambda x, s=seed: x[s], params)
        assert_close(flat(found), book(seed, rho=radius))


def test_nnx_optimizer_compiles_once():
    params, noise, coefficient = start()
    model = NnxTree(params)
    optimizer = nnx.Optimizer(model, sam(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, noise, coefficient):
        def grad_fn(params):
            return jax_gradient(params, noise, coefficient)

        params = nnx.state(model, nnx.Param)
        optimizer.update(model, grad_fn(params), grad_fn=grad_fn)

    history = []
    for t in range(STEPS):
        step(model, optimizer, *jax.tree.map(lambda x, t=t: x[t], (noise, coefficient)))
        history.append(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert_close(flat(jax.tree.map(lambda *leaves: np.stack(leaves), *history)), book())
    assert step.jitted_fn._cache_size() == 1


def test_a_perturbation_for_each_device():
    """Between the means: of the gradients at each device's own point, as NumPy has it."""
    rng = np.random.default_rng(1)
    inputs, targets = rng.normal(size=(16, 3)).astype("f"), rng.normal(size=16).astype("f")
    w = rng.normal(size=3).astype("f")

    def share(w, inputs, targets):
        return jnp.mean((inputs @ w - targets) ** 2), jnp.sum(inputs)

    def on_device(w, inputs, targets):
        w = meshes.varying(w, "data")
        value_and_grad = jax.value_and_grad(lambda w: share(w, inputs, targets), has_aux=True)
        (loss, total), gradient = sharpness_aware_gradient(value_and_grad, w, 0.5)
        return jax.lax.pmean((loss, gradient), "data"), jax.lax.psum(total, "data")

    mesh = Mesh(np.array(jax.devices()), ("data",))
    spread = jax.shard_map(
        on_device, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P()
    )
    (loss, gradient), total = jax.jit(spread)(w, inputs, targets)

    def slope(w, x, y):
        return 2 * x.T @ (x @ w - y) / len(y)

    parts = [(inputs[i : i + 2], targets[i : i + 2]) for i in range(0, 16, 2)]
    expected = []
    for x, y in parts:
        first = slope(w, x, y)
        expected.append(slope(w + 0.5 * first / np.linalg.norm(first), x, y))
    np.testing.assert_allclose(gradient, np.mean(expected, 0), rtol=1e-4)
    together = slope(w, inputs, targets)
    together = slope(w + 0.5 * together / np.linalg.norm(together), inputs, targets)
    assert np.abs(together - gradient).max() > 1e-2  # the two kinds differ here
    np.testing.assert_allclose(loss, np.mean((inputs @ w - targets) ** 2), rtol=1e-5)
    np.testing.assert_allclose(total, inputs.sum(), rtol=1e-4)


def test_no_second_pass_at_a_static_radius_of_0():
    calls = []

    def value_and_grad(w):
        calls.append(w)
        return 3.0, 2 * w

    assert sharpness_aware_gradient(value_and_grad, jnp.array(1.0), 0.0) == (3.0, 2.0)
    assert len(calls) == 1


# What cannot be used


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rho": -0.1}, "rho = -0.1"),
        ({"rho": float("nan")}, "rho = nan"),
        ({"eta": -1.0, "adaptive": True}, "eta = -1"),
        ({"last_epochs": 4}, r"last_epochs = 4 must be a whole number in 1..3"),
        ({"optimizer": optax.sgd(0.1), "decay_in_perturbation": True}, "decay_in_perturbation"),
        ({"optimizer": optax.sgd(0.1), "learning_rate": 0.2}, "learning_rate"),
        ({"optimizer": optax.sgd(0.1), "preconditioner": optax.identity()}, "preconditioner"),
        ({"preconditioner": optax.identity(), "momentum": 0.5}, "momentum"),
        ({"preconditioner": "adam"}, "preconditioner = 'adam'"),
    ],
)
def test_errors(options, words):
    with pytest.raises(UsageError, match=words):
        make_sam_tx(**CLOCK, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"rho": -0.1}, "rho = -0.1"), ({"alpha": -1.0}, "alpha = -1"), ({"every": 0}, "every = 0")],
)
def test_errors_of_looksam(options, words):
    with pytest.raises(UsageError, match=words):
        looksam(**options)


def test_update_says_what_it_lacks():
    tx, w = make_sam_tx(**CLOCK), jnp.ones(2)
    with pytest.raises(ValueError, match=r"update needs grad_fn: call update\(\.\.\., grad_fn"):
        tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(w, tx.init(w), grad_fn=lambda w: w)
    with pytest.raises(UsageError, match="rho = -1"):
        perturb(w, w, -1.0)
