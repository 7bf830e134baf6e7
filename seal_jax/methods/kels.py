"""KELS: all but a slim network inside the network is drawn anew (Taha et al. 2021)."""

from __future__ import annotations

import dataclasses

from seal_jax import slimming
from seal_jax.errors import check_number
from seal_jax.methods.method import Context, Method
from seal_jax.methods.relearning import Init, relearning

SOURCE = "Taha et al. 2021, section 3"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of kernel-level convolution-aware splitting.

    Attributes:
      keep: share of the input and output channels of each kernel that is kept; these form a network
        of their own, which ``python -m seal_jax slim`` exports.
      init: from the model's own initialisation, or PyTorch's default.
    """

    keep: float = 0.8
    init: Init = "model"


def build(options: Options, context: Context) -> Method:
    """Return KELS; the kept network is the same in all generations."""
    check_number("method.keep", options.keep, lambda r: 0 < r < 1, "lie between 0 and 1")
    model = context.model

    def choose(event):
        return slimming.kernel_slices(
            event.weights.params,
            options.keep,
            first=model.layers[0],
            head=model.head,
            flattened=model.flattened,
        )

    return relearning(context, "kels", choose, init=options.init)
