"""A Flax module with its input shape and the declared order of its parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from seal_jax.errors import UsageError, check_number, nearest


@dataclasses.dataclass(frozen=True)
class Model:
    """A module and what a method must know of it; hashable.

    ``variables`` everywhere is ``{"params": ..., "batch_stats": ...}`` and may hold "normalisers", a
    tree like that of ``empty_normalisers`` or a part of it.

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
        round_blocks: the K blocks of layerwise reinitialisation, bottom to top, each an entry of
            ``blocks``; empty for a module that declares none.
        dense_after_convs: the entries of ``blocks`` that are dense layers above the last
            convolution, the classifier included.
    """

    name: str
    module: Any
    image_shape: tuple[int, int, int]
    num_classes: int
    blocks: tuple[str, ...]
    layers: tuple[str, ...]
    head: str
    round_blocks: tuple[str, ...] = ()
    dense_after_convs: tuple[str, ...] = ()

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Draw ``{"params": ..., "batch_stats": ...}``, nested dicts of float32, from ``key``.

        A network without BatchNorm has empty ``batch_stats``. Works under ``jax.jit``, ``jax.vmap``
        over keys, and ``jax.eval_shape``.
        """
        # Shapes alone suffice: lazy_init draws the parameters without running the network.
        images = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        return {"batch_stats": {}, **self.module.lazy_init(key, images, train=False)}

    def features(self, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        """Return what each part of the network makes of ``images`` in inference mode, by name.

        The names are ``stem`` (of the residual networks), each of ``round_blocks`` (see
        ``block_outputs``), ``features`` (float32 ``[N, C]``, the classifier's input) and ``logits``
        (float32 ``[N, num_classes]``). For their order walk ``blocks``: jit sorts dicts.
        """
        logits, state = self.module.apply(variables, images, train=False, mutable=["intermediates"])
        sown = self._sown(state)
        return {
            **({"stem": sown["stem"]} if "stem" in sown else {}),
            **{block: sown[f"{block}/output"] for block in self.round_blocks},
            "features": sown["features"],
            "logits": logits,
        }

    def block_outputs(self, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        """Return the output of each round block in inference mode, by path, in the compute dtype.

        It is taken BEFORE the inserted normaliser of that block; those of earlier blocks are active.
        Under jit, what lies above the last output that is used costs nothing.
        """
        found = self.features(variables, images)
        return {block: found[block] for block in self.round_blocks}

    def before_relu(self, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        """Return what each round block ends with before its last ReLU, by path, in inference mode.

        Raises:
            UsageError: the network's blocks do not end with one.
        """
        _, state = self.module.apply(variables, images, train=False, mutable=["intermediates"])
        sown = traverse_util.flatten_dict(state.get("intermediates", {}), sep="/")
        for block in self.round_blocks:
            if f"{block}/before_relu" not in sown:
                raise UsageError(
                    f"model.name={self.name!r}: its block {block} does not end with an addition and a "
                    "ReLU; take the blocks' outputs"
                )
        return {block: sown[f"{block}/before_relu"][0] for block in self.round_blocks}

    def extract(
        self, variables: Any, images: jax.Array, train: bool, *, rngs: Any = None
    ) -> tuple[jax.Array, Any]:
        """Return the classifier's input, float32 ``[N, C]``, and the changed batch statistics.

        Args:
            variables: see the class.
            images: ``[N, H, W, C]``.
            train: whether BatchNorm uses and updates batch statistics, and dropout drops.
            rngs: ``{"dropout": key}``, for training with dropout.
        """
        mutable = ["intermediates", "batch_stats"] if train else ["intermediates"]
        _, state = self.module.apply(variables, images, train=train, mutable=mutable, rngs=rngs)
        statistics = state.get("batch_stats", variables.get("batch_stats", {}))
        return self._sown(state)["features"], statistics

    def classify(self, head_params: Any, features: jax.Array) -> jax.Array:
        """Return the logits of ``features`` by the very operation that ends the network.

        On CPU they equal the network's bit for bit; elsewhere a compiler may fuse the two apart.

        Args:
            head_params: ``{"kernel": [C, num_classes]}`` with or without ``"bias"``: the entry
                ``head`` of the parameters, or any like it.
            features: ``[N, C]``.
        """
        head = nn.Dense(self.num_classes, use_bias="bias" in head_params)
        logits: Any = head.apply({"params": head_params}, features)
        return logits

    def empty_normalisers(self) -> dict[str, Any]:
        """Return a collection "normalisers" that changes nothing: mean 0, scale 1, by block path.

        Give the network the entry ``{"mean": mu, "scale": 1 / sigma}`` (float32 scalars) of each
        round block whose output is to be normalised.
        """
        return traverse_util.unflatten_dict(
            {
                f"{block}/{name}": jnp.asarray(value, jnp.float32)
                for block in self.round_blocks
                for name, value in (("mean", 0), ("scale", 1))
            },
            sep="/",
        )

    def above(self, block: str) -> tuple[str, ...]:
        """Return the entries of ``blocks`` above a round block.

        Raises:
            UsageError: ``block`` is no round block.
        """
        if block not in self.round_blocks:
            near = nearest(block, self.round_blocks)
            raise UsageError(f"block={block!r} is no round block of {self.name}{near}")
        return self.blocks[self.blocks.index(block) + 1 :]

    @property
    def flattened(self) -> dict[str, int]:
        """Paths of the kernels whose input axis is a flattened image, and that image's channels.

        The axis runs over height, width and channels, the last fastest. Image channels, which no
        ``slim`` network has fewer of, do not count.
        """
        return dict(getattr(self.module, "flattened", {}))

    def slim(self, keep: float) -> "Model":
        """Return the network with ``ceil(keep * width)`` in place of every width.

        The channels of the images and the classes stay. Knowledge evolution (Taha et al. 2021,
        section 3) evaluates the fit hypothesis in this form. Its function is that of the dense
        network with zeros elsewhere, except with LayerNorm, where these zeros would count in the
        statistics. Every parameter and statistic of the
        slim network is a leading slice, along each axis, of the dense network's, but for the input
        axes of the kernels in ``flattened``: there reshape ``[h * w * c, ...]`` to
        ``[h * w, c, ...]`` first, c being the channels named there, and slice c.

        Args:
            keep: in (0, 1]. In the residual networks ``keep * width`` of the first stage must be
                whole, or the stages would no longer fit each other.

        Raises:
            UsageError: ``keep`` is out of range or does not fit the widths, or the module has no
                slim form.
        """
        check_number("method.keep", keep, lambda value: 0 < value <= 1, "lie in (0, 1]")
        if not hasattr(self.module, "slim"):
            raise UsageError(f"model.name={self.name!r} has no slim form: its module has no slim()")
        return from_module(
            self.module.slim(keep), name=f"{self.name} at {keep:g}", image_shape=self.image_shape
        )

    def _sown(self, state: Any) -> dict[str, jax.Array]:
        sown = traverse_util.flatten_dict(state.get("intermediates", {}), sep="/")
        wanted = ("features", *(f"{block}/output" for block in self.round_blocks))
        for path in wanted:
            if path not in sown:
                raise UsageError(
                    f"model.name={self.name!r}: its module must sow {path!r} into 'intermediates'"
                )
        return {path: values[0] for path, values in sown.items()}


def from_module(module: Any, *, name: str, image_shape: tuple[int, int, int]) -> Model:
    """Return the ``Model`` of a module that declares its own order, for nets outside the registry.

    The module must have ``num_classes``, ``blocks``, ``layers``, ``head`` and ``dtype``. It may have
    what else a ``seal_jax.models.network.Network`` declares: ``round_blocks``,
    ``dense_after_convs``, ``flattened``, ``total_stride`` and ``slim``.

    Raises:
        UsageError: ``image_shape`` is not (height, width, channels), or is too small.
    """
    shape = tuple(image_shape)
    if len(shape) != 3 or not all(isinstance(side, int) and side > 0 for side in shape):
        raise UsageError(f"image_shape={shape!r}: give (height, width, channels), all positive")
    least = getattr(module, "total_stride", 1)
    if min(shape[:2]) < least:
        raise UsageError(
            f"image_shape={shape!r} is too small for {name}, which shrinks images {least} times: "
            f"use a height and width of at least {least}{getattr(module, 'smaller_stride', '')}"
        )
    return Model(
        name=name,
        module=module,
        image_shape=shape,
        num_classes=module.num_classes,
        blocks=module.blocks,
        layers=module.layers,
        head=module.head,
        round_blocks=getattr(module, "round_blocks", ()),
        dense_after_convs=getattr(module, "dense_after_convs", (module.head,)),
    )
