"""Residual blocks and stages, the parts that every ResNet of this package is made of.

Padding is explicit and symmetric, as in torch: with stride 2, ``SAME`` pads only on the far side of
an even image and so shifts the sampling grid.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from seal_jax.models.convolution import CONVOLUTIONS

# torch's ``kaiming_normal_(mode="fan_in", nonlinearity="relu")``. ``initializers.he_normal`` is not
# that: it draws from a normal truncated at two standard deviations.
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def conv(
    features: int, size: int, *, stride: int = 1, dtype: Any, convolution: str, name: str
) -> nn.Conv:
    """Return a ``size`` x ``size`` convolution without bias, padded by ``size // 2`` on all sides.

    The kernel is float32 ``[size, size, in, features]``, drawn He-normal; the input and the kernel
    are cast to ``dtype`` for the product. ``convolution`` is a key of ``CONVOLUTIONS``.
    """
    pad = size // 2
    return nn.Conv(
        features,
        (size, size),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=False,
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=he_normal,
        conv_general_dilated=CONVOLUTIONS[convolution],
        name=name,
    )


class BatchNorm(nn.BatchNorm):
    """Flax's BatchNorm under a scope of its own, by which its collectives can be told from others."""

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Normalise; see ``nn.BatchNorm``."""
        with jax.named_scope("batch_norm"):
            return super().__call__(*args, **kwargs)


def batch_norm(*, train: bool, dtype: Any, axis_name: str | None, name: str) -> BatchNorm:
    """Return BatchNorm with torch's constants: eps 1e-5 and running momentum 0.1 (Flax's 0.9).

    Scale, bias, batch statistics and running statistics are float32 whatever ``dtype`` is. With
    ``axis_name`` the batch statistics are averaged over that named axis.
    """
    return BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        param_dtype=jnp.float32,
        axis_name=axis_name,
        name=name,
    )


class _Block(nn.Module):
    """What both residual blocks share: their fields, their shortcut and their last addition.

    Attributes:
        width: channels of the 3x3 convolutions; the block returns ``width * expansion`` channels.
        stride: 1 or 2, the factor by which the block shrinks the image.
        shortcut: what carries the input across a change of shape, He et al. 2016 section 3.3:
            ``"A"`` subsamples and appends zero channels, ``"B"`` is 1x1 convolution and BatchNorm.
        dtype: dtype of the activations.
        bn_axis_name: named axis over which BatchNorm synchronises, or None.
        convolution: how a convolution is computed, a key of ``CONVOLUTIONS``.
    """

    width: int
    stride: int
    shortcut: str
    dtype: Any
    bn_axis_name: str | None
    convolution: str

    expansion: ClassVar[int]
    convs: ClassVar[tuple[str, ...]]

    def _conv(self, features: int, size: int, name: str, stride: int = 1) -> nn.Conv:
        return conv(
            features,
            size,
            stride=stride,
            dtype=self.dtype,
            convolution=self.convolution,
            name=name,
        )

    def _norm(self, train: bool, name: str) -> BatchNorm:
        return batch_norm(train=train, dtype=self.dtype, axis_name=self.bn_axis_name, name=name)

    def _finish(self, x: jax.Array, y: jax.Array, train: bool) -> jax.Array:
        """Add the shortcut of the input ``x`` to the residual ``y``, apply ReLU, sow ``output``."""
        out = self.width * self.expansion
        if self.stride != 1 or x.shape[-1] != out:
            if self.shortcut == "A":
                x = x[:, :: self.stride, :: self.stride]
                x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, out - x.shape[-1])))
            else:
                x = self._conv(out, 1, "downsample_conv", self.stride)(x)
                x = self._norm(train, "downsample_bn")(x)
        y = nn.relu(y + x)
        self.sow("intermediates", "output", y)
        return y


class BasicBlock(_Block):
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


class BottleneckBlock(_Block):
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


class Stage(nn.Module):
    """``size`` residual blocks of one width, named ``block0`` upwards; the first may stride.

    The other fields are those of the blocks; ``block`` is a key of ``BLOCKS``.
    """

    size: int
    block: str
    width: int
    stride: int
    shortcut: str
    dtype: Any
    bn_axis_name: str | None
    convolution: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[N, H, W, C]`` to ``[N, H / stride, W / stride, width * expansion]``."""
        for index in range(self.size):
            x = BLOCKS[self.block](
                width=self.width,
                stride=self.stride if index == 0 else 1,
                shortcut=self.shortcut,
                dtype=self.dtype,
                bn_axis_name=self.bn_axis_name,
                convolution=self.convolution,
                name=f"block{index}",
            )(x, train)
        return x
