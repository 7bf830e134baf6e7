"""Sizes of perturbations against NumPy, SAM's own displacement, and a dense scan of the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax import UsageError
from seal_jax.evaluation import perturbations
from seal_jax.transforms.sam import perturb

CLASSES = 3


def loss(weights, batch):
    features, labels = batch
    hidden = jnp.tanh(features @ weights["params"]["conv"])
    logits = hidden @ weights["params"]["fc"]["kernel"] + weights["params"]["fc"]["bias"]
    logits = logits * weights["statistics"]
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])


@pytest.fixture(scope="module")
def problem():
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    params = {"conv": normal(5, 4), "fc": {"kernel": normal(4, CLASSES), "bias": normal(CLASSES)}}
    batches = (normal(6, 8, 5), jnp.asarray(random.integers(0, CLASSES, (6, 8)), jnp.int32))
    return {"params": params, "statistics": jnp.full(3, 1.5)}, batches


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))


@pytest.mark.parametrize(
    "options",
    [{}, {"adaptive": True, "eta": 0.01}, {"weight_decay": 0.1}],
    ids=["sam", "asam", "decay"],
)
def test_sizes_are_those_of_the_steps_themselves(problem, options):
    weights, batches = problem
    result = perturbations.steps(
        loss,
        weights,
        batches,
        head="params/fc",
        trained="params",
        learning_rate=0.5,
        rho=0.2,
        **options,
    )
    gradient = jax.jit(jax.grad(lambda params, batch: loss({**weights, "params": params}, batch)))
    for b in range(6):
        slopes = gradient(weights["params"], jax.tree.map(lambda leaf, b=b: leaf[b], batches))
        np.testing.assert_allclose(result.sgd[b], 0.5 * norm(slopes["fc"]), rtol=1e-5)
        displaced = perturb(weights["params"], slopes, 0.2, **options)
        step = jax.tree.map(jnp.subtract, displaced, weights["params"])
        np.testing.assert_allclose(result.sam[b], norm(step["fc"]), rtol=1e-4)
    assert (result.sam < 0.2).all() or options.get("adaptive")


def test_sam_on_a_classifier_alone_moves_by_its_radius(problem):
    weights, batches = problem
    result = perturbations.steps(
        loss, weights, batches, head="params/fc", trained="params/fc", rho=0.05
    )
    np.testing.assert_allclose(result.sam, 0.05, rtol=1e-5)


def test_a_zero_gradient_moves_nothing():
    result = perturbations.steps(
        lambda w, batch: 0.0 * (w["a"] + w["fc"]) * batch.sum(),
        {"a": jnp.float32(1), "fc": jnp.float32(1)},
        jnp.ones((2, 1)),
        head="fc",
    )
    assert not np.asarray(result).any()
    with pytest.raises(UsageError, match="rho = -1"):
        perturbations.steps(loss, {"fc": jnp.ones(1)}, jnp.ones((1, 1)), head="fc", rho=-1)


def classify(head, features):
    return features @ head["kernel"] + head["bias"]


def cross_entropy(logits, labels):
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])


def test_distances_equal_a_dense_scan(problem):
    """The gradient and the loss along it in NumPy, float64, on 20,001 points."""
    random = np.random.default_rng(1)
    features, labels = random.normal(size=(5, 16, 4)), random.integers(0, CLASSES, (5, 16))
    # The last mini-batch is separable: its loss falls without end.
    features[4], labels[4] = 0, 0
    head = problem[0]["params"]["fc"]
    result = perturbations.searches(
        head,
        jnp.asarray(features, jnp.float32),
        jnp.asarray(labels, jnp.int32),
        classify,
        cross_entropy,
        chunk=2,
    )
    kernel, bias = (np.asarray(head[name], np.float64) for name in ("kernel", "bias"))
    for b in range(4):
        inputs = np.concatenate([np.ones((16, 1)), features[b]], axis=1)
        weights = np.concatenate([bias[None], kernel])
        logits = inputs @ weights
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        gradient = inputs.T @ (p - np.eye(CLASSES)[labels[b]]) / 16
        unit = gradient / np.linalg.norm(gradient)
        grid = np.linspace(0, 20, 20_001)
        rows = (inputs @ weights)[None] - grid[:, None, None] * (inputs @ unit)[None]
        losses = np.log(np.exp(rows).sum(-1)) - rows[:, np.arange(16), labels[b]]
        nearest = grid[np.argmin(losses.mean(1))]
        assert 0 < nearest < 20
        assert bool(result.accepted[b])
        np.testing.assert_allclose(result.xi[b], nearest, atol=2e-3)
    assert not bool(result.accepted[4])
    assert float(result.xi[4]) == 0
