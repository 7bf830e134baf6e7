"""ResNet-18/34/50/101 (He et al. 2016, arXiv:1512.03385) in torchvision's layout.

Three things differ from ``torchvision.models.resnet`` on purpose:

- Arrays are channels-last, kernels ``[h, w, in, out]``, and a downsample branch is named
  ``downsample_conv`` and ``downsample_bn`` where torchvision has ``downsample.0`` and ``.1``.
- Convolutions and the classifier are drawn He-normal over *fan_in* and the classifier's bias is
  zero, as SEAL's experiments have it; torchvision draws convolutions over fan_out and leaves the
  classifier to torch's default.
- The running variance of BatchNorm takes in the *biased* variance of the batch, Flax's habit. torch
  takes in the unbiased one, larger by n / (n - 1) for n = batch x height x width values a channel.
  Running means, and everything computed in training mode, agree.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from seal_jax.errors import UsageError, nearest
from seal_jax.models.blocks import BLOCKS, Stage, batch_norm, conv, he_normal
from seal_jax.models.convolution import CONVOLUTIONS

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


class ResNet(nn.Module):
    """A residual network: a stem, stages that halve the image and double the width, a classifier.

    The parameter tree is ``conv1``, ``bn1``, ``layer<N>/block<M>/...`` with N from 1 and M from 0,
    and ``fc``; ``blocks``, ``layers`` and ``head`` declare its order from the fields alone.

    Every residual block sows its output (after the ReLU) as ``output`` into the collection
    ``intermediates``; the network sows ``stem`` (after ReLU and pool) and ``features`` (float32
    ``[N, C]``, the classifier's input). Nothing is computed or kept for it unless ``apply`` is
    called with ``mutable=["intermediates"]``.

    Attributes:
        num_classes: number of logits.
        stage_sizes: residual blocks in each stage, bottom to top.
        block: ``"basic"`` or ``"bottleneck"``.
        width: channels of the stem and of the 3x3 convolutions of the first stage.
        stem: ``"imagenet"``, a 7x7 convolution with stride 2 and a 3x3 max-pool with stride 2, or
            ``"cifar"``, a 3x3 convolution that keeps the size.
        shortcut: ``"A"`` or ``"B"`` of He et al. 2016 section 3.3; torchvision's is B.
        dtype: dtype of the activations, float32 or bfloat16. Parameters, BatchNorm statistics, the
            classifier and the logits are float32 either way.
        bn_axis_name: named axis over which BatchNorm synchronises its batch statistics in training
            mode; None leaves them to the batch that the module sees.
        convolution: "native" or "matmul"; see ``seal_jax.models.convolution``.

    Raises:
        UsageError: a field has no such value.
    """

    num_classes: int
    stage_sizes: tuple[int, ...]
    block: str = "basic"
    width: int = 64
    stem: str = "imagenet"
    shortcut: str = "B"
    dtype: Any = jnp.float32
    bn_axis_name: str | None = None
    convolution: str = "native"

    def __post_init__(self) -> None:
        """Check the fields when the module is made, where the line to mend is still in sight."""
        _one_of("block", self.block, BLOCKS)
        _one_of("stem", self.stem, STEMS)
        _one_of("shortcut", self.shortcut, SHORTCUTS)
        _one_of("convolution", self.convolution, CONVOLUTIONS)
        _at_least("num_classes", self.num_classes, 2)
        _at_least("width", self.width, 1)
        if not self.stage_sizes:
            raise UsageError("stage_sizes=() is empty: give the number of blocks of each stage")
        for size in self.stage_sizes:
            _at_least("stage_sizes", size, 1)
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
        x = conv(
            self.width,
            size,
            stride=stride,
            dtype=self.dtype,
            convolution=self.convolution,
            name="conv1",
        )(x)
        x = batch_norm(train=train, dtype=self.dtype, axis_name=self.bn_axis_name, name="bn1")(x)
        x = nn.relu(x)
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
                dtype=self.dtype,
                bn_axis_name=self.bn_axis_name,
                convolution=self.convolution,
                name=f"layer{index + 1}",
            )(x, train)
        # The mean and the classifier cost next to nothing, so bfloat16 would only lose digits here.
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        self.sow("intermediates", "features", x)
        return nn.Dense(self.num_classes, kernel_init=he_normal, name="fc")(x)

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
    def head(self) -> str:
        """Path of the classifier."""
        return "fc"

    @property
    def total_stride(self) -> int:
        """Factor by which the image has shrunk at the last stage."""
        return STEMS[self.stem] * 2 ** (len(self.stage_sizes) - 1)


def _one_of(field: str, value: Any, known: Any) -> None:
    if value not in known:
        choices = " or ".join(repr(name) for name in known)
        raise UsageError(f"{field}={value!r}: use {choices}{nearest(str(value), known)}")


def _at_least(field: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{field}={value!r}: use an integer of at least {least}")
