"""A convolution or a dense layer with its normalisation and ReLU: blocks without a shortcut."""

from collections.abc import Sequence

import jax
from flax import linen as nn

from seal_jax.models.layered import Layered, kernel_init
from seal_jax.models.normaliser import inserted_normaliser


class _PlainBlock(Layered, kw_only=True):
    def _finish(self, x: jax.Array) -> jax.Array:
        self.sow("intermediates", "output", x)
        return inserted_normaliser(self, x)


class ConvBlock(_PlainBlock, kw_only=True):
    """3x3 convolution ``conv``, normalisation ``norm``, ReLU.

    Attributes:
        width: channels of the output.
        stride: factor by which the block shrinks the image.
    """

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[N, H, W, C]`` to ``[N, H / stride, W / stride, width]``, sizes rounded up."""
        x = self._conv(self.width, 3, "conv", self.stride)(x)
        return self._finish(nn.relu(self._norm(train, "norm")(x)))


class SeparableBlock(_PlainBlock, kw_only=True):
    """Depthwise 3x3 and pointwise 1x1 convolution, each with normalisation and ReLU.

    Howard et al. 2017, figure 3 right: ``depthwise``, ``norm1``, ``pointwise``, ``norm2``.

    Attributes:
        width: channels of the output.
        stride: of the depthwise convolution.
    """

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[N, H, W, C]`` to ``[N, H / stride, W / stride, width]``, sizes rounded up."""
        x = self._conv(x.shape[-1], 3, "depthwise", self.stride, depthwise=True)(x)
        x = nn.relu(self._norm(train, "norm1")(x))
        x = self._conv(self.width, 1, "pointwise")(x)
        return self._finish(nn.relu(self._norm(train, "norm2")(x)))


class DenseBlock(_PlainBlock, kw_only=True):
    """Dense layer ``linear``, normalisation ``norm`` unless that is "none", ReLU.

    Attributes:
        width: units.
    """

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[N, C]`` to ``[N, width]``."""
        bare = self.norm == "none"
        x = nn.Dense(
            self.width,
            use_bias=bare,
            dtype=self.dtype,
            kernel_init=kernel_init(self.initialiser),
            name="linear",
        )(x)
        if not bare:
            x = self._norm(train, "norm")(x)
        return self._finish(nn.relu(x))


def flatten(images: jax.Array) -> jax.Array:
    """Return ``[N, H * W * C]`` of ``[N, H, W, C]``, the channel fastest."""
    return images.reshape(len(images), -1)


def numbered(name: str, count: int) -> tuple[str, ...]:
    """Return names with numbers from 1.

    >>> numbered("block", 3)
    ('block1', 'block2', 'block3')
    """
    return tuple(f"{name}{number}" for number in range(1, count + 1))


def within(blocks: Sequence[str], layer: str) -> tuple[str, ...]:
    """Return the path of ``layer`` in each of ``blocks``."""
    return tuple(f"{block}/{layer}" for block in blocks)
