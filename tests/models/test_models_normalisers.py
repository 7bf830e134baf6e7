"""What layerwise reinitialisation inserts after a block, and what it reads before."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def _replace(tree, path, value):
    *parents, leaf = path.split("/")
    for parent in parents:
        tree = tree[parent]
    tree[leaf] = value


def without(variables, **instead):
    return {**{name: variables[name] for name in ("params", "batch_stats")}, **instead}


def test_identity_changes_no_bit(tiny_of):
    model, variables, images = tiny_of("mlp")
    # Layer by layer: as whole programs, the two may be fused and so rounded apart.
    plain = model.features(without(variables), images)
    empty = model.features(without(variables, normalisers=model.empty_normalisers()), images)
    jax.tree.map(np.testing.assert_array_equal, plain, empty)


def test_outputs_of_blocks_are_taken_before_the_normaliser_of_the_block(family):
    model, variables, images = family
    found = jax.jit(model.features)
    plain = found(without(variables), images)
    entries = model.empty_normalisers()
    same = found(without(variables, normalisers=entries), images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), plain, same)

    first, *_, last = model.round_blocks
    for leaf in ("mean", "scale"):
        _replace(entries, f"{first}/{leaf}", np.float32(0.5))
    changed = found(without(variables, normalisers=entries), images)
    np.testing.assert_array_equal(changed[first], same[first])
    assert not np.allclose(changed[last], same[last])


def test_no_entry_adds_nothing_to_the_program(family):
    model, variables, images = family

    def program(variables):
        call = jax.jit(lambda v, x: model.module.apply(v, x, train=False))
        return call.lower(variables, images).as_text()

    assert program(without(variables, normalisers={})) == program(without(variables))
    assert program(variables) != program(without(variables))


def test_normalisers_are_never_mutable_and_have_the_declared_paths(family):
    model, variables, images = family
    assert set(flat(model.empty_normalisers())) == {
        f"{block}/{leaf}" for block in model.round_blocks for leaf in ("mean", "scale")
    }
    _, changed = jax.eval_shape(
        lambda v: model.module.apply(v, images, train=True, mutable=["batch_stats"]), variables
    )
    assert "normalisers" not in changed


def test_bfloat16_blocks_are_normalised_in_float32(tiny_of):
    model, variables, images = tiny_of("mlp", dtype=jnp.bfloat16)
    # In bfloat16, 256 + 1 is 256: the mean would swallow the signal.
    variables = without(
        variables, normalisers={"dense2": {"mean": jnp.float32(-257), "scale": jnp.float32(0.5)}}
    )
    features, _ = model.extract(variables, images, train=False)
    output = model.features(variables, images)["dense2"]
    assert output.dtype == jnp.bfloat16
    want = ((output.astype(jnp.float32) + 257) * 0.5).astype(jnp.bfloat16)
    np.testing.assert_array_equal(features, want.astype(jnp.float32))
