"""FIRE against the singular value decomposition of NumPy, for both layouts of kernels, as a method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax import UsageError, isometry, methods, models
from seal_jax.core.settings import Optimizer, Train
from seal_jax.core.state import Weights
from seal_jax.methods.method import HookContext


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def book(matrix, iterations=None):
    """Return the polar factor, or with a number of iterations what they make of each singular value."""
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    s = s / np.linalg.norm(matrix.astype(np.float64))
    for _ in range(iterations or 0):
        s = 1.5 * s - 0.5 * s**3
    return (u * (s if iterations else 1.0)) @ v


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9), (5, 1)])
def test_the_polar_factor_is_that_of_the_decomposition(shape):
    matrices = gaussian(3, *shape)
    few, many = (np.asarray(isometry.polar_factor(matrices, count)) for count in (3, 40))
    for matrix, after_few, after_many in zip(matrices, few, many, strict=True):
        np.testing.assert_allclose(after_few, book(matrix, 3), atol=1e-5)
        np.testing.assert_allclose(after_many, book(matrix), atol=1e-4)
    gram = np.swapaxes(many, 1, 2) @ many if shape[0] >= shape[1] else many @ many.swapaxes(1, 2)
    np.testing.assert_allclose(gram, np.stack([np.eye(min(shape))] * 3), atol=1e-4)


def test_no_isometry_is_nearer():
    matrix = gaussian(7, 4)
    distance = np.linalg.norm(matrix - isometry.polar_factor(matrix, 40))
    for seed in range(20):
        other = np.linalg.qr(gaussian(7, 4, seed=seed) + seed % 5 * matrix)[0]
        signs = np.sign((other * matrix).sum(0))  # of QR they are arbitrary
        assert distance < np.linalg.norm(matrix - signs * other)


KERNEL = gaussian(3, 2, 4, 8)  # [h, w, in, out]


def scaled(kernel):
    """Each position by itself, times the root of outputs per input, divided by the number of positions."""
    wanted = np.empty(kernel.shape)
    for i, j in np.ndindex(3, 2):
        wanted[i, j] = book(kernel[i, j], 10) * np.sqrt(8 / 4) / 6
    return wanted


def test_kernels_of_flax_and_of_torch():
    rest = {"bias": np.ones(8, "f"), "scale": np.ones(8, "f")}
    flax = {
        "conv": {"kernel": KERNEL, "bias": rest["bias"]},
        "bn": rest,
        "fc": {"kernel": KERNEL[0, 0]},
    }
    torch = {"conv": {"weight": KERNEL.transpose(3, 2, 0, 1)}, "fc": {"weight": KERNEL[0, 0].T}}
    flax, torch = (isometry.reinitialise(jax.tree.map(jnp.asarray, p)) for p in (flax, torch))
    wanted = scaled(KERNEL)
    np.testing.assert_allclose(flax["conv"]["kernel"], wanted, atol=1e-6)
    np.testing.assert_allclose(torch["conv"]["weight"], wanted.transpose(3, 2, 0, 1), atol=1e-6)
    dense = book(KERNEL[0, 0], 10) * np.sqrt(2)
    np.testing.assert_allclose(flax["fc"]["kernel"], dense, atol=1e-5)
    np.testing.assert_allclose(torch["fc"]["weight"], dense.T, atol=1e-5)
    for layer in ("conv", "bn"):
        np.testing.assert_array_equal(flax[layer]["bias"], rest["bias"])


def test_it_may_be_traced_for_some_seeds_in_any_dtype():
    params = {"a": {"kernel": gaussian(2, 6, 3)}, "b": {"kernel": gaussian(2, 3, 3)}}
    params["b"]["kernel"][1] = 0
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    both = jax.jit(jax.vmap(lambda params: isometry.reinitialise(params, among="b")))(half)
    np.testing.assert_array_equal(both["a"]["kernel"], half["a"]["kernel"])
    assert both["b"]["kernel"].dtype == jnp.bfloat16
    own = np.asarray(half["b"]["kernel"], "f")
    np.testing.assert_allclose(np.asarray(both["b"]["kernel"][0], "f"), book(own[0], 10), atol=0.01)
    assert not both["b"]["kernel"][1].any()  # and not NaN


def context(**optimizer):
    model = models.create("mlp", num_classes=3, image_shape=(2, 2, 1), hidden=(4,))
    params = jax.eval_shape(model.init, jax.random.key(0))["params"]
    return methods.Context(model, params, 2, Optimizer(**optimizer), Train())


def test_the_method_changes_kernels_alone():
    own = context()
    method = methods.build({"name": "fire", "iterations": 20}, own)
    params = jax.tree.map(lambda leaf: leaf + 0.1, own.model.init(jax.random.key(0))["params"])
    before = HookContext(
        jax.random.key(1), jnp.int32(1), Weights(params, {}, {}), "momentum", (), None
    )
    after = method.on_generation_start(before)
    new = after.weights.params
    for layer, old in (("dense1", params["dense1"]["linear"]), ("fc", params["fc"])):
        found = new[layer].get("linear", new[layer])
        scale = np.sqrt(old["kernel"].shape[1] / old["kernel"].shape[0])
        np.testing.assert_allclose(
            found["kernel"], scale * book(np.asarray(old["kernel"]), 20), atol=1e-5
        )
        np.testing.assert_array_equal(found["bias"], old["bias"])
    assert after == before._replace(weights=after.weights)


@pytest.mark.parametrize(
    ("values", "optimizer", "message"),
    [
        ({"iterations": 0}, {}, "method.iterations = 0 must be at least 1"),
        ({}, {"schedule": "single"}, "does not go with method 'fire'"),
    ],
)
def test_options_that_cannot_be(values, optimizer, message):
    with pytest.raises(UsageError, match=message):
        methods.build({"name": "fire", **values}, context(**optimizer))


def test_arguments_that_cannot_be():
    with pytest.raises(UsageError, match="iterations = 0 must be a whole number of at least 1"):
        isometry.polar_factor(KERNEL, 0)
    with pytest.raises(UsageError, match="matches no parameter path; nearest: fc"):
        isometry.reinitialise({"fc": {"kernel": KERNEL}}, among="fx")
