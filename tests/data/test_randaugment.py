"""Every operation against Pillow's, of the same strength."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from seal_jax.data import randaugment
from seal_jax.data.randaugment import OPERATIONS, Operations

apply = jax.jit(randaugment.apply, static_argnums=2)
# Of equal images and pixels both kinds of operations occur: each image under each operation, both ways.
DRAWN = [(number, negative) for number in range(len(OPERATIONS)) for negative in (False, True)]


def with_pillow(image, name, negative, strength):
    height, width, channels = image.shape
    picture = Image.fromarray(image if channels == 3 else image[..., 0])
    sign = -1 if negative else 1
    fill = (128,) * channels if channels == 3 else 128

    def affine(*row):
        return picture.transform(picture.size, Image.Transform.AFFINE, row, fillcolor=fill)

    def enhanced(kind):
        return kind(picture).enhance(1 + sign * 0.9 * strength)

    by_name = {
        "identity": lambda: picture,
        "autocontrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
        "rotate": lambda: picture.rotate(sign * 30 * strength, fillcolor=fill),
        "solarize": lambda: ImageOps.solarize(picture, math.ceil(256 * (1 - strength))),
        "color": lambda: enhanced(ImageEnhance.Color),
        "posterize": lambda: ImageOps.posterize(picture, 8 - round(4 * strength)),
        "contrast": lambda: enhanced(ImageEnhance.Contrast),
        "brightness": lambda: enhanced(ImageEnhance.Brightness),
        "sharpness": lambda: enhanced(ImageEnhance.Sharpness),
        "shear_x": lambda: affine(1, sign * 0.3 * strength, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, sign * 0.3 * strength, 1, 0),
        "translate_x": lambda: affine(1, 0, sign * int(150 / 331 * width * strength), 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, sign * int(150 / 331 * height * strength)),
    }
    return np.asarray(by_name[name]()).reshape(image.shape)


def pictures(shape):
    """Noise, dim noise, a ramp, and one grey level."""
    random = np.random.default_rng(0).integers(0, 256, shape)
    ramp = np.broadcast_to(np.linspace(20, 200, shape[1])[:, None], shape)
    return np.stack([random, random // 3 + 40, ramp, np.full(shape, 77)]).astype(np.uint8)


@pytest.mark.parametrize(
    ("shape", "magnitude"),
    [((17, 20, 3), 9.0), ((17, 20, 3), 3.5), ((9, 8, 1), 10.0), ((2, 2, 1), 0.0)],
)
def test_operations_are_pillows(shape, magnitude):
    images = pictures(shape)
    numbers, negative = np.array(DRAWN).T.repeat(len(images), 1)[..., None]
    operations = Operations(jnp.asarray(numbers, jnp.int32), jnp.asarray(negative, bool))
    ours = apply(np.tile(images, (len(DRAWN), 1, 1, 1)), operations, magnitude)
    assert ours.dtype == jnp.uint8
    for index, (number, negative) in enumerate(DRAWN):
        for image, result in zip(images, ours[index * 4 : index * 4 + 4], strict=True):
            name = OPERATIONS[number]
            expected = with_pillow(image, name, negative, magnitude / 10).astype(int)
            # Geometry, thresholds and bits are exact; the others round another way at most.
            exact = name.startswith(("rotate", "shear", "translate", "solarize", "posterize"))
            assert np.abs(expected - result).max() <= (0 if exact else 1), (name, negative)


def test_operations_follow_one_another():
    images = pictures((17, 20, 3))
    operations = randaugment.draw(jax.random.key(0), 4, 3)
    one_by_one = images
    for turn in range(3):
        only = jax.tree.map(lambda leaf, turn=turn: leaf[:, turn : turn + 1], operations)
        one_by_one = apply(one_by_one, only, 9.0)
    np.testing.assert_array_equal(apply(images, operations, 9.0), one_by_one)


def test_every_operation_is_drawn_as_often():
    draw = jax.jit(functools.partial(randaugment.draw, batch=7000, count=2))
    operations = draw(jax.random.key(1))
    counts = np.bincount(np.ravel(operations.numbers), minlength=len(OPERATIONS))
    # A thousand of each, of standard deviation 30.
    assert len(counts) == 14
    assert (np.abs(counts - 1000) < 150).all()
    assert abs(float(operations.negative.mean()) - 0.5) < 0.05
