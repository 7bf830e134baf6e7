"""The layers that all networks of this package share, and the structure that each of them declares.

Padding is explicit and symmetric, as in torch: with stride 2, ``SAME`` pads only on the far side of
an even image and so shifts the sampling grid. A layer that a normalisation follows has no bias.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from seal_jax.errors import UsageError, check_choice, check_integer, check_number
from seal_jax.models.convolution import CONVOLUTIONS
from seal_jax.slimming import kept
from seal_jax.units import Units

NORMS = ("batch", "layer", "group")

# By name, functions of ``in_axis``, ``out_axis`` and ``batch_axis``. "he" is torch's
# ``kaiming_normal_(mode="fan_in", nonlinearity="relu")``. ``initializers.he_normal`` is not that: it
# draws from a normal truncated at two standard deviations.
INITIALISERS: dict[str, Callable[..., Any]] = {
    "he": functools.partial(nn.initializers.variance_scaling, 2.0, "fan_in", "normal"),
    "he_fan_out": functools.partial(nn.initializers.variance_scaling, 2.0, "fan_out", "normal"),
    "xavier": functools.partial(nn.initializers.variance_scaling, 1.0, "fan_avg", "uniform"),
    # N(0, 0.02^2), whatever the fans are: timm's of transformers, whose cut at 2 is a hundred deviations away.
    "normal": lambda **axes: nn.initializers.normal(0.02),
}

# Factor by which each stem shrinks the image.
STEMS: dict[str, int] = {"imagenet": 4, "cifar": 1}

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": nn.relu, "relu6": nn.relu6}

# Name of every classifier.
HEAD = "fc"
_CHOICES: dict[str, Collection[Any]] = {
    "convolution": CONVOLUTIONS,
    "norm": NORMS,
    "initialiser": INITIALISERS,
    "head_bias": (True, False),
}


class BatchNorm(nn.Module):
    """BatchNorm with torch's constants, in a named scope, by which its collectives are found.

    Parameters and statistics are called and computed as those of ``nn.BatchNorm``, in float32 whatever
    ``dtype`` is, and the result as torch computes it. With ``axis_name`` the batch statistics are averaged
    over that named axis.

    Attributes:
        train: whether it normalises with the statistics of the batch, unless told otherwise.
        dtype: of the result.
        momentum: weight of the old running statistics: 1 - torch's 0.1; Flax has 0.99.
        epsilon: added to the variance.
    """

    train: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        max_pool: Callable[[jax.Array], jax.Array] | None = None,
        mask: jax.Array | None = None,
        frozen: Any = False,
        unbiased: bool = False,
    ) -> jax.Array:
        """Normalise ``[N, ..., C]``, then take ``max_pool`` of that; see ``batch_statistics``."""
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        var = self.variable("batch_stats", "var", jnp.ones, channels)
        with jax.named_scope("batch_norm"):
            sign: Any = 1.0
            if max_pool is not None:
                # A window's largest result is that of its largest value or, where the scale is negative, of its
                # smallest. So the values are pooled first, and both passes have fewer of them to normalise.
                sign = jnp.where(scale < 0, -1.0, 1.0)
                x, scale = x * sign.astype(x.dtype), scale * sign
            statistics = running = (sign * mean.value, var.value)
            if self.train and frozen is not True:
                # As in Flax, a network can be initialised where the axis does not exist.
                axis_name = None if self.is_initializing() else self.axis_name
                statistics, count = _moments(x, mask, axis_name)
                batch_mean, batch_var = statistics
                if unbiased:
                    batch_var *= count / jnp.maximum(count - 1, 1)
                updated = tuple(
                    self.momentum * old + (1 - self.momentum) * new
                    for old, new in zip(running, (batch_mean, batch_var), strict=True)
                )
                # Where it is known that nothing is kept, the program has no choice in it.
                if mask is not None or frozen is not False:
                    keep = functools.partial(jnp.where, jnp.logical_or(frozen, count == 0))
                    statistics, updated = jax.tree.map(
                        keep, (running, running), (statistics, updated)
                    )
                if not self.is_initializing():
                    mean.value, var.value = sign * updated[0], updated[1]
            if max_pool is not None:
                x = max_pool(x)
            # torch's form: a product and a sum with two vectors, fewer passes over the elements than nn.BatchNorm's
            # (x - mean) * factor + bias.
            factor = jax.lax.rsqrt(statistics[1] + self.epsilon) * scale
            return jnp.asarray(x * factor + (bias - statistics[0] * factor), self.dtype)


def _moments(
    x: jax.Array, mask: jax.Array | None, axis_name: str | None
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """Return mean and variance of the masked examples on all devices, and how many values."""
    x = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    powers = (x, jnp.square(x))
    if mask is None:
        means: Any = [power.mean(axes) for power in powers]
        count: Any = math.prod(x.shape[:-1])
        if axis_name is not None:
            means = jax.lax.pmean(jnp.stack(means), axis_name)
            count = jax.lax.psum(count, axis_name)
    else:
        # [N, ..., 1]: a channel has one value for each example and pixel, and `count` counts these.
        weights = jnp.broadcast_to(mask.reshape(-1, *(1,) * (x.ndim - 1)), (*x.shape[:-1], 1))
        # Sums, not means: devices may hold different numbers of examples that count.
        sums = jnp.stack([jnp.sum(weights * power, axes) for power in powers])
        count = jnp.sum(weights)
        if axis_name is not None:
            # Not one psum of both, which jax 0.7 cannot differentiate where a part is constant; XLA combines the two.
            sums, count = jax.lax.psum(sums, axis_name), jax.lax.psum(count, axis_name)
        means = sums / jnp.maximum(count, 1)
    # E[x^2] - E[x]^2, as in Flax; rounding may leave it below zero.
    mean, square = means
    return (mean, jnp.maximum(square - jnp.square(mean), 0)), count


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
        if isinstance(context.module, BatchNorm):
            kwargs = {**kwargs, "frozen": frozen, "mask": example_mask, "unbiased": unbiased}
        return next_call(*args, **kwargs)

    return nn.intercept_methods(call)


def norm_groups(channels: int) -> int:
    """Return the number of groups of GroupNorm over so many channels.

    32, as Wu and He (2018) have it and timm's ``resnet50_gn`` even where that leaves two channels each.
    Below 64 channels groups keep at least four: one alone, of a vector, would be normalised to zero.

    Raises:
        UsageError: the groups would differ in size.

    >>> norm_groups(256), norm_groups(64), norm_groups(16), norm_groups(3)
    (32, 32, 4, 1)
    """
    groups = 32 if channels >= 64 else max(1, channels // 4)
    if channels % groups:
        fitting = 32 if channels >= 64 else 4
        raise UsageError(
            f"norm='group': {channels} channels do not divide into {groups} groups; use widths that "
            f"leave multiples of {fitting}, such as {channels // fitting * fitting}, or another norm"
        )
    return groups


class Layered(nn.Module, kw_only=True):
    """A module whose layers are made from options that a whole network shares.

    Attributes:
        dtype: dtype of the activations, float32 or bfloat16; parameters are float32.
        norm: ``"batch"``, or ``"layer"``: over height, width and channels, with a scale and a bias per
            channel, the same in training and in inference; or ``"group"``: the same over each of 32
            groups of channels (Wu and He 2018, arXiv:1803.08494), or over groups of at least four
            channels in layers of fewer than 64.
        initialiser: of the kernels, a key of ``INITIALISERS``.
        bn_axis_name: named axis over which BatchNorm synchronises its batch statistics in training
            mode; None leaves them to the batch that the module sees.
        convolution: how a convolution is computed, a key of ``CONVOLUTIONS``.
        remat: whether the backward pass computes the blocks' activations again instead of keeping them.
    """

    dtype: Any = jnp.float32
    norm: str = "batch"
    initialiser: str = "he"
    bn_axis_name: str | None = None
    convolution: str = "native"
    remat: bool = False

    @property
    def shared(self) -> dict[str, Any]:
        """The fields above, for the modules inside this one."""
        names = ("dtype", "norm", "initialiser", "bn_axis_name", "convolution")
        return {name: getattr(self, name) for name in names}

    def _block(self, kind: "type[Layered]", /, **fields: Any) -> Callable[..., nn.Module]:
        """Return what makes blocks of a kind from their ``name`` and other fields, with ``remat`` if set.

        A block is called with ``train`` as the second positional argument. Parameters, statistics
        and what it sows have the same paths either way.
        """
        # The methods' argument 2 is `train`, after `self` and the images: a Python bool, never traced.
        made = nn.remat(kind, static_argnums=(2,)) if self.remat else kind
        return functools.partial(made, **{**self.shared, **fields})

    def _conv(
        self,
        features: int,
        size: int,
        name: str,
        stride: int = 1,
        *,
        groups: int = 1,
        padding: int | None = None,
        bias: bool = False,
    ) -> nn.Conv:
        """Return a convolution with a kernel ``[size, size, in / groups, features]``.

        ``padding`` is at every side; None for ``size // 2``.
        """
        # A depthwise convolution draws each channel's kernel on its own, so both its fans are size**2;
        # left to the default, fan_out would count all channels. Groups of several count as in torch.
        axes = {"out_axis": -2, "batch_axis": -1} if 1 < groups == features else {}
        return nn.Conv(
            features,
            (size, size),
            strides=(stride, stride),
            padding=size // 2 if padding is None else padding,
            feature_group_count=groups,
            use_bias=bias,
            dtype=self.dtype,
            kernel_init=INITIALISERS[self.initialiser](**axes),
            conv_general_dilated=CONVOLUTIONS[self.convolution],
            name=name,
        )

    def _norm(
        self,
        x: jax.Array,
        train: bool,
        name: str,
        max_pool: Callable[[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        """Return ``[N, ..., C]`` normalised as ``norm`` says, then pooled by ``max_pool``."""
        if self.norm == "batch":
            norm = BatchNorm(train=train, dtype=self.dtype, axis_name=self.bn_axis_name, name=name)
            return norm(x, max_pool=max_pool)
        # One group is LayerNorm over the whole image; nn.LayerNorm would have a scale per pixel.
        groups = 1 if self.norm == "layer" else norm_groups(x.shape[-1])
        x = nn.GroupNorm(groups, epsilon=1e-5, dtype=self.dtype, name=name)(x)
        return x if max_pool is None else max_pool(x)

    def _hidden(self, number: int, x: jax.Array) -> jax.Array:
        """Sow the activations of hidden units within a block as ``hidden1`` upwards, and return them."""
        self.sow("intermediates", f"hidden{number}", x)
        return x

    def _finish(self, x: jax.Array) -> jax.Array:
        r"""Sow a block's ``output``, and return it or, where one is inserted, its normalised form.

        Layerwise reinitialisation inserts :math:`(x - \mu) / \sigma` after each block of a finished
        round (Alabdulmohsin et al. 2021, algorithm 1, lines 8 and 10). The entry of the collection
        "normalisers" is ``{"mean": mu, "scale": 1 / sigma}``, float32 scalars under the block's own
        path: model state that is never trained and that ``apply`` never changes. Mean 0 and scale 1
        give ``x`` itself, bit for bit, though XLA may fuse, and so round, what is around it another
        way. Without an entry nothing is added to the program.
        """
        # Before the block's own normaliser: LW takes its new statistics of this (Algorithm 1, line 5).
        self.sow("intermediates", "output", x)
        if not self.has_variable("normalisers", "mean"):
            return x
        mean: jax.Array = self.get_variable("normalisers", "mean")
        scale: jax.Array = self.get_variable("normalisers", "scale")
        return ((x.astype(jnp.float32) - mean) * scale).astype(x.dtype)


class ConvBlock(Layered, kw_only=True):
    """3x3 convolution ``conv``, normalisation ``norm``, and an activation of ``ACTIVATIONS``."""

    width: int
    stride: int = 1
    activation: str = "relu"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[N, H, W, C]`` to ``[N, H / stride, W / stride, width]``, sizes rounded up."""
        x = self._conv(self.width, 3, "conv", self.stride)(x)
        return self._finish(ACTIVATIONS[self.activation](self._norm(x, train, "norm")))


class SeparableBlock(Layered, kw_only=True):
    """Depthwise 3x3 and pointwise 1x1 convolution, each with normalisation and activation.

    Howard et al. 2017, figure 3 right: ``depthwise`` (which strides), ``norm1``, ``pointwise``, ``norm2``.
    """

    width: int
    stride: int = 1
    activation: str = "relu"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[N, H, W, C]`` to ``[N, H / stride, W / stride, width]``, sizes rounded up."""
        activate, channels = ACTIVATIONS[self.activation], x.shape[-1]
        x = self._conv(channels, 3, "depthwise", self.stride, groups=channels)(x)
        x = self._hidden(1, activate(self._norm(x, train, "norm1")))
        x = self._conv(self.width, 1, "pointwise")(x)
        return self._finish(activate(self._norm(x, train, "norm2")))


class DenseBlock(Layered, kw_only=True):
    """Dense layer ``linear``, normalisation ``norm`` unless that is "none", ReLU."""

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
            x = self._norm(x, train, "norm")
        return self._finish(nn.relu(x))


class Stage(nn.Module):
    """``size`` residual blocks, named ``block0`` upwards, of which the first has the ``stride``."""

    block: Callable[..., nn.Module]  # called with ``stride`` and ``name``
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
        # Stride 1 in the first stage, 2 in all others.
        x = Stage(stage_block, size, min(index, 1) + 1, name=f"layer{index + 1}")(x, train)
    return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structure:
    """The declared order of a network's parameters; all paths go from bottom to top.

    Attributes:
        blocks: path prefixes of the parameter tree that together cover every parameter exactly once:
            ``"conv1", "bn1", "layer1/block0", ..., "fc"``.
        layers: weight layers, as papers count depth: without downsample convolutions. SEAL's
            (section 4) L = 23 in ResNet-50 is the 1-based index here of ``layer3/block0/conv1``.
        head: path of the classifier.
        round_blocks: the K blocks of layerwise reinitialisation, each an entry of ``blocks``, or the path
            above several neighbours; empty for a module that declares none.
        dense_after_convs: the entries of ``blocks`` that are dense layers above the last convolution.
        flattened: channels by path of the kernels whose input axis is a flattened image. The axis runs
            over height, width and channels, the last fastest. Image channels, which no ``slim``
            network has fewer of, do not count. Kernels of a grouped convolution have 1: the inputs
            of a group stay, as the ``slim`` network has fewer groups.
        concatenated: channels of each part, in their order, by path of the layers, norms included, whose
            input is a concatenation. The ``slim`` network has fewer channels in each part.
        total_stride: factor by which the image has shrunk at the last convolution.
        smaller_stride: what else one may do about images smaller than that, for the error message.
        side_multiple: what height and width of the images must be multiples of.
        units: the layers of hidden units that a method may replace, named by what the modules sow: not
            those of stems and residual sums, which all layers above read.
    """

    blocks: tuple[str, ...]
    layers: tuple[str, ...]
    head: str = HEAD
    round_blocks: tuple[str, ...] = ()
    dense_after_convs: tuple[str, ...] = (HEAD,)
    # A dict has no hash; of a `Model` the module, from whose fields this follows, is hashed.
    flattened: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    concatenated: Mapping[str, tuple[int, ...]] = dataclasses.field(
        default_factory=dict, hash=False
    )
    total_stride: int = 1
    smaller_stride: str = ""
    side_multiple: int = 1
    units: tuple[Units, ...] = ()


class Network(Layered, kw_only=True):
    """A classifier of images whose last layer is ``fc``, and the declared order of its parameters.

    A network sows ``features`` (float32 ``[N, C]``, the input of the classifier) and each of its
    ``round_blocks`` sows its ``output`` into the collection ``intermediates``. Nothing is computed
    or kept for it unless ``apply`` is called with ``mutable=["intermediates"]``.

    Attributes:
        num_classes: number of logits.
        dropout: rate; where it applies is up to the network. Training with a rate above 0 needs a
            key for the rng collection "dropout"; nothing else does.
        head_bias: whether the classifier has a bias; it starts at 0.

    Raises:
        UsageError: a field has no such value.
    """

    num_classes: int
    dropout: float = 0.0
    head_bias: bool = True

    # What fields of a family may be, besides those that every network has.
    choices: ClassVar[Mapping[str, Collection[Any]]] = {}
    # Fields of one width or several, all positive, that ``slim`` scales.
    width_fields: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check the fields when the module is made, where the line to fix is still in sight."""
        for field, known in {**_CHOICES, **self.choices}.items():
            check_choice(field, getattr(self, field), known, suggest=True)
        check_integer("num_classes", self.num_classes, 2)
        check_number("dropout", self.dropout, lambda rate: 0 <= rate < 1, "lie in [0, 1)")
        for field in self.width_fields:
            if isinstance(getattr(type(self), field), tuple):  # its default
                setattr(self, field, positive(field, getattr(self, field)))
            else:
                check_integer(field, getattr(self, field), 1)
        super().__post_init__()

    def _drop(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.Dropout(self.dropout, deterministic=not train)(x)

    def _stem(self, x: jax.Array, train: bool, stem: str, width: int) -> jax.Array:
        """Apply ``conv1``, ``bn1``, ReLU and for "imagenet" a max-pool, and sow the result as ``stem``.

        ``stem`` is "imagenet", a 7x7 convolution with stride 2 and a 3x3 max-pool with stride 2, or
        "cifar", a 3x3 convolution that keeps the size.
        """
        size, stride = (7, 2) if stem == "imagenet" else (3, 1)
        x = self._conv(width, size, "conv1", stride)(x)
        max_pool = None
        if stem == "imagenet":
            # Padded as in torchvision; SAME would pad an even image on the far side only.
            max_pool = functools.partial(
                nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1))
            )
        # torchvision pools after ReLU, which is the same.
        x = nn.relu(self._norm(x, train, "bn1", max_pool))
        self.sow("intermediates", "stem", x)
        return x

    def _pooled_logits(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits of the mean over the image, with dropout in between."""
        # In float32: a sum over the image in bfloat16 would lose digits.
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return self._logits(self._drop(x, train))

    def _logits(self, x: jax.Array) -> jax.Array:
        """Sow ``features`` and return the logits of ``[N, C]``, both float32."""
        # The classifier costs next to nothing, so bfloat16 would only lose digits here.
        x = x.astype(jnp.float32)
        self.sow("intermediates", "features", x)
        return nn.Dense(
            self.num_classes, use_bias=self.head_bias, kernel_init=self.head_init, name=HEAD
        )(x)

    @property
    def head_init(self) -> Callable[..., jax.Array]:
        """Initialiser of the classifier's kernel."""
        return INITIALISERS[self.initialiser]()

    @property
    def structure(self) -> Structure:
        """The declared order of the parameters, from the fields alone; each network has its own."""
        raise NotImplementedError

    def torch_layers(self) -> dict[str, dict[str, str]]:
        """Return what "torchvision" and "timm" call the layers, where they have this network.

        For each library the name of its module by the path of a layer here; a parameter outside of a layer
        maps to its tensor. ``conv:NAME`` is a dense layer that is a convolution over the whole image
        there. ``NORM/folded_bias`` maps to the bias of the convolution before a BatchNorm ``NORM``, which
        is a part of the running mean here. See :mod:`seal_jax.models.torch_weights`.
        """
        return {}

    def slim(self, keep: float) -> Self:
        """Return the network with ``ceil(keep * width)`` for every width; raise where that cannot fit."""
        widths: dict[str, Any] = {name: getattr(self, name) for name in self.width_fields}
        return self.clone(**jax.tree.map(lambda width: kept(keep, width), widths))


class Entry(NamedTuple):
    """How a network is created by name: a value of ``MODELS`` in the module of its family."""

    build: Callable[..., Network]  # called with the module's fields by keyword
    # Fields that the user may set, besides those that all networks have.
    options: tuple[str, ...] = ()
    source: str = ""  # who published it
    used: str = ""  # where the papers of this package train it
    # A config that trains it, ``file.py:variant`` in configs/; it is named by model.name there.
    config: str = ""


def numbered(name: str, count: int) -> tuple[str, ...]:
    """Return ``("block1", "block2", ...)`` for the name "block"."""
    return tuple(f"{name}{number}" for number in range(1, count + 1))


def staged(sizes: Iterable[int]) -> tuple[str, ...]:
    """Return the paths of the residual blocks in stages of these sizes.

    >>> staged((1, 2))
    ('layer1/block0', 'layer2/block0', 'layer2/block1')
    """
    return tuple(
        f"layer{stage}/block{index}"
        for stage, size in enumerate(sizes, start=1)
        for index in range(size)
    )


def within(blocks: Sequence[str], *layers: str) -> tuple[str, ...]:
    """Return the paths of ``layers`` in each of ``blocks``."""
    return tuple(f"{block}/{layer}" for block in blocks for layer in layers)


def chained(blocks: Sequence[str], *above: str) -> tuple[Units, ...]:
    """Return the units of blocks whose output the next one reads, the last one's the layer ``above``.

    >>> chained(("dense1", "dense2"), "fc")[1]
    Units(name='dense2/output', incoming=('dense2',), outgoing=('fc',))
    """
    return tuple(
        Units(f"{block}/output", (block,), (reader,))
        for block, reader in itertools.pairwise((*blocks, *above))
    )


def inner_units(blocks: Sequence[str], *layers: tuple[str, str, str]) -> tuple[Units, ...]:
    """Return the units within each block: (convolution, its normalisation or "", reader) of ``hidden1`` upwards.

    >>> inner_units(("block1",), ("fc1", "", "fc2"))
    (Units(name='block1/hidden1', incoming=('block1/fc1',), outgoing=('block1/fc2',)),)
    """
    return tuple(
        Units(
            f"{block}/hidden{number}", within([block], *filter(None, made)), within([block], reader)
        )
        for block in blocks
        for number, (*made, reader) in enumerate(layers, start=1)
    )


def slim_stages(keep: float, width: int, of: str = "channels") -> int:
    """Return ``keep * width``; raise unless it is whole, so that multiples of it stay multiples."""
    slim = kept(keep, width)
    if abs(slim - keep * width) > 1e-6:
        raise UsageError(
            f"method.keep = {keep:g} leaves {keep * width:g} of {width} {of}, and the stages "
            f"would no longer fit each other: use {slim / width:.12g}"
        )
    return slim


def check_depth(depth: int, rest: int) -> None:
    """Raise unless ``depth`` is 6n + ``rest`` with n of at least 1."""
    if depth < 6 + rest or depth % 6 != rest:
        below = max(6, (depth - rest) // 6 * 6) + rest
        raise UsageError(f"depth = {depth!r} is not 6n + {rest}: use {below} or {below + 6}")


def positive(field: str, values: Sequence[int], count: int | None = None) -> tuple[int, ...]:
    """Return ``values`` as a tuple, which can be hashed; raise unless all are positive integers."""
    if isinstance(values, (str, int)) or not values or len(values) != (count or len(values)):
        many = "some integers" if count is None else f"{count} integers"
        raise UsageError(f"{field}={values!r}: give {many}, one for each")
    return tuple(check_integer(field, value, 1) for value in values)
