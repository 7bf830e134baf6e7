"""Models by name: a Flax module with its input shape and the declared order of its parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from seal_jax.errors import UsageError, nearest
from seal_jax.models.cifar_resnet import DEPTHS, cifar_resnet
from seal_jax.models.resnet import RESNETS, ResNet

_CIFAR_RESNETS = {f"resnet{depth}": depth for depth in DEPTHS}
_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Model:
    """A module and what a forgetting method must know of it; hashable.

    Attributes:
        name: the registry's name.
        module: Flax module; ``module.apply(variables, images, train=...)`` returns logits.
        image_shape: ``(height, width, channels)`` of one image.
        num_classes: number of logits.
        blocks: path prefixes of the parameter tree, bottom to top, declared by the module; together
            they cover every parameter exactly once: ``"conv1", "bn1", "layer1/block0", ..., "fc"``.
        layers: weight layers, bottom to top, without downsample convolutions. SEAL's (section 4)
            L = 23 in ResNet-50 is the 1-based index here of ``layer3/block0/conv1``.
        head: path of the classifier.
    """

    name: str
    module: Any
    image_shape: tuple[int, int, int]
    num_classes: int
    blocks: tuple[str, ...]
    layers: tuple[str, ...]
    head: str

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Draw ``{"params": ..., "batch_stats": ...}``, nested dicts of float32, from ``key``.

        Works under ``jax.jit``, ``jax.vmap`` over keys, and ``jax.eval_shape``.
        """
        # Shapes alone suffice: lazy_init draws the parameters without running the network.
        images = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        return self.module.lazy_init(key, images, train=False)

    def features(self, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        """Return what each part of the network makes of ``images`` in inference mode, by name.

        The names are ``stem`` and each residual block's path (``[N, H, W, C]`` in the compute
        dtype, after the ReLU), ``features`` (float32 ``[N, C]``, the classifier's input) and
        ``logits`` (float32 ``[N, num_classes]``). For their order walk ``blocks``: jit sorts dicts.
        """
        logits, state = self.module.apply(variables, images, train=False, mutable=["intermediates"])
        sown = traverse_util.flatten_dict(state["intermediates"], sep="/")
        inner = {block: sown[f"{block}/output"][0] for block in self.module.residual_blocks}
        return {
            "stem": sown["stem"][0],
            **inner,
            "features": sown["features"][0],
            "logits": logits,
        }


def names() -> tuple[str, ...]:
    """Return the names that ``create`` knows."""
    return (*RESNETS, *_CIFAR_RESNETS)


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
        name: one of ``names()``.
        num_classes: number of logits, at least 2.
        image_shape: ``(height, width, channels)``.
        dtype: dtype of the activations, float32 or bfloat16, as a dtype or its name.
        bn_axis_name: named axis over which BatchNorm synchronises its statistics, or None.
        convolution: how a convolution is computed, "native" or "matmul" (for programs that train in
            a loop on CPU, see ``seal_jax.models.convolution``); equal up to rounding.
        **options: for resnet18, 34, 50 and 101 ``stem`` ("imagenet" or "cifar") and ``width``; for
            the 6n + 2 nets ``shortcut`` ("A" or "B") and ``width``.

    Raises:
        UsageError: unknown name or option, a value that a field does not have, or images smaller
            than the network's total stride.

    >>> model = create("resnet50", num_classes=200, image_shape=(64, 64, 3))
    >>> model.layers[23 - 1]
    'layer3/block0/conv1'
    """
    if name not in names():
        known = names()
        raise UsageError(f"model name {name!r} is unknown{nearest(name, known) or _list(known)}")
    known = ("stem", "width") if name in RESNETS else ("shortcut", "width")
    for option in options:
        if option not in known:
            raise UsageError(
                f"{option}={options[option]!r}: {name} has no such option{_list(known)}"
            )
    shared: dict[str, Any] = {
        "num_classes": num_classes,
        "dtype": _dtype(dtype),
        "bn_axis_name": bn_axis_name,
        "convolution": convolution,
        **options,
    }
    if name in RESNETS:
        block, stage_sizes = RESNETS[name]
        module = ResNet(block=block, stage_sizes=stage_sizes, **shared)
    else:
        module = cifar_resnet(_CIFAR_RESNETS[name], **shared)
    return from_module(module, name=name, image_shape=image_shape)


def from_module(module: ResNet, *, name: str, image_shape: tuple[int, int, int]) -> Model:
    """Return the ``Model`` of a module that declares its own order, for nets outside the registry.

    Raises:
        UsageError: ``image_shape`` is not (height, width, channels), or is too small.
    """
    shape = tuple(image_shape)
    if len(shape) != 3 or not all(isinstance(side, int) and side > 0 for side in shape):
        raise UsageError(f"image_shape={shape!r}: give (height, width, channels), all positive")
    least = module.total_stride
    if min(shape[:2]) < least:
        other = ", or stem='cifar'" if module.stem == "imagenet" else ""
        raise UsageError(
            f"image_shape={shape!r} is too small for {name}, which shrinks images {least} times: "
            f"use a height and width of at least {least}{other}"
        )
    return Model(
        name=name,
        module=module,
        image_shape=shape,
        num_classes=module.num_classes,
        blocks=module.blocks,
        layers=module.layers,
        head=module.head,
    )


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
