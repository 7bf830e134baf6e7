"""Weights of torchvision's and timm's own modules in our networks and back (the parity needs torch)."""

import functools

import jax
import numpy as np
import pytest
from flax import traverse_util

from seal_jax import models
from seal_jax.errors import UsageError
from seal_jax.models import torch_weights

SHAPE = (40, 40, 3)


def torchvision_resnet(kind, sizes, **options):
    resnet = pytest.importorskip("torchvision").models.resnet
    return resnet.ResNet(getattr(resnet, kind), sizes, **options)


def small_vgg(library):
    """Their convolutions and heads, on few channels; the whole ones have 140 million parameters."""
    torch, torchvision = pytest.importorskip("torch"), pytest.importorskip("torchvision")
    nn = torch.nn
    layers = {
        "features": torchvision.models.vgg.make_layers([4, "M", 6, 6, "M", 8, "M"], batch_norm=True)
    }
    if library == "torchvision":
        layers["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(7), nn.Flatten())
        dense = [(nn.Linear(a, b), nn.ReLU(), nn.Dropout(0.0)) for a, b in ((8 * 49, 5), (5, 5))]
        layers["classifier"] = nn.Sequential(*dense[0], *dense[1], nn.Linear(5, 3))
    else:
        timm = pytest.importorskip("timm")
        layers["pre_logits"] = timm.models.vgg.ConvMlp(8, 5, 7, drop_rate=0.0)
        layers["head"] = timm.layers.ClassifierHead(5, 3)
    module = nn.Sequential()
    for name, layer in layers.items():
        module.add_module(name, layer)
    return module


SMALL_VGG = {"group_sizes": (1, 2, 1), "widths": (4, 6, 8), "dense_width": 5, "norm": "batch"}
BASIC, BOTTLENECK = {"stage_sizes": (1, 1, 1, 1)}, {"stage_sizes": (1, 2, 1, 1)}
# Torch's module, ours, and the side of the images.
CASES = {
    "basic": (
        lambda: torchvision_resnet("BasicBlock", [1, 1, 1, 1], num_classes=3),
        functools.partial(models.ResNet, **BASIC),
        40,
    ),
    "bottleneck": (
        lambda: torchvision_resnet("Bottleneck", [1, 2, 1, 1], num_classes=3),
        functools.partial(models.ResNet, block="bottleneck", **BOTTLENECK),
        40,
    ),
    # The last feature map is 3x3, which torch pools up to 7x7; and 8x8, which it pools down.
    "vgg": (lambda: small_vgg("torchvision"), functools.partial(models.VGG, **SMALL_VGG), 24),
    "vgg-large": (lambda: small_vgg("torchvision"), functools.partial(models.VGG, **SMALL_VGG), 64),
    "vgg-timm": (lambda: small_vgg("timm"), functools.partial(models.VGG, **SMALL_VGG), 56),
}


def random_weights(net):
    """Draw weights and statistics of a torch module away from 0 and 1; return them by name."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
                value.uniform_(0.5, 1.5)
            elif value.ndim == 1:
                value.normal_()
    return {name: value.numpy().copy() for name, value in net.state_dict().items()}


def check_parity(net, module, shape):
    """Check both directions of the conversion, inference, training and the updated statistics."""
    torch = pytest.importorskip("torch")
    model = models.from_module(module, name="it", image_shape=shape)
    tensors = random_weights(net)
    library, flat = torch_weights.from_torch(model, tensors, label="it")
    images = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)

    @jax.jit
    def both(variables, images):
        trained, update = module.apply(variables, images, train=True, mutable=["batch_stats"])
        return module.apply(variables, images, train=False), trained, update.get("batch_stats", {})

    variables = traverse_util.unflatten_dict(flat, sep="/")
    inferred, trained, statistics = jax.device_get(both(variables, images))
    # The module of our export: the same function, and the same bits where nothing was folded.
    if library != "timm" or shape[0] < 64:
        back = torch_weights.to_torch(model, flat, library)
        net.load_state_dict({name: torch.tensor(value) for name, value in back.items()})
        again = torch_weights.from_torch(model, back, label="it")
        assert again.library == library
    counts = {}  # values per channel that each BatchNorm saw
    for name, layer in net.named_modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.register_forward_hook(
                lambda _, ins, out, name=name: counts.update({name: out.numel() // out.shape[1]})
            )
    torch_images = torch.tensor(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        for ours, train in ((inferred, False), (trained, True)):
            want = net.train(train)(torch_images).numpy()
            assert np.abs(ours - want).max() <= 1e-4 * np.abs(want).max()
    # torch has taken in the unbiased variance, Flax the biased one: in torch's terms
    for path, new in traverse_util.flatten_dict(statistics, sep="/").items():
        old = flat[f"batch_stats/{path}"]
        if path.endswith("/var"):
            name = torch_weights.tensor_names(model, library)[f"batch_stats/{path}"]
            count = counts[name.rpartition(".")[0]]
            new = 0.9 * old + (new - 0.9 * old) * count / (count - 1)
        flat[f"batch_stats/{path}"] = new
    state = {name: value.numpy() for name, value in net.state_dict().items()}
    updated = torch_weights.from_torch(model, state, label="it").variables
    for path, value in flat.items():
        if path.startswith("batch_stats/"):
            np.testing.assert_allclose(value, updated[path], 1e-4, 1e-4, err_msg=path)


@pytest.mark.parametrize("case", [case for case in CASES if case != "vgg-large"])
def test_torch_and_our_network_agree(case):
    make, module, side = CASES[case]
    check_parity(make(), module(num_classes=3), (side, side, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "name", "ours"),
    [
        ("torchvision", "resnet18", "resnet18"),
        ("timm", "resnet34", "resnet34"),
        ("torchvision", "resnet50", "resnet50"),
        ("timm", "resnet101", "resnet101"),
        ("torchvision", "vgg16_bn", "vgg16"),
        ("timm", "vgg19_bn", "vgg19"),
    ],
)
def test_the_libraries_whole_networks(library, name, ours):
    pytest.importorskip(library)
    if library == "timm":
        net = pytest.importorskip("timm").create_model(name, num_classes=7, drop_rate=0.0)
    else:
        net = getattr(pytest.importorskip("torchvision").models, name)(num_classes=7)
    for module in net.modules():  # VGG drops in training, by another generator than ours
        if isinstance(module, pytest.importorskip("torch").nn.Dropout):
            module.p = 0.0
    options = {"norm": "batch"} if ours.startswith("vgg") else {}
    model = models.create(ours, num_classes=7, image_shape=(64, 64, 3), **options)
    assert torch_weights.libraries(model) == ("torchvision", "timm", "seal_jax")
    check_parity(net, model.module, (64, 64, 3))


def test_pooling_is_torchs():
    torch = pytest.importorskip("torch")
    for side in (1, 2, 5, 7, 10):
        rows = torch.eye(side)[:, None]
        want = torch.nn.functional.adaptive_avg_pool1d(rows, 7)[:, 0].numpy().T
        np.testing.assert_allclose(torch_weights._pooling(side, 7), want, rtol=1e-6)


@pytest.fixture(scope="module")
def small():
    """A ResNet of torchvision's form, and its tensors."""
    model = create()
    return model, torch_weights.to_torch(model, variables_of(model), "torchvision")


def create(**fields):
    fields = {"num_classes": 5, "width": 4, **BASIC, **fields}
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


def test_a_vgg_on_large_images_has_no_form_in_torch():
    module = models.VGG(num_classes=3, **SMALL_VGG)
    model = models.from_module(module, name="vgg", image_shape=(64, 64, 3))
    with pytest.raises(UsageError, match=r"larger than 7x7.*use --names=seal_jax"):
        torch_weights.to_torch(model, variables_of(model), "timm")
