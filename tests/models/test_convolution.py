"""The matrix-product convolution against XLA's own, values and both kinds of derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax.models.convolution import canonical, conv_as_matmul


@pytest.mark.parametrize(
    ("size", "stride", "side", "groups", "margin"),
    [
        (3, 2, 7, 1, 1),
        (1, 2, 6, 1, 0),
        pytest.param(3, 1, 6, 1, 1, marks=pytest.mark.slow),
        pytest.param(7, 2, 9, 1, 3, marks=pytest.mark.slow),
        (3, 2, 6, 6, 1),
        (3, 2, 6, 3, 1),  # groups of two channels
        (3, 3, 7, 1, 0),  # patches, and a rest
    ],
)
def test_equals_native_convolution_with_derivatives(size, stride, side, groups, margin):
    images = jax.random.normal(jax.random.key(0), (2, side, side + 1, 6))
    shape = (size, size, 6 // groups, 6 if groups > 1 else 4)
    kernel = jax.random.normal(jax.random.key(1), shape)
    geometry = ((stride, stride), ((margin, margin),) * 2)

    def native(images, kernel):
        return jax.lax.conv_general_dilated(
            images,
            kernel,
            *geometry,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    def ours(images, kernel):
        return canonical(images, kernel, *geometry, feature_group_count=groups)

    def derivatives(conv):
        def loss(images, kernel):
            return (conv(images, kernel) ** 2).sum()

        gradient = jax.grad(loss, argnums=(0, 1))
        return conv(images, kernel), *jax.jvp(gradient, (images, kernel), (images, kernel))

    for expected, got in zip(
        jax.tree.leaves(derivatives(native)), jax.tree.leaves(derivatives(ours)), strict=True
    ):
        np.testing.assert_allclose(
            got, expected, rtol=2e-5, atol=2e-4 * float(jnp.abs(expected).max())
        )


def test_depthwise_products_are_summed_in_float32():
    # A bfloat16 sum of 256 and eight times 1 stays at 256.
    image = jnp.ones((1, 3, 3, 1), jnp.bfloat16).at[0, 0, 0, 0].set(256)
    kernel = jnp.ones((3, 3, 1, 1), jnp.bfloat16)
    out = conv_as_matmul(image, kernel, (1, 1), ((0, 0), (0, 0)), feature_group_count=2)
    assert out.dtype == jnp.bfloat16
    assert float(out[0, 0, 0, 0]) == 264
