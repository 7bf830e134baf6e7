"""Weights by the names of torchvision and timm: what is exported comes back, and what does not fit is told."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from seal_jax import models
from seal_jax.errors import UsageError
from seal_jax.models import torch_weights

SHAPE = (40, 40, 3)


SMALL_VGG = {"group_sizes": (1, 2, 1), "widths": (4, 6, 8), "dense_width": 5, "norm": "batch"}


@pytest.fixture(scope="module")
def small():
    """A ResNet of torchvision's form, and its tensors."""
    model = create()
    return model, torch_weights.to_torch(model, variables_of(model), "torchvision")


def create(**fields):
    fields = {"num_classes": 5, "width": 4, "stage_sizes": (1,) * 4, **fields}
    shape = fields.pop("shape", SHAPE)
    return models.from_module(models.ResNet(**fields), name="small", image_shape=shape)


def variables_of(model, seed=0):
    rng = np.random.default_rng(seed)
    spec = traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0)), sep="/")
    return {path: rng.uniform(0.5, 1, leaf.shape).astype(np.float32) for path, leaf in spec.items()}


@pytest.mark.parametrize("library", ["torchvision", "timm", "seal_jax"])
@pytest.mark.parametrize("network", ["resnet", "vgg", "layer-norm"])
def test_what_is_exported_comes_back_bit_for_bit(library, network):
    if network == "resnet":
        model = create(head_bias=False)
    else:
        fields = SMALL_VGG | {"norm": "batch" if network == "vgg" else "layer"}
        module = models.VGG(num_classes=3, **fields)
        model = models.from_module(module, name="vgg", image_shape=(56, 56, 3))
    variables = variables_of(model)
    tensors = torch_weights.to_torch(model, variables, library)
    assert all(value.flags.c_contiguous for value in tensors.values())
    prefixed = {f"module._orig_mod.{name}": value for name, value in tensors.items()}
    for given in (tensors, prefixed if library != "seal_jax" else tensors):
        back = torch_weights.from_torch(model, given, label="it")
        # ResNet's names are the same in both libraries.
        assert back.library == (
            "torchvision" if network == "resnet" and library == "timm" else library
        )
        assert {*back.variables} == {*variables}
        for path, value in variables.items():
            np.testing.assert_array_equal(back.variables[path], value, strict=True)


def test_half_precision_is_read_as_float32(small):
    model, tensors = small
    half = {
        name: value.astype(np.float16) if value.dtype.kind == "f" else value
        for name, value in tensors.items()
    }
    assert (
        torch_weights.from_torch(model, half, label="it").variables["params/fc/bias"].dtype
        == np.float32
    )


def test_inserted_normalisers_have_a_place_in_our_names_alone(small):
    model, _ = small
    variables = variables_of(model) | {"normalisers/layer1/block0/mean": np.ones((), np.float32)}
    with pytest.raises(UsageError, match=r"normalisers inserted by LW.*use --names=seal_jax"):
        torch_weights.to_torch(model, variables, "torchvision")
    tensors = torch_weights.to_torch(model, variables, "seal_jax")
    assert {*torch_weights.from_torch(model, tensors, label="it").variables} == {*variables}


def renamed(tensors):
    return {name.replace("fc.", "head."): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("fields", "change", "says"),
    [
        (
            {},
            lambda t: {k: v for k, v in t.items() if k != "bn1.bias"},
            r"1 is missing \(bn1.bias\)",
        ),
        (
            {},
            renamed,
            r"2 are missing \(fc.bias, fc.weight\); 2 are unexpected \(head.bias, head.weight\)",
        ),
        ({}, lambda t: t | {"fc.bias": np.full(5, np.nan)}, r"1 is not finite .* \(fc.bias"),
        ({}, lambda t: t | {"fc.bias": np.ones(5, int)}, r"1 is not finite .* \(fc.bias \(int64"),
        ({"num_classes": 3}, dict, r"fc.weight \[5, 32\].*use train.pretrained_head = \"replace\""),
        (
            {"head_bias": False},
            dict,
            r"1 is unexpected \(fc.bias\); use model.head_bias = True, or",
        ),
        ({"norm": "layer"}, dict, r'unexpected \(bn1.running_mean, .*use model.norm = "batch"'),
        ({"stem": "cifar"}, dict, r'conv1.weight \[4, 3, 7, 7\].*use model.stem = "imagenet"'),
        ({"shape": (40, 40, 1)}, dict, r"conv1.weight \[4, 3, 7, 7\].*use data.channels = 3"),
        ({"width": 8}, dict, "use the network and the options of model that the weights were"),
        ({"stage_sizes": (3, 4, 6, 3)}, dict, "missing .*, ...*use the network and the options"),
        # Those of another of our networks.
        ({"stage_sizes": (2, 2, 2, 2)}, "resnet50", "model.name = 'resnet50'"),
    ],
)
def test_weights_that_do_not_fit(small, fields, change, says):
    model, tensors = create(**fields), small[1]
    if change == "resnet50":
        other = models.create("resnet50", num_classes=5, image_shape=SHAPE)
        names = torch_weights.tensor_names(other, "torchvision").values()
        tensors = dict.fromkeys(names, np.ones(1, np.float32))
    else:
        tensors = change(tensors)
    with pytest.raises(
        UsageError, match=f"(?s)^it is not of model.name = 'small'.*{says}"
    ) as error:
        torch_weights.from_torch(model, tensors, label="it")
    assert "\n" not in str(error.value)


def test_a_classifier_that_is_not_wanted_may_have_any_form(small):
    _, tensors = small
    model = create(num_classes=3, head_bias=False)
    taken = torch_weights.from_torch(model, tensors, label="it", head=False).variables
    assert {*variables_of(model)} - {*taken} == {"params/fc/kernel"}
    assert not any(path.startswith("params/fc") for path in taken)


def test_a_prefix_that_the_networks_own_names_have_is_kept():
    module = models.DenseNet(num_classes=3, block_sizes=(1, 1), growth=2, width=4, stem="cifar")
    model = models.from_module(module, name="dense", image_shape=(8, 8, 3))
    tensors = torch_weights.to_torch(model, variables_of(model), "torchvision")
    body = {f"module.{name}": value for name, value in tensors.items() if name[:8] == "features"}
    assert torch_weights.from_torch(model, body, label="it", head=False).library == "torchvision"


def test_a_vgg_on_large_images_has_no_form_in_torch():
    module = models.VGG(num_classes=3, **SMALL_VGG)
    model = models.from_module(module, name="vgg", image_shape=(64, 64, 3))
    with pytest.raises(UsageError, match=r"larger than 7x7.*use --names=seal_jax"):
        torch_weights.to_torch(model, variables_of(model), "timm")
