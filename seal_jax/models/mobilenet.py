"""A shallow MobileNetV1 (Howard et al. 2017, arXiv:1704.04861) of seven convolutional blocks.

The layerwise reinitialisation paper (appendix B.1) says "the standard shallow MobileNet" and K = 7.
Howard et al. call shallow (section 4.2) their table 1 without its five equal layers of 512 channels:
nine blocks. Read here as seven: table 1 up to those five layers, one convolution and the separable
blocks of 64, 128, 128, 256, 256 and 512 channels, then the mean over the image and the classifier.
``MobileNet`` takes any other list of blocks: the whole table 1 has 4.23 million parameters, and
without the five layers 2.9 million, as published.

Convolutions are padded symmetrically, also where they stride, and have no bias.
"""

from typing import Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from seal_jax.errors import UsageError
from seal_jax.models.network import Network, positive, slim_width
from seal_jax.models.plain_blocks import ConvBlock, SeparableBlock, numbered


class MobileNet(Network, kw_only=True):
    """A convolutional block, depthwise separable blocks, the mean over the image, a classifier.

    The parameter tree is ``block1`` upwards and ``fc``. Dropout applies to the mean.

    Attributes:
        widths: channels of each block.
        strides: of each block.

    The other fields are those of ``Network`` and ``Layered``; ``norm`` is "layer" by default.
    """

    norm: str = "layer"
    widths: tuple[int, ...] = (32, 64, 128, 128, 256, 256, 512)
    strides: tuple[int, ...] = (2, 1, 2, 1, 2, 1, 2)

    def __post_init__(self) -> None:
        """Check the fields."""
        self.widths = positive("widths", self.widths)
        self.strides = positive("strides", self.strides, len(self.widths))
        if max(self.strides) > 2:
            raise UsageError(f"strides={self.strides!r}: use 1 or 2 for each block")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits, float32 ``[N, num_classes]``, of images ``[N, H, W, C]``."""
        for index, name in enumerate(self.round_blocks):
            kind = SeparableBlock if index else ConvBlock
            width, stride = self.widths[index], self.strides[index]
            x = kind(width=width, stride=stride, name=name, **self.shared)(x, train)
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return self._logits(self._drop(x, train))

    @property
    def blocks(self) -> tuple[str, ...]:
        """Path prefixes, bottom to top, that together cover every parameter exactly once."""
        return (*self.round_blocks, self.head)

    @property
    def layers(self) -> tuple[str, ...]:
        """Weight layers, bottom to top: depthwise and pointwise count one each."""
        first, *others = self.round_blocks
        inner = (f"{block}/{conv}" for block in others for conv in ("depthwise", "pointwise"))
        return (f"{first}/conv", *inner, self.head)

    @property
    def round_blocks(self) -> tuple[str, ...]:
        """The convolutional and the separable blocks: K = 7."""
        return numbered("block", len(self.widths))

    @property
    def total_stride(self) -> int:
        """Factor by which the image has shrunk at the last block."""
        return 2 ** self.strides.count(2)

    def slim(self, keep: float) -> Self:
        """Return the network with ``ceil(keep * width)`` channels."""
        return self.clone(widths=tuple(slim_width(keep, width) for width in self.widths))
