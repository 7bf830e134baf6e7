"""VGG-16 and VGG-19 (Simonyan and Zisserman 2015, arXiv:1409.1556), with normalisation.

The convolutions have no bias, since a normalisation with one follows; the two hidden dense layers
have biases and no normalisation, as in torchvision's ``vgg16_bn``.
"""

import functools
import itertools
from typing import ClassVar

import jax
from flax import linen as nn

from seal_jax.models import network as net


class VGG(net.Network, kw_only=True):
    """Groups of convolutional blocks, each closed by a 2x2 max-pool, two dense layers, a classifier.

    The parameter tree is ``block1`` upwards, ``dense1``, ``dense2`` and ``fc``. Dropout applies after
    each of the two dense layers. On an image too small for all the pools, the pools that would leave
    nothing of it are left out: 16x16 images pass four of five.

    Attributes:
        group_sizes: convolutional blocks in each group, bottom to top.
        widths: channels of each group.
        dense_width: units of each hidden dense layer.

    The other fields are those of ``Network`` and ``Layered``; ``norm`` is "layer" by default.
    """

    norm: str = "layer"
    group_sizes: tuple[int, ...] = (2, 2, 3, 3, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    dense_width: int = 4096

    width_fields: ClassVar[tuple[str, ...]] = ("widths", "dense_width")

    def __post_init__(self) -> None:
        """Check the fields."""
        self.group_sizes = net.positive("group_sizes", self.group_sizes)
        self.widths = net.positive("widths", self.widths, len(self.group_sizes))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits, float32 ``[N, num_classes]``, of images ``[N, H, W, C]``."""
        # One iterator for all groups: the blocks are numbered across them.
        names = iter(self.structure.round_blocks)
        for size, width in zip(self.group_sizes, self.widths, strict=True):
            for name in itertools.islice(names, size):
                x = self._block(net.ConvBlock)(width=width, name=name)(x, train)
            if min(x.shape[1:3]) > 1:  # nothing would be left of a single row or column
                x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        for name in ("dense1", "dense2"):
            dense = self._block(net.DenseBlock, norm="none")(width=self.dense_width, name=name)
            x = self._drop(dense(x, train), train)
        return self._logits(x)

    @property
    def structure(self) -> net.Structure:
        """K = 13 convolutional blocks and 16 layers in VGG-16."""
        blocks = net.numbered("block", sum(self.group_sizes))
        # No total_stride: a small image passes fewer pools.
        return net.Structure(
            blocks=(*blocks, "dense1", "dense2", net.HEAD),
            layers=(*net.within(blocks, "conv"), "dense1/linear", "dense2/linear", net.HEAD),
            round_blocks=blocks,
            dense_after_convs=("dense1", "dense2", net.HEAD),
            flattened={"dense1/linear/kernel": self.widths[-1]},
            units=net.chained((*blocks, "dense1", "dense2"), net.HEAD),
        )

    def torch_layers(self) -> dict[str, dict[str, str]]:
        """Return the names of the layers in torchvision's and timm's VGG with BatchNorm."""
        names: dict[str, str] = {}
        index = 0
        blocks = iter(self.structure.round_blocks)
        for size in self.group_sizes:
            for block in itertools.islice(blocks, size):
                # Their convolutions have biases, though a normalisation follows.
                names |= {
                    f"{block}/conv": f"features.{index}",
                    f"{block}/norm/folded_bias": f"features.{index}.bias",
                    f"{block}/norm": f"features.{index + 1}",
                }
                index += 3  # the ReLU has a number too
            index += 1  # and the pool
        dense = ("dense1/linear", "dense2/linear", net.HEAD)
        heads = {
            "torchvision": ("classifier.0", "classifier.3", "classifier.6"),
            "timm": ("conv:pre_logits.fc1", "conv:pre_logits.fc2", "head.fc"),
        }
        return {
            library: names | dict(zip(dense, modules, strict=True))
            for library, modules in heads.items()
        }


MODELS = {
    # Configurations D and E of table 1.
    name: net.Entry(
        functools.partial(VGG, group_sizes=group_sizes),
        ("dense_width",),
        "Simonyan and Zisserman 2015",
        used,
        config,
    )
    for name, group_sizes, used, config in (
        ("vgg16", (2, 2, 3, 3, 3), "LW paper, appendix B.1", "lw_cifar10.py"),
        ("vgg19", (2, 2, 4, 4, 4), "FAST paper, sections 6.5, 6.6", "fast_cifar100.py:fast_vgg19"),
    )
}
