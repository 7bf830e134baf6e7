"""Models by name."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from seal_jax.errors import UsageError, nearest
from seal_jax.models.cifar_resnet import DEPTHS, cifar_resnet
from seal_jax.models.mlp import MLP
from seal_jax.models.mobilenet import MobileNet
from seal_jax.models.model import Model, from_module
from seal_jax.models.network import Network
from seal_jax.models.resnet import RESNETS, ResNet
from seal_jax.models.scnn import SimpleCNN
from seal_jax.models.vgg import VGG, VGGS
from seal_jax.models.wide_resnet import WideResNet, parse


class _Entry(NamedTuple):
    """A function of the options that returns the module, and the options of its own."""

    build: Callable[..., Network]
    options: tuple[str, ...]


_ENTRIES: dict[str, _Entry] = {
    **{
        name: _Entry(
            functools.partial(ResNet, block=block, stage_sizes=sizes),
            ("stem", "width"),
        )
        for name, (block, sizes) in RESNETS.items()
    },
    **{
        f"resnet{depth}": _Entry(functools.partial(cifar_resnet, depth), ("shortcut", "width"))
        for depth in DEPTHS
    },
    "scnn": _Entry(SimpleCNN, ("dense_width", "pool")),
    **{
        name: _Entry(functools.partial(VGG, group_sizes=sizes), ("dense_width",))
        for name, sizes in VGGS.items()
    },
    "mobilenet": _Entry(MobileNet, ()),
    "mlp": _Entry(MLP, ("hidden",)),
}
_COMMON = ("norm", "initialiser", "dropout", "head_bias")
# Some of the names that fit the pattern wrn<6n + 4>-<k>, all of which create() knows.
_WIDE = ("wrn10-1", "wrn16-8", "wrn28-10", "wrn40-4")
_DTYPES = ("float32", "bfloat16")


def names() -> tuple[str, ...]:
    """Return names that ``create`` knows: all but those of wide ResNets, of which it knows more."""
    return (*_ENTRIES, *_WIDE)


def create(
    name: str,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    dtype: Any = jnp.float32,
    bn_axis_name: str | None = None,
    convolution: str = "native",
    **options: Any,
) -> Model:
    """Return the model called ``name``.

    Args:
        name: one of ``names()``, or any "wrn<depth>-<width>" with a depth of 6n + 4.
        num_classes: number of logits, at least 2.
        image_shape: ``(height, width, channels)``.
        dtype: dtype of the activations, float32 or bfloat16, as a dtype or its name.
        bn_axis_name: named axis over which BatchNorm synchronises its statistics, or None.
        convolution: how a convolution is computed, "native" or "matmul" (for programs that train in
            a loop on CPU, see ``seal_jax.models.convolution``); equal up to rounding.
        **options: for all ``norm`` ("batch" or "layer"; "none" too for the MLP), ``initialiser``
            ("he", "he_fan_out" or "xavier"), ``dropout`` (rate) and ``head_bias``; for resnet18, 34,
            50 and 101 ``stem`` ("imagenet" or "cifar") and ``width``; for the 6n + 2 nets
            ``shortcut`` ("A" or "B") and ``width``; for wide ResNets ``stride_on`` ("first" or
            "second"); for scnn, vgg16 and vgg19 ``dense_width``; for scnn ``pool`` (2 or 3); for the
            MLP ``hidden`` (a tuple of widths).

    Raises:
        UsageError: unknown name or option, a value that a field does not have, or images smaller
            than the network's total stride.

    >>> model = create("resnet50", num_classes=200, image_shape=(64, 64, 3))
    >>> model.layers[23 - 1]
    'layer3/block0/conv1'
    """
    build, own = _entry(name)
    known = (*own, *_COMMON)
    for option in options:
        if option not in known:
            raise UsageError(
                f"{option}={options[option]!r}: {name} has no such option{_list(known)}"
            )
    module = build(
        num_classes=num_classes,
        dtype=_dtype(dtype),
        bn_axis_name=bn_axis_name,
        convolution=convolution,
        **options,
    )
    return from_module(module, name=name, image_shape=image_shape)


def _entry(name: str) -> _Entry:
    wide = parse(name)
    if wide is not None:
        depth, widen = wide
        build = functools.partial(WideResNet, depth=depth, width=16 * widen)
        return _Entry(build, ("stride_on",))
    if name not in _ENTRIES:
        raise UsageError(
            f"model name {name!r} is unknown{nearest(name, names()) or _list(names())}"
        )
    return _ENTRIES[name]


def _list(known: tuple[str, ...]) -> str:
    return f"; known: {', '.join(known)}"


def _dtype(dtype: Any) -> Any:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in _DTYPES:
        raise UsageError(
            f"dtype={dtype!r}: use {' or '.join(_DTYPES)}{nearest(str(dtype), _DTYPES)}"
        )
    return found
