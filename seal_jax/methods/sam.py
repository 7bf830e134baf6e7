"""SAM and ASAM: sharpness-aware minimisation (Foret et al. 2021; Kwon et al. 2021)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax

from seal_jax.errors import UsageError, check_number
from seal_jax.methods.method import Context, Gradient, Method, StepContext
from seal_jax.transforms import make_normal_tx
from seal_jax.transforms.sam import sharpness_aware, sharpness_aware_gradient

SOURCE = "Foret et al. 2021; PoF paper, section 4.1"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of SAM.

    Attributes:
      rho: radius of the perturbation; 0 is plain training.
      adaptive: scale it by the size of each parameter (ASAM; its usual rho is ten times SAM's).
      eta: added to that size.
      decay_in_perturbation: count the weight decay in the direction of the perturbation.
      sharpness: one perturbation for the whole batch ("synchronised"), or one on each device from
        its own part ("device", m-sharpness).
    """

    rho: float = 0.05
    adaptive: bool = False
    eta: float = 0.0
    decay_in_perturbation: bool = False
    sharpness: Literal["synchronised", "device"] = "synchronised"


def build(options: Options, context: Context) -> Method:
    """Return SAM around the optimizer of plain training."""
    for field in ("rho", "eta"):
        check_number(
            f"method.{field}",
            getattr(options, field),
            lambda v: 0 <= v < math.inf,
            "be 0 or positive",
        )
    if options.sharpness == "device" and options.decay_in_perturbation:
        raise UsageError(
            'method.decay_in_perturbation = True does not go with method.sharpness = "device"'
        )
    decay = context.optimizer.weight_decay if options.decay_in_perturbation else 0.0
    perturbation: dict[str, Any] = {
        "rho": options.rho,
        "adaptive": options.adaptive,
        "eta": options.eta,
        "weight_decay": decay,
    }
    plain = make_normal_tx(**context.arguments())
    if options.sharpness == "synchronised":
        return Method(tx=sharpness_aware(plain, **perturbation), loss=context.loss)

    def gradient(problem: StepContext, params) -> Gradient:
        value_and_grad = jax.value_and_grad(problem.objective, has_aux=True)
        (_, auxiliary), found = sharpness_aware_gradient(value_and_grad, params, **perturbation)
        return Gradient(auxiliary, found, {})

    return Method(tx=plain, loss=context.loss, gradient=gradient)
