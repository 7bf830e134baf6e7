"""Masks: properties on drawn trees, the names of leaves, and errors that say the mend."""

import re
from typing import Any, NamedTuple

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import seal_jax
from seal_jax import UsageError, masks, paths, selections

PARAMS = {
    "conv1": {"kernel": np.ones((3, 3, 2, 4))},
    "bn1": {"scale": np.ones(4), "bias": np.ones(4)},
    "layer1": [{"conv": {"kernel": np.ones((3, 3, 4, 4))}}, {"conv": {"kernel": np.ones((1, 4))}}],
    "layer10": {"kernel": np.ones((2, 2))},
    "fc": {"kernel": np.ones((4, 5)), "bias": np.ones(5)},
}


def select(mask, params=PARAMS):
    return {name for name, flag in paths.named_leaves(masks.resolve(mask, params)) if flag}


# Properties

words = st.text("abc", min_size=1, max_size=3)
shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)
trees = st.recursive(
    shapes.map(np.zeros),
    lambda inner: st.one_of(
        st.dictionaries(words, inner, min_size=1, max_size=4),
        st.lists(inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=3).map(tuple),
    ),
    max_leaves=10,
).filter(lambda tree: len(jax.tree.leaves(tree)) >= 2)


@st.composite
def trees_and_masks(draw):
    params = draw(trees)
    leaves, structure = jax.tree.flatten(params)
    flags = draw(st.lists(st.booleans(), min_size=len(leaves), max_size=len(leaves)))
    flags[draw(st.integers(0, len(flags) - 2))] = True
    if all(flags):
        flags[-1] = False
    return params, jax.tree.unflatten(structure, flags)


@given(trees_and_masks())
@settings(deadline=None)
def test_properties_of_bool_trees(drawn):
    params, mask = drawn
    assert masks.resolve(mask, params) == mask
    assert masks.resolve(lambda p: mask, params) == mask
    assert masks.resolve(masks.invert(masks.invert(mask)), params) == mask
    opposite = masks.resolve(masks.invert(mask), params)
    for here, there in zip(jax.tree.leaves(mask), jax.tree.leaves(opposite), strict=True):
        assert here is (not there)
    by_name = dict(paths.named_leaves(mask))
    for name, leaf in paths.named_leaves(params):
        assert isinstance(leaf, np.ndarray)
        assert name in by_name
    chosen = [
        leaf
        for flag, leaf in zip(jax.tree.leaves(mask), jax.tree.leaves(params), strict=True)
        if flag
    ]
    report = masks.report(mask, params)
    assert report.tensors == len(chosen)
    assert report.all_tensors == len(jax.tree.leaves(params))
    assert report.parameters == sum(int(np.prod(leaf.shape)) for leaf in chosen)
    assert report.all_parameters == sum(leaf.size for leaf in jax.tree.leaves(params))


@given(trees_and_masks())
@settings(deadline=None)
def test_rules_of_whole_names_select_as_a_tree_does(drawn):
    params, mask = drawn
    flags = dict(paths.named_leaves(mask))
    assert masks.resolve(list(flags.items()), params) == mask
    assert masks.resolve([name for name, flag in flags.items() if flag], params) == mask
    patterns = [(re.compile(re.escape(name)), flag) for name, flag in flags.items()]
    assert masks.resolve(patterns, params) == mask
    typed = {tuple(int(w) if w.isdigit() else w for w in n.split("/")): f for n, f in flags.items()}
    assert masks.resolve(lambda path, leaf: typed[path], params) == mask


@st.composite
def orders(draw):
    layers = draw(st.lists(words, min_size=2, max_size=6, unique=True))
    order = []
    for layer in layers:
        blocks = draw(st.integers(0, 3))
        order += [f"{layer}/block{b}" for b in range(blocks)] or [layer]
    candidates = [layer for layer in layers if order[0].split("/")[0] != layer]
    candidates += order[1:]
    return layers, tuple(order), draw(st.sampled_from(candidates))


@given(orders())
@settings(deadline=None)
def test_before_and_since_split_the_order(drawn):
    _, order, threshold = drawn
    params: dict = {}
    for entry in order:
        layer, _, block = entry.partition("/")
        own = {"kernel": np.ones((2, 2))}
        if block:
            params.setdefault(layer, {})[block] = own
        else:
            params[layer] = own
    early = select(masks.before(order, threshold), params)
    late = select(masks.since(order, threshold), params)
    everything = {name for name, _ in paths.named_leaves(params)}
    assert early | late == everything
    assert not early & late
    # The threshold is the first entry of the later part, and everything after it follows.
    position = next(i for i, e in enumerate(order) if (e + "/").startswith(threshold + "/"))
    assert early == {f"{entry}/kernel" for entry in order[:position]}


def test_the_order_is_taken_literally():
    order = ("a.b", "axb", "fc+(1)")
    params = {name: np.ones(1) for name in order}
    assert select(masks.before(order, "axb"), params) == {"a.b"}
    assert select(masks.since(order, "fc+(1)"), params) == {"fc+(1)"}


# What rules mean


def test_strings_are_exact_paths_or_leading_components():
    assert select("layer1") == {"layer1/0/conv/kernel", "layer1/1/conv/kernel"}
    assert select("layer1/0/conv") == {"layer1/0/conv/kernel"}
    names = ("layer.1.w", "layer11.w", "w[0]", "w0", "a*", "aa")
    params = {name: np.ones(1) for name in names}
    for name in names:
        assert select(name, params) == {name}
        assert select([(name, True)], params) == {name}


@pytest.mark.parametrize("make", [re.compile, lambda pattern: f"re:{pattern}"])
def test_patterns_on_request(make):
    assert select(make("layer1")) == select("layer1")
    assert select(make("layer1.*")) == select("layer1") | {"layer10/kernel"}
    assert select(make(".*/bias")) == {"bn1/bias", "fc/bias"}
    assert select([make("conv1|bn1"), "layer10"]) == select(["conv1", "bn1", "layer10"])
    assert select([(make("fc/b.*"), False), ("fc", True)]) == {"fc/kernel"}


def test_patterns_keep_their_flags():
    assert select(re.compile("FC  # the classifier", re.IGNORECASE | re.VERBOSE)) == select("fc")


def test_the_first_rule_counts():
    assert select([("fc/bias", False), ("fc", True)]) == {"fc/kernel"}
    assert select([["fc/bias", False], "fc"]) == {"fc/kernel"}


def test_prefix_trees_and_other_containers():
    prefix = {"conv1": True, "bn1": False, "layer1": False, "layer10": False, "fc": True}
    expected = {"conv1/kernel", "fc/kernel", "fc/bias"}
    assert select(prefix) == expected
    assert select(prefix, flax.core.freeze(PARAMS)) == expected
    assert select([[True], (False, False)], [(np.ones(1),), [np.ones(1), np.ones(1)]]) == {"0/0"}


def test_restrict_tells_kernels_biases_and_norms_apart():
    def everything(params):
        return jax.tree.map(lambda _: True, params)

    kernels = {name for name, leaf in paths.named_leaves(PARAMS) if leaf.ndim >= 2}
    assert select(masks.restrict(everything, biases=False)) == kernels
    assert select(masks.restrict(everything)) == kernels | {"fc/bias"}
    norms = {"bn1/scale", "bn1/bias"}
    assert select(masks.restrict(everything, norms=True, biases=False)) == kernels | norms
    assert select(masks.restrict(["fc", "bn1"])) == {"fc/kernel", "fc/bias"}


def test_roles_in_other_libraries():
    conv, norm = eqx.nn.Conv2d(2, 3, 3, key=jax.random.key(0)), eqx.nn.LayerNorm((2, 3))
    tree = eqx.filter({"conv": conv, "norm": norm}, eqx.is_array)
    tree |= {
        "haiku": {"w": np.ones((3, 4)), "b": np.ones(4)},
        "twins": {"a": PARAMS["fc"]["kernel"]},
    }
    tree["twins"]["b"] = np.ones((4, 5))
    tree |= {"cls_token": np.ones((1, 1, 4)), "pos_embed": np.ones((1, 5, 4))}
    everything = masks.restrict(lambda p: jax.tree.map(lambda _: True, p), biases=False)
    kernels = {"conv/weight", "haiku/w", "twins/a", "twins/b"}
    assert select(everything, tree) == kernels
    named = zip(paths.named_leaves(tree), selections.eligible(tree), strict=True)
    assert {name for (name, _), flag in named if flag} == kernels


def test_hidden_parameters_stay_hidden_and_take_part():
    hidden = {"conv": optax.MaskedNode(), "fc": {"kernel": np.ones(2), "bias": optax.MaskedNode()}}
    resolved = masks.resolve([("conv", True), ("fc/kernel", False), ("fc/bias", True)], hidden)
    assert resolved == {
        "conv": optax.MaskedNode(),
        "fc": {"kernel": False, "bias": optax.MaskedNode()},
    }
    assert masks.report("fc", hidden)[:2] == (1, 1)


def test_one_node_may_hide_a_subtree():
    hidden = {"conv": {"kernel": np.ones(2)}, "fc": optax.MaskedNode(), "norm": np.ones(1)}
    whole = {"conv": {"kernel": True}, "fc": {"kernel": False, "bias": True}, "norm": False}
    expected = {"conv": {"kernel": True}, "fc": optax.MaskedNode(), "norm": False}
    for mask in (whole, ("conv", "fc/bias"), [("fc/kernel", False), ("conv/kernel", True)]):
        assert masks.resolve(mask, hidden) == expected
    with pytest.raises(UsageError, match="selects no parameter"):
        masks.resolve("cnv", hidden)


def test_none_leaves_are_no_parameters():
    assert select("a", {"a": np.ones(1), "b": None, "c": np.ones(1)}) == {"a"}
    assert select({"a": True, "b": None, "c": False}, {"a": 1.0, "b": None, "c": 2.0}) == {"a"}


# Names


class Module(eqx.Module):
    weight: jax.Array
    parts: list


def test_names_of_every_kind_of_key():
    tree = {"block": (Module(jnp.ones(1), [jnp.ones(1), {"x": jnp.ones(1)}]),), 3: jnp.ones(1)}
    flat = jax.tree_util.tree_leaves_with_path({"only": tree["block"], "value": tree[3]})
    assert [paths.name(path) for path, _ in flat] == [
        "only/0/weight",
        "only/0/parts/0",
        "only/0/parts/1/x",
        "value",
    ]
    assert paths.name(()) == ""


def test_nnx_names_are_the_same_with_variables_and_without():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    raw = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert all("value" in text for text in raw), "NNX no longer ends its paths in the value"
    names = [name for name, _ in paths.named_leaves(state)]
    assert names == ["bias", "kernel"]
    assert [name for name, _ in paths.named_leaves(nnx.to_pure_dict(state))] == names


class Pair(NamedTuple):
    value: Any
    weight: Any


def test_what_is_no_variable_may_have_a_value():
    tree = {"a": {"value": 1}, "b": Pair(2, 3)}
    assert [name for name, _ in paths.named_leaves(tree)] == ["a/value", "b/value", "b/weight"]
    assert masks.resolve("b/value", tree) == {"a": {"value": False}, "b": Pair(True, False)}
    variable = nnx.Param({"value": jnp.ones(1), "w": jnp.ones(2)})
    assert [name for name, _ in paths.named_leaves({"v": variable})] == ["v/value", "v/w"]


COLLIDING = {"x": {"k": 1.0}, "x/k": 2.0, "x%2Fk": 3.0}


def test_names_are_unique():
    names = [name for name, _ in paths.named_leaves(COLLIDING)]
    assert names == ["x/k", "x%252Fk", "x%2Fk"]
    assert names[1:] == [paths.escape(key) for key in ("x%2Fk", "x/k")]
    keys = st.text("a/%25F", min_size=1, max_size=6)

    @given(keys, keys, keys)
    def unique(a, b, c):
        tree = {a: {b: 1}, f"{a}/{b}": 1, c: 1} if c != a else {a: {b: 1}, f"{a}/{b}": 1}
        assert len(dict(paths.named_leaves(tree))) == len(jax.tree.leaves(tree))

    unique()


def test_masks_of_trees_with_slashes_in_their_keys():
    for flags in ((True, False, False), (False, True, False), (False, False, True)):
        mask = {"x": {"k": flags[0]}, "x/k": flags[1], "x%2Fk": flags[2]}
        assert masks.resolve(mask, COLLIDING) == mask
        assert masks.resolve({**mask, "x": flags[0]}, COLLIDING) == mask
        path = (("x", "k"), ("x/k",), ("x%2Fk",))[flags.index(True)]
        assert masks.resolve(lambda p, leaf, path=path: p == path, COLLIDING) == mask
        rule = "/".join(map(paths.escape, path))
        assert masks.resolve(rule, COLLIDING) == mask
    # Haiku's modules: without another leaf of that name, slashes need no escape.
    haiku = {"net/~/conv": {"w": 1.0}, "net/~/fc": {"w": 2.0, "b": 3.0}, "other": {"w": 4.0}}
    assert select("net/~/fc", haiku) == {"net%2F~%2Ffc/w", "net%2F~%2Ffc/b"}
    assert select("net", haiku) == select(re.compile("net.*"), haiku)


# Errors: one line, and what to write instead

ERRORS = {
    "rule matches nothing": ("layr10", "'layr10' matches no parameter path", "nearest: layer10,"),
    "one rule of two": (["conv1", "fx/kernel"], "'fx/kernel' matches no", "fc/kernel"),
    "shadowed": ([("fc", False), ("fc/bias", True)], "only paths that an earlier rule", "fc/bias"),
    "pattern matches nothing": (re.compile("layr.*"), "'re:layr.*' matches no parameter path", ""),
    "unmarked": (".*/bias", "re.compile('.*/bias') or 're:.*/bias'", ""),
    "bad expression": ("re:layer(", "'re:layer(' is not a regular expression", ""),
    "everything": ("re:.*", "selects every parameter", "conv1"),
    "everything by list": (["conv1", "re:(?!conv1).*"], "selects every parameter", "layer10"),
    "nothing": ([("fc", False)], "selects no parameter", "fc"),
    "nothing by predicate": (lambda path, leaf: False, "selects no parameter", "conv1"),
    "nothing by filter": (nnx.PathContains("fx"), "selects no parameter", "fc"),
    "label": (
        {"conv1": "forget", "bn1": True, "layer1": False, "layer10": False, "fc": False},
        "'forget' at 'conv1'; a mask holds bool",
        "",
    ),
    "bytes": (re.compile(b"fc"), "at 'its root'; a mask holds bool", ""),
    "number": (3, "3 at 'its root'; a mask holds bool", ""),
    "array": (
        {"conv1": np.ones((3, 3), bool), "bn1": True, "layer1": False, "layer10": 0, "fc": False},
        "at 'conv1'; a mask holds bool",
        "",
    ),
    "missing": (
        {"conv1": True, "bn1": {"scale": True}, "layer1": False, "layer10": False, "fc": False},
        "no entry for the parameter 'bn1/bias'",
        "bn1/scale",
    ),
    "unknown": (
        {"conv1": True, "bn1": True, "layer1": True, "layer10": False, "fc": False, "fd": True},
        "an entry 'fd' that is no parameter",
        "nearest: fc",
    ),
    "of another model": (lambda params: {"a": True, "b": False}, "no entry for the parameter", ""),
    "empty": ([], "no entry for the parameter", ""),
    "none": (None, "no entry for the parameter", ""),
}


@pytest.mark.parametrize(("mask", "message", "near"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("use", [masks.resolve, masks.report])
def test_errors(mask, message, near, use):
    with pytest.raises(UsageError) as caught:
        use(mask, PARAMS)
    text = str(caught.value)
    assert message in text
    assert near in text
    assert "\n" not in text
    assert len(text) < 300


def test_the_closest_path_comes_first():
    with pytest.raises(UsageError, match="; nearest: layer10/kernel,"):
        masks.resolve("layer11/kernel", PARAMS)
    with pytest.raises(UsageError, match=r"; nearest: fc$"):
        masks.resolve("fd", PARAMS)
    deep = {"layer3": {"block0": {"downsample": {"conv": {"kernel": 1.0}}}}, "fc": 2.0}
    with pytest.raises(UsageError, match="; nearest: layer3,"):
        masks.resolve("layr3", deep)
    with pytest.raises(UsageError, match="; nearest: layer3,"):
        masks.resolve({"layr3": True, "layer3": True, "fc": False}, deep)
    with pytest.raises(UsageError, match="; nearest: bn1/scale,"):
        masks.resolve("bn1/scala", PARAMS)


def test_thresholds():
    order = ("conv1", "layer1/block0", "layer2/block0", "fc")
    for split in (masks.before, masks.since):
        with pytest.raises(UsageError, match=r"'layr2' is not in .* order; nearest: layer2/block0"):
            split(order, "layr2")
        with pytest.raises(UsageError, match=r"'conv1' is the first of the order"):
            split(order, "conv1")
        with pytest.raises(UsageError, match=r"'layer' is not in the declared order"):
            split(order, "layer")  # a part of a component is no layer


def test_parameters_that_cannot_be_split():
    with pytest.raises(UsageError, match="no parameters to select from"):
        masks.resolve("a", {})
    with pytest.raises(UsageError, match="single array"):
        masks.resolve(True, np.ones(2))


def test_a_traced_mask_is_refused():
    def traced(flag):
        return masks.resolve({"a": flag, "b": False}, {"a": 1.0, "b": 2.0})

    with pytest.raises(UsageError, match="mask is traced at 'a'"):
        jax.jit(traced)(True)


class Net(eqx.Module):
    a: jax.Array
    b: jax.Array

    def __call__(self, x):
        raise AssertionError("a tree of bool was called")


def test_a_callable_tree_of_bools_is_a_tree():
    resolved = masks.resolve(Net(True, False), Net(jnp.ones(1), jnp.ones(1)))
    assert (resolved.a, resolved.b) == (True, False)


def test_one_mask_is_resolved_once_for_all_links():
    calls = []

    def mask(params):
        calls.append(jax.tree.map(jnp.shape, params))
        return {"conv": True, "fc": False}

    params = {"conv": jnp.ones(2), "fc": jnp.ones(3)}
    tx = seal_jax.make_seal_tx(
        mask, steps_per_epoch=1, epochs_per_generation=4, fit_in_ascent="freeze"
    )
    jax.jit(tx.update)(params, tx.init(params), params)
    assert calls == [{"conv": (2,), "fc": (3,)}]
    wide = {"conv": jnp.ones(4), "fc": jnp.ones(3)}
    jax.jit(tx.update)(wide, tx.init(wide), wide)
    assert calls[1:] == [{"conv": (4,), "fc": (3,)}]
