"""Models by name: what a user may ask for, and what one reads when it cannot be had."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from seal_jax import models
from seal_jax.errors import UsageError


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "resnet19"}, "nearest: resnet1"),
        ({"name": "vgg"}, "nearest: vgg1"),
        ({"name": "????"}, "known: densenet121, densenet201, mlp"),
        ({"name": "wrn27-10"}, "use 22 or 28"),
        ({"name": "wrn4-10"}, "use 10 or 16"),
        ({"name": "wrn10-0"}, "width = 0"),
        ({"stems": "cifar"}, "known: stem, width, norm, initialiser, dropout, head_bias"),
        ({"name": "resnet20", "stem": "cifar"}, "known: shortcut, width"),
        ({"name": "wrn10-1", "width": 4}, "known: stride_on, norm"),
        ({"name": "wrn10-1", "stride_on": "frist"}, "nearest: first"),
        ({"name": "vgg16", "dense_width": 0}, "dense_width = 0"),
        ({"name": "scnn", "pool": 4}, "one of 2, 3"),
        ({"name": "scnn", "image_shape": (3, 8, 1)}, "at least 4"),
        ({"name": "mobilenet", "image_shape": (8, 8, 1)}, "at least 16"),
        ({"name": "mlp", "hidden": ()}, "give some integers"),
        ({"name": "mlp", "hidden": "32"}, "give some integers"),
        ({"name": "mlp", "hidden": (8, 0)}, "at least 1"),
        ({"name": "vit_small_patch16", "image_shape": (72, 64, 3)}, "multiples of 16"),
        ({"name": "vit_small_patch16", "width": 100}, "use 64 or 128"),
        ({"name": "vit_small_patch16", "norm": "batch"}, "one of layer"),
        ({"name": "densenet121", "image_shape": (16, 64, 3)}, "at least 32, or stem='cifar'"),
        ({"norm": "none"}, "one of batch, layer, group"),
        ({"norm": "layers"}, "nearest: layer"),
        ({"initialiser": "xavir"}, "nearest: xavier"),
        ({"dropout": 1.0}, "lie in [0, 1)"),
        ({"head_bias": "no"}, "one of True, False"),
        ({"stem": "cifr"}, "nearest: cifar"),
        ({"name": "resnet20", "shortcut": "C"}, "one of A, B"),
        ({"width": 0}, "width = 0"),
        ({"num_classes": 1}, "at least 2"),
        ({"num_classes": True}, "at least 2"),
        ({"dtype": "float23"}, "nearest: float32"),
        ({"dtype": jnp.int32}, "one of float32, bfloat16"),
        ({"image_shape": (16, 64, 3)}, "at least 32, or stem='cifar'"),
        ({"image_shape": (64, 64)}, "(height, width, channels)"),
        ({"name": "resnet8", "image_shape": (3, 3, 1)}, "at least 4"),
    ],
)
def test_bad_input_is_one_line_that_names_the_mend(change, said):
    call = {"name": "resnet18", "num_classes": 10, "image_shape": (64, 64, 3), **change}
    with pytest.raises(UsageError) as caught:
        models.create(call.pop("name"), **call)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("depth", "said"), [(7, "8 or 14"), (21, "20 or 26"), (-4, "8 or 14")])
def test_depth_that_is_not_6n_plus_2(depth, said):
    with pytest.raises(UsageError, match=said):
        models.cifar_resnet(depth, 10)


def test_bad_module_fields():
    with pytest.raises(UsageError, match="basic"):
        models.ResNet(num_classes=2, stage_sizes=(1,), block="basics")
    with pytest.raises(UsageError, match="stage_sizes"):
        models.ResNet(num_classes=2, stage_sizes=())
    with pytest.raises(UsageError, match=r"strides=.*give 3 integers"):
        models.MobileNet(num_classes=2, widths=(1, 2, 3), strides=(1, 2))
    for fields in ({"block": "bottleneck", "groups": 2}, {"width_per_group": 2}):
        with pytest.raises(UsageError, match=r"groups=.*width_per_group"):
            models.ResNet(num_classes=2, stage_sizes=(1,), **fields)
    with pytest.raises(UsageError, match=r"strides=.*1 or 2"):
        models.MobileNet(num_classes=2, widths=(1, 2), strides=(1, 3))


def test_a_model_is_hashable_and_holds_what_was_asked():
    module = models.ResNet(num_classes=3, stage_sizes=[1, 1], width=4, stem="cifar")
    model = models.from_module(module, name="tiny", image_shape=[2, 2, 1])
    assert hash(model) == hash(models.from_module(module, name="tiny", image_shape=(2, 2, 1)))
    assert (model.num_classes, model.image_shape) == (3, (2, 2, 1))
    assert model.blocks == ("conv1", "bn1", "layer1/block0", "layer2/block0", "fc")


def test_init_is_reproducible_and_has_no_intermediates():
    model = models.create("resnet8", num_classes=10, image_shape=(8, 8, 1), width=4)
    init = jax.jit(model.init)
    first, again, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    assert set(first) == {"params", "batch_stats"}
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernels = (v["params"]["layer1"]["block0"]["conv1"]["kernel"] for v in (first, other))
    assert not np.array_equal(*kernels)
    assert {leaf.dtype for leaf in jax.tree.leaves(first)} == {jnp.dtype("float32")}


def test_init_is_a_plain_normal_of_fan_in():
    model = models.create("resnet8", num_classes=10, image_shape=(8, 8, 1), width=32)
    params = jax.jit(model.init)(jax.random.key(3))["params"]
    kernel = np.asarray(params["layer3"]["block0"]["conv2"]["kernel"])
    unit = kernel / np.sqrt(2 / (9 * 128))
    assert unit.std() == pytest.approx(1, abs=0.01)
    assert np.mean(unit**4) == pytest.approx(3, abs=0.1)
    # 4.55 % of a normal lies beyond two standard deviations; of a truncated one, none.
    assert np.mean(np.abs(unit) > 2) == pytest.approx(0.0455, abs=0.003)
    head = np.asarray(params["fc"]["kernel"])
    assert head.std() == pytest.approx(np.sqrt(2 / 128), rel=0.1)
    np.testing.assert_array_equal(params["fc"]["bias"], 0)
    np.testing.assert_array_equal(params["bn1"]["scale"], 1)
    np.testing.assert_array_equal(params["bn1"]["bias"], 0)


def kernels(module, layers):
    """Draw the kernels of some layers only: what is not returned is not compiled."""
    model = models.from_module(module, name="tiny", image_shape=(16, 16, 3))

    @jax.jit
    def draw(key):
        params = traverse_util.flatten_dict(model.init(key)["params"], sep="/")
        return {layer: params[f"{layer}/kernel"] for layer in layers}

    return {layer: np.asarray(kernel) for layer, kernel in draw(jax.random.key(0)).items()}


def test_wide_resnets_are_drawn_over_fan_out():
    module = models.WideResNet(depth=10, num_classes=50)
    drawn = kernels(module, ["layer3/block0/conv1", "fc"])
    # From 32 to 64 channels: over fan_in it would be larger by a factor of sqrt 2.
    assert drawn["layer3/block0/conv1"].std() == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.02)
    assert drawn["fc"].std() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("initialiser", ["he", "xavier"])
def test_initialisers_know_the_fans_of_each_kind_of_layer(initialiser):
    module = models.MobileNet(
        num_classes=50, initialiser=initialiser, widths=(32, 96), strides=(1, 1)
    )
    fans = {
        "block1/conv": (9 * 3, 9 * 32),
        "block2/depthwise": (9, 9),
        "block2/pointwise": (32, 96),
        "fc": (96, 50),
    }
    for layer, kernel in kernels(module, fans).items():
        fan_in, fan_out = fans[layer]
        variance = 2 / fan_in if initialiser == "he" else 2 / (fan_in + fan_out)
        assert kernel.std() == pytest.approx(np.sqrt(variance), rel=0.1), layer
        if initialiser == "xavier":
            assert np.abs(kernel).max() <= np.sqrt(3 * variance)


class Foreign(nn.Module):
    """A network from elsewhere: what ``from_module`` asks for and nothing else."""

    num_classes: int = 2
    dtype: Any = jnp.float32
    blocks: ClassVar[tuple[str, ...]] = ("only",)
    layers: ClassVar[tuple[str, ...]] = ("only",)
    head: ClassVar[str] = "only"

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(self.num_classes, name="only")(x.reshape(len(x), -1))


def test_a_module_that_declares_little_is_a_model_still():
    model = models.from_module(Foreign(), name="foreign", image_shape=(2, 2, 1))
    variables = model.init(jax.random.key(0))
    assert variables["batch_stats"] == {}
    assert (model.round_blocks, model.dense_after_convs, model.flattened) == ((), ("only",), {})
    assert model.empty_normalisers() == {}
    with pytest.raises(UsageError, match="must sow 'features'"):
        model.extract(variables, jnp.ones((1, 2, 2, 1)), train=False)
    with pytest.raises(UsageError, match="has no slim form"):
        model.slim(0.5)
