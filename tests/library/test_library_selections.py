"""Selections against NumPy's sorting, index sets made by hand, and probability."""

import functools
import math
from decimal import ROUND_HALF_UP, Decimal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_jax import UsageError, forgetting, masks, selections, slimming

SHAPES = {
    "conv1": {"kernel": (3, 3, 3, 8), "bias": (8,)},
    "bn1": {"scale": (8,)},
    "conv2": {"kernel": (3, 3, 8, 16)},
    "fc": {"kernel": (16, 10), "bias": (10,)},
}


def normal(shapes=SHAPES, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Random subsets


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.29])
def test_random_subsets_have_exact_sizes(fraction):
    """Every tensor has its count, and every entry is as likely as any other."""
    params = {"a": {"kernel": jnp.zeros((5, 7)), "bias": jnp.zeros(9)}, "w": jnp.zeros((3, 2, 1))}
    keys = jax.random.split(jax.random.key(1), 2000)
    run = jax.jit(jax.vmap(lambda key: selections.random_subset(key, params, fraction)))
    chosen = jax.tree.map(np.asarray, run(keys))
    assert not chosen["a"]["bias"].any()
    for leaf in (chosen["a"]["kernel"], chosen["w"]):
        flat = leaf.reshape(len(keys), -1)
        share = rounded(fraction, flat.shape[1]) / flat.shape[1]
        assert (flat.sum(1) == round(share * flat.shape[1])).all()
        deviation = math.sqrt(share * (1 - share) / len(keys))
        assert np.abs(flat.mean(0) - share).max() < 5 * deviation
        # Two entries are chosen together as often as without replacement.
        size, count = flat.shape[1], flat[0].sum()
        together = count * (count - 1) / (size * (size - 1))
        pairs = (flat[:, 1:] & flat[:, :-1]).mean(0)
        assert np.abs(pairs - together).max() < 5 * math.sqrt(max(together, 1e-3) / len(keys))


def test_bernoulli_takes_its_share_of_the_kernels_alone():
    params = {"a": {"kernel": jnp.zeros((300, 200)), "bias": jnp.zeros(500)}, "bn": jnp.zeros(9)}
    for share in (0.2, 0.5):
        chosen = selections.random_subset(jax.random.key(1), params, share, exact=False)
        kernel = np.asarray(chosen["a"]["kernel"])
        assert kernel.dtype == bool
        assert abs(kernel.mean() - share) < 5 * math.sqrt(share * (1 - share) / kernel.size)
        # Independent entries: neighbours agree as often as two draws do.
        agree = (kernel[:, 1:] == kernel[:, :-1]).mean()
        expected = share**2 + (1 - share) ** 2
        assert abs(agree - expected) < 5 * math.sqrt(expected * (1 - expected) / kernel.size)
        assert chosen["a"]["bias"].shape == (500,)
        assert not chosen["a"]["bias"].any()
        assert not chosen["bn"].any()


def test_random_subsets_depend_on_key_and_name_only():
    params, key = normal(), jax.random.key(3)
    select = functools.partial(selections.random_subset, fraction=0.5)
    chosen = select(key, params)
    assert_equal(select(key, params), chosen)
    assert_equal(jax.jit(lambda k: select(k, params))(key), chosen)
    wider = {"a_first_layer": {"kernel": jnp.ones((3, 8))}, **dict(reversed(params.items()))}
    again = select(key, wider)
    assert_equal({name: again[name] for name in chosen}, chosen)
    other = select(jax.random.key(4), params)
    assert (other["conv2"]["kernel"] != chosen["conv2"]["kernel"]).any()
    twins = {"a": jnp.ones((20, 20)), "b": jnp.ones((20, 20))}
    drawn = select(key, twins)
    assert (drawn["a"] != drawn["b"]).any()
    alike = {"x": {"k": jnp.ones((20, 20))}, "x/k": jnp.ones((20, 20))}
    drawn = select(key, alike)
    assert (drawn["x"]["k"] != drawn["x/k"]).any()


def test_random_subsets_among_what_one_says():
    params = normal()
    among = ["fc", "re:.*/scale"]
    chosen = selections.random_subset(jax.random.key(0), params, 0.5, among=among)
    taken = jax.tree.map(lambda leaf: bool(leaf.any()), chosen)
    assert taken["fc"] == {"kernel": True, "bias": True}
    assert taken["bn1"] == {"scale": True}
    assert not taken["conv1"]["kernel"]
    assert not taken["conv2"]["kernel"]
    every = selections.random_subset(jax.random.key(0), params, 0.5, among="re:.*")
    assert all(leaf.any() for leaf in jax.tree.leaves(every))
    spec = jax.eval_shape(lambda: params)
    assert_equal(selections.random_subset(jax.random.key(0), spec, 0.5, among="re:.*"), every)


def test_seeds_that_are_vmapped_select_apart():
    params, keys = normal(), jax.random.split(jax.random.key(0), 3)
    many = jax.vmap(lambda key: selections.random_subset(key, params, 0.3))(keys)
    kernel = many["conv2"]["kernel"]
    assert (kernel[0] != kernel[1]).any()
    assert (kernel[1] != kernel[2]).any()
    assert_equal(jax.tree.map(lambda x: x[2], many), selections.random_subset(keys[2], params, 0.3))


# Magnitudes


def lowest(values, count):
    """NumPy's stable argsort, ties by index."""
    flags = np.zeros(values.size, bool)
    flags[np.argsort(np.abs(values).ravel(), kind="stable")[:count]] = True
    return flags


def rounded(fraction, count):
    return int((Decimal(str(fraction)) * count).quantize(Decimal(1), rounding=ROUND_HALF_UP))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])  # bfloat16 has many ties
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.001])
def test_smallest_equals_a_sort(dtype, fraction):
    params = normal(dtype=dtype)
    kernels = [params[name]["kernel"] for name in ("conv1", "conv2", "fc")]
    arrays = [np.asarray(kernel, np.float32) for kernel in kernels]
    run = jax.jit(
        lambda p: [selections.smallest(p, fraction, scope=scope) for scope in ("tensor", "global")]
    )
    each, together = run(params)
    for name, array in zip(("conv1", "conv2", "fc"), arrays, strict=True):
        wanted = lowest(array, rounded(fraction, array.size)).reshape(array.shape)
        np.testing.assert_array_equal(each[name]["kernel"], wanted)
    whole = np.concatenate([array.ravel() for array in arrays])
    found = [np.asarray(together[name]["kernel"]).ravel() for name in ("conv1", "conv2", "fc")]
    np.testing.assert_array_equal(
        np.concatenate(found), lowest(whole, rounded(fraction, whole.size))
    )
    for selection in (each, together):
        assert not selection["bn1"]["scale"].any()
        assert not selection["fc"]["bias"].any()


def test_smallest_with_ties_zeros_and_nan():
    w = jnp.array([[2.0, -0.0, 1.0, jnp.nan, -1.0, 0.0, 1.0, -1.0]])
    chosen = selections.smallest({"w": w}, 0.5)["w"]
    assert chosen.tolist() == [[False, True, True, False, True, True, False, False]]
    assert not selections.smallest({"w": w}, 0.01)["w"].any()
    same = selections.smallest({"w": jnp.ones((3, 4)), "v": jnp.ones((2, 4))}, 0.4, scope="global")
    assert same["v"].all()  # the tree's order: v before w
    assert not same["w"].any()


def test_smallest_of_stacked_seeds():
    many = jax.tree.map(lambda *x: jnp.stack(x), normal(seed=0), normal(seed=1))
    chosen = jax.vmap(lambda p: selections.smallest(p, 0.3, scope="global"))(many)
    for seed in range(2):
        alone = selections.smallest(normal(seed=seed), 0.3, scope="global")
        assert_equal(jax.tree.map(lambda x, seed=seed: x[seed], chosen), alone)


@given(st.integers(1, 9999), st.integers(0, 10**8))
def test_portions_are_exact(parts, count):
    wanted = rounded(Decimal(parts) / 10_000, count)
    assert selections.portion(parts / 10_000, count) == wanted
    assert int(selections.portion(parts / 10_000, np.int32(count))) == wanted


# Kernel slices

NET = {
    "stem": {"kernel": (3, 3, 3, 5), "bias": (5,)},
    "norm": {"scale": (5,), "bias": (5,)},
    "depthwise": {"kernel": (3, 3, 1, 5)},
    "pointwise": {"kernel": (1, 1, 5, 10)},
    "dense": {"kernel": (4 * 10, 6), "bias": (6,)},
    "features": {"scale": (40,)},
    "head": {"kernel": (6, 7), "bias": (7,)},
    "temperature": (),
}


def fit_by_hand():
    """What r = 0.3 keeps: 2 of 5, 3 of 10 and 2 of 6 channels."""
    fit = jax.tree.map(
        lambda shape: np.zeros(shape, bool), NET, is_leaf=lambda node: isinstance(node, tuple)
    )
    every = [0, 1, 2]
    fit["stem"]["kernel"][np.ix_(every, every, every, [0, 1])] = True
    fit["stem"]["bias"][[0, 1]] = True
    fit["norm"]["scale"][[0, 1]] = True
    fit["norm"]["bias"][[0, 1]] = True
    fit["depthwise"]["kernel"][np.ix_(every, every, [0], [0, 1])] = True
    fit["pointwise"]["kernel"][np.ix_([0], [0], [0, 1], [0, 1, 2])] = True
    # Four positions of ten channels each: the first three channels of every position.
    flat = [0, 1, 2, 10, 11, 12, 20, 21, 22, 30, 31, 32]
    fit["dense"]["kernel"][np.ix_(flat, [0, 1])] = True
    fit["dense"]["bias"][[0, 1]] = True
    fit["features"]["scale"][flat] = True
    fit["head"]["kernel"][[0, 1], :] = True
    fit["head"]["bias"][:] = True
    fit["temperature"][()] = True
    return fit


def test_kernel_slices_by_hand():
    params = normal(NET)
    flattened = {"dense": 10, "features/scale": 10}

    def run(params):
        return slimming.kernel_slices(params, 0.3, first="stem", head="head", flattened=flattened)

    wanted = jax.tree.map(np.logical_not, fit_by_hand())
    assert_equal(jax.tree.map(np.asarray, run(params)), wanted)
    assert_equal(jax.tree.map(np.asarray, jax.jit(run)(params)), wanted)
    assert_equal(jax.tree.map(np.asarray, run(jax.eval_shape(lambda: params))), wanted)


def test_kernel_slices_round_up_what_is_exact_in_decimals():
    params = {"a": jnp.ones((2, 30)), "b": jnp.ones((30, 5)), "c": jnp.ones((5, 2))}
    for keep, of_30, of_5 in ((0.1, 3, 1), (0.8, 24, 4), (0.5, 15, 3), (0.61, 19, 4)):
        chosen = slimming.kernel_slices(params, keep, first="a", head="c")
        fit = np.argwhere(~np.asarray(chosen["b"]))
        assert fit.max(0).tolist() == [of_30 - 1, of_5 - 1]
        assert len(fit) == of_30 * of_5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": "sten"}, "first = 'sten' is no layer with a kernel; nearest: stem"),
        ({"head": "norm"}, "head = 'norm' is no layer with a kernel"),
        ({"flattened": {"dens": 10}}, "flattened names 'dens', which is no layer .*nearest: dense"),
        ({"flattened": {"dense": 7}}, r"flattened\['dense'\] = 7 does not divide the axis of 40"),
        ({"flattened": {"dense": 0}}, "must be a whole number of channels"),
        ({"keep": 1.0}, "keep = 1 must lie between 0 and 1"),
        ({"keep": math.nan}, "keep = nan must"),
        ({"keep": jnp.float32(0.5)}, "keep must be a number of Python"),
    ],
)
def test_slices_that_cannot_be(options, message):
    options = {"keep": 0.5, "first": "stem", "head": "head", **options}
    with pytest.raises(UsageError, match=message):
        slimming.kernel_slices(normal(NET), **options)


@pytest.mark.parametrize("wrong", [0, 1, -0.2, 1.2, math.nan, True, "0.2"])
def test_fractions_that_cannot_be(wrong):
    with pytest.raises(UsageError, match=r"fraction = .* must lie between 0 and 1"):
        selections.random_subset(jax.random.key(0), normal(), wrong)
    with pytest.raises(UsageError, match=r"fraction = .* must lie between 0 and 1"):
        selections.smallest(normal(), wrong)


def test_among_nothing():
    with pytest.raises(UsageError, match="kernels of two or more dimensions, takes no parameter"):
        selections.random_subset(jax.random.key(0), {"bias": jnp.ones(3)}, 0.5)
    with pytest.raises(UsageError, match="the mask takes no parameter"):
        selections.smallest(normal(), 0.5, among=lambda p: jax.tree.map(lambda _: False, p))
    with pytest.raises(UsageError, match="nearest: conv"):
        selections.smallest(normal(), 0.5, among="cnv")
    with pytest.raises(UsageError, match="scope = 'layer' must be one of tensor, global"):
        selections.smallest(normal(), 0.5, scope="layer")


def test_hidden_parameters_stay_hidden():
    params = {**normal(), "bn1": optax.MaskedNode()}
    for chosen in (
        selections.random_subset(jax.random.key(0), params, 0.5),
        selections.smallest(params, 0.5, scope="global"),
        slimming.kernel_slices(params, 0.5, first="conv1", head="fc"),
    ):
        assert jax.tree.structure(chosen) == jax.tree.structure(params)
    alone = selections.smallest(normal(), 0.5, scope="global")
    np.testing.assert_array_equal(
        selections.smallest(params, 0.5, scope="global")["fc"]["kernel"], alone["fc"]["kernel"]
    )


# Exact events


def test_replace_is_bit_exact():
    old, new = normal(seed=0, dtype=jnp.bfloat16), normal(seed=1)
    chosen = selections.random_subset(jax.random.key(0), old, 0.5, among="re:.*")
    got = jax.jit(forgetting.replace)(old, new, chosen)
    wanted = jax.tree.map(
        lambda c, n, o: np.where(c, np.asarray(n.astype(jnp.bfloat16)), np.asarray(o)),
        chosen,
        new,
        old,
    )
    assert_equal(jax.tree.map(np.asarray, got), wanted)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    whole = masks.resolve("fc", old)
    got = forgetting.replace(old, old | {"fc": new["fc"]}, whole)
    assert_equal(got, forgetting.replace(old, new, jax.tree.map(jnp.asarray, whole)))
    assert_equal(got["conv1"], old["conv1"])


def test_reinitialise_selected_draws_what_the_initialiser_draws():
    params, key = normal(), jax.random.key(5)

    def init(key):
        return jax.tree.map(lambda p: jax.random.uniform(key) - p, params)

    for init_fn, draw in ((init, init), ("torch_default", None)):
        drawn = draw(key) if draw else forgetting.torch_default(key, params)
        chosen = selections.smallest(params, 0.4)
        new = forgetting.reinitialise_selected(key, params, chosen, init_fn)
        for c, n, d, p in zip(*map(jax.tree.leaves, (chosen, new, drawn, params)), strict=True):
            np.testing.assert_array_equal(n, np.where(c, d, p))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc": {"kernel": True}}, "selection must be a tree like the parameters"),
        ({"fc": {"kernel": True, "bias": 1.0}}, "selection at 'fc/bias' is float32 of shape"),
        ({"fc": {"kernel": jnp.ones(10, bool), "bias": True}}, r"must be bool of shape \(16, 10\)"),
    ],
)
def test_selections_that_do_not_fit(change, message):
    params = normal()
    selection = {**jax.tree.map(lambda _: False, params), **change}
    with pytest.raises(UsageError, match=message):
        forgetting.replace(params, params, selection)
