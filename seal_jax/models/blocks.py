"""The layers and plain blocks that every network of this package is made of.

Padding is explicit and symmetric, as in torch: with stride 2, ``SAME`` pads only on the far side of
an even image and so shifts the sampling grid. A layer that a normalisation follows has no bias.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from seal_jax.models.convolution import CONVOLUTIONS

NORMS = ("batch", "layer")

# By name, functions of ``in_axis``, ``out_axis`` and ``batch_axis``. "he" is torch's
# ``kaiming_normal_(mode="fan_in", nonlinearity="relu")``. ``initializers.he_normal`` is not that: it
# draws from a normal truncated at two standard deviations.
INITIALISERS: dict[str, Callable[..., Any]] = {
    "he": functools.partial(nn.initializers.variance_scaling, 2.0, "fan_in", "normal"),
    "he_fan_out": functools.partial(nn.initializers.variance_scaling, 2.0, "fan_out", "normal"),
    "xavier": functools.partial(nn.initializers.variance_scaling, 1.0, "fan_avg", "uniform"),
}


class BatchNorm(nn.BatchNorm):
    """BatchNorm with torch's constants, under a scope of its own that names its collectives.

    Scale, bias, batch statistics and running statistics are float32 whatever ``dtype`` is. With
    ``axis_name`` the batch statistics are averaged over that named axis.

    Attributes:
        train: whether it normalises with the statistics of the batch, unless told otherwise.
        momentum: weight of the old running statistics: 1 - torch's 0.1; Flax has 0.99.
        epsilon: added to the variance.
    """

    train: bool = False
    momentum: float = 0.9
    epsilon: float = 1e-5

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        frozen: Any = False,
        unbiased: bool = False,
    ) -> jax.Array:
        """Normalise ``[N, ..., C]``; see ``nn.BatchNorm`` and ``batch_statistics``."""
        normalise = super().__call__
        if use_running_average is None:
            use_running_average = not self.train
        with jax.named_scope("batch_norm"):
            if use_running_average or frozen is True:
                return normalise(x, use_running_average=True)
            if frozen is False and mask is None and not unbiased:
                return normalise(x, use_running_average=False)
            running: dict[str, jax.Array] = {
                name: self.get_variable("batch_stats", name) for name in ("mean", "var")
            }
            batch, count = _moments(x, mask, self.axis_name)
            keep = jnp.logical_or(frozen, count == 0)
            # Flax knows neither masks nor a traced choice. So it is lent, as the running statistics,
            # what this batch is to be normalised with; the updated ones are stored afterwards.
            for name, old in running.items():
                self.put_variable("batch_stats", name, jnp.where(keep, old, batch[name]))
            y = normalise(x, use_running_average=True)
            if unbiased:
                batch["var"] *= count / jnp.maximum(count - 1, 1)
            for name, old in running.items():
                updated = self.momentum * old + (1 - self.momentum) * batch[name]
                self.put_variable("batch_stats", name, jnp.where(keep, old, updated))
            return y


def _moments(
    x: jax.Array, mask: jax.Array | None, axis_name: str | None
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Return mean and variance of the masked examples on all devices, and how many values."""
    x = x.astype(jnp.float32)
    mask = jnp.ones(len(x)) if mask is None else mask
    weights = jnp.broadcast_to(mask.reshape(-1, *(1,) * (x.ndim - 1)), (*x.shape[:-1], 1))
    axes = tuple(range(x.ndim - 1))
    # Sums, not means: devices may hold different numbers of examples that count.
    sums = jnp.stack([jnp.sum(weights * power, axes) for power in (x, jnp.square(x))])
    count = jnp.sum(weights)
    if axis_name is not None:
        sums, count = jax.lax.psum((sums, count), axis_name)
    mean, square = sums / jnp.maximum(count, 1)
    return {"mean": mean, "var": jnp.maximum(square - jnp.square(mean), 0)}, count


def batch_statistics(
    *, frozen: Any = False, example_mask: jax.Array | None = None, unbiased: bool = False
) -> Any:
    """Return a context in which training passes treat every ``BatchNorm`` alike.

    Args:
        frozen: normalise with the running statistics and leave them as they are, exactly; a bool,
            which may be traced.
        example_mask: float32 ``[N]``, 0 for examples that do not count; where none of them does,
            the running statistics take the place of the batch's. ``None``: all count.
        unbiased: update the running variance with n / (n - 1) times the batch's, as torch does;
            Flax takes the batch's own, three quarters of that for four values. Both normalise with
            the batch's own.
    """

    def call(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        # Flax's own __call__, which ours calls, is intercepted too; it is told what to use.
        if isinstance(context.module, BatchNorm) and "use_running_average" not in kwargs:
            kwargs = {**kwargs, "frozen": frozen, "mask": example_mask, "unbiased": unbiased}
        return next_call(*args, **kwargs)

    return nn.intercept_methods(call)


class Layered(nn.Module, kw_only=True):
    """A module that makes its layers in the one way that a whole network shares.

    Attributes:
        dtype: dtype of the activations, float32 or bfloat16; parameters are float32.
        norm: ``"batch"``, or ``"layer"``: over height, width and channels, with a scale and a bias a
            channel, the same in training and in inference.
        initialiser: of the kernels, a key of ``INITIALISERS``.
        bn_axis_name: named axis over which BatchNorm synchronises its batch statistics in training
            mode; None leaves them to the batch that the module sees.
        convolution: how a convolution is computed, a key of ``CONVOLUTIONS``.
    """

    dtype: Any = jnp.float32
    norm: str = "batch"
    initialiser: str = "he"
    bn_axis_name: str | None = None
    convolution: str = "native"

    @property
    def shared(self) -> dict[str, Any]:
        """The fields above, for the modules inside this one."""
        names = ("dtype", "norm", "initialiser", "bn_axis_name", "convolution")
        return {name: getattr(self, name) for name in names}

    def _conv(
        self, features: int, size: int, name: str, stride: int = 1, *, depthwise: bool = False
    ) -> nn.Conv:
        """Return a convolution with a kernel ``[size, size, in, features]``, padded by ``size // 2``.

        A ``depthwise`` one convolves each channel on its own, with ``[size, size, 1, features]``.
        """
        # Each channel's kernel is drawn on its own, so both its fans are size**2; left to the
        # default, fan_out would count all channels.
        axes = {"out_axis": -2, "batch_axis": -1} if depthwise else {}
        return nn.Conv(
            features,
            (size, size),
            strides=(stride, stride),
            padding=((size // 2, size // 2),) * 2,
            feature_group_count=features if depthwise else 1,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=INITIALISERS[self.initialiser](**axes),
            conv_general_dilated=CONVOLUTIONS[self.convolution],
            name=name,
        )

    def _norm(self, train: bool, name: str) -> BatchNorm | nn.GroupNorm:
        if self.norm == "layer":
            # One group is LayerNorm over the whole image; nn.LayerNorm would have a scale a pixel.
            return nn.GroupNorm(num_groups=1, epsilon=1e-5, dtype=self.dtype, name=name)
        return BatchNorm(train=train, dtype=self.dtype, axis_name=self.bn_axis_name, name=name)

    def _finish(self, x: jax.Array) -> jax.Array:
        r"""Sow a block's ``output``, and return it or, where one is inserted, its normalised form.

        Layerwise reinitialisation inserts :math:`(x - \mu) / \sigma` after each block of a finished
        round (Alabdulmohsin et al. 2021, algorithm 1, lines 8 and 10). The entry of the collection
        "normalisers" is ``{"mean": mu, "scale": 1 / sigma}``, float32 scalars under the block's own
        path: model state that is never trained and that ``apply`` never changes. Mean 0 and scale 1
        give ``x`` itself, bit for bit, though XLA may fuse, and so round, what is around it another
        way. Without an entry nothing is added to the program.
        """
        self.sow("intermediates", "output", x)
        if not self.has_variable("normalisers", "mean"):
            return x
        mean: jax.Array = self.get_variable("normalisers", "mean")
        scale: jax.Array = self.get_variable("normalisers", "scale")
        return ((x.astype(jnp.float32) - mean) * scale).astype(x.dtype)


class ConvBlock(Layered, kw_only=True):
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


class SeparableBlock(Layered, kw_only=True):
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


class DenseBlock(Layered, kw_only=True):
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
            kernel_init=INITIALISERS[self.initialiser](),
            name="linear",
        )(x)
        if not bare:
            x = self._norm(train, "norm")(x)
        return self._finish(nn.relu(x))


class Stage(nn.Module):
    """``size`` residual blocks, named ``block0`` upwards, of which the first may stride.

    Attributes:
        block: makes a block; called with ``stride`` and ``name``.
        size: number of blocks.
        stride: of the first block.
    """

    block: Callable[..., nn.Module]
    size: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[N, H, W, C]`` to ``[N, H / stride, W / stride, C']``, sizes rounded up."""
        for index in range(self.size):
            stride = self.stride if index == 0 else 1
            x = self.block(stride=stride, name=f"block{index}")(x, train)
        return x


def stages(
    x: jax.Array, train: bool, sizes: Sequence[int], width: int, block: Callable[..., nn.Module]
) -> jax.Array:
    """Apply stages ``layer1`` upwards, of these ``sizes``; all but the first halve the image.

    The first has ``width`` channels, each further one twice as many. ``block`` makes a block; it is
    called with ``width``, ``stride`` and ``name``, within a module's compact ``__call__``.
    """
    for index, size in enumerate(sizes):
        stage_block = functools.partial(block, width=width * 2**index)
        x = Stage(stage_block, size, min(index, 1) + 1, name=f"layer{index + 1}")(x, train)
    return x


def flatten(images: jax.Array) -> jax.Array:
    """Return ``[N, H * W * C]`` of ``[N, H, W, C]``, the channel fastest."""
    return images.reshape(len(images), -1)
