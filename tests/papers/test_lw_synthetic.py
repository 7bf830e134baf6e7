"""Data, initialisation and the events between rounds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from papers import lw_synthetic as lw
from papers.lw_synthetic import BLOCKS, IDLE, Settings, forward, init, sample
from seal_jax import forgetting, layerwise

PARAMS = init(jax.random.key(0), 0)
FRESH = init(jax.random.key(1), 1)
NONE = jnp.tile(jnp.array([0.0, 1.0]), (3, 1))
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
    scaled = X[:, :16].at[:3].multiply(alpha)
    np.testing.assert_allclose(
        forward(PARAMS, NONE, X[:, :16], alpha, "after")[1],
        forward(PARAMS, NONE, scaled, 1.0, "after")[1],
        atol=1e-5,
    )


def test_initialisers():
    for name in BLOCKS:
        he, glorot = PARAMS[name]["kernel"], FRESH[name]["kernel"]
        out, in_ = he.shape
        np.testing.assert_allclose(he.std(), (2 / in_) ** 0.5, rtol=0.12)
        bound = (6 / (in_ + out)) ** 0.5
        assert 0.97 * bound < jnp.abs(glorot).max() <= bound
        assert not PARAMS[name]["bias"].any()
    assert [PARAMS[name]["kernel"].shape for name in BLOCKS] == [(32, 128), (32, 32), (8, 32)]


def test_rescaling_restores_the_initial_norms():
    trained = jax.tree.map(lambda array: 3 * array + 0.1, PARAMS)
    rescaled = layerwise.rescale(trained, layerwise.kernel_norms(PARAMS), BLOCKS, jnp.int32(2))
    for name in BLOCKS[:2]:
        kernel = rescaled[name]["kernel"]
        np.testing.assert_allclose(
            np.linalg.norm(kernel), np.linalg.norm(PARAMS[name]["kernel"]), rtol=1e-6
        )
        ratio = kernel / trained[name]["kernel"]
        np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)
        np.testing.assert_array_equal(rescaled[name]["bias"], trained[name]["bias"])
    np.testing.assert_array_equal(rescaled["head"]["kernel"], trained["head"]["kernel"])
    # Block 0 is none, as the plans use it.
    same = layerwise.rescale(trained, layerwise.kernel_norms(PARAMS), BLOCKS, jnp.int32(0))
    jax.tree.map(np.testing.assert_array_equal, same, trained)


@pytest.mark.parametrize("position", ["after", "before"])
def test_normalised_outputs_have_mean_0_and_deviation_1(position):
    normalisers = NONE
    for block in range(3):
        outputs, _ = forward(PARAMS, normalisers, X, 1.0, position)
        before = normalisers
        normalisers = lw.insert_normaliser(normalisers, outputs, block + 1, 1e-6)
        outputs, _ = forward(PARAMS, normalisers, X, 1.0, position)
        mean, scale = normalisers[block]
        normalised = (outputs[block] - mean) * scale
        assert abs(normalised.mean()) < 1e-4
        assert abs(normalised.std() - 1) < 1e-4
        others = np.arange(3) != block
        np.testing.assert_array_equal(before[others], normalisers[others])
    none = lw.insert_normaliser(normalisers, outputs, jnp.int32(0), 1e-6)
    np.testing.assert_array_equal(none, normalisers)


def selected(part=lw.NOTHING, keep=3, new_key=4, **settings):
    event = IDLE._replace(part=jnp.int32(part), keep=jnp.int32(keep))
    keys = jax.random.key(3), jax.random.key(new_key)
    return lw.selection(Settings(**settings), PARAMS, event, *keys)


def kernels(tree):
    return [np.asarray(tree[name]["kernel"]) for name in BLOCKS]


def test_masks_of_wels_and_welsr():
    def flat(**options):
        chosen = selected(**options)
        # The library's count is exact, of each kernel; biases stay.
        assert [mask.sum() for mask in kernels(chosen)] == [819, 205, 51]
        assert not any(chosen[name]["bias"].any() for name in BLOCKS)
        return np.concatenate([mask.ravel() for mask in kernels(chosen)])

    same = [flat(part=lw.FIXED_SUBSET, new_key=key) for key in (4, 5)]
    np.testing.assert_array_equal(*same)
    new = [flat(part=lw.NEW_SUBSET, new_key=key) for key in (4, 5)]
    both = (new[0] & new[1]).mean()
    assert abs(both - 0.04) < 5 * (0.04 / new[0].size) ** 0.5
    assert not any(leaf.any() for leaf in jax.tree.leaves(selected()))


def test_the_smallest_fifth():
    magnitudes = [np.abs(kernel) for kernel in kernels(PARAMS)]
    for magnitude, mask in zip(magnitudes, kernels(selected(part=lw.SMALLEST)), strict=True):
        assert mask.sum() == round(0.2 * magnitude.size)
        assert magnitude[mask].max() < magnitude[~mask].min()
    masks = kernels(selected(part=lw.SMALLEST, dsd="global"))
    masks, all_ = (np.concatenate([leaf.ravel() for leaf in tree]) for tree in (masks, magnitudes))
    assert masks.sum() == round(0.2 * all_.size)
    assert all_[masks].max() < all_[~masks].min()


def test_reinitialised_layers_are_the_fresh_ones():
    trained = jax.tree.map(lambda array: array + 1, PARAMS)
    for biases in ("reinitialised", "kept"):
        forgotten = forgetting.replace(trained, FRESH, selected(keep=1, biases=biases))
        for name, source in zip(BLOCKS, (trained, FRESH, FRESH), strict=True):
            np.testing.assert_array_equal(forgotten[name]["kernel"], source[name]["kernel"])
        source = FRESH if biases == "reinitialised" else trained
        np.testing.assert_array_equal(forgotten["head"]["bias"], source["head"]["bias"])
        np.testing.assert_array_equal(forgotten["dense1"]["bias"], trained["dense1"]["bias"])


def test_the_plan_of_lw():
    lw_events = lw.events("1", Settings(first_round="algorithm"))["LW"]
    assert lw_events.rescale.tolist() == lw_events.keep.tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert lw_events.normalise.tolist() == [1, 1, 1, 2, 2, 2, 0, 0, 0]
    assert not lw_events.part.any()
    later = lw.events("1", Settings(head="normalised"))["LW"]
    assert later.rescale.tolist() == later.normalise.tolist() == [0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert later.keep.tolist() == [3, 1, 1, 1, 2, 2, 2, 3, 3]


def test_the_plans_of_table_4():
    settings = Settings(first_round="algorithm")
    plans = lw.plans("4", settings, ["glorot"])
    baseline, rescaling, layerwise = (
        jax.tree.map(lambda field, index=index: field[index], plans) for index in (3, 4, 5)
    )
    assert all((field == idle).all() for field, idle in zip(baseline.events, IDLE, strict=True))
    assert rescaling.events.rescale.tolist() == layerwise.events.rescale.tolist() == [3] * 5
    assert rescaling.events.keep.tolist() == [3] * 5
    assert layerwise.events.keep.tolist() == [1, 1, 2, 2, 2]
    assert not layerwise.events.normalise.any()
    assert layerwise.alpha == 0.5
    np.testing.assert_allclose(layerwise.penalty, 0.0025)
    full = lw.plans("4", dataclasses.replace(settings, penalty="sum"), ["glorot"])
    np.testing.assert_allclose(full.penalty, 2 * plans.penalty)
