"""The simple CNN of the layerwise reinitialisation paper (arXiv:2109.00267), appendix B.1.

What its table leaves open is read as follows: convolutions are 3x3, keep the size and have no bias;
pooling is over 2x2 with stride 2, after the second and the fourth block and not part of them; the
dense layer has no bias either, since a normalisation with one follows.
"""

from typing import Any, ClassVar

import jax
from flax import linen as nn

from seal_jax.models import network as net


class SimpleCNN(net.Network, kw_only=True):
    """Four convolutional blocks, a max-pool after every second, a dense block, a classifier.

    The parameter tree is ``block1`` to ``block4``, ``dense`` and ``fc``. Dropout applies after the
    dense block.

    Attributes:
        widths: channels of each block.
        dense_width: units of the dense block.
        pool: side of the pooling window, 2, or 3 with a margin of 1; the stride is 2.

    The other fields are those of ``Network`` and ``Layered``; ``norm`` is "layer" by default.
    """

    norm: str = "layer"
    widths: tuple[int, ...] = (32, 32, 64, 64)
    dense_width: int = 512
    pool: int = 2

    choices: ClassVar[dict[str, Any]] = {"pool": (2, 3)}
    width_fields: ClassVar[tuple[str, ...]] = ("widths", "dense_width")

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits, float32 ``[N, num_classes]``, of images ``[N, H, W, C]``."""
        # With a margin of 1 a window of 3 halves an even image, as a window of 2 does without.
        margin = (self.pool - 1) // 2
        for index, name in enumerate(self.structure.round_blocks):
            x = self._block(net.ConvBlock)(width=self.widths[index], name=name)(x, train)
            if index % 2 == 1:
                x = nn.max_pool(x, (self.pool,) * 2, (2, 2), ((margin, margin),) * 2)
        x = x.reshape(len(x), -1)
        x = self._block(net.DenseBlock)(width=self.dense_width, name="dense")(x, train)
        return self._logits(self._drop(x, train))

    @property
    def structure(self) -> net.Structure:
        """K = 4 convolutional blocks; the pools shrink the image."""
        blocks = net.numbered("block", len(self.widths))
        return net.Structure(
            blocks=(*blocks, "dense", net.HEAD),
            layers=(*net.within(blocks, "conv"), "dense/linear", net.HEAD),
            round_blocks=blocks,
            dense_after_convs=("dense", net.HEAD),
            flattened={"dense/linear/kernel": self.widths[-1]},
            total_stride=2 ** (len(self.widths) // 2),
            units=net.chained((*blocks, "dense"), net.HEAD),
        )


MODELS = {
    "scnn": net.Entry(
        SimpleCNN,
        ("dense_width", "pool"),
        "LW paper, appendix B.1",
        "LW paper, appendix B.1",
        "lw_cifar10.py",
    )
}
