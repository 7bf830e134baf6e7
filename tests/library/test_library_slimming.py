"""The slim network computes what the wide one does, once all outside the fit slices is zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax import UsageError, forgetting, slimming

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def shapes(a, b, d):
    """Parameters of a network with a channels behind the stem, then b, then d; 4x4 images."""
    return {
        "stem": {"kernel": (3, 3, 2, a), "bias": (a,)},
        "norm": {"scale": (a,), "bias": (a,)},
        "depthwise": {"kernel": (3, 3, 1, a)},
        "pointwise": {"kernel": (1, 1, a, b)},
        "dense": {"kernel": (16 * b, d), "bias": (d,)},
        "head": {"kernel": (d, 3), "bias": (3,)},
    }


def is_shape(node):
    return isinstance(node, tuple)


def specs(tree):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree, is_leaf=is_shape
    )


# r = 0.3 of 5, 10 and 7 channels is 2, 3 and 3.
WIDE, SLIM = shapes(5, 10, 7), shapes(2, 3, 3)
STATS = {"norm": {"mean": (5,), "var": (5,)}}
SLIM_STATS = {"norm": {"mean": (2,), "var": (2,)}}


def normal(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(np.abs(rng.normal(size=shape)), jnp.float32),
        tree,
        is_leaf=is_shape,
    )


def apply(params, stats, x):
    def conv(x, layer, groups=1):
        return jax.lax.conv_general_dilated(
            x,
            layer["kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=DIMENSIONS,
            feature_group_count=groups,
        )

    x = conv(x, params["stem"]) + params["stem"]["bias"]
    x = (x - stats["norm"]["mean"]) / jnp.sqrt(stats["norm"]["var"] + 1e-5)
    x = jax.nn.relu(x * params["norm"]["scale"] + params["norm"]["bias"])
    x = conv(x, params["depthwise"], groups=x.shape[-1])
    x = jax.nn.relu(conv(x, params["pointwise"])).reshape(len(x), -1)
    x = jax.nn.relu(x @ params["dense"]["kernel"] + params["dense"]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def test_slim_and_wide_agree_where_the_rest_is_zero():
    params, stats = normal(WIDE, 0), normal(STATS, 1)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 4, 4, 2)), jnp.float32)
    flattened = {"dense": 10}
    outside = slimming.kernel_slices(params, 0.3, first="stem", head="head", flattened=flattened)
    fit = forgetting.replace(params, jax.tree.map(jnp.zeros_like, params), outside)
    slim = slimming.slim(params, specs(SLIM), flattened)
    slim_stats = slimming.slim(stats, specs(SLIM_STATS))
    wanted = apply(fit, stats, x)
    assert float(jnp.abs(wanted).max()) > 1
    np.testing.assert_allclose(apply(slim, slim_stats, x), wanted, rtol=1e-5)
    assert float(jnp.abs(wanted - apply(params, stats, x)).max()) > 1  # the rest did matter
    # What is cut out is the fit slice, no more and no less.
    marked = forgetting.replace(params, jax.tree.map(lambda p: p * jnp.nan, params), outside)
    cut = slimming.slim(marked, specs(SLIM), flattened)
    for kept, of, flags in zip(*map(jax.tree.leaves, (cut, params, outside)), strict=True):
        np.testing.assert_array_equal(np.asarray(kept).ravel(), np.asarray(of)[~np.asarray(flags)])


def test_parameters_and_statistics_in_one_tree():
    params, stats = normal(WIDE, 0), normal(STATS, 1)
    both = {"params": params, "batch_stats": stats}
    like = {"params": specs(SLIM), "batch_stats": specs(SLIM_STATS)}
    together = slimming.slim(both, like, {"params/dense": 10})
    apart = slimming.slim(params, specs(SLIM), {"dense": 10})
    jax.tree.map(np.testing.assert_array_equal, together["params"], apart)
    np.testing.assert_array_equal(
        together["batch_stats"]["norm"]["mean"], stats["norm"]["mean"][:2]
    )
    with pytest.raises(UsageError, match=r"flattened names 'dense', .* nearest: params/dense"):
        slimming.slim(both, like, {"dense": 10})


def test_slim_keeps_dtype_and_takes_arrays_and_stacked_seeds():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), normal(WIDE, 0))
    like = normal(SLIM, 1)
    flattened = {"dense/kernel": 10}
    slim = jax.jit(lambda p: slimming.slim(p, like, flattened))(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(slim)} == {jnp.dtype(jnp.bfloat16)}
    many = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    both = jax.vmap(lambda p: slimming.slim(p, like, flattened))(many)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], 2 * b), both, slim)


@pytest.mark.parametrize(
    ("change", "flattened", "message"),
    [
        ({"stem": {"kernel": (3, 3, 2, 2)}}, {}, "'stem/bias' is not in the slim network"),
        (
            {"steam": {"kernel": (2, 2)}},
            {},
            "'steam/kernel' is not in the wide network; nearest: st",
        ),
        (
            {"norm": {"scale": (6,), "bias": (2,)}},
            {},
            r"'norm/scale': the slim shape \(6,\) does not",
        ),
        ({"norm": {"scale": (), "bias": (2,)}}, {}, r"'norm/scale': .* does not fit into \(5,\)"),
        (
            {"dense": {"kernel": (47, 3), "bias": (3,)}},
            {"dense": 10},
            "no whole number of channels",
        ),
        ({}, {"dense": 9}, "does not divide the axis of 160"),
        (
            {},
            {"densest": 10},
            "names 'densest', which is no layer of the parameters; nearest: dense",
        ),
    ],
)
def test_what_does_not_fit(change, flattened, message):
    with pytest.raises(UsageError, match=message):
        slimming.slim(normal(WIDE, 0), specs({**SLIM, **change}), flattened)
