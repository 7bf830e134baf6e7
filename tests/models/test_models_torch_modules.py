"""The networks against torchvision's and timm's own modules, with their weights and ours (needs both)."""

import collections
import functools

import jax
import numpy as np
import pytest
from flax import traverse_util

from seal_jax import models
from seal_jax.models import torch_weights
from seal_jax.training import weight_files

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
safetensors_torch = pytest.importorskip("safetensors.torch")

from timm.models import efficientnet, vision_transformer  # noqa: E402 - what importorskip lets through

resnet = torchvision.models.resnet


def narrow_mobilenet():
    """Two stages of timm's MobileNetV1, which rounds channels to multiples of 8."""
    stages = efficientnet.decode_arch_def([["dsa_r1_k3_s1_c8"], ["dsa_r2_k3_s2_c16"]])
    layers = {"norm_layer": torch.nn.BatchNorm2d, "act_layer": torch.nn.ReLU6}
    return efficientnet.EfficientNet(
        stages, num_classes=3, num_features=0, stem_size=8, fix_stem=True, **layers
    )


def small_vgg(**head):
    """Torch's layers of a VGG of few channels: the least that the libraries build has 100 million parameters."""
    features = torchvision.models.vgg.make_layers([4, "M", 6, 6, "M", 8, "M"], batch_norm=True)
    return torch.nn.Sequential(collections.OrderedDict(features=features, **head))


def classifier():
    """The end of torchvision's VGG."""
    dense = [torch.nn.Linear(8 * 49, 5), torch.nn.ReLU(), torch.nn.Dropout(0.0)]
    dense += [torch.nn.Linear(5, 5), torch.nn.ReLU(), torch.nn.Dropout(0.0), torch.nn.Linear(5, 3)]
    pool = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(7), torch.nn.Flatten())
    return {"avgpool": pool, "classifier": torch.nn.Sequential(*dense)}


def timm_head():
    """The end of timm's VGG."""
    mlp = timm.models.vgg.ConvMlp(8, 5, drop_rate=0.0)
    return {"pre_logits": mlp, "head": timm.layers.ClassifierHead(5, 3)}


VGG = functools.partial(
    models.VGG, group_sizes=(1, 2, 1), widths=(4, 6, 8), dense_width=5, norm="batch"
)

# Our network and theirs: one of every family, small.
SMALL = {
    "resnet": (
        functools.partial(models.ResNet, stage_sizes=(1,) * 4),
        lambda: resnet.ResNet(resnet.BasicBlock, [1] * 4, num_classes=3),
    ),
    # Torch pools their last feature maps, 3x3 and 8x8, to 7x7: up and down.
    "vgg": (VGG, lambda: small_vgg(**classifier())),
    "vgg-large": (VGG, lambda: small_vgg(**classifier())),
    "vgg-timm": (VGG, lambda: small_vgg(**timm_head())),
    "densenet": (
        functools.partial(models.DenseNet, block_sizes=(2, 1, 2), growth=3, bottleneck=2, width=5),
        lambda: torchvision.models.DenseNet(3, (2, 1, 2), 5, bn_size=2, num_classes=3),
    ),
    "resnext": (
        functools.partial(
            models.ResNet, stage_sizes=(1,) * 4, block="bottleneck", groups=4, width_per_group=2
        ),
        lambda: resnet.ResNet(
            resnet.Bottleneck, [1] * 4, num_classes=3, groups=4, width_per_group=2
        ),
    ),
    "mobilenet": (
        functools.partial(
            models.MobileNet,
            widths=(8, 8, 16, 16),
            strides=(2, 1, 2, 1),
            norm="batch",
            activation="relu6",
        ),
        narrow_mobilenet,
    ),
    "vit": (
        functools.partial(models.ViT, patch=16, width=128, depth=2),
        lambda: vision_transformer.VisionTransformer((32, 48), 16, num_classes=3, embed_dim=128,
                                                     depth=2, num_heads=2),
    ),
}  # fmt: skip
SHAPES = {"vgg": (24, 24, 3), "vgg-large": (64, 64, 3), "vgg-timm": (24, 24, 3)}
# Convolutions with groups, patches and strides of their own are computed in both ways.
CANONICAL = ("densenet", "resnext", "mobilenet", "vit")
# The whole networks: theirs, by the names under which `models.create` knows ours.
WHOLE = {
    **{name: getattr(torchvision.models, name) for name in ("resnet18", "resnet50")},
    **{name: getattr(torchvision.models, name) for name in ("densenet121", "densenet201")},
    **{name: getattr(torchvision.models, name) for name in ("resnext50_32x4d", "resnext101_32x8d")},
    "vgg16": torchvision.models.vgg16_bn,
    **{
        name: functools.partial(timm.create_model, theirs)
        for name, theirs in {
            "resnet34": "resnet34",
            "resnet101": "resnet101",
            "vgg19": "vgg19_bn",
            "mobilenetv1": "mobilenetv1_100",
            "vit_small_patch16": "vit_small_patch16_224",
            "vit_base_patch16": "vit_base_patch16_224",
        }.items()
    },
}


def random_tensors(net):
    """Draw a module's vectors away from 0 and 1; return all its tensors by name."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
                value.uniform_(0.5, 1.5)
            elif value.ndim == 1:
                value.normal_()
    return {name: value.numpy().copy() for name, value in net.state_dict().items()}


def check_parity(model, theirs, exported=True):
    """Compare both modes and the new running statistics, from torch's weights and back."""
    library, flat = torch_weights.from_torch(model, random_tensors(theirs), label="it")
    if exported:
        tensors = torch_weights.to_torch(model, flat, library)
        theirs.load_state_dict(safetensors_torch.load(weight_files.to_bytes(tensors, {})))
    counts = {}  # values a channel that each BatchNorm saw
    for name, layer in theirs.named_modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.register_forward_hook(
                lambda _, ins, out, name=name: counts.update({name: out.numel() // out.shape[1]})
            )
        elif isinstance(layer, torch.nn.Dropout):  # it would drop other values than ours
            layer.p = 0.0
    images = np.random.default_rng(0).normal(size=(3, *model.image_shape)).astype(np.float32)

    @jax.jit
    def both(variables, images):
        apply = functools.partial(model.module.apply, variables, images)
        return apply(train=False), apply(train=True, mutable=["batch_stats"])

    variables = traverse_util.unflatten_dict(flat, sep="/")
    inferred, (trained, update) = jax.device_get(both(variables, images))
    pixels = torch.tensor(np.transpose(images, (0, 3, 1, 2)).copy())
    for logits, train in ((inferred, False), (trained, True)):
        with torch.no_grad():
            want = theirs.train(train)(pixels).numpy()
        assert np.abs(logits - want).max() <= 1e-4 * np.abs(want).max()
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    updated = torch_weights.from_torch(model, state, label="it").variables
    names = torch_weights.tensor_names(model, library)
    for path, leaf in traverse_util.flatten_dict(update, sep="/").items():
        if path.endswith("/var"):
            # torch takes in the unbiased variance, Flax the biased one.
            count = counts[names[path].removesuffix(".running_var")]
            old = 0.9 * flat[path]
            leaf = old + (leaf - old) * count / (count - 1)
        np.testing.assert_allclose(leaf, updated[path], 1e-4, 1e-4, err_msg=path)


@pytest.mark.parametrize(
    ("family", "convolution"),
    [*((family, "native") for family in SMALL), *((family, "canonical") for family in CANONICAL)],
)
def test_small_networks_agree(family, convolution):
    ours, theirs = SMALL[family]
    module = ours(num_classes=3, convolution=convolution)
    shape = SHAPES.get(family, (32, 48, 3))
    model = models.from_module(module, name=family, image_shape=shape)
    # What torch pools down has no form there.
    check_parity(model, theirs(), exported=family != "vgg-large")


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_whole_networks_agree(name):
    # MobileNet's BatchNorms see few values of a small image, which magnifies rounding: torch's own
    # float32 is 1e-4 from its float64 at 64x64.
    side = 224 if name.startswith("vit") else 128 if name == "mobilenetv1" else 64
    model = create(name, num_classes=10, side=side)
    check_parity(model, WHOLE[name](num_classes=10))


@pytest.mark.parametrize("name", WHOLE)
def test_parameters_are_as_many(name):
    model = create(name, num_classes=1000, side=224)
    params = jax.eval_shape(model.init, jax.random.key(0))["params"]
    with torch.device("meta"):
        theirs = WHOLE[name]()
    count = sum(tensor.numel() for tensor in theirs.parameters())
    if name.startswith("vgg"):  # their convolutions have biases, which a BatchNorm follows
        count -= sum(
            layer.bias.numel() for layer in theirs.features if hasattr(layer, "in_channels")
        )
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def create(name, num_classes, side):
    options = {"norm": "batch"} if name.startswith("vgg") else {}
    return models.create(name, num_classes=num_classes, image_shape=(side, side, 3), **options)


def test_pooling_is_torchs():
    for side in (1, 2, 5, 7, 10):
        want = torch.nn.functional.adaptive_avg_pool1d(torch.eye(side)[:, None], 7)[:, 0].T
        np.testing.assert_allclose(torch_weights._pooling(side, 7), want.numpy(), rtol=1e-6)


@pytest.mark.parametrize("side", [3, 4, 9])
def test_positions_are_interpolated_as_in_timm(side):
    embeddings = torch.randn(1, 1 + 6 * 6, 5, generator=torch.manual_seed(0))
    want = timm.layers.resample_abs_pos_embed(embeddings, [side, side])
    found = torch_weights._positions(embeddings.numpy(), 1 + side * side)
    np.testing.assert_allclose(found, want.numpy(), rtol=1e-4, atol=1e-5)
