"""Compute dtype, synchronised BatchNorm, intermediate features and second derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from seal_jax import models
from seal_jax.errors import UsageError
from seal_jax.models.network import BatchNorm

IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


def tiny(stem="cifar", **fields):
    fields = {"stage_sizes": (1,), "width": 4, **fields}
    module = models.ResNet(num_classes=3, stem=stem, **fields)
    return models.from_module(module, name="tiny", image_shape=(8, 8, 3))


@pytest.fixture(scope="module")
def variables():
    return tiny().init(jax.random.key(0))


def train_step(module):
    return lambda variables, images: module.apply(
        variables, images, train=True, mutable=["batch_stats"]
    )


def test_bfloat16_keeps_float32_where_it_matters(variables):
    full, half = tiny(), tiny(dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, variables, half.init(jax.random.key(0)))
    want, _ = jax.jit(train_step(full.module))(variables, IMAGES)
    logits, update = jax.jit(train_step(half.module))(variables, IMAGES)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(update)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(logits, want, rtol=0.05, atol=0.1)
    assert not np.array_equal(logits, want)
    block = jax.eval_shape(half.features, variables, IMAGES)["layer1/block0"]
    assert block.dtype == jnp.bfloat16


def test_bfloat16_statistics_are_summed_in_float32():
    # A bfloat16 sum of ones stalls at 256.
    norm = BatchNorm(train=True, dtype=jnp.bfloat16)
    ones = jnp.ones((64, 8, 8, 1), jnp.bfloat16)
    _, state = norm.init_with_output(jax.random.key(0), ones[:1])
    out, update = norm.apply(state, ones, mutable=["batch_stats"])
    assert out.dtype == jnp.bfloat16
    before, after = state["batch_stats"]["mean"], update["batch_stats"]["mean"]
    np.testing.assert_allclose(after - 0.9 * before, 0.1, rtol=1e-6)


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_is_that_of_flax_and_a_pool_goes_first(train):
    """Pooled before, as by Flax after: result, running statistics and derivatives, whatever the sign of the scale."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(2, 3, (6, 8, 8, 5)), jnp.float32)
    params = {
        name: jnp.asarray(rng.normal(size=5), jnp.float32).at[0].set(zero)
        for name, zero in (("scale", 0.0), ("bias", 1.0))
    }
    statistics = {"mean": jnp.arange(5.0), "var": jnp.arange(1.0, 6.0)}
    cotangent = rng.normal(size=(6, 4, 4, 5))

    def pool(y):
        return nn.max_pool(y, (3, 3), (2, 2), ((1, 1), (1, 1)))

    def run(norm, pool_in, pool_after):
        def loss(params, x):
            variables = {"params": params, "batch_stats": statistics}
            y, update = norm.apply(variables, x, mutable=["batch_stats"], **pool_in)
            return (pool_after(y) * cotangent).sum(), (pool_after(y), update)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)

    flax = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)
    (_, want), (of_params, of_x) = run(flax, {}, pool)
    (_, got), slopes = run(BatchNorm(train=train), {"max_pool": pool}, lambda y: y)
    # Where a scale is 0 all results are alike, and which of them a pool takes is anybody's choice.
    of_params["scale"], slopes[0]["scale"] = (
        s.at[0].set(0) for s in (of_params["scale"], slopes[0]["scale"])
    )
    for ours, theirs in ((got, want), (slopes, (of_params, of_x))):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-4), ours, theirs)


def test_group_norm_is_over_groups_of_channels(tiny_of):
    model, variables, images = tiny_of("scnn", norm="group", widths=(8, 64, 8, 8), dense_width=12)
    assert not variables["batch_stats"]
    capture = lambda module, _: type(module).__name__ in ("Conv", "Dense", "GroupNorm")  # noqa: E731
    _, state = model.module.apply(
        variables, images, train=True, capture_intermediates=capture, mutable=["intermediates"]
    )
    # Below 64 channels groups of four; 32 groups otherwise.
    for block, layer, groups in (
        ("block1", "conv", 2),
        ("block2", "conv", 32),
        ("dense", "linear", 3),
    ):
        x, y = (state["intermediates"][block][part]["__call__"][0] for part in (layer, "norm"))
        by_group = np.asarray(x, np.float64).reshape(len(x), -1, groups, x.shape[-1] // groups)
        mean, var = (f(by_group, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
        want = ((by_group - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
        affine = variables["params"][block]["norm"]
        np.testing.assert_allclose(y, want * affine["scale"] + affine["bias"], 1e-4, 1e-4)


def test_group_norm_says_which_widths_fit(tiny_of):
    with pytest.raises(UsageError, match=r"norm='group': 11 channels .* multiples of 4, such as 8"):
        tiny_of("mlp", norm="group", hidden=(11, 4))
    model = models.create("wrn10-1", num_classes=3, image_shape=(8, 8, 3), norm="group")
    slim = model.slim(0.6875)  # 11 of 16 channels
    with pytest.raises(UsageError, match=r"11 channels do not divide into 2 groups"):
        jax.eval_shape(slim.init, jax.random.key(0))


@pytest.mark.parametrize(
    "name",
    [
        "densenet",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("resnet", "wide_resnet", "scnn", "vgg", "mobilenet", "vit", "mlp")
        ),
    ],
)
def test_recomputed_activations_change_rounding_alone(tiny_of, name):
    """Loss, gradient, new statistics and what is sown, with dropout and normalisers; and the initial values."""
    keep, again = (tiny_of(name, dropout=0.3, remat=remat) for remat in (False, True))
    key = jax.random.key(1)
    kept, drawn = (family.model.init(key) for family in (keep, again))
    jax.tree.map(np.testing.assert_array_equal, kept, drawn)

    def run(family):
        def loss(params):
            logits, state = family.model.module.apply(
                {**family.variables, "params": params},
                family.images,
                train=True,
                mutable=["batch_stats", "intermediates"],
                rngs={"dropout": key},
            )
            return jnp.mean(logits**2), state

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(family.variables["params"])

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-3, 1e-4), run(keep), run(again))


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16",
        pytest.param("resnet18", marks=pytest.mark.slow),
        pytest.param("densenet121", marks=pytest.mark.slow),
    ],
)
def test_recomputed_activations_are_not_kept(name):
    """In bytes between the passes, parameters included; how much of it XLA undoes is up to the device."""

    def kept(remat):
        model = models.create(name, num_classes=3, image_shape=(64, 64, 3), remat=remat)
        spec = jax.eval_shape(model.init, jax.random.key(0))
        images = jax.ShapeDtypeStruct((64, *model.image_shape), jnp.float32)

        def backward(params, statistics, images):
            step, rest = train_step(model.module), {"batch_stats": statistics}
            return jax.vjp(lambda params: step({**rest, "params": params}, images)[0], params)[1]

        # The function that jax.vjp returns is a pytree of what it needs.
        residuals = jax.eval_shape(backward, spec["params"], spec["batch_stats"], images)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

    assert kept(True) < 0.6 * kept(False)


def test_batch_norm_synchronises_over_the_named_axis(variables):
    model = tiny()
    whole, whole_update = jax.jit(train_step(model.module))(variables, IMAGES)
    halves = IMAGES.reshape(2, 2, 8, 8, 3)
    for axis_name in ("data", None):
        step = train_step(tiny(bn_axis_name=axis_name).module)
        split = jax.jit(jax.vmap(step, (None, 0), axis_name="data"))
        logits, update = split(variables, halves)
        agrees = np.allclose(logits.reshape(4, 3), whole, rtol=1e-4, atol=1e-4)
        assert agrees == (axis_name is not None)
        if axis_name:
            jax.tree.map(
                lambda both, one: np.testing.assert_allclose(both[1], one, 1e-4, 1e-5),
                update,
                whole_update,
            )


def test_features_are_named_by_block():
    model = tiny(block="bottleneck", stage_sizes=(1, 1), width=2)
    variables = model.init(jax.random.key(0))
    found = jax.jit(model.features)(variables, IMAGES)
    assert {name: value.shape[1:] for name, value in found.items()} == {
        "stem": (8, 8, 2),
        "layer1/block0": (8, 8, 8),
        "layer2/block0": (4, 4, 16),
        "features": (16,),
        "logits": (3,),
    }
    top = np.asarray(found["layer2/block0"])
    assert top.min() == 0  # after the ReLU
    np.testing.assert_allclose(found["features"], top.mean((1, 2)), rtol=1e-5, atol=1e-6)
    head = variables["params"]["fc"]
    np.testing.assert_allclose(
        found["features"] @ head["kernel"] + head["bias"], found["logits"], rtol=1e-5, atol=1e-5
    )
    plain = jax.jit(lambda v, x: model.module.apply(v, x, train=False))(variables, IMAGES)
    np.testing.assert_allclose(found["logits"], plain, rtol=1e-5, atol=1e-5)


def test_hessian_vector_products_exist():
    """Forward over reverse through max-pool and BatchNorm, against a difference of gradients."""
    model = tiny("imagenet")
    variables = model.init(jax.random.key(0))
    params = variables["params"]

    def loss(params):
        logits, _ = train_step(model.module)({**variables, "params": params}, IMAGES)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

    gradient = jax.jit(jax.grad(loss))
    # Along the classifier the loss is smooth, so that differences may be trusted.
    move = jax.tree.map(jnp.zeros_like, params)
    move["fc"]["kernel"] = jnp.ones_like(params["fc"]["kernel"]).at[:, 0].set(-1.0)
    exact = jax.jit(lambda p, m: jax.jvp(jax.grad(loss), (p,), (m,))[1])(params, move)
    ahead, behind = (
        gradient({**params, "fc": {**params["fc"], "kernel": params["fc"]["kernel"] + step}})
        for step in (1e-2 * move["fc"]["kernel"], -1e-2 * move["fc"]["kernel"])
    )
    rough = jax.tree.map(lambda a, b: (a - b) / 2e-2, ahead, behind)
    assert float(jnp.abs(exact["conv1"]["kernel"]).max()) > 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-2, 2e-3), exact, rough)
