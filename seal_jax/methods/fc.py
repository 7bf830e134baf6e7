"""FC: the dense layers behind the last convolution are reinitialised (LW paper)."""

from __future__ import annotations

import dataclasses

from seal_jax import masks
from seal_jax.methods.method import Context, Init, Method, Variant

ORDER = 23
VARIANTS = {"fc": Variant("FC", "LW paper, section 1", "lw_cifar10.py")}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of FC.

    Attributes:
      threshold: the first block, in the model's declared order, that is reinitialised; ``None`` for
        the first dense layer behind the last convolution.
      init: from the model's own initialisation, or PyTorch's default ("torch_default").
    """

    threshold: str | None = None
    init: Init = "model"


def build(options: Options, context: Context) -> Method:
    """Return FC: LW's special case of one block and several rounds."""
    first = options.threshold or context.model.dense_after_convs[0]
    mask = masks.resolve(context.at_threshold(masks.since, first), context.params)
    # A mask is a selection as well, with one bool for each tensor.
    method = context.relearn("fc", lambda hook: mask, options.init)
    return dataclasses.replace(method, mask=mask)
