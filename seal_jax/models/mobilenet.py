"""MobileNetV1 (Howard et al. 2017, arXiv:1704.04861): the whole one, and a shallow one of seven blocks.

``mobilenetv1`` is their table 1 in the layout of timm's ``mobilenetv1_100``, with BatchNorm and with
ReLUs that end at 6, as in the authors' code.

``mobilenet`` is what the layerwise reinitialisation paper (appendix B.1) calls "the standard shallow
MobileNet", with K = 7. Howard et al. call shallow (section 4.2) their table 1 without its five equal
layers of 512 channels: nine blocks. Read here as seven: table 1 up to those five layers, one
convolution and the separable blocks of 64, 128, 128, 256, 256 and 512 channels, then the mean over
the image and the classifier. ``MobileNet`` takes any other list of blocks: without the five layers it
has 2.9 million parameters, as published.

Convolutions are padded symmetrically, also where they stride, and have no bias.
"""

import functools
import itertools
from typing import Any, ClassVar

import jax
from flax import linen as nn

from seal_jax.errors import UsageError
from seal_jax.models import network as net
from seal_jax.units import Units


class MobileNet(net.Network, kw_only=True):
    """A convolutional block, depthwise separable blocks, the mean over the image, a classifier.

    The parameter tree is ``block1`` upwards and ``fc``. Dropout applies to the mean.

    Attributes:
        widths: channels of each block.
        strides: of each block.
        activation: ``"relu"``, or ``"relu6"``, which ends at 6.

    The other fields are those of ``Network`` and ``Layered``; ``norm`` is "layer" by default.
    """

    norm: str = "layer"
    widths: tuple[int, ...] = (32, 64, 128, 128, 256, 256, 512)
    strides: tuple[int, ...] = (2, 1, 2, 1, 2, 1, 2)
    activation: str = "relu"

    choices: ClassVar[dict[str, Any]] = {"activation": net.ACTIVATIONS}
    width_fields: ClassVar[tuple[str, ...]] = ("widths",)

    def __post_init__(self) -> None:
        """Check the fields."""
        self.widths = net.positive("widths", self.widths)
        self.strides = net.positive("strides", self.strides, len(self.widths))
        # `total_stride` below counts halvings.
        if max(self.strides) > 2:
            raise UsageError(f"strides={self.strides!r}: use 1 or 2 for each block")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits, float32 ``[N, num_classes]``, of images ``[N, H, W, C]``."""
        for index, name in enumerate(self.structure.round_blocks):
            block = self._block(net.SeparableBlock if index else net.ConvBlock)
            fields = {"width": self.widths[index], "stride": self.strides[index]}
            x = block(**fields, activation=self.activation, name=name)(x, train)
        return self._pooled_logits(x, train)

    @property
    def structure(self) -> net.Structure:
        """K = 7 blocks. Depthwise and pointwise convolutions count as one layer each."""
        first, *others = blocks = net.numbered("block", len(self.widths))
        made = ((first,), *(net.within([block], "pointwise", "norm2") for block in others))
        readers = ((reader,) for reader in (*net.within(others, "depthwise"), net.HEAD))
        return net.Structure(
            blocks=(*blocks, net.HEAD),
            layers=(f"{first}/conv", *net.within(others, "depthwise", "pointwise"), net.HEAD),
            round_blocks=blocks,
            total_stride=2 ** self.strides.count(2),
            units=(
                *net.inner_units(others, ("depthwise", "norm1", "pointwise")),
                *itertools.starmap(
                    Units, zip(net.within(blocks, "output"), made, readers, strict=True)
                ),
            ),
        )

    def torch_layers(self) -> dict[str, dict[str, str]]:
        """Return timm's names of the modules by our paths; timm's MobileNetV1 has ReLU6."""
        if self.activation != "relu6":
            return {}
        first, *others = self.structure.round_blocks
        names = {f"{first}/conv": "conv_stem", f"{first}/norm": "bn1", net.HEAD: "classifier"}
        parts = {"depthwise": "conv_dw", "norm1": "bn1", "pointwise": "conv_pw", "norm2": "bn2"}
        # A stage of timm's begins where a block strides; the first has the blocks below.
        stage, index = 0, -1
        for block, stride in zip(others, self.strides[1:], strict=True):
            stage, index = (stage, index + 1) if stride == 1 else (stage + 1, 0)
            for part, name in parts.items():
                names[f"{block}/{part}"] = f"blocks.{stage}.{index}.{name}"
        return {"timm": names}


MODELS = {
    "mobilenet": net.Entry(
        MobileNet, (), "Howard et al. 2017", "LW paper, appendix B.1", "lw_cifar10.py"
    ),
    "mobilenetv1": net.Entry(
        functools.partial(
            MobileNet,
            norm="batch",
            activation="relu6",
            widths=(32, 64, 128, 128, 256, 256, *(512,) * 6, 1024, 1024),
            strides=(2, 1, 2, 1, 2, 1, 2, *(1,) * 5, 2, 1),
        ),
        (),
        "Howard et al. 2017",
        config="fast_cifar100.py",
    ),
}
