"""LookSAM: SAM's second gradient every few steps, its sideways part reused in between (Liu et al. 2022)."""

from __future__ import annotations

import dataclasses

from seal_jax.methods.method import Context, Method, Variant, check_options
from seal_jax.transforms.looksam import make_looksam_tx

ORDER = 34
VARIANTS = {
    "looksam": Variant(
        "LookSAM", "Liu et al. 2022, Algorithm 1", "pof_cifar10.py", digits={"alpha": 0.2}
    )
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of LookSAM.

    Attributes:
      rho: ρ, radius of the perturbation; 0 is plain training, bit for bit.
      alpha: α, size of the reused part, as a share of the gradient; 0.7 as in public code, which can be too much.
      every: k, the steps from one second gradient to the next; 1 is SAM.
    """

    rho: float = 0.05
    alpha: float = 0.7
    every: int = 5


def build(options: Options, context: Context) -> Method:
    """Return LookSAM around the optimizer of plain training."""
    check_options(options, "be 0 or positive", "rho", "alpha")
    check_options(options, "be at least 1", "every")
    tx = make_looksam_tx(
        rho=options.rho, alpha=options.alpha, every=options.every, **context.arguments()
    )
    return context.plain(tx=tx)
