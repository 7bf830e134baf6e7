"""ResNets for 32x32 images, depth 6n + 2: He et al. 2016 (arXiv:1512.03385), section 4.2.

A 3x3 stem, three stages of n basic blocks with 16, 32 and 64 channels on 32x32, 16x16 and 8x8, the
mean over the image and a classifier: 6n + 2 weight layers. The paper's nets have the parameter-free
shortcut A; where it puts the zero channels is not said, here they come after the input's own.
"""

from typing import Any

from seal_jax.errors import UsageError
from seal_jax.models.resnet import ResNet

# 20 to 110 are the paper's; 8 and 14 are for tests and small images.
DEPTHS = (8, 14, 20, 32, 44, 56, 110)


def cifar_resnet(
    depth: int,
    num_classes: int,
    *,
    width: int = 16,
    shortcut: str = "A",
    **options: Any,
) -> ResNet:
    """Return the residual network of ``depth`` = 6n + 2 weight layers.

    Args:
        depth: 8, 14, 20, ...: any 6n + 2 with n of at least 1.
        num_classes: number of logits.
        width: channels of the stem and the first stage; the others have twice and four times that.
        shortcut: ``"A"``, subsample and append zero channels, or ``"B"``, 1x1 convolution and
            BatchNorm.
        **options: fields that every network has; see ``Network`` and ``Layered``.

    Raises:
        UsageError: ``depth`` is not 6n + 2, or a field has no such value.

    >>> cifar_resnet(20, 10).stage_sizes
    (3, 3, 3)
    """
    if depth < 8 or depth % 6 != 2:
        below = max(8, (depth - 2) // 6 * 6 + 2)
        raise UsageError(f"depth={depth!r} is not 6n + 2: use {below} or {below + 6}")
    return ResNet(
        num_classes=num_classes,
        stage_sizes=((depth - 2) // 6,) * 3,
        block="basic",
        width=width,
        stem="cifar",
        shortcut=shortcut,
        **options,
    )
