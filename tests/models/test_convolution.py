"""The canonical convolution against XLA's own: values, derivatives of both kinds, layouts."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from seal_jax.models import convolution
from seal_jax.models.convolution import canonical, conv_as_matmul


@pytest.fixture(autouse=True)
def _no_products(monkeypatch):
    """Convolve small images as large ones."""
    monkeypatch.setattr(convolution, "FEW_BYTES", 0)


def gradient_of(conv):
    return jax.grad(
        lambda images, kernel: (conv(images, kernel) ** 2).sum().astype(jnp.float32), (0, 1)
    )


@pytest.mark.parametrize(
    ("size", "stride", "side", "groups", "margin"),
    [
        (3, 2, 7, 1, 1),
        (3, 2, 8, 1, 1),  # no window reaches the last row and column of the padding
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
        gradient = gradient_of(conv)
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


@pytest.mark.parametrize("stride", [1, 2])
def test_all_convolutions_of_all_derivatives_are_in_the_canonical_layout(stride):
    def conv(images, kernel):
        return canonical(images, kernel, (stride, stride), ((1, 1), (1, 1)))

    gradient = gradient_of(conv)
    arrays = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
    programs = {
        "gradient": lambda *at: gradient(*at),
        "forward over reverse": lambda *at: jax.jvp(gradient, at, at)[1],
        "reverse over forward": jax.grad(lambda *at: jax.jvp(conv, at, at)[1].sum(), (0, 1)),
        "reverse over reverse": gradient_of(lambda *at: gradient(*at)[1]),
    }
    for name, program in programs.items():
        text = jax.jit(program).lower(*arrays).as_text()
        layouts = set(re.findall(r"dim_numbers = (\[.*?\]->\[.*?\])", text))
        assert layouts == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}, name


def test_mapped_over_seeds_and_devices():
    """Kernels of two seeds that are the same on both devices, images divided over them."""
    images = jax.random.normal(jax.random.key(0), (4, 5, 6, 3))
    kernels = jax.random.normal(jax.random.key(1), (2, 3, 3, 3, 4))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))

    def loss(kernel, images, conv):
        return jax.lax.pmean((conv(images, kernel) ** 2).sum(), "data")

    def gradients(conv, over_seeds):
        def seeds(kernels, images):
            one = functools.partial(jax.grad(loss), images=images, conv=conv)
            return jax.vmap(one)(kernels) if over_seeds == "vmap" else jax.lax.map(one, kernels)

        specs = (PartitionSpec(), PartitionSpec("data"))
        return jax.jit(jax.shard_map(seeds, mesh=mesh, in_specs=specs, out_specs=PartitionSpec()))(
            kernels, images
        )

    geometry = ((2, 2), ((1, 1), (1, 1)))

    def native(images, kernel):
        return jax.lax.conv_general_dilated(
            images, kernel, *geometry, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    # Not "vmap", which jax 0.7 cannot do with its own convolutions.
    expected = gradients(native, "map")
    products = gradients(lambda *arrays: conv_as_matmul(*arrays, *geometry), "map")
    np.testing.assert_allclose(products, expected, rtol=2e-5, atol=1e-4)
    for over_seeds in ("vmap", "map"):
        actual = gradients(lambda *arrays: canonical(*arrays, *geometry), over_seeds)
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-4)
