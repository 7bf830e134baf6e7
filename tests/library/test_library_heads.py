"""Initial heads: their moments, bounds and zeros."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax import heads
from seal_jax.errors import UsageError

D, N = 300, 200
HEAD = {"kernel": jax.ShapeDtypeStruct((D, N), "float32"), "bias": jnp.ones(N)}
DEVIATIONS = {
    "zero": 0.0,
    "tiny": 1e-8,
    "normal": 0.1,
    "kaiming_fan_in": np.sqrt(2 / D),
    "kaiming_fan_out": np.sqrt(2 / N),
    "xavier": np.sqrt(2 / (D + N)),
}


def draw(name, key=0, head=HEAD):
    sigma = 0.1 if name == "normal" else None
    return heads.initialise(jax.random.key(key), head, name, sigma)


@pytest.mark.parametrize("name", DEVIATIONS)
def test_moments(name):
    head, deviation = draw(name), DEVIATIONS[name]
    kernel = np.asarray(head["kernel"], np.float64)
    assert kernel.shape == (D, N)
    np.testing.assert_array_equal(head["bias"], np.zeros(N))
    # Standard errors of mean and deviation over 60 000 draws, five of each.
    assert abs(kernel.mean()) <= 5 * deviation / np.sqrt(D * N)
    assert abs(kernel.std() - deviation) <= 5 * deviation / np.sqrt(2 * D * N)
    if name == "xavier":
        bound = np.sqrt(6 / (D + N))
        assert 0.999 * bound < np.abs(kernel).max() <= np.nextafter(np.float32(bound), 1)
    elif deviation:
        outside = np.mean(np.abs(kernel) > 2 * deviation)  # of a normal distribution, 4.55 %
        assert abs(outside - 0.0455) < 5 * np.sqrt(0.0455 / (D * N))


def test_zero_is_the_default_and_exact():
    head = heads.initialise(jax.random.key(0), HEAD)
    assert not np.any(head["kernel"])


def test_keys_and_layers_draw_anew():
    two = {"a": HEAD, "b": HEAD}
    first, second = draw("kaiming_fan_in", 0, two), draw("kaiming_fan_in", 1, two)
    kernels = [first["a"], first["b"], second["a"], second["b"]]
    for i, a in enumerate(kernels):
        for b in kernels[:i]:
            assert abs(np.corrcoef(np.ravel(a["kernel"]), np.ravel(b["kernel"]))[0, 1]) < 0.03


def test_without_a_bias_in_half_precision_under_vmap():
    head = {"kernel": jnp.ones((D, N), jnp.bfloat16)}
    run = jax.jit(jax.vmap(lambda key: heads.initialise(key, head, "tiny")))
    kernels = run(jax.random.split(jax.random.key(0), 2))["kernel"]
    assert kernels.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.std(np.asarray(kernels, np.float64), (1, 2)), 1e-8, rtol=0.02)
    assert np.any(kernels[0] != kernels[1])


@pytest.mark.parametrize(
    ("name", "sigma", "words"),
    [
        ("kaiming_fanin", None, "head = 'kaiming_fanin' .*nearest: kaiming_fan_in"),
        (None, None, "head = None must be one of zero"),
        ("normal", None, 'head = "normal" needs sigma'),
        ("normal", -0.1, "sigma = -0.1 must be positive"),
        ("zero", 0.1, "sigma = 0.1 goes with"),
    ],
)
def test_errors(name, sigma, words):
    with pytest.raises(UsageError, match=words):
        heads.initialise(jax.random.key(0), HEAD, name, sigma)


@pytest.mark.parametrize(("name", "fan"), [("kaiming_fan_in", 400), ("kaiming_fan_out", 10)])
def test_layouts(name, fan):
    equinox = eqx.filter(eqx.nn.Linear(400, 10, key=jax.random.key(0)), eqx.is_array)
    fresh = heads.initialise(jax.random.key(1), equinox, name)
    haiku = heads.initialise(jax.random.key(1), {"w": jnp.ones((400, 10)), "b": jnp.ones(10)}, name)
    other = {"weights": jnp.ones((10, 400)), "offset": jnp.ones(10)}
    given = heads.initialise(jax.random.key(1), other, name, layout="out_in")
    for kernel in (fresh.weight, haiku["w"], given["weights"]):
        deviation = np.sqrt(2 / fan)
        assert abs(np.std(kernel) - deviation) < 5 * deviation / np.sqrt(2 * 4000)
    for bias in (fresh.bias, haiku["b"], given["offset"]):
        assert not np.any(bias)


@pytest.mark.parametrize("shape", [(3, 3, 4, 5), (4,), ()])
def test_what_is_no_head(shape):
    with pytest.raises(UsageError, match="'last/scale' of shape"):
        heads.initialise(jax.random.key(0), {"last": {"scale": jnp.ones(shape)}})
