"""A multilayer perceptron, for tests, small images and feature vectors (images of one pixel)."""

from typing import ClassVar, Self

import jax
from flax import linen as nn

from seal_jax.models.network import Network, positive, slim_width
from seal_jax.models.plain_blocks import DenseBlock, flatten, numbered, within


class MLP(Network, kw_only=True):
    """Dense layers with ReLU, and a classifier.

    The parameter tree is ``dense1`` upwards and ``fc``. Dropout applies after every hidden layer. The
    default is the network of the layerwise reinitialisation paper, section 1.1; the third of its
    K = 3 blocks is the classifier, which has nothing above it to reinitialise and is no round block.

    Attributes:
        hidden: units of each hidden layer, bottom to top.

    The other fields are those of ``Network`` and ``Layered``; ``norm`` is "none" by default, and then
    the layers have biases. ``convolution`` has no effect.
    """

    norm: str = "none"
    hidden: tuple[int, ...] = (32, 32)

    norms: ClassVar[tuple[str, ...]] = ("none", *Network.norms)

    def __post_init__(self) -> None:
        """Check the fields."""
        self.hidden = positive("hidden", self.hidden)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits, float32 ``[N, num_classes]``, of images ``[N, H, W, C]``."""
        x = flatten(x)
        for name, width in zip(self.round_blocks, self.hidden, strict=True):
            x = self._drop(DenseBlock(width=width, name=name, **self.shared)(x, train), train)
        return self._logits(x)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Path prefixes, bottom to top, that together cover every parameter exactly once."""
        return (*self.round_blocks, self.head)

    @property
    def layers(self) -> tuple[str, ...]:
        """Weight layers, bottom to top."""
        return (*within(self.round_blocks, "linear"), self.head)

    @property
    def round_blocks(self) -> tuple[str, ...]:
        """The hidden layers."""
        return numbered("dense", len(self.hidden))

    def slim(self, keep: float) -> Self:
        """Return the network with ``ceil(keep * units)`` units; its images keep their size."""
        return self.clone(hidden=tuple(slim_width(keep, width) for width in self.hidden))
