"""The matrix-product convolution against XLA's own, values and both kinds of derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax.models.convolution import conv_as_matmul


@pytest.mark.parametrize(("size", "stride", "side"), [(3, 1, 6), (3, 2, 7), (1, 2, 6), (7, 2, 9)])
def test_equals_native_convolution_with_derivatives(size, stride, side):
    images = jax.random.normal(jax.random.key(0), (2, side, side, 3))
    kernel = jax.random.normal(jax.random.key(1), (size, size, 3, 4))
    geometry = ((stride, stride), ((size // 2, size // 2),) * 2)

    def native(images, kernel):
        return jax.lax.conv_general_dilated(
            images, kernel, *geometry, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def ours(images, kernel):
        return conv_as_matmul(images, kernel, *geometry)

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
