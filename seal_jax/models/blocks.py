"""Residual blocks and stages, the parts that the post-activation ResNets are made of."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from seal_jax.models.layered import Layered
from seal_jax.models.normaliser import inserted_normaliser


class _Block(Layered, kw_only=True):
    """What both residual blocks share: their fields, their shortcut and their last addition.

    Attributes:
        width: channels of the 3x3 convolutions; the block returns ``width * expansion`` channels.
        stride: 1 or 2, the factor by which the block shrinks the image.
        shortcut: what carries the input across a change of shape, He et al. 2016 section 3.3:
            ``"A"`` subsamples and appends zero channels, ``"B"`` is 1x1 convolution and norm.
    """

    width: int
    stride: int
    shortcut: str

    expansion: ClassVar[int]
    convs: ClassVar[tuple[str, ...]]

    def _finish(self, x: jax.Array, y: jax.Array, train: bool) -> jax.Array:
        """Add the shortcut of the input ``x`` to the residual ``y``, apply ReLU, and sow both."""
        out = self.width * self.expansion
        if self.stride != 1 or x.shape[-1] != out:
            if self.shortcut == "A":
                x = x[:, :: self.stride, :: self.stride]
                x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, out - x.shape[-1])))
            else:
                x = self._conv(out, 1, "downsample_conv", self.stride)(x)
                x = self._norm(train, "downsample_bn")(x)
        y = y + x
        self.sow("intermediates", "before_relu", y)
        y = nn.relu(y)
        self.sow("intermediates", "output", y)
        return inserted_normaliser(self, y)


class BasicBlock(_Block, kw_only=True):
    """Two 3x3 convolutions, the stride on the first (He et al. 2016, figure 5 left)."""

    expansion: ClassVar[int] = 1
    convs: ClassVar[tuple[str, ...]] = ("conv1", "conv2")

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[N, H, W, C]`` to ``[N, H / stride, W / stride, width]``, sizes rounded up."""
        y = nn.relu(
            self._norm(train, "bn1")(self._conv(self.width, 3, "conv1", self.stride)(x)),
        )
        y = self._norm(train, "bn2")(self._conv(self.width, 3, "conv2")(y))
        return self._finish(x, y, train)


class BottleneckBlock(_Block, kw_only=True):
    """1x1, 3x3, 1x1 convolutions (He et al. 2016, figure 5 right), the stride on the 3x3.

    The paper strides the first 1x1; torchvision strides the 3x3, known as ResNet v1.5.
    """

    expansion: ClassVar[int] = 4
    convs: ClassVar[tuple[str, ...]] = ("conv1", "conv2", "conv3")

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[N, H, W, C]`` to ``[N, H / stride, W / stride, 4 * width]``, sizes rounded up."""
        y = nn.relu(self._norm(train, "bn1")(self._conv(self.width, 1, "conv1")(x)))
        y = nn.relu(
            self._norm(train, "bn2")(self._conv(self.width, 3, "conv2", self.stride)(y)),
        )
        y = self._norm(train, "bn3")(self._conv(self.width * 4, 1, "conv3")(y))
        return self._finish(x, y, train)


BLOCKS: dict[str, type[BasicBlock] | type[BottleneckBlock]] = {
    "basic": BasicBlock,
    "bottleneck": BottleneckBlock,
}


class Stage(Layered, kw_only=True):
    """``size`` residual blocks of one width, named ``block0`` upwards; the first may stride.

    The other fields are those of the blocks; ``block`` is a key of ``BLOCKS``.
    """

    size: int
    block: str
    width: int
    stride: int
    shortcut: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[N, H, W, C]`` to ``[N, H / stride, W / stride, width * expansion]``."""
        for index in range(self.size):
            x = BLOCKS[self.block](
                width=self.width,
                stride=self.stride if index == 0 else 1,
                shortcut=self.shortcut,
                name=f"block{index}",
                **self.shared,
            )(x, train)
        return x
