"""KELS: all but a slim network inside the network is reinitialised (Taha et al. 2021)."""

from __future__ import annotations

import dataclasses

from seal_jax import slimming
from seal_jax.methods.method import Context, Init, Method, Variant, check_options

ORDER = 21
VARIANTS = {"kels": Variant("KELS", "Taha et al. 2021, section 3", "ke_cifar100.py")}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of kernel-level convolution-aware splitting.

    Attributes:
      keep: r, the share of the input and output channels of each kernel that is kept; these form a
        network of their own, which ``python -m seal_jax slim`` exports.
      init: from the model's own initialisation, or PyTorch's default ("torch_default").
    """

    keep: float = 0.8
    init: Init = "model"


def build(options: Options, context: Context) -> Method:
    """Return KELS; the kept network is the same in all generations."""
    check_options(options, "lie in (0, 1)", "keep")
    model = context.model
    # A network without a slim form has none at any size; nothing of it would be a network on its own.
    model.slim(1)

    def choose(hook):
        # The first layer keeps all inputs and the classifier all outputs: images and classes stay.
        return slimming.kernel_slices(
            hook.weights.params,
            options.keep,
            first=model.layers[0],
            head=model.head,
            flattened={**model.flattened, **model.concatenated},
        )

    # The slices follow from the shapes, so the choice need not be stored.
    return context.relearn("kels", choose, options.init)
