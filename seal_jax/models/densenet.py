"""Densely connected networks, DenseNet-BC (Huang et al. 2017, arXiv:1608.06993), in torchvision's layout.

A stem, dense blocks with a transition that halves channels and image between them, a normalisation,
the mean over the image and a classifier. A dense block is a chain of dense layers, each of which
appends its ``growth`` new channels to all that came before it.

What layerwise reinitialisation and the probes take for blocks are the dense blocks, four of them; the
declared order of the parameters has every dense layer, so a mask may begin at any of them. Torchvision
draws the classifier by torch's default, here it is He-normal like the convolutions.
"""

import functools
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from seal_jax.models import network as net
from seal_jax.units import Units


class DenseLayer(net.Layered, kw_only=True):
    """Norm, ReLU, 1x1 convolution to ``bottleneck`` times ``growth`` channels, norm, ReLU, 3x3 convolution.

    Attributes:
        growth: channels that the layer adds.
        bottleneck: of the channels in between, as a multiple of ``growth``.
        dropout: rate, of the new channels.
    """

    growth: int
    bottleneck: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[N, H, W, C]`` to ``[N, H, W, C + growth]``."""
        y = nn.relu(self._norm(x, train, "norm1"))
        y = self._conv(self.bottleneck * self.growth, 1, "conv1")(y)
        y = self._hidden(1, nn.relu(self._norm(y, train, "norm2")))
        y = self._conv(self.growth, 3, "conv2")(y)
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return jnp.concatenate([x, y], axis=-1)


class DenseBlock(net.Layered, kw_only=True):
    """``size`` dense layers, ``layer0`` upwards, made by ``layer`` from their names."""

    size: int
    layer: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[N, H, W, C]`` to ``[N, H, W, C + size * growth]``."""
        for index in range(self.size):
            x = self.layer(name=f"layer{index}")(x, train)
        return self._finish(x)


class Transition(net.Layered, kw_only=True):
    """Norm, ReLU, 1x1 convolution to half the channels, and the mean over windows of 2x2."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[N, H, W, C]`` to ``[N, H // 2, W // 2, C // 2]``."""
        x = self._conv(x.shape[-1] // 2, 1, "conv")(nn.relu(self._norm(x, train, "norm")))
        return nn.avg_pool(x, (2, 2), strides=(2, 2))


class DenseNet(net.Network, kw_only=True):
    """A densely connected network.

    The parameter tree is ``conv1``, ``bn1``, ``block<N>/layer<M>/...`` and ``transition<N>`` with N
    from 1 and M from 0, ``norm`` and ``fc``. The network sows ``stem``, after ReLU and pool. Dropout
    applies to what each dense layer adds.

    Attributes:
        block_sizes: dense layers in each dense block, bottom to top.
        growth: channels that each dense layer adds.
        bottleneck: channels between its two convolutions, as a multiple of ``growth``.
        width: channels of the stem.
        stem: ``"imagenet"`` or ``"cifar"``, as in ``ResNet``.

    The other fields are those of ``Network`` and ``Layered``.
    """

    block_sizes: tuple[int, ...]
    growth: int = 32
    bottleneck: int = 4
    width: int = 64
    stem: str = "imagenet"

    choices: ClassVar[dict[str, Any]] = {"stem": net.STEMS}
    width_fields: ClassVar[tuple[str, ...]] = ("width", "growth")

    def __post_init__(self) -> None:
        """Check the fields."""
        self.block_sizes = net.positive("block_sizes", self.block_sizes)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits, float32 ``[N, num_classes]``, of images ``[N, H, W, C]``."""
        # Layers, not whole dense blocks, are recomputed: a block's inputs to all its layers would fill the memory.
        layer = self._block(
            DenseLayer, growth=self.growth, bottleneck=self.bottleneck, dropout=self.dropout
        )
        x = self._stem(x, train, self.stem, self.width)
        for number, size in enumerate(self.block_sizes, start=1):
            block = DenseBlock(size=size, layer=layer, name=f"block{number}", **self.shared)
            x = block(x, train)
            if number < len(self.block_sizes):
                x = Transition(name=f"transition{number}", **self.shared)(x, train)
        x = nn.relu(self._norm(x, train, "norm"))
        return self._logits(jnp.mean(x.astype(jnp.float32), axis=(1, 2)))

    @property
    def structure(self) -> net.Structure:
        """K = 4 dense blocks; 121 layers in DenseNet-121, whose depth counts the transitions."""
        blocks = net.numbered("block", len(self.block_sizes))
        transitions = (*net.numbered("transition", len(blocks) - 1), "norm")
        order, layers = ["conv1", "bn1"], ["conv1"]
        units: tuple[Units, ...] = ()
        for block, size, transition in zip(blocks, self.block_sizes, transitions, strict=True):
            dense_layers = net.within([block], *(f"layer{index}" for index in range(size)))
            order += [*dense_layers, transition]
            layers += [*net.within(dense_layers, "conv1", "conv2"), f"{transition}/conv"]
            units += net.inner_units(dense_layers, ("conv1", "norm2", "conv2"))
        return net.Structure(
            blocks=(*order, net.HEAD),
            layers=(*layers[:-1], net.HEAD),  # the last normalisation has no convolution
            round_blocks=blocks,
            concatenated=self._concatenated,
            total_stride=net.STEMS[self.stem] * 2 ** (len(blocks) - 1),
            smaller_stride=", or stem='cifar'" if self.stem == "imagenet" else "",
            units=units,
        )

    @property
    def _concatenated(self) -> dict[str, tuple[int, ...]]:
        """The channels of a dense block's input and of each layer in it, by the layers that read them."""
        parts: tuple[int, ...] = (self.width,)
        found: dict[str, tuple[int, ...]] = {}
        for number, size in enumerate(self.block_sizes, start=1):
            for index in range(size):
                for layer in ("norm1", "conv1"):
                    found[f"block{number}/layer{index}/{layer}"] = parts
                parts = (*parts, self.growth)
            last = number == len(self.block_sizes)
            above = (
                ("norm", net.HEAD) if last else net.within([f"transition{number}"], "norm", "conv")
            )
            found |= dict.fromkeys(above, parts)
            parts = (sum(parts) // 2,)
        return found

    def slim(self, keep: float) -> Self:
        """Return the network with ``keep`` times the stem's width and the growth, which must be whole."""
        slim = functools.partial(net.slim_stages, keep)
        return self.clone(width=slim(self.width), growth=slim(self.growth))

    def torch_layers(self) -> dict[str, dict[str, str]]:
        """Return torchvision's names of the modules by our paths; timm has the same."""
        names = {"conv1": "features.conv0", "bn1": "features.norm0", net.HEAD: "classifier"}
        names["norm"] = "features.norm5"  # whatever the number of dense blocks
        for number, size in enumerate(self.block_sizes, start=1):
            for index in range(size):
                for part in ("norm1", "conv1", "norm2", "conv2"):
                    names[f"block{number}/layer{index}/{part}"] = (
                        f"features.denseblock{number}.denselayer{index + 1}.{part}"
                    )
        for number in range(1, len(self.block_sizes)):
            for part in ("norm", "conv"):
                names[f"transition{number}/{part}"] = f"features.transition{number}.{part}"
        return {"torchvision": names, "timm": names}


MODELS = {
    # Table 1 with k = 32.
    name: net.Entry(
        functools.partial(DenseNet, block_sizes=sizes),
        ("stem", "width", "growth"),
        "Huang et al. 2017",
        used,
        config,
    )
    for name, sizes, used, config in (
        ("densenet121", (6, 12, 24, 16), "", "fast_cifar100.py"),
        (
            "densenet201",
            (6, 12, 48, 32),
            "FAST paper, section 6.6",
            "fast_cifar100.py:fast_densenet201",
        ),
    )
}
