"""DSD: the smallest weights are reinitialised (Han et al. 2017, as the LW paper extends it)."""

from __future__ import annotations

import dataclasses

from seal_jax import selections
from seal_jax.methods.method import Context, Init, Method, Variant, check_options

ORDER = 22
VARIANTS = {"dsd": Variant("DSD", "Han et al. 2017; LW paper, section 1", "lw_cifar10.py")}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of DSD.

    Attributes:
      fraction: share of the weights of the kernels, the smallest in magnitude, that is reinitialised.
      scope: the smallest of each kernel ("tensor"), or of all kernels together ("global").
      init: from the model's own initialisation, or PyTorch's default ("torch_default").
    """

    fraction: float = 0.2
    scope: selections.Scope = "tensor"
    init: Init = "model"


def build(options: Options, context: Context) -> Method:
    """Return DSD over several rounds."""
    check_options(options, "lie in (0, 1)", "fraction")

    def choose(hook):
        # Of the weights as the generation ends, so that each round may choose others.
        return selections.smallest(hook.weights.params, options.fraction, scope=options.scope)

    return context.relearn("dsd", choose, options.init)
