"""The network cut below its classifier, heads without bias, and dropout."""

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest


def test_extract_and_classify_are_the_network(family, rounding):
    model, variables, images = family
    extract = jax.jit(model.extract, static_argnames="train")
    classify = jax.jit(model.classify)
    head = variables["params"][model.head]

    @jax.jit
    def whole(variables):
        apply = model.module.apply
        inferred = apply(variables, images, train=False)
        return inferred, apply(variables, images, train=True, mutable=["batch_stats"])

    inferred, (trained, changed) = whole(variables)
    for train, logits in ((False, inferred), (True, trained)):
        features, statistics = extract(variables, images, train=train)
        assert (features.ndim, features.dtype) == (2, jnp.float32)
        np.testing.assert_allclose(classify(head, features), logits, rtol=rounding)
        want = changed.get("batch_stats", {}) if train else variables["batch_stats"]
        # Two programs may round the statistics apart.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), statistics, want)
    if variables["batch_stats"]:
        before, after = (
            jax.tree.leaves(tree)[0] for tree in (variables["batch_stats"], statistics)
        )
        assert not np.array_equal(before, after)


def test_head_bias_is_optional(tiny_of):
    model, variables, images = tiny_of("mlp", head_bias=False)
    head = variables["params"][model.head]
    assert set(head) == {"kernel"}
    features, _ = model.extract(variables, images, train=False)
    np.testing.assert_allclose(
        model.classify(head, features), features @ head["kernel"], 1e-5, 1e-6
    )
    with_bias = model.classify({**head, "bias": jnp.ones(3)}, features)
    np.testing.assert_allclose(with_bias, features @ head["kernel"] + 1, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["resnet", "wide_resnet", "scnn", "vgg", "mobilenet", "mlp", "densenet", "vit"]
)
def test_dropout_needs_a_key_in_training_only(tiny_of, name):
    model, variables, images = tiny_of(name, dropout=0.5)

    def shapes(train, rngs=None):
        jax.eval_shape(lambda v: model.extract(v, images, train, rngs=rngs), variables)

    with pytest.raises(flax.errors.InvalidRngError):
        shapes(train=True)
    shapes(train=True, rngs={"dropout": jax.random.key(0)})
    shapes(train=False)
    plain = tiny_of(name).model
    jax.eval_shape(lambda v: plain.extract(v, images, train=True), variables)


def test_dropout_drops_by_key_and_keeps_the_mean(tiny_of):
    model, variables, images = tiny_of("mlp", dropout=0.25)
    plain, _ = model.extract(variables, images, train=False)
    kept, _ = tiny_of("mlp").model.extract(variables, images, train=True)
    np.testing.assert_array_equal(plain, kept)
    outputs = model.features(variables, images)["dense2"]
    assert np.any(outputs > 0)

    @jax.jit
    @jax.vmap
    def draws(key):
        # Above the last block only: the mean of what the first drops passes a ReLU.
        dropped = model.module.apply(
            variables, images, True, rngs={"dropout": key}, mutable=["intermediates"]
        )[1]["intermediates"]
        return dropped["dense2"]["output"][0], dropped["features"][0]

    before, after = jax.device_get(draws(jax.random.split(jax.random.key(0), 500)))
    entry = variables["normalisers"]["dense2"]
    before = (before - entry["mean"]) * entry["scale"]
    ratio = after / before
    assert np.all(np.isclose(ratio, 0) | np.isclose(ratio, 4 / 3, rtol=1e-3))
    assert np.mean(np.isclose(ratio, 0)) == pytest.approx(0.25, abs=0.02)
