"""The layers that every network of this package is made of, and who makes them.

Padding is explicit and symmetric, as in torch: with stride 2, ``SAME`` pads only on the far side of
an even image and so shifts the sampling grid. A layer that a normalisation follows has no bias.
"""

import functools
from collections.abc import Callable
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


def kernel_init(initialiser: str, *, depthwise: bool = False) -> Callable[..., jax.Array]:
    """Return the initialiser called ``initialiser``, a key of ``INITIALISERS``.

    A ``depthwise`` kernel ``[size, size, 1, C]`` holds C convolutions of one channel each: both its
    fans are ``size**2``, not ``size**2 * C`` for the second.
    """
    axes = {"out_axis": -2, "batch_axis": -1} if depthwise else {}
    return INITIALISERS[initialiser](**axes)


def conv(
    features: int,
    size: int,
    *,
    stride: int = 1,
    dtype: Any,
    convolution: str,
    initialiser: str = "he",
    depthwise: bool = False,
    name: str,
) -> nn.Conv:
    """Return a ``size`` x ``size`` convolution without bias, padded by ``size // 2`` on all sides.

    The kernel is float32 ``[size, size, in, features]``; the input and the kernel are cast to
    ``dtype`` for the product. ``convolution`` is a key of ``CONVOLUTIONS``. With ``depthwise`` each
    of the ``features`` channels is convolved on its own, with a kernel ``[size, size, 1, features]``.
    """
    pad = size // 2
    return nn.Conv(
        features,
        (size, size),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        feature_group_count=features if depthwise else 1,
        use_bias=False,
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=kernel_init(initialiser, depthwise=depthwise),
        conv_general_dilated=CONVOLUTIONS[convolution],
        name=name,
    )


class BatchNorm(nn.BatchNorm):
    """Flax's BatchNorm under a scope of its own, by which its collectives can be told from others.

    Attributes:
        train: whether it normalises with the statistics of the batch, unless told otherwise.
    """

    train: bool = False

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
            # Flax normalises with a choice of its own; so lend it what this batch is to be
            # normalised with as the running statistics, and store the moved ones afterwards.
            for name, old in running.items():
                self.put_variable("batch_stats", name, jnp.where(keep, old, batch[name]))
            y = normalise(x, use_running_average=True)
            if unbiased:
                batch["var"] *= count / jnp.maximum(count - 1, 1)
            for name, old in running.items():
                moved = self.momentum * old + (1 - self.momentum) * batch[name]
                self.put_variable("batch_stats", name, jnp.where(keep, old, moved))
            return y


def _moments(
    x: jax.Array, mask: jax.Array | None, axis_name: str | None
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Return mean and variance of the masked examples on all devices, and how many values."""
    x = x.astype(jnp.float32)
    mask = jnp.ones(len(x)) if mask is None else mask
    weights = jnp.broadcast_to(mask.reshape(-1, *(1,) * (x.ndim - 1)), (*x.shape[:-1], 1))
    axes = tuple(range(x.ndim - 1))
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
        unbiased: let the running variance take in n / (n - 1) times the batch's, as torch does;
            Flax takes in the batch's own, three quarters of that for four values. Both normalise
            with the batch's own.
    """

    def call(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        # The inner call, Flax's own, comes past here too: it has been told what to use.
        if isinstance(context.module, BatchNorm) and "use_running_average" not in kwargs:
            kwargs = {**kwargs, "frozen": frozen, "mask": example_mask, "unbiased": unbiased}
        return next_call(*args, **kwargs)

    return nn.intercept_methods(call)


def batch_norm(*, train: bool, dtype: Any, axis_name: str | None, name: str) -> BatchNorm:
    """Return BatchNorm with torch's constants: eps 1e-5 and running momentum 0.1 (Flax's 0.9).

    Scale, bias, batch statistics and running statistics are float32 whatever ``dtype`` is. With
    ``axis_name`` the batch statistics are averaged over that named axis.
    """
    return BatchNorm(
        train=train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        param_dtype=jnp.float32,
        axis_name=axis_name,
        name=name,
    )


def layer_norm(*, dtype: Any, name: str) -> nn.GroupNorm:
    """Return LayerNorm over height, width and channels with a scale and a bias a channel.

    It is GroupNorm with one group and eps 1e-5, the same in training and in inference; statistics
    are float32 whatever ``dtype`` is. On ``[N, C]`` it is LayerNorm over the channels.
    """
    return nn.GroupNorm(num_groups=1, epsilon=1e-5, dtype=dtype, param_dtype=jnp.float32, name=name)


class Layered(nn.Module, kw_only=True):
    """A module that makes its layers in the one way that a whole network shares.

    Attributes:
        dtype: dtype of the activations, float32 or bfloat16.
        norm: ``"batch"`` or ``"layer"``; see ``batch_norm`` and ``layer_norm``.
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
        return {
            "dtype": self.dtype,
            "norm": self.norm,
            "initialiser": self.initialiser,
            "bn_axis_name": self.bn_axis_name,
            "convolution": self.convolution,
        }

    def _conv(
        self, features: int, size: int, name: str, stride: int = 1, *, depthwise: bool = False
    ) -> nn.Conv:
        return conv(
            features,
            size,
            stride=stride,
            dtype=self.dtype,
            convolution=self.convolution,
            initialiser=self.initialiser,
            depthwise=depthwise,
            name=name,
        )

    def _norm(self, train: bool, name: str) -> BatchNorm | nn.GroupNorm:
        if self.norm == "layer":
            return layer_norm(dtype=self.dtype, name=name)
        return batch_norm(train=train, dtype=self.dtype, axis_name=self.bn_axis_name, name=name)
