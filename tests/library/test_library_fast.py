"""FAST on a small network against NumPy's backward pass and torch's optimizers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from library_oracles import NnxTree, assert_close

from seal_jax import heads, masks
from seal_jax.errors import UsageError
from seal_jax.transforms.fast import make_fast_tx
from seal_jax.transforms.preconditioners import preconditioner, rectification
from seal_jax.transforms.reset_state import freeze, freeze_while
from seal_jax.transforms.sgd import make_normal_tx

M, INPUTS, D, N = 10, 4, 8, 5  # examples, inputs, features, classes
STEPS, S, E = 12, 2, 4  # a generation and a half
CLOCK = {"steps_per_epoch": S, "epochs_per_generation": E}
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(M, INPUTS)).astype("f")
# No class has its share of 2: its bias would have no gradient, and Adam make much of rounding.
LABELS = np.array([0, 0, 0, 1, 1, 1, 2, 3, 3, 3])
START = {
    "conv": {"kernel": RNG.normal(size=(INPUTS, D)).astype("f")},
    "fc": {"kernel": np.zeros((D, N), "f"), "bias": np.zeros(N, "f")},
}


def logits(params):
    features = jax.nn.relu(IMAGES @ params["conv"]["kernel"])
    return features @ params["fc"]["kernel"] + params["fc"]["bias"]


def loss(params):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params), LABELS).mean()


def backward(params):
    """The gradient by hand in float64 (section 2 of the paper), and the features."""
    hidden = IMAGES.astype(np.float64) @ params["conv/kernel"]
    features = np.maximum(hidden, 0)
    scores = features @ params["fc/kernel"] + params["fc/bias"]
    odds = np.exp(scores - scores.max(1, keepdims=True))
    error = np.eye(N)[LABELS] - odds / odds.sum(1, keepdims=True)
    slope = -(error @ params["fc/kernel"].T) * (hidden > 0)
    gradient = {
        "conv/kernel": IMAGES.T @ slope / M,
        "fc/kernel": -features.T @ error / M,
        "fc/bias": -error.mean(0),
    }
    return gradient, features, error


def flat(params):
    return {f"{layer}/{n}": x for layer, own in params.items() for n, x in own.items()}


def book(alpha, beta, *, momentum=0.9, damped=True, nesterov=False, decay=0.0, held=0):
    """Algorithm 2, with the rates where the paper has them, inside V; features held at first."""
    params = {n: x.astype(np.float64) for n, x in flat(START).items()}
    rate = {n: alpha if n.startswith("fc") else beta for n in params}
    share = 1 - momentum if damped else 1.0
    history = []
    for t in range(STEPS):
        if t % (S * E) == 0:
            speed = {n: np.zeros_like(x) for n, x in params.items()}
        gradient, _, _ = backward(params)
        for n, x in params.items():
            own = 0.0 if t < held and n == "conv/kernel" else rate[n]
            push = share * -own * (gradient[n] + decay * x)
            speed[n] = momentum * speed[n] + push
            params[n] = x + (momentum * speed[n] + push if nesterov else speed[n])
        history.append(dict(params))
    return history


def scanned(tx, warming=None, params=START):
    params = jax.tree.map(jnp.asarray, params)

    def body(carry, extra):
        params, state = carry
        extra = {} if extra is None else {"warming": extra}
        updates, state = tx.update(jax.grad(loss)(params), state, params, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(body, (params, tx.init(params)), warming, length=STEPS)[1]


def run(tx, **options):
    return flat(jax.jit(functools.partial(scanned, tx, **options))())


def fast(alpha=0.5, beta=0.2, **options):
    return make_fast_tx("fc", alpha, beta, **{**CLOCK, **options})


# The known answers of the first step


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_at_zero(bias):
    head = START["fc"] if bias else {"kernel": START["fc"]["kernel"]}
    params = {**START, "fc": {"bias": jnp.zeros(N), **heads.initialise(jax.random.key(0), head)}}
    value, gradient = jax.value_and_grad(loss)(params)
    assert float(value) == pytest.approx(math.log(N), rel=1e-7)
    np.testing.assert_array_equal(jax.nn.softmax(logits(params)), np.full((M, N), 1 / N, "f"))
    np.testing.assert_array_equal(gradient["conv"]["kernel"], 0)


@pytest.mark.parametrize(
    ("momentum", "damped", "factor"),
    [
        (0.0, False, 1.0),
        (0.0, True, 1.0),
        (0.9, False, 1.0),
        (0.9, True, 0.1),
        (0.5, True, 0.5),
    ],
)
def test_the_first_step(momentum, damped, factor):
    history = run(fast(0.7, 0.3, momentum=momentum, damped_momentum=damped))
    _, features, error = backward(flat(START))
    expected = factor * 0.7 / M * features.T @ error
    np.testing.assert_allclose(history["fc/kernel"][0], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(history["conv/kernel"][0], START["conv"]["kernel"])
    assert np.any(history["conv/kernel"][1] != START["conv"]["kernel"])


# Training


VARIANTS = {
    "damped": ({}, {}),
    "undamped": ({"damped_momentum": False}, {"damped": False}),
    "nesterov": ({"optimizer": "nesterov"}, {"nesterov": True}),
    "decay": ({"weight_decay": 0.1}, {"decay": 0.1}),
    "momentum": ({"momentum": 0.5}, {"momentum": 0.5}),
}


@pytest.mark.parametrize(("options", "by_the_book"), VARIANTS.values(), ids=VARIANTS)
def test_scan_equals_the_reference(options, by_the_book):
    assert_close(run(fast(**options)), book(0.5, 0.2, **by_the_book), 1e-5)


def test_the_reference_tells_the_variants_apart():
    runs = [book(0.5, 0.2, **options) for _, options in VARIANTS.values()]
    runs += [book(0.2, 0.5), book(0.5, 0.2, held=4)]
    for i, a in enumerate(runs):
        for b in runs[:i]:
            difference = a[-1]["conv/kernel"] - b[-1]["conv/kernel"]
            assert np.linalg.norm(difference) > 1e-4 * np.linalg.norm(b[-1]["conv/kernel"])


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov"])
def test_damped_rates_are_ten_times_the_undamped(optimizer):
    damped = run(fast(0.5, 0.2, optimizer=optimizer))
    undamped = run(fast(0.05, 0.02, optimizer=optimizer, damped_momentum=False))
    for name, value in undamped.items():
        np.testing.assert_allclose(damped[name], value, rtol=1e-4, atol=1e-5)


def test_rates_by_schedule():
    def half(step):
        return jnp.where(step < S * E // 2, 1.0, 0.5)

    both = run(fast(lambda step: 0.5 * half(step), lambda step: 0.2 * half(step)))
    plain = run(fast(0.5, 0.2))
    middle = S * E // 2
    np.testing.assert_allclose(both["fc/kernel"][:middle], plain["fc/kernel"][:middle], rtol=1e-5)
    assert np.abs(both["fc/kernel"][middle] - plain["fc/kernel"][middle]).max() > 1e-3


TORCH = {
    "sgd": ("SGD", {"momentum": 0.9}),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "adam": ("Adam", {}),
    "radam": ("RAdam", {}),
}


def torch_head(name, rate, decay, steps=10):
    """Train the head alone, from the start, on fixed features."""
    torch = pytest.importorskip("torch")
    _, features, _ = backward(flat(START))
    weight = torch.zeros(N, D, requires_grad=True)
    bias = torch.zeros(N, requires_grad=True)
    kind, options = TORCH[name]
    optimizer = getattr(torch.optim, kind)([weight, bias], lr=rate, weight_decay=decay, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        scores = torch.nn.functional.linear(
            torch.tensor(features, dtype=torch.float32), weight, bias
        )
        torch.nn.functional.cross_entropy(scores, torch.tensor(LABELS)).backward()
        optimizer.step()
    return weight.detach().numpy().T, bias.detach().numpy()


@pytest.mark.parametrize("name", TORCH)
def test_a_head_alone_equals_torch(name):
    long = {"steps_per_epoch": 1, "epochs_per_generation": STEPS}
    tx = fast(0.1, 0.0, optimizer=name, damped_momentum=False, weight_decay=0.01, **long)
    history = run(tx)
    kernel, bias = torch_head(name, 0.1, 0.01)
    np.testing.assert_allclose(history["fc/kernel"][9], kernel, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(history["fc/bias"][9], bias, rtol=2e-4, atol=1e-5)
    np.testing.assert_array_equal(history["conv/kernel"][9], START["conv"]["kernel"])


@pytest.mark.parametrize("b2", [0.999, 0.99, 0.9])
def test_the_rectification_of_radam_in_float32(b2):
    longest = 2 / (1 - b2) - 1
    for t in (6, 7, 8, 10, 20, 50, 100, 500, 999, 1001, 2000, 20_000):
        rho = longest - 2 * t * b2**t / (1 - b2**t)
        root = (rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho)
        length, correction = rectification(t, b2)
        assert float(length) == pytest.approx(rho, rel=2e-6)
        if rho > 5:
            assert float(correction) == pytest.approx(math.sqrt(root), rel=4e-6)


# What stands still


def updates_of(tx, gradient, steps=3, **extra):
    params = jax.tree.map(jnp.ones_like, gradient)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(gradient, state, params, **extra)
    return updates, state


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "radam"])
@pytest.mark.parametrize("size", [1.0, np.inf])
def test_a_rate_of_0_freezes(optimizer, size):
    gradient = jax.tree.map(lambda x: jnp.full(x.shape, size), START)
    options = {"optimizer": optimizer, "weight_decay": 0.1}
    for zero in (0, 0.0, lambda step: jnp.zeros(())):
        head = updates_of(fast(zero, 0.1, **options), gradient)[0]
        assert all(not np.any(leaf) for leaf in head["fc"].values())
        features = updates_of(fast(0.1, zero, **options), gradient)[0]
        assert not np.any(features["conv"]["kernel"])
    if size == 1:
        assert np.all(head["conv"]["kernel"])
        assert np.all(features["fc"]["kernel"])


def test_warm_up_holds_the_features_and_what_is_remembered_of_them():
    """As a rate of 0 inside V would: after the warm-up the features start without momentum."""
    warming = jnp.arange(STEPS) < 4
    found = run(fast(weight_decay=0.1), warming=warming)
    assert_close(found, book(0.5, 0.2, decay=0.1, held=4), 1e-5)
    np.testing.assert_array_equal(found["conv/kernel"][3], START["conv"]["kernel"])
    never = run(fast(weight_decay=0.1), warming=jnp.zeros(STEPS, bool))
    for name, value in run(fast(weight_decay=0.1)).items():
        np.testing.assert_array_equal(never[name], value)


@pytest.mark.parametrize("name", ["adam", "radam"])
def test_after_the_warm_up_the_features_have_a_fresh_optimizer(name):
    """Torch's, made when the warm-up ends; the schedule of the rate has gone on meanwhile."""
    torch = pytest.importorskip("torch")
    held = 5
    tx = fast(lambda step: 0.5 / (1 + step), lambda step: 0.2 / (1 + step), optimizer=name)
    params = jax.tree.map(jnp.asarray, START)
    tensors = {n: torch.tensor(x, requires_grad=True) for n, x in flat(START).items()}
    kind, _ = TORCH[name]
    optimizers = {}
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(S * E):
        rng = np.random.default_rng(t)
        g = jax.tree.map(lambda x, rng=rng: rng.normal(size=x.shape).astype("f"), START)
        updates, state = update(g, state, params, warming=jnp.array(t < held))
        for n, tensor in tensors.items():
            if t < held and n == "conv/kernel":
                assert not np.any(flat(updates)[n])
                continue
            if n not in optimizers:
                optimizers[n] = getattr(torch.optim, kind)([tensor], lr=1.0)
            optimizers[n].param_groups[0]["lr"] = (0.5 if n.startswith("fc") else 0.2) / (1 + t)
            before = tensor.detach().clone()
            tensor.grad = torch.tensor(flat(g)[n])
            optimizers[n].step()
            moved = (tensor.detach() - before).numpy()
            np.testing.assert_allclose(flat(updates)[n], moved, rtol=1e-3, atol=2e-6)


def test_gate_as_a_last_link():
    base = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))
    tx = optax.chain(base, freeze_while("conv"))
    gradient = jax.tree.map(jnp.ones_like, START)
    plain, state = updates_of(base, gradient)
    for warming in (jnp.array(False), None):
        extra = {} if warming is None else {"warming": warming}
        jax.tree.map(np.testing.assert_array_equal, updates_of(tx, gradient, **extra)[0], plain)
    # Momentum from before the warm-up moves nothing either.
    held, _ = tx.update(gradient, (state, optax.EmptyState()), gradient, warming=jnp.array(True))
    open_, _ = base.update(gradient, state, gradient)
    assert np.all(open_["conv"]["kernel"])
    assert not np.any(held["conv"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, held["fc"], open_["fc"])


def test_gate_around_an_optimizer_forgets_the_held():
    tx = freeze_while("conv", optax.sgd(0.1, momentum=0.9))
    gradient = jax.tree.map(jnp.ones_like, START)
    _, state = updates_of(tx, gradient, warming=jnp.array(True))
    updates, _ = tx.update(gradient, state, gradient, warming=jnp.array(False))
    np.testing.assert_allclose(updates["conv"]["kernel"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(updates["fc"]["bias"], -0.1 * (1 + 0.9 + 0.81 + 0.729), rtol=1e-6)


def test_freeze():
    base = optax.sgd(0.1, momentum=0.9)
    gradient = jax.tree.map(jnp.ones_like, START)
    plain, _ = updates_of(base, gradient)
    updates, _ = updates_of(optax.chain(base, freeze(masks.invert("fc"))), gradient)
    assert not np.any(updates["conv"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, updates["fc"], plain["fc"])


# Preconditioners in plain training


def test_momentum_as_a_preconditioner_is_the_default():
    options = {"learning_rate": 0.1, "weight_decay": 0.05, **CLOCK}
    for nesterov in (False, True):
        default = run(make_normal_tx(momentum=0.9, nesterov=nesterov, **options))
        named = preconditioner("sgd", momentum=0.9, nesterov=nesterov)
        given = run(make_normal_tx(preconditioner=named, **options))
        for name, value in default.items():
            np.testing.assert_array_equal(given[name], value)


@pytest.mark.parametrize(
    "options",
    [{"damped": True}, {"damped": True, "nesterov": True}, {"name": "adam"}, {"name": "radam"}],
)
def test_a_generation_starts_anew(options):
    """A constant gradient, no decay: both generations move alike, and not each step alike."""
    tx = make_normal_tx(
        0.1, weight_decay=0.0, preconditioner=preconditioner(**{"name": "sgd", **options}), **CLOCK
    )
    params = jax.tree.map(jnp.asarray, START)

    def body(state, t):
        gradient = jax.tree.map(lambda x: jnp.full(x.shape, 1.0 + t % (S * E)), params)
        updates, state = tx.update(gradient, state, params)
        return state, updates["fc"]["bias"][0]

    moves = jax.jit(lambda: jax.lax.scan(body, tx.init(params), jnp.arange(STEPS))[1])()
    np.testing.assert_array_equal(moves[: STEPS - S * E], moves[S * E :])
    assert len(np.unique(np.asarray(moves[: S * E]).round(5))) > S


# Any place


def test_vmap_over_rates():
    alphas, betas = jnp.array([0.5, 0.3]), jnp.array([0.2, 0.0])
    found = jax.jit(jax.vmap(lambda a, b: scanned(fast(a, b))))(alphas, betas)
    for index, (alpha, beta) in enumerate(((0.5, 0.2), (0.3, 0.0))):
        own = flat(jax.tree.map(lambda x, i=index: x[i], found))
        assert_close(own, book(alpha, beta), 1e-5)


def test_nnx_optimizer_compiles_once():
    model = NnxTree(START)
    optimizer = nnx.Optimizer(model, fast(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, warming):
        params = nnx.state(model, nnx.Param)
        gradient = jax.grad(lambda params: loss(nnx.to_pure_dict(params)))(params)
        optimizer.update(model, gradient, warming=warming)

    history = []
    for t in range(STEPS):
        step(model, optimizer, jnp.array(t < 4))
        history.append(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    found = flat(jax.tree.map(lambda *leaves: np.stack(leaves), *history))
    assert_close(found, book(0.5, 0.2, held=4), 1e-5)
    assert step.jitted_fn._cache_size() == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": -0.1}, "alpha = -0.1 must be 0"),
        ({"beta": math.nan}, "beta = nan must be 0"),
        ({"beta": math.inf}, "beta = inf must be 0"),
        ({"alpha": 0, "beta": 0.0}, "alpha = 0 and beta = 0"),
        ({"optimizer": "adma"}, "optimizer = 'adma' must be one of .*nearest: adam"),
        ({"momentum": 1.0}, "momentum = 1 must lie"),
        ({"weight_decay": -1.0}, "weight_decay = -1"),
    ],
)
def test_errors(options, words):
    with pytest.raises(UsageError, match=words):
        fast(**options)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("sgdd", {}, "optimizer = 'sgdd' must be one of sgd, adam, radam; nearest: sgd"),
        ("adam", {"nesterov": True}, "nesterov = True goes with"),
        ("radam", {"damped": True}, "damped = True goes with"),
    ],
)
def test_errors_of_preconditioners(name, options, words):
    with pytest.raises(UsageError, match=words):
        preconditioner(name, **options)


def test_a_head_that_is_not_there():
    with pytest.raises(UsageError, match="'head' matches no parameter path"):
        make_fast_tx("head", **CLOCK).init(START)
    with pytest.raises(UsageError, match="selects every parameter"):
        make_fast_tx(lambda params: jax.tree.map(lambda _: True, params), **CLOCK).init(START)
