"""The slim network of knowledge evolution inside the dense one."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from seal_jax import models, slimming
from seal_jax.errors import UsageError


def shapes(model):
    variables = jax.eval_shape(model.init, jax.random.key(0))
    flat = traverse_util.flatten_dict(variables, sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def embed(path, leaf, shape, model):
    """Put a slim leaf at the front of zeros of the dense shape, or of each part of it."""
    inner = path.partition("/")[2]
    layer, _, kind = inner.rpartition("/")
    parts = model.concatenated.get(layer)
    if parts and (kind, layer) != ("bias", model.head):
        axis = max(len(shape) - 2, 0)
        dense, start, slim_start = np.zeros(shape, np.float32), 0, 0
        for part in parts:
            count = part * leaf.shape[axis] // shape[axis]
            rows = leaf.take(range(slim_start, slim_start + count), axis)
            place = [slice(size) for size in leaf.shape]
            place[axis] = slice(start, start + count)
            dense[tuple(place)] = rows
            start, slim_start = start + part, slim_start + count
        return dense
    channels = model.flattened.get(inner, 1)
    if channels > 1:
        positions = shape[0] // channels
        leaf = leaf.reshape(positions, -1, leaf.shape[-1])
        shape = (positions, channels, shape[1])
    dense = np.zeros(shape, np.float32)
    dense[tuple(slice(size) for size in leaf.shape)] = leaf
    return dense.reshape(-1, shape[-1]) if channels > 1 else dense


def dense_and_slim(model, images, train=False):
    """Return the logits of the dense network with zeros outside a slim one, and of the slim one."""
    slim = model.slim(0.5)
    dense_shapes, slim_shapes = shapes(model), shapes(slim)
    assert set(dense_shapes) == set(slim_shapes)
    rng = np.random.default_rng(0)
    # Mostly positive, so that no layer's units are all dead.
    inner = {
        path: rng.uniform(-0.5 if path.endswith("kernel") else 0.1, 1, shape).astype(np.float32)
        for path, shape in slim_shapes.items()
    }
    outer = {path: embed(path, leaf, dense_shapes[path], model) for path, leaf in inner.items()}
    assert any(inner[path].size < outer[path].size for path in inner)

    def logits(model, flat):
        variables = traverse_util.unflatten_dict(flat, sep="/")
        mutable = ["batch_stats"] if train else []
        return jax.jit(lambda v: model.module.apply(v, images, train=train, mutable=mutable)[0])(
            variables
        )

    want = logits(slim, inner)
    assert np.abs(want - want[0]).max() > 1e-3
    return logits(model, outer), want


@pytest.mark.parametrize(
    ("name", "train"),
    [
        (name, False)
        for name in (
            "resnet",
            "wide_resnet",
            "scnn",
            "vgg",
            "mobilenet",
            "mlp",
            "densenet",
            "resnext",
        )
    ]
    + [("scnn", True)],
)
def test_with_batch_norm_the_slim_network_is_the_dense_one_with_zeros_outside(tiny_of, name, train):
    fields = {"block": "bottleneck", "groups": 2, "width_per_group": 3} if name == "resnext" else {}
    model, _, images = tiny_of(name.replace("resnext", "resnet"), norm="batch", **fields)
    # What the event forgets of it, and what `slim` cuts out of it, are the same entries.
    outside = slimming.kernel_slices(
        jax.eval_shape(model.init, jax.random.key(0))["params"],
        0.5,
        first=model.layers[0],
        head=model.head,
        flattened={**model.flattened, **model.concatenated},
    )
    kept = sum(int((~np.asarray(flags)).sum()) for flags in jax.tree.leaves(outside))
    assert kept == sum(math.prod(s) for p, s in shapes(model.slim(0.5)).items() if p[0] == "p")
    got, want = dense_and_slim(model, images, train)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["scnn", "mobilenet"])
def test_with_layer_norm_it_is_a_network_of_its_own(tiny_of, name):
    model, _, images = tiny_of(name)
    assert model.module.norm == "layer"
    got, want = dense_and_slim(model, images)
    assert np.abs(got - want).max() > 0.1  # where BatchNorm agrees to 1e-4


@pytest.mark.parametrize(
    ("name", "keep"),
    [("resnet50", 0.5), ("resnet20", 0.25), ("wrn16-8", 0.75), ("vgg16", 0.3), ("mlp", 0.8)],
)
def test_every_width_is_the_kept_share_rounded_up(name, keep):
    model = models.create(name, num_classes=10, image_shape=(32, 32, 3), norm="batch")
    slim = model.slim(keep)
    assert (slim.blocks, slim.num_classes, slim.image_shape) == (model.blocks, 10, (32, 32, 3))
    found = shapes(slim)
    inputs = f"params/{model.layers[0]}/kernel"
    for path, shape in shapes(model).items():
        widths = [math.ceil(keep * size) for size in shape]
        if path.endswith("kernel"):
            widths[:-2] = shape[:-2]
            if path == inputs:
                widths[-2] = shape[-2]
        if path.startswith(f"params/{model.head}/"):
            widths[-1] = 10
        assert found[path] == tuple(widths), path


def test_shares_that_do_not_fit():
    make = functools.partial(models.create, num_classes=10, image_shape=(32, 32, 3))
    with pytest.raises(UsageError, match=r"method.keep = 0.8 leaves 51.2 of 64 .*: use 0.8125"):
        make("resnet50").slim(0.8)
    assert make("resnet50").slim(0.8125).module.width == 52
    with pytest.raises(UsageError, match=r"method.keep = 0.3 leaves 4.8 of 16 .*: use 0.3125"):
        make("wrn10-1").slim(0.3)
    with pytest.raises(UsageError, match=r"method.keep = 1.5 must lie in \(0, 1\]"):
        make("mlp").slim(1.5)
    narrow = models.WideResNet(num_classes=3, depth=10, width=8, stem_width=4)
    with pytest.raises(UsageError, match=r"no 1x1 shortcut: use 0.25"):
        narrow.slim(0.125)
    assert narrow.slim(0.25).width == 2 * narrow.slim(0.25).stem_width == 2
    with pytest.raises(UsageError, match=r"leaves 25.6 of 32 groups"):
        models.ResNet(
            num_classes=3,
            stage_sizes=(1,),
            block="bottleneck",
            width=40,
            groups=32,
            width_per_group=4,
        ).slim(0.8)
    with pytest.raises(UsageError, match="no slim form"):
        make("vit_small_patch16").slim(0.5)
    # 0.07 * 100 is a little above 7 in floating point.
    assert make("mlp", hidden=(100,)).slim(0.07).module.hidden == (7,)


def test_the_whole_network_is_its_own_slim_one():
    model = models.create("scnn", num_classes=10, image_shape=(8, 8, 1), dtype=jnp.bfloat16)
    assert model.slim(1).module == model.module
