"""Published parameter counts, and the declared order against the real parameter tree."""

import functools
import math

import jax
import pytest
from flax import traverse_util

from seal_jax import layerwise, models, paths


@functools.cache
def shapes(name, num_classes=10, **options):
    """Model and its parameters' shapes by path."""
    model = models.create(name, num_classes=num_classes, image_shape=(64, 64, 3), **dict(options))
    params = jax.eval_shape(model.init, jax.random.key(0))["params"]
    flat = traverse_util.flatten_dict(params, sep="/")
    return model, {path: leaf.shape for path, leaf in flat.items()}


def size(shapes):
    return sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
    ],
)
def test_torchvision_counts(name, published):
    _, found = shapes(name, 1000)
    assert size(found) == published


@pytest.mark.parametrize(
    ("name", "tensors", "params", "forget_tensors", "forget_params"),
    [
        ("resnet50", 161, 23_917_832, 72, 1_444_928),
        ("resnet18", 62, 11_279_112, 30, 683_072),
    ],
)
def test_seal_forget_subtree(name, tensors, params, forget_tensors, forget_params):
    """SEAL section 4: 200 classes, everything before layer3 forgets."""
    model, found = shapes(name, 200)
    assert (len(found), size(found)) == (tensors, params)
    before = model.blocks[: model.blocks.index("layer3/block0")]
    forget = {
        path: shape
        for path, shape in found.items()
        if any(path.startswith(f"{block}/") for block in before)
    }
    assert (len(forget), size(forget)) == (forget_tensors, forget_params)


def test_seal_layer_23_of_resnet50():
    assert shapes("resnet50", 200)[0].layers[23 - 1] == "layer3/block0/conv1"


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 44, 56, 110])
def test_cifar_counts(depth):
    """Closed form of He et al. section 4.2 with shortcut A: only 3x3 convolutions, norms, fc."""
    n = (depth - 2) // 6
    convs = 9 * (3 * 16 + 2 * n * (16**2 + 32**2 + 64**2) - 16 * 32 - 32 * 64)
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    _, found = shapes(f"resnet{depth}")
    assert size(found) == convs + norms + 64 * 10 + 10


def test_cifar_counts_of_the_paper():
    """He et al. table 6, in millions."""
    table = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85}
    assert {name: round(size(shapes(name)[1]) / 1e6, 2) for name in table} == table
    assert round(size(shapes("resnet110")[1]) / 1e6, 1) == 1.7


def test_shortcut_b_adds_two_projections():
    _, plain = shapes("resnet8")
    _, projected = shapes("resnet8", shortcut="B")
    assert set(projected) - set(plain) == {
        f"layer{stage}/block0/downsample_{leaf}"
        for stage in (2, 3)
        for leaf in ("conv/kernel", "bn/scale", "bn/bias")
    }
    assert size(projected) - size(plain) == 16 * 32 + 32 * 64 + 2 * (32 + 64)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # torchvision's with BatchNorm, less the biases of its convolutions.
        ("vgg16", 138_365_992 - (2 * 64 + 2 * 128 + 3 * 256 + 6 * 512)),
        ("vgg19", 143_678_248 - (2 * 64 + 2 * 128 + 4 * 256 + 8 * 512)),
    ],
)
def test_vgg_counts(name, published):
    model = models.create(name, num_classes=1000, image_shape=(224, 224, 3))
    params = jax.eval_shape(model.init, jax.random.key(0))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == published


def test_wide_resnet_counts():
    """Zagoruyko and Komodakis: 36.5M for 28-10, and 11.0M for 16-8, both with 10 classes."""
    assert size(shapes("wrn28-10")[1]) == 36_479_194
    assert round(size(shapes("wrn16-8")[1]) / 1e6, 1) == 11.0


def test_mobilenet_counts():
    """Keras has 4,231,976 trainable ones; Howard et al. 4.2M, and 2.9M without five layers of 512."""

    def count(repeats):
        module = models.MobileNet(
            num_classes=1000,
            widths=(32, 64, 128, 128, 256, 256, 512, *(512,) * repeats, 1024, 1024),
            strides=(2, 1, 2, 1, 2, 1, 2, *(1,) * repeats, 2, 1),
        )
        model = models.from_module(module, name="full", image_shape=(224, 224, 3))
        params = jax.eval_shape(model.init, jax.random.key(0))["params"]
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    assert count(5) == 4_231_976
    assert round(count(0) / 1e6, 1) == 2.9


def test_scnn_count():
    """The table of the paper, line by line, on 64x64 images."""
    convs = 9 * (3 * 32 + 32 * 32 + 32 * 64 + 64 * 64)
    norms = 2 * (32 + 32 + 64 + 64 + 512)
    dense = 16 * 16 * 64 * 512 + 512 * 10 + 10
    assert size(shapes("scnn")[1]) == convs + norms + dense


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("scnn", 4), ("mobilenet", 7), ("vgg16", 13), ("resnet50", 16), ("densenet201", 4)],
)
def test_blocks_of_layerwise_reinitialisation(name, blocks):
    """K of the paper, appendix B.1; of DenseNet its dense blocks."""
    model, found = shapes(name)
    assert len(model.round_blocks) == blocks
    params = traverse_util.unflatten_dict(found, sep="/")
    levels = layerwise.block_levels(params, model.blocks, model.round_blocks)
    assert set(levels) == set(range(1, blocks + 2))


def depth(name):
    """Weight layers, as the declared order counts them, by the name of the network."""
    own = {"scnn": 4 + 1 + 1, "mobilenet": 1 + 2 * 6 + 1, "mobilenetv1": 28, "mlp": 3}
    own |= dict.fromkeys(("vit_small_patch16", "vit_base_patch16"), 1 + 4 * 12 + 1)
    wide = name.removeprefix("wrn").split("-")[0]
    # Depth 6n + 4 counts three 1x1 shortcuts and not the classifier.
    return own.get(name) or (
        int(wide) - 2 if name.startswith("wrn") else int(name.lstrip("resntxvgd").split("_")[0])
    )


@pytest.mark.parametrize("name", models.names())
def test_declared_order_fits_the_tree(name):
    model, found = shapes(name, 1000 if name in ("resnet34", "resnet101") else 10)
    for path in found:
        owners = [block for block in model.blocks if paths.below(path, block)]
        assert len(owners) == 1, path
    for block in model.blocks:
        assert any(paths.below(path, block) for path in found), block
    kernels = {path.removesuffix("/kernel") for path in found if path.endswith("/kernel")}
    assert set(model.layers) == {path for path in kernels if "downsample" not in path}
    assert len(set(model.layers)) == len(model.layers) == depth(name)
    assert model.blocks[-1] == model.layers[-1] == model.head == "fc"
    # Bottom to top: the blocks that own the layers never go down.
    owners = [
        next(i for i, block in enumerate(model.blocks) if f"{layer}/".startswith(f"{block}/"))
        for layer in model.layers
    ]
    assert owners == sorted(owners)
    # Dense kernels have two axes, and all lie above the convolutions, but where they are the body.
    dense = {path.split("/")[0] for path, shape in found.items() if len(shape) == 2}
    body = name == "mlp" or name.startswith("vit")
    assert set(model.dense_after_convs) == ({"fc"} if body else dense)
    # Every layer of the tree has a torch name of its own.
    mapped = getattr(model.module, "torch_layers", dict)()
    tops = {path.rpartition("/")[0] or path for path in found}
    for names in mapped.values():
        assert tops <= set(names)
        assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("name", ["resnet50", "wrn10-1"])
def test_layer_norm_has_the_parameters_of_batch_norm(name):
    model, found = shapes(name, norm="layer")
    assert found == shapes(name)[1]
    assert jax.eval_shape(model.init, jax.random.key(0))["batch_stats"] == {}


def test_path_names():
    _, found = shapes("resnet18", 200)
    assert found["conv1/kernel"] == (7, 7, 3, 64)
    assert found["layer1/block0/bn1/scale"] == (64,)
    assert found["layer3/block0/downsample_conv/kernel"] == (1, 1, 128, 256)
    assert found["layer3/block0/downsample_bn/scale"] == (256,)
    assert found["fc/kernel"] == (512, 200)
    assert shapes("resnet18", stem="cifar")[1]["conv1/kernel"] == (3, 3, 3, 64)
