"""ResNet-18/34/50/101 (He et al. 2016, arXiv:1512.03385) in torchvision's layout.

Three things differ from ``torchvision.models.resnet`` on purpose:

- Arrays are channels-last, kernels ``[h, w, in, out]``, and a downsample branch is named
  ``downsample_conv`` and ``downsample_bn`` where torchvision has ``downsample.0`` and ``.1``.
- By default convolutions and the classifier are drawn He-normal over *fan_in* and the classifier's
  bias is zero, as SEAL's experiments have it; torchvision draws convolutions over fan_out and leaves
  the classifier to torch's default.
- The running variance of BatchNorm takes in the *biased* variance of the batch, Flax's habit. torch
  takes in the unbiased one, larger by n / (n - 1) for n = batch x height x width values a channel.
  Running means, and everything computed in training mode, agree.
"""

from typing import Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from seal_jax.errors import UsageError
from seal_jax.models.blocks import BLOCKS, Stage
from seal_jax.models.network import Network, at_least, one_of, slim_stages

# Residual block and blocks a stage: He et al. 2016, table 1.
RESNETS: dict[str, tuple[str, tuple[int, ...]]] = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
}

# Factor by which each stem shrinks the image.
STEMS: dict[str, int] = {"imagenet": 4, "cifar": 1}
SHORTCUTS = ("A", "B")


class ResNet(Network, kw_only=True):
    """A residual network: a stem, stages that halve the image and double the width, a classifier.

    The parameter tree is ``conv1``, ``bn1``, ``layer<N>/block<M>/...`` with N from 1 and M from 0,
    and ``fc``; ``blocks``, ``layers`` and ``head`` declare its order from the fields alone. The
    normalisations are called ``bn`` whatever ``norm`` is.

    Every residual block sows its output (after the ReLU) as ``output`` into the collection
    ``intermediates``; the network sows ``stem`` (after ReLU and pool) and ``features``. Dropout, if
    any, applies to the features. With ``dtype`` bfloat16 the parameters, the statistics of the
    norms, the features, the classifier and the logits are float32 still.

    Attributes:
        stage_sizes: residual blocks in each stage, bottom to top.
        block: ``"basic"`` or ``"bottleneck"``.
        width: channels of the stem and of the 3x3 convolutions of the first stage.
        stem: ``"imagenet"``, a 7x7 convolution with stride 2 and a 3x3 max-pool with stride 2, or
            ``"cifar"``, a 3x3 convolution that keeps the size.
        shortcut: ``"A"`` or ``"B"`` of He et al. 2016 section 3.3; torchvision's is B.

    The other fields are those of ``Network`` and ``Layered``.

    Raises:
        UsageError: a field has no such value.
    """

    stage_sizes: tuple[int, ...]
    block: str = "basic"
    width: int = 64
    stem: str = "imagenet"
    shortcut: str = "B"

    def __post_init__(self) -> None:
        """Check the fields when the module is made, where the line to mend is still in sight."""
        one_of("block", self.block, BLOCKS)
        one_of("stem", self.stem, STEMS)
        one_of("shortcut", self.shortcut, SHORTCUTS)
        at_least("width", self.width, 1)
        if not self.stage_sizes:
            raise UsageError("stage_sizes=() is empty: give the number of blocks of each stage")
        for size in self.stage_sizes:
            at_least("stage_sizes", size, 1)
        # A tuple, so that the module can be hashed and be a static argument of jax.jit.
        self.stage_sizes = tuple(self.stage_sizes)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits, float32 ``[N, num_classes]``, of images ``[N, H, W, C]``.

        With ``train`` BatchNorm uses the statistics of the batch and updates the running ones, so
        ``apply`` needs ``mutable=["batch_stats"]``; otherwise it uses the running ones.
        """
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = self._conv(self.width, size, "conv1", stride)(x)
        x = nn.relu(self._norm(train, "bn1")(x))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        self.sow("intermediates", "stem", x)
        for index, blocks in enumerate(self.stage_sizes):
            x = Stage(
                size=blocks,
                block=self.block,
                width=self.width * 2**index,
                stride=1 if index == 0 else 2,
                shortcut=self.shortcut,
                name=f"layer{index + 1}",
                **self.shared,
            )(x, train)
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return self._logits(self._drop(x, train))

    @property
    def residual_blocks(self) -> tuple[str, ...]:
        """Paths of the residual blocks, bottom to top: ``layer1/block0`` and so on."""
        return tuple(
            f"layer{stage}/block{index}"
            for stage, size in enumerate(self.stage_sizes, start=1)
            for index in range(size)
        )

    @property
    def blocks(self) -> tuple[str, ...]:
        """Path prefixes, bottom to top, that together cover every parameter exactly once."""
        return ("conv1", "bn1", *self.residual_blocks, self.head)

    @property
    def layers(self) -> tuple[str, ...]:
        """Weight layers, bottom to top, as papers count depth: without downsample convs."""
        convs = BLOCKS[self.block].convs
        inner = (f"{block}/{name}" for block in self.residual_blocks for name in convs)
        return ("conv1", *inner, self.head)

    @property
    def round_blocks(self) -> tuple[str, ...]:
        """The residual blocks: K = 16 in ResNet-50. The stem is none of them."""
        return self.residual_blocks

    @property
    def total_stride(self) -> int:
        """Factor by which the image has shrunk at the last stage."""
        return STEMS[self.stem] * 2 ** (len(self.stage_sizes) - 1)

    @property
    def smaller_stride(self) -> str:
        """The other stem."""
        return ", or stem='cifar'" if self.stem == "imagenet" else ""

    def slim(self, keep: float) -> Self:
        """Return the network with ``keep * width`` channels, which must be whole."""
        return self.clone(width=slim_stages(keep, self.width))
