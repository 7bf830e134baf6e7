"""DSD: the smallest weights are drawn anew (Han et al. 2017, as the LW paper extends it)."""

from __future__ import annotations

import dataclasses

from seal_jax import selections
from seal_jax.errors import check_number
from seal_jax.methods.method import Context, Method
from seal_jax.methods.relearning import Init, relearning

SOURCE = "LW paper, section 1; Han et al. 2017"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of DSD.

    Attributes:
      fraction: share of the weights, the smallest in magnitude, that is re-initialised.
      scope: the smallest of each kernel ("tensor"), or of all kernels together ("global").
      init: from the model's own initialisation, or PyTorch's default.
    """

    fraction: float = 0.2
    scope: selections.Scope = "tensor"
    init: Init = "model"


def build(options: Options, context: Context) -> Method:
    """Return DSD over several rounds."""
    check_number("method.fraction", options.fraction, lambda f: 0 < f < 1, "lie between 0 and 1")

    def choose(event):
        return selections.smallest(event.weights.params, options.fraction, scope=options.scope)

    return relearning(context, "dsd", choose, init=options.init)
