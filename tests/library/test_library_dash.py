"""DASH against the cosine of PyTorch, neuron by neuron, in both layouts of kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax import UsageError, forgetting, methods, models
from seal_jax.core.settings import Optimizer, Train


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = {"conv": {"kernel": (3, 2, 4, 5), "bias": (5,)}, "bn": {"scale": (5,), "bias": (5,)}}
    shapes |= {"fc": {"kernel": (6, 7), "bias": (7,)}, "cls_token": (1, 1, 6)}
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def book(weights, slopes, axis, least):
    """PyTorch's cosine along one axis of what is laid out as PyTorch has it."""
    torch = pytest.importorskip("torch")
    weights, slopes = (torch.tensor(np.asarray(x, np.float64)) for x in (weights, slopes))
    cosine = torch.cosine_similarity(weights, -slopes, dim=axis, eps=1e-300)
    return (weights * cosine.clamp(min=least).unsqueeze(axis)).numpy()


@pytest.mark.parametrize(("least", "scale"), [(0.3, 1.0), (0.0, 1e-20), (0.1, 1e20)])
def test_against_pytorch(least, scale):
    params, gradient = draw(0), draw(1, scale)
    # A traced factor gives the same program for all.
    new = jax.jit(forgetting.shrink_by_direction)(params, gradient, least=jnp.float32(least))
    fc, slopes = params["fc"], gradient["fc"]
    wanted = book(fc["kernel"].T, slopes["kernel"].T, 1, least).T
    np.testing.assert_allclose(new["fc"]["kernel"], wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        new["fc"]["bias"], book(fc["bias"], slopes["bias"], 0, least), rtol=1e-5, atol=1e-7
    )
    # [h, w, in, out] as [out, in, h * w]: the positions of each pair of channels.
    laid = [
        tree["conv"]["kernel"].transpose(3, 2, 0, 1).reshape(5, 4, 6) for tree in (params, gradient)
    ]
    found = np.asarray(new["conv"]["kernel"]).transpose(3, 2, 0, 1).reshape(5, 4, 6)
    np.testing.assert_allclose(found, book(*laid, 2, least), rtol=1e-5, atol=1e-7)
    for name in ("bn", "cls_token"):
        jax.tree.map(np.testing.assert_array_equal, new[name], params[name])
    # Some are shrunk as far as they may, others less.
    factors = np.asarray(new["fc"]["kernel"] / fc["kernel"])[0]
    assert ((factors > least + 0.01) & (factors < 1)).any()
    assert (factors < least + 1e-5).any()


def test_kernels_of_torch():
    params, gradient = draw(0), draw(1)

    def as_torch(tree):
        conv, fc = tree["conv"]["kernel"], tree["fc"]["kernel"]
        return {"conv": {"weight": conv.transpose(3, 2, 0, 1)}, "fc": {"weight": fc.T}}

    new = forgetting.shrink_by_direction(params, gradient)
    found = forgetting.shrink_by_direction(as_torch(params), as_torch(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, as_torch(new))


def test_ends():
    params = draw(0)
    zero = jax.tree.map(jnp.zeros_like, params)
    down = jax.tree.map(lambda leaf: -2 * leaf, params)
    kept = forgetting.shrink_by_direction(params, down, least=0.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), kept, params)
    # Weights of zero stay so, and a gradient of zero points nowhere.
    assert not any(
        leaf.any() for leaf in jax.tree.leaves(forgetting.shrink_by_direction(zero, down))
    )
    least = forgetting.shrink_by_direction(params, zero, least=0.25)["fc"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b / 4), least, params["fc"])


def test_arguments_that_cannot_be():
    with pytest.raises(UsageError, match=r"least = 1.5 must lie in \[0, 1\]"):
        forgetting.shrink_by_direction(draw(0), draw(1), least=1.5)
    with pytest.raises(UsageError, match="gradient must be a tree like"):
        forgetting.shrink_by_direction(draw(0), {"fc": 0.0})


@pytest.mark.parametrize(
    ("values", "optimizer", "message"),
    [
        ({"least": -0.1}, {}, r"method.least = -0.1 must lie in \[0, 1\]"),
        ({"alpha": 2.0}, {}, r"method.alpha = 2 must lie in \[0, 1\]"),
        ({"batches": -1}, {}, "method.batches = -1 must be at least 0"),
        ({}, {"schedule": "single"}, "does not go with method 'dash'"),
    ],
)
def test_options_that_cannot_be(values, optimizer, message):
    model = models.create("mlp", num_classes=3, image_shape=(2, 2, 1), hidden=(4,))
    params = jax.eval_shape(model.init, jax.random.key(0))["params"]
    context = methods.Context(model, params, 2, Optimizer(**optimizer), Train())
    with pytest.raises(UsageError, match=message):
        methods.build({"name": "dash", **values}, context)
