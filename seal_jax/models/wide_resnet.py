"""Wide residual networks WRN-d-k (Zagoruyko and Komodakis 2016, arXiv:1605.07146).

A 3x3 stem of 16 channels, three stages of (d - 4) / 6 pre-activation blocks with 16k, 32k and 64k
channels, a normalisation, the mean over the image and a classifier. Kernels are drawn He-normal over
*fan_out* and the classifier's from N(0, 0.1^2) with bias 0.
"""

import re
from collections.abc import Callable
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from seal_jax.errors import UsageError
from seal_jax.models.layered import Layered
from seal_jax.models.network import Network, at_least, one_of, slim_stages, slim_width
from seal_jax.models.normaliser import inserted_normaliser

STRIDE_ON = ("first", "second")
STAGES = 3


class WideBlock(Layered, kw_only=True):
    """Norm, ReLU, 3x3 convolution, twice, and a shortcut: B(3,3) with dropout in the middle.

    Where the shape changes, the shortcut is a 1x1 convolution of the *activated* input, which both
    branches then share (He et al. 2016b); elsewhere it is the input itself. The sum stays without
    ReLU.

    Attributes:
        width: channels.
        stride: factor by which the block shrinks the image.
        stride_on: the convolution that strides, ``"first"`` as in the original, or ``"second"``.
        dropout: rate, between the convolutions.
    """

    width: int
    stride: int
    stride_on: str
    dropout: float

    convs: ClassVar[tuple[str, ...]] = ("conv1", "conv2")

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[N, H, W, C]`` to ``[N, H / stride, W / stride, width]``, sizes rounded up."""
        first, second = (self.stride, 1) if self.stride_on == "first" else (1, self.stride)
        y = nn.relu(self._norm(train, "bn1")(x))
        if self.stride != 1 or x.shape[-1] != self.width:
            x = self._conv(self.width, 1, "downsample_conv", self.stride)(y)
        y = self._conv(self.width, 3, "conv1", first)(y)
        y = nn.relu(self._norm(train, "bn2")(y))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        y = x + self._conv(self.width, 3, "conv2", second)(y)
        self.sow("intermediates", "output", y)
        return inserted_normaliser(self, y)


class WideStage(Layered, kw_only=True):
    """``size`` blocks, named ``block0`` upwards, of which the first may stride.

    The other fields are those of the blocks.
    """

    size: int
    width: int
    stride: int
    stride_on: str
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[N, H, W, C]`` to ``[N, H / stride, W / stride, width]``."""
        for index in range(self.size):
            x = WideBlock(
                width=self.width,
                stride=self.stride if index == 0 else 1,
                stride_on=self.stride_on,
                dropout=self.dropout,
                name=f"block{index}",
                **self.shared,
            )(x, train)
        return x


class WideResNet(Network, kw_only=True):
    """A wide residual network of ``depth`` = 6n + 4.

    The parameter tree is ``conv1``, ``layer<N>/block<M>/...`` with N from 1 to 3 and M from 0,
    ``bn`` and ``fc``. The network sows ``stem``, the output of ``conv1``. Dropout applies within the
    residual blocks.

    Attributes:
        depth: 10, 16, 22, ...: any 6n + 4 with n of at least 1.
        width: channels of the first stage, 16k; the others have twice and four times that.
        stem_width: channels of the stem.
        stride_on: the convolution of a block that strides, ``"first"``, or ``"second"``, as in the
            released code of the PoF paper.

    The other fields are those of ``Network`` and ``Layered``; ``initialiser`` is "he_fan_out" by
    default.

    Raises:
        UsageError: a field has no such value.
    """

    initialiser: str = "he_fan_out"
    depth: int
    width: int = 16
    stem_width: int = 16
    stride_on: str = "first"

    def __post_init__(self) -> None:
        """Check the fields."""
        at_least("width", self.width, 1)
        at_least("stem_width", self.stem_width, 1)
        one_of("stride_on", self.stride_on, STRIDE_ON)
        if self.depth < 10 or self.depth % 6 != 4:
            below = max(10, (self.depth - 4) // 6 * 6 + 4)
            raise UsageError(f"depth={self.depth!r} is not 6n + 4: use {below} or {below + 6}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits, float32 ``[N, num_classes]``, of images ``[N, H, W, C]``."""
        x = self._conv(self.stem_width, 3, "conv1")(x)
        self.sow("intermediates", "stem", x)
        for index in range(STAGES):
            x = WideStage(
                size=self._stage_size,
                width=self.width * 2**index,
                stride=1 if index == 0 else 2,
                stride_on=self.stride_on,
                dropout=self.dropout,
                name=f"layer{index + 1}",
                **self.shared,
            )(x, train)
        x = nn.relu(self._norm(train, "bn")(x))
        return self._logits(jnp.mean(x.astype(jnp.float32), axis=(1, 2)))

    @property
    def _stage_size(self) -> int:
        return (self.depth - 4) // 6

    @property
    def head_init(self) -> Callable[..., jax.Array]:
        """N(0, 0.1^2)."""
        return nn.initializers.normal(0.1)

    @property
    def round_blocks(self) -> tuple[str, ...]:
        """Paths of the residual blocks: 12 in WRN-28-10."""
        return tuple(
            f"layer{stage}/block{index}"
            for stage in range(1, STAGES + 1)
            for index in range(self._stage_size)
        )

    @property
    def blocks(self) -> tuple[str, ...]:
        """Path prefixes, bottom to top, that together cover every parameter exactly once."""
        return ("conv1", *self.round_blocks, "bn", self.head)

    @property
    def layers(self) -> tuple[str, ...]:
        """Weight layers, bottom to top: d - 2. Depth counts the 1x1 shortcuts, not the classifier."""
        inner = (f"{block}/{name}" for block in self.round_blocks for name in WideBlock.convs)
        return ("conv1", *inner, self.head)

    @property
    def total_stride(self) -> int:
        """Factor by which the image has shrunk at the last stage."""
        return 2 ** (STAGES - 1)

    def slim(self, keep: float) -> Self:
        """Return the network with ``keep * width`` channels, which must be whole."""
        stem_width, width = slim_width(keep, self.stem_width), slim_stages(keep, self.width)
        # A stem as wide as the first stage leaves no work for the 1x1 convolution of its shortcut.
        fitting = next(
            other
            for other in range(width, self.width + 1)
            if (slim_width(other / self.width, self.stem_width) == other)
            == (self.stem_width == self.width)
        )
        if fitting != width:
            raise UsageError(
                f"method.keep = {keep:g} leaves {width} channels in the stem and in the first stage, "
                f"which then has no 1x1 shortcut: use {fitting / self.width:.12g}"
            )
        return self.clone(width=width, stem_width=stem_width)


def parse(name: str) -> tuple[int, int] | None:
    """Return depth and k of a name like "wrn28-10", or None for any other name.

    >>> parse("wrn28-10"), parse("resnet18")
    ((28, 10), None)
    """
    found = re.fullmatch(r"wrn(\d+)-(\d+)", name)
    return (int(found[1]), int(found[2])) if found else None
