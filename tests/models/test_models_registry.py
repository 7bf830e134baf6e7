"""Models by name: what a user may ask for, and what one reads when it cannot be had."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax import models
from seal_jax.errors import UsageError


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "resnet19"}, "nearest: resnet1"),
        ({"name": "vgg"}, "known: resnet18"),
        ({"stems": "cifar"}, "known: stem, width"),
        ({"name": "resnet20", "stem": "cifar"}, "known: shortcut, width"),
        ({"stem": "cifr"}, "nearest: cifar"),
        ({"name": "resnet20", "shortcut": "C"}, "'A' or 'B'"),
        ({"width": 0}, "width=0"),
        ({"num_classes": 1}, "at least 2"),
        ({"num_classes": True}, "at least 2"),
        ({"dtype": "float23"}, "nearest: float32"),
        ({"dtype": jnp.int32}, "float32 or bfloat16"),
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
