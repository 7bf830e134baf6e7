"""A Flax module with its input shape and the declared order of its parameters, by name.

A family of networks is a module of this folder. What it puts into ``MODELS`` is found here.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from seal_jax.errors import UsageError, check_choice, check_number, nearest
from seal_jax.models.network import Entry, Structure

_COMMON_OPTIONS = ("norm", "initialiser", "dropout", "head_bias")
_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(Structure):
    """A module and what a method must know of it; hashable.

    ``variables`` everywhere is ``{"params": ..., "batch_stats": ...}`` and may hold "normalisers", a
    tree like that of ``empty_normalisers`` or a part of it.

    Attributes:
        name: as ``create`` knows it.
        module: Flax module; ``module.apply(variables, images, train=...)`` returns logits.
        image_shape: ``(height, width, channels)`` of one image.
        num_classes: number of logits.

    The others are those of ``Structure``, as the module declares them.
    """

    name: str
    module: Any
    image_shape: tuple[int, int, int]
    num_classes: int

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Initialize ``{"params": ..., "batch_stats": ...}``, nested dicts of float32, from ``key``.

        A network without BatchNorm has empty ``batch_stats``. Works under ``jax.jit``, ``jax.vmap``
        over keys, and ``jax.eval_shape``.
        """
        # Shapes alone suffice: lazy_init draws the parameters without running the network.
        images = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        return {"batch_stats": {}, **self.module.lazy_init(key, images, train=False)}

    def features(self, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        """Return the output of each part of the network in inference mode, by name.

        The names are ``stem`` (of the residual networks), each of ``round_blocks``, ``features``
        (float32 ``[N, C]``, the classifier's input) and ``logits`` (float32 ``[N, num_classes]``). For
        their order walk ``blocks``: jit sorts dicts. A block's output is taken BEFORE its inserted
        normaliser; those of earlier blocks are active. Under jit, what is not used costs nothing.
        """
        logits, sown, _ = self._apply(variables, images)
        return {
            **({"stem": sown["stem"]} if "stem" in sown else {}),
            **{block: sown[f"{block}/output"] for block in self.round_blocks},
            "features": sown["features"],
            "logits": logits,
        }

    def before_relu(self, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        """Return the input of each round block's last ReLU, by path, in inference mode."""
        _, sown, _ = self._apply(variables, images)
        for block in self.round_blocks:
            if f"{block}/before_relu" not in sown:
                raise UsageError(
                    f"model.name={self.name!r}: its block {block} does not end with an addition and a "
                    "ReLU; take the blocks' outputs"
                )
        return {block: sown[f"{block}/before_relu"] for block in self.round_blocks}

    def hidden(self, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        """Return the activations of each layer of ``units`` in inference mode, ``[N, ..., n]`` by name."""
        _, sown, _ = self._apply(variables, images)
        return self.activations(sown)

    def activations(self, sown: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Return those of what the modules sow, by path, that are activations of ``units``."""
        for layer in self.units:
            if layer.name not in sown:
                raise UsageError(
                    f"model.name={self.name!r}: its module must sow {layer.name!r} into 'intermediates', "
                    "as it declares these units"
                )
        return {layer.name: sown[layer.name] for layer in self.units}

    def extract(
        self, variables: Any, images: jax.Array, train: bool, *, rngs: Any = None
    ) -> tuple[jax.Array, Any]:
        """Return the classifier's input, float32 ``[N, C]``, and the changed batch statistics.

        With ``train`` BatchNorm uses and updates batch statistics, and dropout drops, by the key of
        ``rngs``, ``{"dropout": key}``.
        """
        _, sown, statistics = self._apply(variables, images, train, rngs)
        return sown["features"], statistics

    def classify(self, head_params: Any, features: jax.Array) -> jax.Array:
        """Return the logits of ``features``, ``[N, C]``, by the operation that ends the network.

        On CPU they equal the network's bit for bit; elsewhere a compiler may fuse the two apart.
        ``head_params`` is ``{"kernel": [C, num_classes]}`` with or without ``"bias"``.
        """
        # The layer that `Network._logits` ends with.
        head = nn.Dense(self.num_classes, use_bias="bias" in head_params)
        logits: Any = head.apply({"params": head_params}, features)
        return logits

    def empty_normalisers(self) -> dict[str, Any]:
        """Return a collection "normalisers" that changes nothing: mean 0, scale 1, by block path.

        Give the network the entry ``{"mean": mu, "scale": 1 / sigma}`` (float32 scalars) of each
        round block whose output is normalised.
        """
        # Separate arrays for every block: a buffer cannot be donated twice.
        return traverse_util.unflatten_dict(
            {b: {"mean": jnp.zeros(()), "scale": jnp.ones(())} for b in self.round_blocks}, sep="/"
        )

    def slim(self, keep: float) -> "Model":
        """Return the network with ``ceil(keep * width)`` in place of every width.

        The channels of the images and the classes stay. Knowledge evolution (Taha et al. 2021,
        section 3) evaluates the fit hypothesis in this form. Its function is that of the dense
        network with zeros elsewhere, except with LayerNorm, where these zeros would count in the
        statistics. Every parameter and statistic of the slim network is a leading slice, along each
        axis, of the dense network's, except for the input axes of the kernels in ``flattened``: there
        reshape ``[h * w * c, ...]`` to ``[h * w, c, ...]`` first, c being the channels named there,
        and slice c. Of layers in ``concatenated`` each part is sliced.

        ``keep`` is in (0, 1]. In the residual networks ``keep * width`` of the first stage must be
        whole, or the stages would no longer fit each other; in DenseNets also ``keep * growth``, in
        ResNeXt ``keep * groups``.
        """
        check_number("method.keep", keep, lambda value: 0 < value <= 1, "lie in (0, 1]")
        if not hasattr(self.module, "slim"):
            raise UsageError(f"model.name={self.name!r} has no slim form: its module has no slim()")
        return from_module(
            self.module.slim(keep), name=f"{self.name} at {keep:g}", image_shape=self.image_shape
        )

    @staticmethod
    def sown(state: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Return what modules have sown into "intermediates" of the changed ``state``, by path."""
        flat = traverse_util.flatten_dict(state.get("intermediates", {}), sep="/")
        # Sowing appends to a tuple, of one entry here.
        return {path: values[0] for path, values in flat.items()}

    def _apply(
        self, variables: Any, images: jax.Array, train: bool = False, rngs: Any = None
    ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        """Return the logits, what the modules sow by path, and the changed batch statistics."""
        mutable = ["intermediates", "batch_stats"] if train else ["intermediates"]
        logits, state = self.module.apply(
            variables, images, train=train, mutable=mutable, rngs=rngs
        )
        # Methods and evaluations see inside a network by what it sows; a user's own module may not sow it.
        sown = self.sown(state)
        for path in ("features", *(f"{block}/output" for block in self.round_blocks)):
            if path not in sown:
                raise UsageError(
                    f"model.name={self.name!r}: its module must sow {path!r} into 'intermediates'"
                )
        return logits, sown, state.get("batch_stats", variables.get("batch_stats", {}))


def from_module(module: Any, *, name: str, image_shape: tuple[int, int, int]) -> Model:
    """Return the ``Model`` of a module that declares its own order, for nets outside the registry.

    The module must have ``num_classes`` and ``dtype``, and a ``structure`` or, as attributes of its
    own, the ``blocks``, ``layers`` and ``head`` of a ``seal_jax.models.network.Structure``; it may
    have the others of these, and ``slim`` as a ``Network`` has it.
    """
    shape = tuple(image_shape)
    if len(shape) != 3 or not all(isinstance(side, int) and side > 0 for side in shape):
        raise UsageError(f"image_shape={shape!r}: give (height, width, channels), all positive")
    structure = getattr(module, "structure", None)
    # A user's module may declare the fields as attributes, and has defaults for most of them.
    if structure is None:
        names = (field.name for field in dataclasses.fields(Structure))
        declared = {name: getattr(module, name) for name in names if hasattr(module, name)}
        structure = Structure(**{"dense_after_convs": (module.head,), **declared})
    least = structure.total_stride
    if min(shape[:2]) < least:
        raise UsageError(
            f"image_shape={shape!r} is too small for {name}, which shrinks images {least} times: "
            f"use a height and width of at least {least}{structure.smaller_stride}"
        )
    multiple = structure.side_multiple
    if shape[0] % multiple or shape[1] % multiple:
        raise UsageError(
            f"image_shape={shape!r} does not divide into the patches of {name}: use a height and width "
            f"that are multiples of {multiple}, or another patch"
        )
    return Model(
        name=name,
        module=module,
        image_shape=shape,
        num_classes=module.num_classes,
        **vars(structure),
    )


def create(
    name: str,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    dtype: Any = jnp.float32,
    bn_axis_name: str | None = None,
    convolution: str = "native",
    remat: bool = False,
    **options: Any,
) -> Model:
    """Return the model called ``name``.

    Args:
        name: one of ``names()``, or any "wrn<depth>-<k>" with a depth of 6n + 4.
        num_classes: number of logits, at least 2.
        image_shape: ``(height, width, channels)``.
        dtype: dtype of the activations, float32 or bfloat16, as a dtype or its name.
        bn_axis_name: named axis over which BatchNorm synchronises its statistics, or None.
        convolution: how a convolution is computed, "native" or "canonical" (for programs that train in
            a loop on CPU, see ``seal_jax.models.convolution``); equal up to rounding.
        remat: whether the backward pass computes the activations of blocks again instead of keeping
            them: less memory for more time; equal up to rounding.
        **options: fields of the module. All have ``norm`` ("batch", "layer" or "group"; "none" too for
            the MLP, "layer" alone for a ViT), ``initialiser`` ("he", "he_fan_out", "xavier" or
            "normal"), ``dropout`` (rate) and ``head_bias``; what else a family has its ``MODELS`` say.

    Raises:
        UsageError: unknown name or option, a value that a field does not have, images smaller than
            the network's total stride, or images that its patches do not divide.

    >>> model = create("resnet50", num_classes=200, image_shape=(64, 64, 3))
    >>> model.layers[23 - 1]
    'layer3/block0/conv1'
    """
    entry = _find_entry(name)
    # Checked before the module's constructor, whose TypeError would not list what there is.
    known = (*entry.options, *_COMMON_OPTIONS)
    for option in options:
        if option not in known:
            raise UsageError(
                f"{option}={options[option]!r}: {name} has no such option; "
                f"known: {', '.join(known)}"
            )
    module = entry.build(
        num_classes=num_classes,
        dtype=_checked_dtype(dtype),
        bn_axis_name=bn_axis_name,
        convolution=convolution,
        remat=remat,
        **options,
    )
    return from_module(module, name=name, image_shape=image_shape)


def names() -> tuple[str, ...]:
    """Return the names that ``create`` knows; of the endless wide ResNets only the usual ones."""
    return tuple(entries())


def entries() -> dict[str, Entry]:
    """Return what is declared of each network, by the names of ``names``."""
    return {name: entry for family in _families() for name, entry in family.MODELS.items()}


def _find_entry(name: str) -> Entry:
    for family in _families():
        # A family of endless names, such as the wide ResNets, has a function as well.
        by_pattern = getattr(family, "find", family.MODELS.get)
        if entry := family.MODELS.get(name) or by_pattern(name):
            return entry
    near = nearest(name, names()) or f"; known: {', '.join(names())}"
    raise UsageError(f"model name {name!r} is unknown{near}")


@functools.cache
def _families() -> tuple[ModuleType, ...]:
    """Import the modules of this folder and return those that declare models."""
    modules = (
        importlib.import_module(f"{__package__}.{module.name}")
        for module in pkgutil.iter_modules([str(Path(__file__).parent)])
    )
    return tuple(module for module in modules if hasattr(module, "MODELS"))


def _checked_dtype(dtype: Any) -> Any:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    check_choice("dtype", name, _DTYPES, suggest=True)
    return jnp.dtype(name)
