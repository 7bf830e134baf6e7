"""A shallow MobileNetV1 (Howard et al. 2017, arXiv:1704.04861) of seven convolutional blocks.

The layerwise reinitialisation paper (appendix B.1) says "the standard shallow MobileNet" and K = 7.
Howard et al. call shallow (section 4.2) their table 1 without its five equal layers of 512 channels:
nine blocks. Read here as seven: table 1 up to those five layers, one convolution and the separable
blocks of 64, 128, 128, 256, 256 and 512 channels, then the mean over the image and the classifier.
``MobileNet`` takes any other list of blocks: the whole table 1 has 4.23 million parameters, and
without the five layers 2.9 million, as published.

Convolutions are padded symmetrically, also where they stride, and have no bias.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from seal_jax.errors import UsageError
from seal_jax.models import network as net


class MobileNet(net.Network, kw_only=True):
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

    width_fields: ClassVar[tuple[str, ...]] = ("widths",)

    def __post_init__(self) -> None:
        """Check the fields."""
        self.widths = net.positive("widths", self.widths)
        self.strides = net.positive("strides", self.strides, len(self.widths))
        # `total_stride` below counts halvings.
        if max(self.strides) > 2:
            raise UsageError(f"strides={self.strides!r}: use 1 or 2 for each block")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits, float32 ``[N, num_classes]``, of images ``[N, H, W, C]``."""
        for index, name in enumerate(self.structure.round_blocks):
            kind = net.SeparableBlock if index else net.ConvBlock
            width, stride = self.widths[index], self.strides[index]
            x = kind(width=width, stride=stride, name=name, **self.shared)(x, train)
        # In float32: a sum over the image in bfloat16 would lose digits.
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return self._logits(self._drop(x, train))

    @property
    def structure(self) -> net.Structure:
        """K = 7 blocks. Depthwise and pointwise convolutions count as one layer each."""
        first, *others = blocks = net.numbered("block", len(self.widths))
        return net.Structure(
            blocks=(*blocks, net.HEAD),
            layers=(f"{first}/conv", *net.within(others, "depthwise", "pointwise"), net.HEAD),
            round_blocks=blocks,
            total_stride=2 ** self.strides.count(2),
        )


MODELS = {"mobilenet": net.Entry(MobileNet)}
