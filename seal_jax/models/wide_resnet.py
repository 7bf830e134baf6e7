"""Wide residual networks WRN-d-k (Zagoruyko and Komodakis 2016, arXiv:1605.07146).

A 3x3 stem of 16 channels, three stages of (d - 4) / 6 pre-activation blocks with 16k, 32k and 64k
channels, a normalisation, the mean over the image and a classifier. Kernels are drawn He-normal over
*fan_out* and the classifier's from N(0, 0.1^2) with bias 0.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from seal_jax.errors import UsageError
from seal_jax.models import network as net
from seal_jax.slimming import kept


class WideBlock(net.Layered, kw_only=True):
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

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[N, H, W, C]`` to ``[N, H / stride, W / stride, width]``, sizes rounded up."""
        first, second = (self.stride, 1) if self.stride_on == "first" else (1, self.stride)
        # Pre-activation: `y` feeds both branches where the shape changes, else the shortcut is `x` itself.
        y = nn.relu(self._norm(x, train, "bn1"))
        if self.stride != 1 or x.shape[-1] != self.width:
            x = self._conv(self.width, 1, "downsample_conv", self.stride)(y)
        y = self._conv(self.width, 3, "conv1", first)(y)
        y = self._hidden(1, nn.relu(self._norm(y, train, "bn2")))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return self._finish(x + self._conv(self.width, 3, "conv2", second)(y))


class WideResNet(net.Network, kw_only=True):
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
    """

    initialiser: str = "he_fan_out"
    depth: int
    width: int = 16
    stem_width: int = 16
    stride_on: str = "first"

    choices: ClassVar[dict[str, Any]] = {"stride_on": ("first", "second")}
    width_fields: ClassVar[tuple[str, ...]] = ("width", "stem_width")

    def __post_init__(self) -> None:
        """Check the fields."""
        net.check_depth(self.depth, 4)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits, float32 ``[N, num_classes]``, of images ``[N, H, W, C]``."""
        x = self._conv(self.stem_width, 3, "conv1")(x)
        self.sow("intermediates", "stem", x)
        block = self._block(WideBlock, stride_on=self.stride_on, dropout=self.dropout)
        x = net.stages(x, train, self._stage_sizes, self.width, block)
        x = nn.relu(self._norm(x, train, "bn"))
        return self._logits(jnp.mean(x.astype(jnp.float32), axis=(1, 2)))

    @property
    def _stage_sizes(self) -> tuple[int, ...]:
        # A depth of 6n + 4 counts two convolutions in each of 3n blocks, the stem and three 1x1 shortcuts.
        return ((self.depth - 4) // 6,) * 3

    @property
    def head_init(self) -> Callable[..., jax.Array]:
        """N(0, 0.1^2)."""
        return nn.initializers.normal(0.1)

    @property
    def structure(self) -> net.Structure:
        """K = 12 in WRN-28-10; d - 2 layers: its depth counts the 1x1 shortcuts, not the classifier."""
        blocks = net.staged(self._stage_sizes)
        return net.Structure(
            blocks=("conv1", *blocks, "bn", net.HEAD),
            layers=("conv1", *net.within(blocks, "conv1", "conv2"), net.HEAD),
            round_blocks=blocks,
            total_stride=4,
            units=net.inner_units(blocks, ("conv1", "bn2", "conv2")),
        )

    def slim(self, keep: float) -> Self:
        """Return the network with ``keep * width`` channels, which must be whole."""
        stem_width, width = kept(keep, self.stem_width), net.slim_stages(keep, self.width)
        # A stem as wide as the first stage leaves no work for the 1x1 convolution of its shortcut.
        fitting = next(
            other
            for other in range(width, self.width + 1)
            if (kept(other / self.width, self.stem_width) == other)
            == (self.stem_width == self.width)
        )
        if fitting != width:
            raise UsageError(
                f"method.keep = {keep:g} leaves {width} channels in the stem and in the first stage, "
                f"which then has no 1x1 shortcut: use {fitting / self.width:.12g}"
            )
        return self.clone(width=width, stem_width=stem_width)


def find(name: str) -> net.Entry | None:
    """Return the entry of a name like "wrn28-10", depth and k, or None for any other name.

    >>> find("wrn28-10").build(num_classes=10).width, find("resnet18")
    (160, None)
    """
    match = re.fullmatch(r"wrn(\d+)-(\d+)", name)
    if match is None:
        return None
    depth, k = map(int, match.groups())
    # The one that the PoF paper trains.
    used = "PoF paper, section 4" if (depth, k) == (28, 10) else ""
    build = functools.partial(WideResNet, depth=depth, width=16 * k)
    return net.Entry(build, ("stride_on",), "Zagoruyko and Komodakis 2016", used, "pof_cifar10.py")


# Some of the names that ``find`` knows.
MODELS = {name: find(name) for name in ("wrn10-1", "wrn16-8", "wrn28-10", "wrn40-4")}
