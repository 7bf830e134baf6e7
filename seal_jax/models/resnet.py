"""Residual networks (He et al. 2016, arXiv:1512.03385) and ResNeXt (Xie et al. 2017, arXiv:1611.05431).

ResNet-18, 34, 50 and 101 have torchvision's layout, and so have ResNeXt-50 (32x4d) and 101 (32x8d),
bottlenecks whose 3x3 convolutions have 32 groups. Those of section 4.2, for 32x32 images, have a
depth of 6n + 2 weight layers: a 3x3 stem, three stages of n basic blocks with 16, 32 and 64 channels,
the mean over the image and a classifier, with the parameter-free shortcut A. Where it puts the zero
channels the paper does not say; here they come after the input's own.

Three things differ from ``torchvision.models.resnet`` on purpose:

- Arrays are channels-last, kernels ``[h, w, in, out]``, and a downsample branch is named
  ``downsample_conv`` and ``downsample_bn`` where torchvision has ``downsample.0`` and ``.1``.
- By default convolutions and the classifier are drawn He-normal over *fan_in* and the classifier's
  bias is zero, as SEAL's experiments have it; torchvision draws convolutions over fan_out and leaves
  the classifier to torch's default.
- The running variance of BatchNorm is updated with the *biased* variance of the batch, as in Flax;
  torch's unbiased one is larger by n / (n - 1) for n = batch x height x width values per channel.
  Running means, and everything computed in training mode, agree.
"""

import functools
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from seal_jax.errors import UsageError, check_integer
from seal_jax.models import network as net

# The kernel sizes of a block's convolutions (He et al. 2016, figure 5).
BLOCKS: dict[str, tuple[int, ...]] = {"basic": (3, 3), "bottleneck": (1, 3, 1)}


class ResidualBlock(net.Layered, kw_only=True):
    """Convolutions ``conv1`` upwards, each normalised by ``bn1`` upwards, the shortcut, and a last ReLU.

    The first 3x3 convolution strides. In a bottleneck the paper strides the 1x1 before it; torchvision
    strides the 3x3, known as ResNet v1.5.

    Attributes:
        kind: a key of ``BLOCKS``.
        width: channels; a bottleneck's last convolution has four times as many.
        inner_width: channels of the convolutions before the last.
        groups: of the 3x3 convolution of a bottleneck.
        stride: 1 or 2, the factor by which the block shrinks the image.
        shortcut: what carries the input across a change of shape, He et al. 2016 section 3.3:
            ``"A"`` subsamples and appends zero channels, ``"B"`` is 1x1 convolution and norm.
    """

    kind: str
    width: int
    inner_width: int
    groups: int
    stride: int
    shortcut: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[N, H, W, C]`` to ``[N, H / stride, W / stride, C']``, sizes rounded up."""
        sizes = BLOCKS[self.kind]
        out = self.width * 4 if self.kind == "bottleneck" else self.width
        y = x
        for index, size in enumerate(sizes):
            # No ReLU after the last norm: the shortcut is added first.
            y = self._hidden(index, nn.relu(y)) if index else y
            width = out if index == len(sizes) - 1 else self.inner_width
            stride = self.stride if index == sizes.index(3) else 1
            groups = self.groups if size == 3 else 1
            y = self._conv(width, size, f"conv{index + 1}", stride, groups=groups)(y)
            y = self._norm(y, train, f"bn{index + 1}")
        if self.stride != 1 or x.shape[-1] != out:
            # A has no parameters: every stride-th pixel, and zeros for the channels that the input lacks.
            if self.shortcut == "A":
                x = x[:, :: self.stride, :: self.stride]
                x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, out - x.shape[-1])))
            else:
                x = self._conv(out, 1, "downsample_conv", self.stride)(x)
                x = self._norm(x, train, "downsample_bn")
        y = y + x
        self.sow("intermediates", "before_relu", y)
        return self._finish(nn.relu(y))


class ResNet(net.Network, kw_only=True):
    """A residual network: a stem, stages that halve the image and double the width, a classifier.

    The parameter tree is ``conv1``, ``bn1``, ``layer<N>/block<M>/...`` with N from 1 and M from 0, and
    ``fc``. The normalisations are called ``bn`` whatever ``norm`` is. Besides what every network sows
    there is ``stem``, after ReLU and pool. Dropout applies to the features.

    Attributes:
        stage_sizes: residual blocks in each stage, bottom to top.
        block: ``"basic"`` or ``"bottleneck"``.
        width: channels of the stem and of the 3x3 convolutions of the first stage.
        stem: ``"imagenet"``, a 7x7 convolution with stride 2 and a 3x3 max-pool with stride 2, or
            ``"cifar"``, a 3x3 convolution that keeps the size.
        shortcut: ``"A"`` or ``"B"`` of He et al. 2016 section 3.3; torchvision's is B.
        groups: of the 3x3 convolutions of bottlenecks, the cardinality of ResNeXt.
        width_per_group: channels of each of them in the first stage, and twice as many in each further
            one; 0 for the stage's width, without groups.

    The other fields are those of ``Network`` and ``Layered``.
    """

    stage_sizes: tuple[int, ...]
    block: str = "basic"
    width: int = 64
    stem: str = "imagenet"
    shortcut: str = "B"
    groups: int = 1
    width_per_group: int = 0

    choices: ClassVar[dict[str, Any]] = {"block": BLOCKS, "stem": net.STEMS, "shortcut": ("A", "B")}
    width_fields: ClassVar[tuple[str, ...]] = ("width",)

    def __post_init__(self) -> None:
        """Check the fields."""
        self.stage_sizes = net.positive("stage_sizes", self.stage_sizes)
        check_integer("groups", self.groups, 1)
        check_integer("width_per_group", self.width_per_group, 0)
        grouped = self.groups > 1 or self.width_per_group
        if grouped and (self.block == "basic" or not self.width_per_group):
            raise UsageError(
                f"groups={self.groups!r}, width_per_group={self.width_per_group!r}: give both, and "
                "block='bottleneck'"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits, float32 ``[N, num_classes]``, of images ``[N, H, W, C]``."""
        x = self._stem(x, train, self.stem, self.width)
        make = self._block(
            ResidualBlock, kind=self.block, shortcut=self.shortcut, groups=self.groups
        )
        # Also of one group, all that a slim ResNeXt may have left.
        inner = self.groups * self.width_per_group or self.width

        def block(*, width: int, **fields: Any) -> nn.Module:
            # Inner widths double from stage to stage as the widths do.
            return make(width=width, inner_width=width // self.width * inner, **fields)

        return self._pooled_logits(net.stages(x, train, self.stage_sizes, self.width, block), train)

    @property
    def structure(self) -> net.Structure:
        """K = 16 residual blocks in ResNet-50; the stem is none of them."""
        blocks = net.staged(self.stage_sizes)
        inner = range(1, len(BLOCKS[self.block]))
        return net.Structure(
            blocks=("conv1", "bn1", *blocks, net.HEAD),
            layers=(
                "conv1",
                *net.within(blocks, *net.numbered("conv", len(BLOCKS[self.block]))),
                net.HEAD,
            ),
            round_blocks=blocks,
            flattened=dict.fromkeys(
                net.within(blocks if self.groups > 1 else (), "conv2/kernel"), 1
            ),
            total_stride=net.STEMS[self.stem] * 2 ** (len(self.stage_sizes) - 1),
            smaller_stride=", or stem='cifar'" if self.stem == "imagenet" else "",
            units=net.inner_units(
                blocks, *((f"conv{number}", f"bn{number}", f"conv{number + 1}") for number in inner)
            ),
        )

    def torch_layers(self) -> dict[str, dict[str, str]]:
        """Return the names of the layers in torchvision and timm, whose networks have four stages."""
        if len(self.stage_sizes) != 4 or self.shortcut != "B":
            return {}
        names = {layer: layer for layer in ("conv1", "bn1", net.HEAD)}
        for block in net.staged(self.stage_sizes):
            module = block.replace("/block", ".")
            for number in range(1, len(BLOCKS[self.block]) + 1):
                for layer in (f"conv{number}", f"bn{number}"):
                    names[f"{block}/{layer}"] = f"{module}.{layer}"
            # The first block of a stage changes the shape, but for that of basic blocks after the stem.
            if block.endswith("/block0") and (self.block, block) != ("basic", "layer1/block0"):
                names[f"{block}/downsample_conv"] = f"{module}.downsample.0"
                names[f"{block}/downsample_bn"] = f"{module}.downsample.1"
        return {"torchvision": names, "timm": names}

    def slim(self, keep: float) -> Self:
        """Return the network with ``keep * width`` channels, which must be whole, as must the groups."""
        groups = net.slim_stages(keep, self.groups, "groups") if self.groups > 1 else 1
        return self.clone(width=net.slim_stages(keep, self.width), groups=groups)


def cifar_resnet(
    depth: int,
    num_classes: int,
    *,
    width: int = 16,
    shortcut: str = "A",
    **options: Any,
) -> ResNet:
    """Return the residual network of ``depth`` = 6n + 2 weight layers.

    ``depth`` is 8, 14, 20, ...: any 6n + 2 with n of at least 1. The stem and the first stage have
    ``width`` channels, the others twice and four times that. ``options`` are other fields of ``ResNet``.

    >>> cifar_resnet(20, 10).stage_sizes
    (3, 3, 3)
    """
    net.check_depth(depth, 2)
    return ResNet(
        num_classes=num_classes,
        stage_sizes=((depth - 2) // 6,) * 3,
        block="basic",
        width=width,
        stem="cifar",
        shortcut=shortcut,
        **options,
    )


def _of_stages(
    source: str, used: str, config: str, block: str, *stage_sizes: int, **fields: Any
) -> net.Entry:
    build = functools.partial(ResNet, block=block, stage_sizes=stage_sizes, **fields)
    return net.Entry(build, ("stem", "width"), source, used, config)


# Where a paper trains it, and a config.
_CIFAR = {
    20: ("Frankle and Carbin 2019 (IMP)", "imp_cifar10.py"),
    110: ("SEAL paper, Table 9", "seal_cifar100.py:seal_resnet110"),
}
_RESNET, _RESNEXT = "He et al. 2016", "Xie et al. 2017"
_SEAL_18, _SEAL_50 = "SEAL paper, Tables 8, 10 and 12", "SEAL paper; LW paper, appendix B.1"

MODELS = {
    # Table 1 of He et al.
    "resnet18": _of_stages(
        _RESNET,
        f"{_SEAL_18}; FAST paper, sections 6.2 to 6.5",
        "seal_cifar100.py",
        "basic",
        *(2, 2, 2, 2),
    ),
    "resnet34": _of_stages(_RESNET, "", "fast_cifar100.py", "basic", 3, 4, 6, 3),
    "resnet50": _of_stages(_RESNET, _SEAL_50, "seal_tiny_imagenet.py", "bottleneck", 3, 4, 6, 3),
    "resnet101": _of_stages(_RESNET, "", "fast_cifar100.py", "bottleneck", 3, 4, 23, 3),
    # Table 1 of Xie et al., and torchvision's larger one.
    "resnext50_32x4d": _of_stages(
        _RESNEXT, "", "fast_cifar100.py", "bottleneck", 3, 4, 6, 3, groups=32, width_per_group=4
    ),
    "resnext101_32x8d": _of_stages(
        _RESNEXT,
        "FAST paper, section 6.7",
        "fast_cifar100.py:fast_resnext101_32x8d",
        "bottleneck",
        *(3, 4, 23, 3),
        groups=32,
        width_per_group=8,
    ),
    # 20 to 110 are the paper's of section 4.2; 8 and 14 are for tests and small images.
    **{
        f"resnet{depth}": net.Entry(
            functools.partial(cifar_resnet, depth),
            ("shortcut", "width"),
            _RESNET,
            *_CIFAR.get(depth, ("", "digits_resnet8.py")),
        )
        for depth in (8, 14, 20, 32, 44, 56, 110)
    },
}
