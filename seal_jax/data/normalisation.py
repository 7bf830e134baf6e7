"""Channel means and standard deviations of the training images, on the scale 0..1."""

from __future__ import annotations

from typing import NamedTuple

from seal_jax.errors import UsageError, nearest


class Statistics(NamedTuple):
    """What normalisation subtracts and divides by, one number a channel.

    Attributes:
      mean: of the pixel values divided by 255.
      std: of the same.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


STATISTICS: dict[str, Statistics] = {
    "imagenet": Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": Statistics((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": Statistics((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "svhn": Statistics((0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197)),
    "fashion_mnist": Statistics((0.2859,), (0.3530,)),
    # np.mean and np.std over all pixels of the uint8 training split (every sample whose index is
    # not a multiple of five), divided by 255.
    "digits": Statistics((0.3053,), (0.3762,)),
}


def statistics(name: str) -> Statistics:
    """Return the named statistics.

    Raises:
      UsageError: for an unknown name; the message gives the nearest.

    Examples:
      >>> statistics("fashion_mnist").mean
      (0.2859,)
    """
    if name not in STATISTICS:
        raise UsageError(
            f"data.normalisation={name!r} is not one of {', '.join(STATISTICS)}"
            f"{nearest(name, STATISTICS, count=1)}"
        )
    return STATISTICS[name]
