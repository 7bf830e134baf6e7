"""FC: the dense layers behind the last convolution are drawn anew (LW paper)."""

from __future__ import annotations

import dataclasses

from seal_jax import masks
from seal_jax.errors import UsageError
from seal_jax.methods.method import Context, Method
from seal_jax.methods.relearning import Init, relearning

SOURCE = "LW paper, section 1; Zhao et al. 2018; Li et al. 2020"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of FC.

    Attributes:
      threshold: the first block, of the model's declared order, that is re-initialised; ``None``
        for the first dense layer after the last convolution.
      init: from the model's own initialisation, or PyTorch's default.
    """

    threshold: str | None = None
    init: Init = "model"


def build(options: Options, context: Context) -> Method:
    """Return FC: LW's special case of one block and several rounds."""
    model = context.model
    first = options.threshold or model.dense_after_convs[0]
    try:
        mask = masks.resolve(masks.since(model.blocks, first), context.params)
    except UsageError as error:
        raise UsageError(f"method.threshold: {error}") from None
    method = relearning(context, "fc", lambda event: mask, init=options.init)
    return dataclasses.replace(method, mask=mask)
