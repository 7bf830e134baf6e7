"""The networks against torchvision's and timm's own modules, weights copied over (needs both)."""

import functools

import jax
import numpy as np
import pytest
from flax import traverse_util

from seal_jax import models

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

from timm.models import efficientnet, vision_transformer  # noqa: E402 - what importorskip lets through

resnet = torchvision.models.resnet


def narrow_mobilenet():
    """Two stages of timm's MobileNetV1, which rounds channels to multiples of 8."""
    stages = efficientnet.decode_arch_def([["dsa_r1_k3_s1_c8"], ["dsa_r2_k3_s2_c16"]])
    layers = {"norm_layer": torch.nn.BatchNorm2d, "act_layer": torch.nn.ReLU6}
    return efficientnet.EfficientNet(
        stages, num_classes=3, num_features=0, stem_size=8, fix_stem=True, **layers
    )


# Our network and theirs: one of every new family, small.
SMALL = {
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
# The whole networks: theirs, by the names under which `models.create` knows ours.
WHOLE = {
    **{
        name: getattr(torchvision.models, name)
        for name in ("densenet121", "densenet201", "resnext50_32x4d", "resnext101_32x8d")
    },
    **{
        name: functools.partial(timm.create_model, theirs)
        for name, theirs in {
            "mobilenetv1": "mobilenetv1_100",
            "vit_small_patch16": "vit_small_patch16_224",
            "vit_base_patch16": "vit_base_patch16_224",
        }.items()
    },
}
LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def torch_state(model, variables):
    """Return the arrays of a network by torch's names and in its layout."""
    (names, *_), state = model.module.torch_layers().values(), {}
    for collection in ("params", "batch_stats"):
        for path, leaf in traverse_util.flatten_dict(variables[collection], sep="/").items():
            layer, _, kind = path.rpartition("/")
            # A free parameter is in no layer; its tensor has a name of its own.
            name = f"{names[layer]}.{LEAVES.get(kind, kind)}" if layer else names[path]
            if kind == "kernel":
                leaf = np.transpose(leaf, {4: (3, 2, 0, 1), 2: (1, 0)}[leaf.ndim])
            state[name] = np.ascontiguousarray(leaf)
    return state


def check_parity(model, theirs, drawn):
    """Compare both modes and the new running statistics, from the same drawn weights."""
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0)))
    state = {name: torch.tensor(leaf) for name, leaf in torch_state(model, variables).items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    counts = {}  # values a channel that each BatchNorm saw
    for name, layer in theirs.named_modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.register_forward_hook(
                lambda _, ins, out, name=name: counts.update({name: out.numel() // out.shape[1]})
            )
    images = np.random.default_rng(0).normal(size=(3, *model.image_shape)).astype(np.float32)

    @jax.jit
    def both(variables, images):
        apply = functools.partial(model.module.apply, variables, images)
        return apply(train=False), apply(train=True, mutable=["batch_stats"])

    inferred, (trained, update) = jax.device_get(both(variables, images))
    pixels = torch.tensor(np.transpose(images, (0, 3, 1, 2)).copy())
    for logits, train in ((inferred, False), (trained, True)):
        with torch.no_grad():
            want = theirs.train(train)(pixels).numpy()
        assert np.abs(logits - want).max() <= 1e-4 * np.abs(want).max()
    new = torch_state(model, {"params": {}, "batch_stats": update.get("batch_stats", {})})
    for name, leaf in new.items():
        if name.endswith("running_var"):
            # torch takes in the unbiased variance, Flax the biased one.
            count = counts[name.removesuffix(".running_var")]
            old = 0.9 * state[name].numpy()
            leaf = old + (leaf - old) * count / (count - 1)
        np.testing.assert_allclose(leaf, theirs.state_dict()[name], 1e-4, 1e-4, err_msg=name)


@pytest.mark.parametrize("convolution", ["native", "matmul"])
@pytest.mark.parametrize("family", SMALL)
def test_small_networks_agree(family, convolution, drawn):
    ours, theirs = SMALL[family]
    module = ours(num_classes=3, convolution=convolution)
    model = models.from_module(module, name=family, image_shape=(32, 48, 3))
    check_parity(model, theirs(), drawn)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_whole_networks_agree(name, drawn):
    # MobileNet's BatchNorms see few values of a small image, which magnifies rounding: torch's own
    # float32 is 1e-4 from its float64 at 64x64.
    side = 224 if name.startswith("vit") else 128 if name == "mobilenetv1" else 64
    model = models.create(name, num_classes=10, image_shape=(side, side, 3))
    check_parity(model, WHOLE[name](num_classes=10), drawn)


@pytest.mark.parametrize("name", WHOLE)
def test_parameters_are_as_many(name):
    model = models.create(name, num_classes=1000, image_shape=(224, 224, 3))
    params = jax.eval_shape(model.init, jax.random.key(0))["params"]
    with torch.device("meta"):
        theirs = WHOLE[name]()
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(
        tensor.numel() for tensor in theirs.parameters()
    )
