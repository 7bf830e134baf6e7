"""A multilayer perceptron, for tests, small images and feature vectors (images of one pixel)."""

from typing import Any, ClassVar

import jax
from flax import linen as nn

from seal_jax.errors import check_integer
from seal_jax.models import network as net


class MLP(net.Network, kw_only=True):
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

    choices: ClassVar[dict[str, Any]] = {"norm": ("none", *net.NORMS)}
    width_fields: ClassVar[tuple[str, ...]] = ("hidden",)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits, float32 ``[N, num_classes]``, of images ``[N, H, W, C]``."""
        # [N, H, W, C] -> [N, H * W * C].
        x = x.reshape(len(x), -1)
        for name, width in zip(self.structure.round_blocks, self.hidden, strict=True):
            x = self._drop(self._block(net.DenseBlock)(width=width, name=name)(x, train), train)
        return self._logits(x)

    @property
    def structure(self) -> net.Structure:
        """The round blocks are the hidden layers."""
        hidden = net.numbered("dense", len(self.hidden))
        layers = net.within(hidden, "linear")
        return net.Structure(
            blocks=(*hidden, net.HEAD),
            layers=(*layers, net.HEAD),
            round_blocks=hidden,
            units=net.chained(hidden, net.HEAD),
        )


def _build(
    *, width: int = 32, depth: int = 2, hidden: tuple[int, ...] | None = None, **fields: Any
) -> MLP:
    """Return an MLP of ``hidden`` layers, or of ``depth`` layers of one ``width``."""
    if hidden is None:
        hidden = (width,) * check_integer("depth", depth, 1)
    return MLP(hidden=hidden, **fields)


MODELS = {
    "mlp": net.Entry(
        _build,
        ("hidden", "width", "depth"),
        "LW paper, section 1.1",
        "LW paper, section 1.1",
        "digits.py",
    )
}
