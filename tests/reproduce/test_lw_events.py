"""Data, initialisation and the events between rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax.reproduce import lw_events as events
from seal_jax.reproduce import lw_plans
from seal_jax.reproduce.lw_events import Events
from seal_jax.reproduce.lw_plans import Choices
from seal_jax.reproduce.lw_synthetic import forward, initial, sample

PARAMS = initial(jax.random.key(0), 0)
FRESH = initial(jax.random.key(1), 1)
X, LABELS = sample(jax.random.key(2), 4096)


def test_labels_are_the_signs_of_the_first_features():
    signal = np.asarray(X[:3])
    assert set(np.unique(signal)) == {-1.0, 1.0}
    decoded = [int("".join("01"[int(value > 0)] for value in column), 2) for column in signal.T]
    np.testing.assert_array_equal(decoded, LABELS)
    counts = np.bincount(LABELS, minlength=8)
    assert len(counts) == 8
    assert abs(counts - 512).max() < 5 * 512**0.5
    five = np.asarray(X)[:3, np.asarray(LABELS) == 5]
    np.testing.assert_array_equal(five, np.array([[1], [-1], [1]]) * np.ones_like(five))


def test_all_else_is_standard_normal():
    noise = np.asarray(X[3:], np.float64)
    assert noise.shape == (125, 4096)
    assert abs(noise.mean()) < 5 / noise.size**0.5
    assert abs(noise.var() - 1) < 5 * (2 / noise.size) ** 0.5
    covariance = np.cov(noise)
    assert abs(covariance - np.diag(np.diag(covariance))).max() < 6 / 4096**0.5


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_alpha_scales_the_signal(alpha):
    none = events.identity(jnp.zeros(3))
    scaled = X[:, :16].at[:3].multiply(alpha)
    np.testing.assert_allclose(
        forward(PARAMS, none, X[:, :16], alpha, "after")[1],
        forward(PARAMS, none, scaled, 1.0, "after")[1],
        atol=1e-5,
    )


def test_initialisers():
    for he, glorot in zip(PARAMS, FRESH, strict=True):
        out, in_ = he.kernel.shape
        np.testing.assert_allclose(he.kernel.std(), (2 / in_) ** 0.5, rtol=0.12)
        bound = (6 / (in_ + out)) ** 0.5
        assert 0.97 * bound < jnp.abs(glorot.kernel).max() <= bound
        assert not he.bias.any()
    assert [layer.kernel.shape for layer in PARAMS] == [(32, 128), (32, 32), (8, 32)]


def test_rescaling_restores_the_initial_norms():
    trained = jax.tree.map(lambda array: 3 * array + 0.1, PARAMS)
    rescaled = events.rescale(trained, events.norms(PARAMS), jnp.array([True, True, False]))
    for index in range(2):
        np.testing.assert_allclose(
            np.linalg.norm(rescaled[index].kernel), np.linalg.norm(PARAMS[index].kernel), rtol=1e-6
        )
        ratio = rescaled[index].kernel / trained[index].kernel
        np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)
        np.testing.assert_array_equal(rescaled[index].bias, trained[index].bias)
    np.testing.assert_array_equal(rescaled[2].kernel, trained[2].kernel)


@pytest.mark.parametrize("position", ["after", "before"])
def test_normalised_outputs_have_mean_0_and_deviation_1(position):
    normaliser = events.identity(jnp.zeros(3))
    for block in range(3):
        outputs, _ = forward(PARAMS, normaliser, X, 1.0, position)
        before = normaliser
        normaliser = events.normalise(normaliser, outputs, jnp.arange(3) == block, 1e-6)
        outputs, _ = forward(PARAMS, normaliser, X, 1.0, position)
        normalised = (outputs[block] - normaliser.mean[block]) * normaliser.scale[block]
        assert abs(normalised.mean()) < 1e-4
        assert abs(normalised.std() - 1) < 1e-4
        for old, new in zip(before, normaliser, strict=True):
            others = np.arange(3) != block
            np.testing.assert_array_equal(old[others], new[others])


def selected(part, key=3, new_key=4, whole=(False, False, False), params=PARAMS):
    event = Events(None, None, jnp.array(whole), jnp.int32(part))
    keys = jax.random.key(key), jax.random.key(new_key)
    return events.selected(params, event, *keys, 0.2)


def test_masks_of_wels_and_welsr():
    def flat(**keys):
        return np.concatenate([mask.ravel() for mask in selected(**keys)])

    size = 128 * 32 + 32 * 32 + 32 * 8
    spread = 5 * (0.2 * 0.8 / size) ** 0.5
    assert abs(flat(part=events.SAME_MASK).mean() - 0.2) < spread
    assert abs(flat(part=events.NEW_MASK).mean() - 0.2) < spread
    same = [flat(part=events.SAME_MASK, new_key=key) for key in (4, 5)]
    np.testing.assert_array_equal(*same)
    new = [flat(part=events.NEW_MASK, new_key=key) for key in (4, 5)]
    both = (new[0] & new[1]).mean()
    assert abs(both - 0.04) < 5 * (0.04 / size) ** 0.5
    assert not flat(part=events.NOTHING).any()


def test_the_smallest_fifth():
    kernels = [np.abs(layer.kernel) for layer in PARAMS]
    for kernel, mask in zip(kernels, selected(events.SMALLEST_OF_TENSOR), strict=True):
        assert mask.sum() == round(0.2 * kernel.size)
        assert kernel[mask].max() < kernel[~mask].min()
    masks = np.concatenate([mask.ravel() for mask in selected(events.SMALLEST_OF_ALL)])
    all_ = np.concatenate([kernel.ravel() for kernel in kernels])
    assert masks.sum() == round(0.2 * all_.size)
    assert all_[masks].max() < all_[~masks].min()


def test_reinitialised_layers_are_the_fresh_ones():
    trained = jax.tree.map(lambda array: array + 1, PARAMS)
    whole = jnp.array([False, True, True])
    mask = events.selected(
        trained, Events(None, None, whole, jnp.int32(0)), *jax.random.split(jax.random.key(0)), 0.2
    )
    for biases in (True, False):
        forgotten = events.forget(trained, FRESH, mask, whole & biases)
        for index, source in enumerate((trained, FRESH, FRESH)):
            np.testing.assert_array_equal(forgotten[index].kernel, source[index].kernel)
        source = FRESH if biases else trained
        np.testing.assert_array_equal(forgotten[2].bias, source[2].bias)
        np.testing.assert_array_equal(forgotten[0].bias, trained[0].bias)


def rows(flags):
    return ["".join("01"[int(flag)] for flag in row) for row in flags]


def test_the_plan_of_lw():
    choices = Choices(first_round="algorithm")
    lw = jax.tree.map(lambda field: field[5], lw_plans.table1(["he"], choices).events)
    assert rows(lw.rescale) == ["100"] * 3 + ["110"] * 3 + ["111"] * 3
    assert rows(lw.normalise) == ["100"] * 3 + ["010"] * 3 + ["000"] * 3
    assert rows(lw.reinitialise) == ["011"] * 3 + ["001"] * 3 + ["000"] * 3
    choices = Choices(head="normalised")
    later = jax.tree.map(lambda field: field[5], lw_plans.table1(["he"], choices).events)
    assert rows(later.rescale) == ["000"] + ["100"] * 3 + ["110"] * 3 + ["111"] * 2
    assert rows(later.normalise) == ["000"] + ["100"] * 3 + ["010"] * 3 + ["001"] * 2


def test_the_plans_of_table_4():
    plans = lw_plans.table4(["glorot"], Choices(first_round="algorithm"))
    baseline, rescaling, lw = (
        jax.tree.map(lambda field, index=index: field[index], plans) for index in (3, 4, 5)
    )
    assert not any(np.any(field) for field in baseline.events)
    assert rows(rescaling.events.rescale) == rows(lw.events.rescale) == ["111"] * 5
    assert not rescaling.events.reinitialise.any()
    assert rows(lw.events.reinitialise) == ["011", "011", "001", "001", "001"]
    assert not lw.events.normalise.any()
    assert lw.alpha == 0.5
    np.testing.assert_allclose(lw.penalty, 0.0025)
    full = lw_plans.table4(["glorot"], Choices(penalty="sum"))
    np.testing.assert_allclose(full.penalty, 2 * plans.penalty)
