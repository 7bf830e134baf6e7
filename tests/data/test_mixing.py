"""Mixup and cutmix against NumPy, image by image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from seal_jax.data.mixing import Mixing, MixingParams, draw, interpolate, mix, partners
from seal_jax.errors import UsageError

SHAPE = (9, 8, 3)


def draws(spec, count=2000):
    """Return the parameters of many batches of two, as arrays of one image each."""
    keys = jax.random.split(jax.random.key(0), count)
    params = jax.jit(jax.vmap(lambda key: draw(key, 2, spec, SHAPE)))(keys)
    for leaf in jax.tree.leaves(params):
        np.testing.assert_array_equal(leaf[:, 0], leaf[:, 1])  # one draw a batch
    return jax.tree.map(lambda leaf: np.asarray(leaf[:, 0]), params)


def areas(box):
    top, left, bottom, right = box.T
    return (bottom - top) * (right - left) / (SHAPE[0] * SHAPE[1])


def test_mixup_is_of_the_beta_distribution():
    share, outside, box = draws(Mixing(mixup=0.4))
    assert box is None
    np.testing.assert_array_equal(share, outside)
    assert share.min() >= 0.5
    # Either of λ and 1 - λ, whichever is larger: both have the distribution.
    either = np.where(np.random.default_rng(0).random(len(share)) < 0.5, share, 1 - share)
    assert stats.kstest(either, stats.beta(0.4, 0.4).cdf).pvalue > 0.01


def test_cutmix_counts_the_pixels_of_its_box():
    share, outside, box = draws(Mixing(cutmix=1.0))
    assert (box >= 0).all()
    assert (box[:, 2:] <= SHAPE[:2]).all()
    area = areas(box)
    np.testing.assert_allclose(share, np.maximum(area, 1 - area), rtol=1e-6)
    np.testing.assert_array_equal(outside, area <= 0.5)
    # Sides are the root of what is cut, of a uniform share: the mean of unclipped areas would be 1/2.
    assert 0.2 < area.mean() < 0.5
    assert (area > 0.5).any()


def test_with_both_each_batch_draws_one_of_them():
    share, outside, box = draws(Mixing(mixup=1.0, cutmix=1.0))
    mixed = (outside > 0) & (outside < 1)
    assert 0.45 < mixed.mean() < 0.55
    assert (areas(box)[mixed] == 0).all()
    np.testing.assert_array_equal(share[mixed], outside[mixed])


@pytest.mark.parametrize("spec", [Mixing(mixup=0.3), Mixing(cutmix=1.0), Mixing(1.0, 1.0)])
def test_images_are_mixed_pixel_by_pixel(spec):
    random = np.random.default_rng(1)
    images = random.normal(size=(6, *SHAPE)).astype(np.float32)
    for seed in range(4):
        params = draw(jax.random.key(seed), 6, spec, SHAPE)
        expected = images.copy()
        for i, image in enumerate(images):
            top, left, bottom, right = (0,) * 4 if params.box is None else np.asarray(params.box[i])
            for row in range(SHAPE[0]):
                for column in range(SHAPE[1]):
                    own = float(params.outside[i])
                    if top <= row < bottom and left <= column < right:
                        own = 1 - own
                    other = images[i + 1 - 2 * (i % 2), row, column]
                    expected[i, row, column] = own * image[row, column] + (1 - own) * other
        np.testing.assert_allclose(jax.jit(mix)(images, params), expected, rtol=1e-5, atol=1e-6)
        # A pair keeps all of its pixels, so the labels' shares of it add up to whole labels.
        np.testing.assert_allclose(
            expected.reshape(3, 2, -1).sum(1), images.reshape(3, 2, -1).sum(1), rtol=1e-4, atol=1e-5
        )


def test_half_precision_is_mixed_in_single():
    images = jnp.ones((2, 1, 1, 1), jnp.bfloat16)
    assert mix(images, MixingParams(jnp.ones(2), jnp.full(2, 0.6), None)).dtype == jnp.bfloat16
    assert interpolate(jnp.ones(2), images[:, 0, 0, 0], images[:, 0, 0, 0]).dtype == jnp.float32


def test_partners_stay_within_any_even_shard():
    rows = partners(jnp.arange(24))
    assert (rows != jnp.arange(24)).all()
    for shards in (1, 2, 3, 4, 6, 12):
        parts = [partners(part) for part in jnp.split(jnp.arange(24), shards)]
        np.testing.assert_array_equal(jnp.concatenate(parts), rows)


@pytest.mark.parametrize("field", ["mixup", "cutmix"])
def test_unusable_fields(field):
    with pytest.raises(UsageError, match=rf"data\.{field} = -1 must be 0 or positive"):
        Mixing(**{field: -1.0})
