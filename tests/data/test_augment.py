from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax.data import (
    STATISTICS,
    Augmentation,
    AugmentationParams,
    apply,
    check_image_shape,
    draw,
    randaugment,
    statistics,
)
from seal_jax.errors import UsageError

RGB = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
FULL = Augmentation(crop_padding=2, flip=True, cutout=3, **RGB)
EVERYTHING = dataclasses.replace(FULL, randaugment=2)


def images_of(n, height=8, width=9, channels=3):
    return np.random.default_rng(0).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


augmented = jax.jit(randaugment.apply, static_argnums=2)


def one_by_one(images, params, spec):
    """The augmentation of each image by itself, in plain NumPy."""
    result = []
    for i, image in enumerate(images):
        height, width, channels = image.shape
        pad = spec.crop_padding
        if pad:
            padded = np.zeros((height + 2 * pad, width + 2 * pad, channels), np.uint8)
            padded[pad : pad + height, pad : pad + width] = image
            top, left = np.asarray(params.offsets[i])
            image = padded[top : top + height, left : left + width]
        if spec.flip and params.flips[i]:
            image = image[:, ::-1]
        if spec.randaugment:  # whose own tests are against Pillow
            operations = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], params.operations)
            image = np.asarray(augmented(image[None], operations, spec.randaugment_magnitude)[0])
        image = (image / 255 - np.array(spec.mean)) / np.array(spec.std)
        if spec.cutout:
            row, column = np.asarray(params.cutout_centres[i]) - spec.cutout // 2
            for y in range(row, row + spec.cutout):
                for x in range(column, column + spec.cutout):
                    if 0 <= y < height and 0 <= x < width:
                        image[y, x] = 0
        result.append(image)
    return np.stack(result)


@pytest.mark.parametrize(
    "spec",
    [
        Augmentation(crop_padding=2, **RGB),
        Augmentation(flip=True, **RGB),
        Augmentation(cutout=4, **RGB),
        FULL,
        EVERYTHING,
    ],
    ids=["crop", "flip", "cutout", "all", "randaugment"],
)
def test_batch_equals_one_image_at_a_time(spec):
    images = images_of(64)
    params = draw(jax.random.key(3), 64, spec, images.shape[1:])
    batch = jax.jit(apply, static_argnums=(2, 3))(images, params, spec, jnp.float32)
    np.testing.assert_allclose(batch, one_by_one(images, params, spec), rtol=1e-5, atol=1e-6)


def test_evaluation_only_normalises():
    images = images_of(4)
    expected = (images / 255 - np.array(RGB["mean"])) / np.array(RGB["std"])
    np.testing.assert_allclose(apply(images, None, FULL), expected, rtol=1e-5, atol=1e-6)
    halved = apply(images, None, FULL, jnp.bfloat16)
    assert halved.dtype == jnp.bfloat16
    np.testing.assert_allclose(halved.astype(jnp.float32), expected, rtol=1e-2, atol=1e-2)


def test_parameters_cover_their_ranges():
    params = draw(jax.random.key(0), 2000, FULL, (8, 9, 3))
    assert params.offsets.dtype == params.cutout_centres.dtype == jnp.int32
    assert params.flips.dtype == jnp.bool_
    for axis, side in ((0, 8), (1, 9)):
        assert set(params.offsets[:, axis].tolist()) == set(range(5))
        assert set(params.cutout_centres[:, axis].tolist()) == set(range(side))
    assert 0.45 < float(params.flips.mean()) < 0.55


def test_switching_one_on_leaves_the_others_parameters():
    key = jax.random.key(5)
    alone = draw(key, 16, Augmentation(flip=True, **RGB), (8, 9, 3))
    assert alone.offsets is None
    assert alone.cutout_centres is None
    np.testing.assert_array_equal(alone.flips, draw(key, 16, FULL, (8, 9, 3)).flips)
    everything = draw(key, 16, EVERYTHING, (8, 9, 3))
    for name in ("offsets", "flips", "cutout_centres"):
        full = getattr(draw(key, 16, FULL, (8, 9, 3)), name)
        np.testing.assert_array_equal(full, getattr(everything, name))


def test_a_part_of_the_batch_gives_the_same_images():
    images = images_of(8)
    params = draw(jax.random.key(1), 8, EVERYTHING, images.shape[1:])
    compiled = jax.jit(apply, static_argnums=2)
    whole = compiled(images, params, EVERYTHING)
    parts = [
        compiled(images[rows], jax.tree.map(lambda d, rows=rows: d[rows], params), EVERYTHING)
        for rows in (slice(0, 3), slice(3, 8))
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_no_gather_and_no_loop():
    """A TPU runs both far slower than the selects."""
    images = images_of(4)
    params = draw(jax.random.key(1), 4, FULL, images.shape[1:])
    lowered = jax.jit(apply, static_argnums=2).lower(images, params, FULL).as_text()
    assert "stablehlo.select" in lowered
    for operation in ("gather", "dynamic_slice", "stablehlo.while", "scatter"):
        assert operation not in lowered


@pytest.mark.parametrize(
    "name", ["nan/1", "inf/1", "0/nan", "0/inf", "0.5/0", "0.5/-1", "/", "1/1/1"]
)
def test_statistics_are_finite_and_deviations_positive(name):
    with pytest.raises(UsageError, match="means and positive deviations are written as"):
        statistics(name)


def test_statistics():
    from sklearn.datasets import load_digits

    digits = np.round(load_digits().images * 255 / 16) / 255
    train = digits[np.arange(len(digits)) % 5 != 0]
    assert statistics("digits").mean == (round(train.mean(), 4),)
    assert statistics("digits").std == (round(train.std(), 4),)
    for numbers in STATISTICS.values():
        Augmentation(mean=numbers.mean, std=numbers.std)
    with pytest.raises(UsageError, match=r"'cifr10' is not one of .*nearest: cifar10"):
        statistics("cifr10")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop_padding": -1}, "crop_padding = -1 must be a whole number"),
        ({"cutout": -2}, "cutout = -2 must be a whole number"),
        ({"randaugment": -1}, "randaugment = -1 must be a whole number"),
        ({"randaugment_magnitude": 11}, r"randaugment_magnitude = 11 must lie in \[0, 10\]"),
        ({"std": (1.0,)}, "mean has 3 channels and std has 1"),
        ({"std": (0.2, 0.0, 0.2)}, "must be positive"),
    ],
)
def test_unusable_fields(fields, message):
    with pytest.raises(UsageError, match=message):
        Augmentation(**(RGB | fields))


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (FULL, (8, 8, 1), "mean has 3 channels and the images have 1: set data.channels = 3"),
        (Augmentation(crop_padding=8, **RGB), (8, 9, 3), "crop_padding=8 must be smaller"),
        (Augmentation(cutout=16, **RGB), (8, 9, 3), "cutout=16 must be smaller"),
        (
            Augmentation(mean=(0.5,) * 4, std=(0.2,) * 4, randaugment=2),
            (8, 9, 4),
            "randaugment = 2 needs images of 1 or 3 channels, not 4: set 0",
        ),
    ],
)
def test_unsuited_to_the_images(spec, shape, message):
    for call in (
        lambda: check_image_shape(spec, shape),
        lambda: draw(jax.random.key(0), 2, spec, shape),
        lambda: apply(jnp.zeros((2, *shape), jnp.uint8), None, spec),
    ):
        with pytest.raises(UsageError, match=message):
            call()


def test_unusable_arguments():
    with pytest.raises(UsageError, match="dtype float32: give uint8"):
        apply(jnp.zeros((2, 8, 8, 3)), None, FULL)
    with pytest.raises(UsageError, match=r"params.offsets is None"):
        apply(images_of(2), AugmentationParams(), FULL)
