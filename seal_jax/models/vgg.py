"""VGG-16 and VGG-19 (Simonyan and Zisserman 2015, arXiv:1409.1556), with normalisation.

The convolutions have no bias, since a normalisation with one follows; the two hidden dense layers
have biases and no normalisation, as in torchvision's ``vgg16_bn``.
"""

import itertools
from typing import Self

import jax
from flax import linen as nn

from seal_jax.models.network import Network, at_least, positive, slim_width
from seal_jax.models.plain_blocks import ConvBlock, DenseBlock, flatten, numbered, within

# Convolutions a group: configurations D and E of table 1.
VGGS: dict[str, tuple[int, ...]] = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}


class VGG(Network, kw_only=True):
    """Groups of convolutional blocks, each closed by a 2x2 max-pool, two dense layers, a classifier.

    The parameter tree is ``block1`` upwards, ``dense1``, ``dense2`` and ``fc``. Dropout applies after
    each of the two dense layers. On an image too small for all the pools, the pools that would leave
    nothing of it are left out: 16x16 images meet four of five.

    Attributes:
        group_sizes: convolutional blocks in each group, bottom to top.
        widths: channels of each group.
        dense_width: units of each hidden dense layer.

    The other fields are those of ``Network`` and ``Layered``; ``norm`` is "layer" by default.
    """

    norm: str = "layer"
    group_sizes: tuple[int, ...] = VGGS["vgg16"]
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    dense_width: int = 4096

    def __post_init__(self) -> None:
        """Check the fields."""
        self.group_sizes = positive("group_sizes", self.group_sizes)
        self.widths = positive("widths", self.widths, len(self.group_sizes))
        at_least("dense_width", self.dense_width, 1)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits, float32 ``[N, num_classes]``, of images ``[N, H, W, C]``."""
        names = iter(self.round_blocks)
        for size, width in zip(self.group_sizes, self.widths, strict=True):
            for name in itertools.islice(names, size):
                x = ConvBlock(width=width, name=name, **self.shared)(x, train)
            if min(x.shape[1:3]) > 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
        x = flatten(x)
        for name in ("dense1", "dense2"):
            fields = {**self.shared, "norm": "none"}
            x = self._drop(DenseBlock(width=self.dense_width, name=name, **fields)(x, train), train)
        return self._logits(x)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Path prefixes, bottom to top, that together cover every parameter exactly once."""
        return (*self.round_blocks, *self.dense_after_convs)

    @property
    def layers(self) -> tuple[str, ...]:
        """Weight layers, bottom to top: 16 in VGG-16."""
        convs = within(self.round_blocks, "conv")
        return (*convs, "dense1/linear", "dense2/linear", self.head)

    @property
    def round_blocks(self) -> tuple[str, ...]:
        """The convolutional blocks: K = 13 in VGG-16."""
        return numbered("block", sum(self.group_sizes))

    @property
    def dense_after_convs(self) -> tuple[str, ...]:
        """The dense layers and the classifier."""
        return ("dense1", "dense2", self.head)

    @property
    def flattened(self) -> dict[str, int]:
        """The first dense kernel and the channels below it."""
        return {"dense1/linear/kernel": self.widths[-1]}

    def slim(self, keep: float) -> Self:
        """Return the network with ``ceil(keep * width)`` channels and units."""
        widths = tuple(slim_width(keep, width) for width in self.widths)
        return self.clone(widths=widths, dense_width=slim_width(keep, self.dense_width))
