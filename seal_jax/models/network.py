"""What every network of this package declares of itself, beside computing logits."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from seal_jax.errors import UsageError, check_number, nearest
from seal_jax.models.blocks import INITIALISERS, NORMS, Layered
from seal_jax.models.convolution import CONVOLUTIONS

HEAD = "fc"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structure:
    """The declared order of a network's parameters; all paths go from bottom to top.

    Attributes:
        blocks: path prefixes of the parameter tree that together cover every parameter exactly once:
            ``"conv1", "bn1", "layer1/block0", ..., "fc"``.
        layers: weight layers, as papers count depth: without downsample convolutions. SEAL's
            (section 4) L = 23 in ResNet-50 is the 1-based index here of ``layer3/block0/conv1``.
        head: path of the classifier.
        round_blocks: the K blocks of layerwise reinitialisation, each an entry of ``blocks``; empty
            for a module that declares none.
        dense_after_convs: the entries of ``blocks`` that are dense layers above the last convolution.
        flattened: channels by path of the kernels whose input axis is a flattened image. The axis runs
            over height, width and channels, the last fastest. Image channels, which no ``slim``
            network has fewer of, do not count.
        total_stride: factor by which the image has shrunk at the last convolution.
        smaller_stride: what else one may do about images smaller than that, for the error message.
    """

    blocks: tuple[str, ...]
    layers: tuple[str, ...]
    head: str = HEAD
    round_blocks: tuple[str, ...] = ()
    dense_after_convs: tuple[str, ...] = (HEAD,)
    flattened: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    total_stride: int = 1
    smaller_stride: str = ""


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

    norms: ClassVar[tuple[str, ...]] = NORMS
    # The fields that ``slim`` scales.
    width_fields: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check the fields when the module is made, where the line to mend is still in sight."""
        one_of("convolution", self.convolution, CONVOLUTIONS)
        one_of("norm", self.norm, self.norms)
        one_of("initialiser", self.initialiser, INITIALISERS)
        at_least("num_classes", self.num_classes, 2)
        check_number("dropout", self.dropout, lambda rate: 0 <= rate < 1, "lie in [0, 1)")
        one_of("head_bias", self.head_bias, (True, False))
        super().__post_init__()

    def _drop(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.Dropout(self.dropout, deterministic=not train)(x)

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

    def slim(self, keep: float) -> Self:
        """Return the same network with ``ceil(keep * width)`` in place of every width.

        Raises:
            UsageError: the widths would no longer fit each other.
        """
        widths: dict[str, Any] = {name: getattr(self, name) for name in self.width_fields}
        slim: dict[str, Any] = jax.tree.map(lambda width: slim_width(keep, width), widths)
        return self.clone(**slim)


class Entry(NamedTuple):
    """How a network is created by name: a value of ``MODELS`` in the module of its family.

    Attributes:
        build: returns the module, called with its fields by keyword.
        options: fields that the user may set, besides those that every network has.
    """

    build: Callable[..., Network]
    options: tuple[str, ...] = ()


def numbered(name: str, count: int) -> tuple[str, ...]:
    """Return names with numbers from 1.

    >>> numbered("block", 3)
    ('block1', 'block2', 'block3')
    """
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


def slim_width(keep: float, width: int) -> int:
    """Return ``keep * width`` rounded up, but for rounding errors of the product.

    >>> slim_width(0.5, 3), slim_width(0.07, 100), 0.07 * 100
    (2, 7, 7.000000000000001)
    """
    return math.ceil(keep * width - 1e-9)


def slim_stages(keep: float, width: int) -> int:
    """Return ``keep * width`` for a network whose other widths are multiples of ``width``.

    Raises:
        UsageError: the product is not whole, so that the multiples would not stay multiples.
    """
    slim = slim_width(keep, width)
    if abs(slim - keep * width) > 1e-6:
        raise UsageError(
            f"method.keep = {keep:g} leaves {keep * width:g} of {width} channels, and the stages "
            f"would no longer fit each other: use {slim / width:.12g}"
        )
    return slim


def one_of(field: str, value: Any, known: Any) -> None:
    """Raise ``UsageError`` unless ``value`` is one of ``known``."""
    if value not in known:
        choices = " or ".join(repr(name) for name in known)
        near = nearest(str(value), [str(name) for name in known])
        raise UsageError(f"{field}={value!r}: use {choices}{near}")


def at_least(field: str, value: Any, least: int) -> None:
    """Raise ``UsageError`` unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{field}={value!r}: use an integer of at least {least}")


def positive(field: str, values: Sequence[int], count: int | None = None) -> tuple[int, ...]:
    """Return ``values`` as a tuple, so that a module can be hashed, as a static argument of jax.jit.

    Raises:
        UsageError: ``values`` are not positive integers, or not ``count`` of them, or none.
    """
    if isinstance(values, (str, int)) or not values or len(values) != (count or len(values)):
        many = "some integers" if count is None else f"{count} integers"
        raise UsageError(f"{field}={values!r}: give {many}, one for each")
    for value in values:
        at_least(field, value, 1)
    return tuple(values)
