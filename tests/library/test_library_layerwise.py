"""The pieces of LW's rounds against NumPy, with k static, traced and vmapped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax import UsageError, forgetting, layerwise

SHAPES = {
    "stem": {"kernel": (3, 3, 2, 4)},
    "one": {"conv": {"kernel": (3, 3, 4, 4)}, "norm": {"scale": (4,), "bias": (4,)}},
    "two": {"conv": {"kernel": (4, 6)}},
    "two_b": {"kernel": (6, 6)},
    "head": {"kernel": (6, 3), "bias": (3,)},
}
ORDER = ("stem", "one", "two", "two_b", "head")
BLOCKS = ("one", "two_b")
# Which top-level names lie in blocks 1 to k, by hand.
INSIDE = {1: {"stem", "one"}, 2: {"stem", "one", "two", "two_b"}}


def normal(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def named(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def frobenius(array):
    return np.linalg.norm(array.astype(np.float64).ravel())


def rescaled(params, norms, k):
    return layerwise.rescale(params, norms, ORDER, k, blocks=BLOCKS)


@pytest.mark.parametrize("vectors", [False, True])
def test_rescaling_returns_to_the_initial_norms(vectors):
    initial, params = normal(0), jax.tree.map(lambda p: 3 * p, normal(1))
    norms = layerwise.kernel_norms(initial, vectors=vectors)
    traced = jax.jit(rescaled)
    for k in (1, 2):
        new = named(traced(params, norms, k))
        for path, before in named(params).items():
            if path.split("/")[0] in INSIDE[k] and (vectors or before.ndim >= 2):
                wanted = frobenius(named(initial)[path])
                assert abs(frobenius(new[path]) / wanted - 1) < 1e-6
                factor = wanted / frobenius(before)
                np.testing.assert_allclose(new[path], before * factor, rtol=1e-6)
            else:
                np.testing.assert_array_equal(new[path], before)
        static = named(rescaled(params, norms, k))
        for path, value in new.items():
            np.testing.assert_allclose(static[path], value, rtol=1e-6)
    assert traced._cache_size() == 1


def test_a_norm_of_zero_changes_nothing():
    initial, params = normal(0), normal(1)
    params["stem"]["kernel"] = jnp.zeros_like(params["stem"]["kernel"])
    initial["two"]["conv"]["kernel"] = jnp.zeros((4, 6))
    with jax.debug_nans(True):
        new = rescaled(params, layerwise.kernel_norms(initial), 2)
    np.testing.assert_array_equal(new["stem"]["kernel"], 0)
    np.testing.assert_array_equal(new["two"]["conv"]["kernel"], params["two"]["conv"]["kernel"])
    assert (new["two_b"]["kernel"] != params["two_b"]["kernel"]).any()


def test_rescaling_keeps_a_narrow_dtype():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), normal(1))
    norms = layerwise.kernel_norms(normal(0))
    new = rescaled(params, norms, 1)
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype(jnp.bfloat16)}
    wanted = frobenius(named(normal(0))["stem/kernel"])
    assert abs(frobenius(named(new)["stem/kernel"].astype(np.float32)) / wanted - 1) < 5e-3


def draw(key):
    return jax.tree.map(lambda p: jax.random.uniform(key) + p, normal(3))


@pytest.mark.parametrize("init_fn", [draw, "torch_default"])
def test_above_is_drawn_and_below_untouched(init_fn):
    params, key = normal(1), jax.random.key(4)

    @jax.jit
    def run(key, params, k):
        new = layerwise.reinitialise_above(key, params, ORDER, k, init_fn, blocks=BLOCKS)
        return new, forgetting.initialiser(init_fn, params)(key)

    for k in (1, 2):
        new, fresh = map(named, run(key, params, k))
        for path, before in named(params).items():
            wanted = before if path.split("/")[0] in INSIDE[k] else fresh[path]
            np.testing.assert_array_equal(new[path], wanted)
        assert (new["head/kernel"] != named(params)["head/kernel"]).all()
    assert run._cache_size() == 1


def test_seeds_in_different_rounds():
    """One vmapped program; every seed has its own k and key."""
    many = jax.tree.map(lambda *x: jnp.stack(x), *(normal(seed) for seed in range(2)))
    norms = jax.vmap(layerwise.kernel_norms)(many)
    ks, keys = jnp.array([2, 1]), jax.random.split(jax.random.key(0), 2)

    def one(params, norms, k, key):
        params = rescaled(jax.tree.map(lambda p: 2 * p, params), norms, k)
        return layerwise.reinitialise_above(key, params, ORDER, k, draw, blocks=BLOCKS)

    new = jax.jit(jax.vmap(one))(many, norms, ks, keys)
    for seed, k in enumerate((2, 1)):
        params, fresh = named(normal(seed)), named(draw(keys[seed]))
        for path, value in named(new).items():
            inside = path.split("/")[0] in INSIDE[k]
            # Twice the weights come back to where they were; vectors stay doubled.
            kept = params[path] if params[path].ndim >= 2 else 2 * params[path]
            np.testing.assert_allclose(value[seed], kept if inside else fresh[path], rtol=1e-6)


def test_every_entry_is_a_block_by_default():
    params = normal(0)
    for k, name in enumerate(ORDER, start=1):
        flags = layerwise.above(params, ORDER, k)
        wanted = {other: other in ORDER[k:] for other in ORDER}
        for path, flag in named(flags).items():
            assert bool(flag) == wanted[path.split("/")[0]], (name, path)
    order = ("stem", "one/conv", "one/norm", "two", "two_b", "head")
    named_by_prefix = layerwise.above(params, order, 1, blocks=("one", "head"))
    assert {p.split("/")[0] for p, flag in named(named_by_prefix).items() if flag} == {
        "two",
        "two_b",
        "head",
    }


def test_statistics_and_normaliser():
    z = np.random.default_rng(0).normal(3.0, 2.0, size=(8, 5, 5, 4)).astype(np.float32)
    mean, std = jax.jit(layerwise.statistics)(z)
    exact = z.astype(np.float64)
    np.testing.assert_allclose([mean, std], [exact.mean(), exact.std()], rtol=1e-6)
    assert (mean.dtype, mean.shape, std.dtype, std.shape) == (jnp.float32, (), jnp.float32, ())
    parts = jax.vmap(lambda part: layerwise.statistics(part, "data"), axis_name="data")
    halves = parts(z.reshape(2, 4, 5, 5, 4) + np.float32([0, 5]).reshape(2, 1, 1, 1, 1))
    shifted = exact + np.repeat([0, 5], 4).reshape(8, 1, 1, 1)
    np.testing.assert_allclose(
        halves, np.repeat([[shifted.mean()], [shifted.std()]], 2, 1), rtol=1e-6
    )
    center, scale = layerwise.normaliser(mean, std, eps=0.1)
    wanted = (exact - exact.mean()) / (exact.std() + 0.1)
    np.testing.assert_allclose((z - center) * scale, wanted, rtol=1e-4, atol=1e-5)
    _, scale = layerwise.normaliser(*layerwise.statistics(jnp.full((3, 2), 7.0)))
    assert np.isfinite(scale)
    half = layerwise.statistics(jnp.asarray(z, jnp.bfloat16))
    assert all(value.dtype == jnp.float32 for value in half)


@pytest.mark.parametrize("repeats", [1, 3])
def test_rounds_count_from_one(repeats):
    """The two nested loops of algorithm 1."""
    wanted = [(k, n) for k in range(1, 5) for n in range(1, repeats + 1)]
    assert [layerwise.round_of(g, repeats) for g in range(4 * repeats)] == wanted
    traced = jax.jit(lambda g: layerwise.round_of(g, repeats))(jnp.arange(4 * repeats))
    assert list(zip(*(part.tolist() for part in traced), strict=True)) == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k = 0 must be a whole number from 1 to the number of blocks, 2"),
        ({"k": 3}, "k = 3 must be"),
        ({"k": 1.0}, "k = 1.0 must be"),
        ({"k": True}, "k = True must be"),
        ({"blocks": ("one", "too")}, "block 'too' is not in the declared order; nearest: two"),
        ({"blocks": ("two", "one")}, "block 'one' must be neighbours in the declared order, and"),
        ({"blocks": ("one", "one")}, "blocks stand in its sequence"),
        (
            {"order": ("one/conv", "stem", "one/norm", *ORDER[2:])},
            "block 'one' must be neighbours in the declared order",
        ),
        ({"order": ORDER[:-1]}, "covers the parameter 'head/bias' with no entry; exactly one must"),
        ({"order": (*ORDER, "one/conv")}, "the parameter 'one/conv/kernel' with 2 entries"),
        ({"order": (*ORDER, "heads")}, "order has an entry 'heads' that covers no parameter; nea"),
    ],
)
def test_declarations_that_cannot_be(options, message):
    options = {"k": 1, "blocks": BLOCKS, "order": ORDER, **options}
    params = normal(0)
    with pytest.raises(UsageError, match=message):
        layerwise.above(params, **options)
    with pytest.raises(UsageError, match=message):
        layerwise.rescale(params, layerwise.kernel_norms(params), **options)
    with pytest.raises(UsageError, match=message):
        layerwise.reinitialise_above(jax.random.key(0), params, init_fn=draw, **options)


def test_more_that_cannot_be():
    params = normal(0)
    with pytest.raises(UsageError, match="blocks is empty"):
        layerwise.block_levels(params, ORDER, ())
    for repeats in (0, 1.5, True):
        with pytest.raises(UsageError, match=f"repeats = {repeats} must be"):
            layerwise.round_of(0, repeats)
    norms = layerwise.kernel_norms({**params, "extra": jnp.ones((2, 2))})
    with pytest.raises(UsageError, match="they differ in extra"):
        rescaled(params, norms, 1)
    with pytest.raises(UsageError, match="eps = -1 must be 0 or positive"):
        layerwise.normaliser(0.0, 1.0, eps=-1)


def test_a_bias_of_several_dimensions_is_no_kernel():
    """A convolution as Equinox shapes it, and a LayerNorm over two axes."""
    ones = {
        "conv": {"weight": (4, 1, 3, 3), "bias": (4, 1, 1)},
        "norm": dict.fromkeys(["weight", "bias"], (2, 2)),
    }
    ones = jax.tree.map(jnp.ones, ones, is_leaf=lambda node: isinstance(node, tuple))
    norms = layerwise.kernel_norms(ones)
    assert norms == {"conv": {"weight": 6, "bias": 0}, "norm": {"weight": 0, "bias": 0}}
