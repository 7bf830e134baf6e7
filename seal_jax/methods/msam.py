"""MSAM: the gradient is taken ahead, along the momentum, at the cost of plain training (Becker et al. 2024)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from seal_jax.errors import UsageError
from seal_jax.methods.method import Context, Method, Variant, check_options
from seal_jax.transforms import aliases, make_normal_tx
from seal_jax.transforms.msam import momentum, perturb_along_momentum
from seal_jax.transforms.sgd import reset_condition

ORDER = 33
VARIANTS = {"msam": Variant("MSAM", "Becker et al. 2024, Algorithm 1", "pof_cifar10.py")}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of Momentum-SAM.

    Attributes:
      rho: ρ, radius of the perturbation, several times SAM's; 0.3 is the default of the authors' code. 0 is plain
        training, bit for bit.
    """

    rho: float = 0.3


def build(options: Options, context: Context) -> Method:
    """Return plain training whose gradient is taken at another point."""
    check_options(options, "be 0 or positive", "rho")
    arguments = context.arguments()
    tx = make_normal_tx(**arguments)
    if context.optimizer.name in aliases.SUMS_STEPS:
        raise UsageError(
            f"optimizer.name = {context.optimizer.name!r} does not go with method 'msam': its momentum is of steps, "
            "not of gradients; use another, such as lamb"
        )
    try:
        momentum(jax.eval_shape(tx.init, context.params), context.params)
    except UsageError as error:
        raise UsageError(f"optimizer.name = {context.optimizer.name!r}: {error}") from None
    resets = reset_condition(context.schedule_clock, arguments["reset_momentum"])

    def point(params, opt_state, step):
        # The update resets the momentum, and only after the gradient.
        rho = jnp.where(resets(step), 0.0, options.rho)
        return perturb_along_momentum(params, opt_state, rho)

    return context.plain(tx=tx, point=point)
