"""Margins and flatness against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax import UsageError
from seal_jax.evaluation import margins


def test_margins_of_two_classes_are_hyperbolic_tangents():
    """p - (1 - p) = tanh(z / 2) for logits (z, 0)."""
    z = np.linspace(-40, 40, 9)
    logits = np.stack([z, np.zeros(9)], axis=1)
    found = margins.margins(logits, np.zeros(9, int))
    np.testing.assert_allclose(found, np.tanh(z / 2), atol=1e-15)


def test_accuracy_under_noise_is_the_normal_tail():
    """A classifier w > 0 of margin 1 in every coordinate errs with probability Phi(-1 / sigma)."""
    weights = {"a": jnp.ones(40_000)}
    sigmas = [0.0, 0.5, 1.0, 4.0]
    found = margins.flatness(lambda p: (p["a"] > 0).mean(), weights, sigmas, draws=3)
    expected = [1, *(0.5 * math.erfc(-1 / sigma / math.sqrt(2)) for sigma in sigmas[1:])]
    np.testing.assert_allclose(found, np.tile(expected, (3, 1)).T, atol=0.012)
    assert len(set(found[2].tolist())) == 3
    again = margins.flatness(lambda p: (p["a"] > 0).mean(), weights, sigmas, draws=3)
    np.testing.assert_array_equal(found, again)
    other = margins.flatness(
        lambda p: (p["a"] > 0).mean(), weights, sigmas, draws=3, key=jax.random.key(1)
    )
    assert (found[2] != other[2]).all()


def test_size_of_weights_scales_with_both():
    random = np.random.default_rng(0)
    features, kernel = random.normal(size=(9, 4)), random.normal(size=(4, 3))
    expected = math.sqrt((features**2).sum()) * math.sqrt((kernel**2).sum())
    assert margins.size_of_weights(features, kernel) == pytest.approx(expected)


def test_bad_input():
    with pytest.raises(UsageError, match=r"labels is .* must be an array of 3 integers"):
        margins.margins(np.zeros((3, 2)), np.zeros(2, int))
    with pytest.raises(UsageError, match="logits hold NaN"):
        margins.margins(np.full((3, 2), np.nan), np.zeros(3, int))
    with pytest.raises(UsageError, match="sigmas = -1 must be"):
        margins.flatness(jnp.sum, jnp.ones(2), [-1.0])
    with pytest.raises(UsageError, match="draws = 0 must be"):
        margins.flatness(jnp.sum, jnp.ones(2), [1.0], draws=0)
