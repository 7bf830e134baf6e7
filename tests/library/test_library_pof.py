"""``make_pof_tx``: what moves, what does not, and the recipe around it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P
from library_oracles import E, S, jax_gradient, nested, numpy_gradient, problem

import seal_jax
from seal_jax import UsageError
from seal_jax.transforms.pof import make_pof_tx
from seal_jax.weak_classifiers import perturb

HEAD = {"fc/kernel", "fc/bias"}
OPTIONS = {"learning_rate": 0.05, "weight_decay": 0.05}  # large, so that nothing can hide
STEPS = 6


def start(seed=0):
    return jax.tree.map(jnp.asarray, tuple(map(nested, problem(seed))))


def flat(tree):
    return {f"{layer}/{leaf}": value for layer, own in tree.items() for leaf, value in own.items()}


@functools.partial(jax.jit, static_argnums=0)
def run(tx, params, noise, coefficient, state=None):
    """Return the histories of the parameters over ``STEPS`` steps."""
    state = tx.init(params) if state is None else state

    def body(carry, inputs):
        params, state = carry
        updates, state = tx.update(jax_gradient(params, *inputs), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    inputs = jax.tree.map(lambda x: x[:STEPS], (noise, coefficient))
    (_, state), history = jax.lax.scan(body, (params, state), inputs)
    return history, state


def by_the_book(seed=0, rate=0.05, decay=0.05, momentum=0.9, nesterov=True, classifier_rate=0.0):
    params, noise, coefficient = problem(seed)
    gradient = numpy_gradient(noise, coefficient)
    params = {name: value.astype(np.float64) for name, value in params.items()}
    buffers = dict.fromkeys(params, 0.0)
    history = []
    for t in range(STEPS):
        slopes = gradient(params, t)
        for name in params:
            if name in HEAD:
                params[name] = params[name] - classifier_rate * slopes[name]
                continue
            slope = slopes[name] + decay * params[name]
            buffers[name] = momentum * buffers[name] + slope
            step = slope + momentum * buffers[name] if nesterov else buffers[name]
            params[name] = params[name] - rate * step
        history.append(dict(params))
    return {name: np.stack([p[name] for p in history]) for name in params}


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"nesterov": False, "momentum": 0.5}, {"nesterov": False, "momentum": 0.5}),
        ({"classifier_learning_rate": 0.02}, {"classifier_rate": 0.02}),
        ({"steps_per_epoch": 2, "epochs_per_generation": 1}, {}),  # momentum is never reset
    ],
)
def test_equals_the_reference(options, expected):
    history, _ = run(make_pof_tx("fc", **OPTIONS, **options), *start())
    expected = by_the_book(**expected)
    for name, value in flat(history).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)


def test_the_features_move_and_the_classifier_does_not():
    params, *gradients = start()
    history, _ = run(make_pof_tx("fc", **OPTIONS), params, *gradients)
    for name, value in flat(history).items():
        before = np.broadcast_to(flat(params)[name], value.shape)
        assert np.array_equal(value, before) == (name in HEAD)


@pytest.mark.parametrize("wrong", [jnp.nan, jnp.inf])
def test_no_gradient_of_the_classifier_reaches_anything(wrong):
    params, noise, coefficient = start()
    tx = make_pof_tx("fc", optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)))
    good = jax_gradient(params, *jax.tree.map(lambda x: x[0], (noise, coefficient)))
    bad = {**good, "fc": jax.tree.map(lambda g: jnp.full_like(g, wrong), good["fc"])}
    (a, state_a), (b, state_b) = (tx.update(g, tx.init(params), params) for g in (good, bad))
    assert_equal((a, state_a), (b, state_b))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(b["fc"]))


def test_the_norm_that_clips_is_that_of_the_features():
    params, noise, coefficient = start()
    gradient = jax_gradient(params, *jax.tree.map(lambda x: x[0], (noise, coefficient)))
    tx = make_pof_tx("fc", optimizer=optax.clip_by_global_norm(0.1))
    updates, _ = tx.update(gradient, tx.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.1, rtol=1e-6)


def test_goes_on_with_the_state_of_the_pre_training():
    params, *gradients = start()
    normal = seal_jax.make_normal_tx(
        0.05, steps_per_epoch=S, epochs_per_generation=E, nesterov=True, weight_decay=0.05
    )
    history, state = run(normal, params, *gradients)
    params = jax.tree.map(lambda x: x[-1], history)
    tx = make_pof_tx("fc", **OPTIONS)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    gradient = jax_gradient(params, *jax.tree.map(lambda x: x[STEPS], tuple(gradients)))
    updates, _ = tx.update(gradient, state, params)
    expected, _ = normal.update(gradient, state, params)
    fresh, _ = tx.update(gradient, tx.init(params), params)
    for layer in ("conv1", "bn1"):
        assert_equal(updates[layer], expected[layer])
        for a, b in zip(*(jax.tree.leaves(u[layer]) for u in (updates, fresh)), strict=True):
            assert not np.allclose(a, b)


def test_a_schedule_goes_on_unless_it_is_told_to_restart():
    def rates(**options):
        tx = make_pof_tx("fc", lambda step: 2.0**step, momentum=0.0, weight_decay=0.0, **options)
        params = {"conv": jnp.zeros(()), "fc": jnp.zeros(())}
        state, rates = tx.init(params), []
        for _ in range(5):
            updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
            rates.append(-float(updates["conv"]))
        return rates

    assert rates() == rates(steps_per_epoch=3) == [1, 2, 4, 8, 16]
    assert rates(steps_per_epoch=3, epochs_per_generation=1) == [1, 2, 4, 1, 2]


# With the perturbation around it

X = jax.random.normal(jax.random.key(1), (16, 4))
Y = jnp.arange(16) % 3


def net(seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return {
        "conv": jax.random.normal(keys[0], (4, 5)),
        "fc": {"kernel": jax.random.normal(keys[1], (5, 3)), "bias": jnp.array([0.1, -0.0, 0.0])},
    }


def features(params, x):
    return jnp.tanh(x @ params["conv"])


def classify(head, features):
    return features @ head["kernel"] + head["bias"]


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def post_train(tx, params, key, *, gamma=None, loss=cross_entropy, x=X, y=Y):
    """A few steps of PoF, with an expansion factor that is given or drawn."""
    options = {} if gamma is None else {"gamma": lambda key: gamma}

    def step(carry, key):
        params, state = carry
        batch_key, key = jax.random.split(key)
        own = features(params, x)
        order = jax.random.permutation(batch_key, len(y))[: len(y) // 2 or 1]
        weak, found, _ = perturb(key, params["fc"], own[order], y[order], classify, loss, **options)

        def objective(params):
            return loss(classify(params["fc"], features(params, x)), y)

        gradient = jax.grad(objective)({**params, "fc": weak})
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, found.accepted)

    return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, 4))[1]


TX = make_pof_tx("fc", **OPTIONS)
TRAIN = jax.jit(lambda params, key, gamma: post_train(TX, params, key, gamma=gamma))


def test_post_training_moves_the_features_only():
    params = net()
    history, accepted = TRAIN(params, jax.random.key(0), 1.5)
    assert accepted.any()
    changed = jnp.diff(history["conv"], axis=0, prepend=params["conv"][None])
    assert (jnp.abs(changed).max((1, 2)) > 0).all()
    for before, after in zip(
        jax.tree.leaves(params["fc"]), jax.tree.leaves(history["fc"]), strict=True
    ):
        after, before = np.asarray(after), np.broadcast_to(before, after.shape)
        np.testing.assert_array_equal(after.view(np.uint32), before.view(np.uint32))


def test_gamma_0_is_nesterov_sgd_on_the_features_bit_for_bit():
    params = net()
    history, accepted = TRAIN(params, jax.random.key(0), 0.0)
    assert accepted.any()
    plain = seal_jax.make_normal_tx(
        0.05, steps_per_epoch=1, nesterov=True, weight_decay=0.05, reset_momentum="never"
    )

    @jax.jit
    def step(carry, _):
        params, state = carry

        def objective(params):
            return cross_entropy(classify(params["fc"], features(params, X)), Y)

        updates, state = plain.update(jax.grad(objective)(params), state, params)
        moved = optax.apply_updates(params, updates)
        return ({**moved, "fc": params["fc"]}, state), moved["conv"]

    _, expected = jax.lax.scan(step, (params, plain.init(params)), length=4)
    np.testing.assert_array_equal(history["conv"], expected)
    perturbed, _ = TRAIN(params, jax.random.key(0), 1.5)
    assert (perturbed["conv"] != expected).any()


def test_vmapped_seeds_without_recompilation():
    traces = []

    @jax.jit
    def train(params, keys):
        traces.append(1)
        return jax.vmap(lambda p, key: post_train(TX, p, key))(params, keys)

    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(net, range(3)))
    for seed in range(2):
        keys = jax.random.split(jax.random.key(seed), 3)
        history, accepted = train(params, keys)
    assert len(traces) == 1
    alone = jax.jit(lambda p, key: post_train(TX, p, key))
    for seed in range(3):
        expected, own = alone(net(seed), keys[seed])
        np.testing.assert_array_equal(accepted[seed], own)
        jax.tree.map(
            lambda a, b, seed=seed: np.testing.assert_allclose(a[seed], b, rtol=1e-4, atol=1e-5),
            history,
            expected,
        )


def test_over_devices():
    """Two examples on each of eight devices; one perturbation for all of them."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(logits, labels):
        return jax.lax.pmean(cross_entropy(logits, labels), "data")

    def body(params, key, x, y):
        return post_train(TX, params, key, gamma=1.5, loss=loss, x=x, y=y)

    train = jax.shard_map(
        body, mesh=mesh, in_specs=(P(), P(), P("data"), P("data")), out_specs=P(), check_vma=True
    )
    history, accepted = jax.jit(train)(net(), jax.random.key(0), X, Y)
    assert accepted.shape == (4,)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(history))
    assert (history["conv"][-1] != net()["conv"]).all()
    assert_equal(history["fc"]["kernel"][-1], net()["fc"]["kernel"])


# Where it may stand

MASKS = {
    "rule": "fc",
    "tree": {"conv1": False, "bn1": False, "fc": True},
    "callable": lambda params: jax.tree.map_with_path(lambda path, _: path[0].key == "fc", params),
    "filter": nnx.PathContains("fc"),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_train_state_and_every_form_of_mask(mask):
    params, noise, coefficient = start()
    state = TrainState.create(apply_fn=None, params=params, tx=make_pof_tx(mask, **OPTIONS))
    expected, _ = run(make_pof_tx("fc", **OPTIONS), params, noise, coefficient)
    for t in range(2):
        inputs = jax.tree.map(lambda x, t=t: x[t], (noise, coefficient))
        state = state.apply_gradients(grads=jax_gradient(state.params, *inputs))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b[1], rtol=1e-5, atol=1e-7),
        state.params,
        expected,
    )


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Linear(4, 5, rngs=rngs)
        self.fc = nnx.Linear(5, 3, rngs=rngs)


@pytest.mark.parametrize("mask", ["fc", nnx.PathContains("fc")], ids=["rule", "filter"])
def test_nnx_optimizer(mask):
    """The recipe on modules: a copy with the weak classifier gives the gradient."""
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make_pof_tx(mask, **OPTIONS), wrt=nnx.Param)
    graph, _ = nnx.split(model.fc)

    def classify(head, features):
        return nnx.merge(graph, head)(features)

    @nnx.jit
    def step(model, optimizer, key):
        head = nnx.state(model.fc)
        own = jnp.tanh(model.conv(X))
        weak, found, _ = perturb(key, head, own, Y, classify, cross_entropy)

        def objective(model):
            return cross_entropy(model.fc(jnp.tanh(model.conv(X))), Y)

        perturbed = nnx.clone(model)
        nnx.update(perturbed.fc, weak)
        optimizer.update(model, nnx.grad(objective)(perturbed))
        return found.accepted

    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))
    for seed in range(3):
        assert step(model, optimizer, jax.random.key(seed))
    after = nnx.to_pure_dict(nnx.state(model))
    assert_equal(after["fc"], before["fc"])
    assert all(
        (a != b).all()
        for a, b in zip(*map(jax.tree.leaves, (after["conv"], before["conv"])), strict=True)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "classifier"}, "classifier"),
        ({"classifier_learning_rate": -1.0}, "classifier_learning_rate = -1 must be 0"),
        ({"learning_rate": 0.0}, "learning_rate = 0 must be positive"),
        ({"momentum": 1.0}, r"momentum = 1 must lie in \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1 must be 0 or positive"),
        ({"steps_per_epoch": 0}, "steps_per_epoch = 0 must be a whole number"),
        ({"optimizer": optax.sgd(0.1), "learning_rate": 0.1}, "learning_rate has no effect beside"),
        ({"optimizer": 0.1}, "optimizer = 0.1 must be an optax transformation"),
    ],
)
def test_arguments_that_cannot_be_used(options, message):
    with pytest.raises(UsageError, match=message):
        make_pof_tx(**{"head": "fc", **options}).init(start()[0])


def test_the_optimizer_of_the_paper_by_default():
    """Section 4.1: rate 3e-5, Nesterov 0.9, decay 5e-4; in closed form without a gradient."""
    params = start()[0]
    tx = make_pof_tx("fc")
    state = tx.init(params)
    for factor in (1 + 0.9, 1 + 0.9 + 0.81):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        expected = -3e-5 * 5e-4 * factor * params["conv1"]["kernel"]
        np.testing.assert_allclose(updates["conv1"]["kernel"], expected, rtol=1e-5)


def test_parameters_are_asked_for():
    params = start()[0]
    tx = make_pof_tx("fc")
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))
