"""SAM and ASAM: sharpness-aware minimisation (Foret et al. 2021; Kwon et al. 2021)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax

from seal_jax.errors import UsageError
from seal_jax.methods.method import Context, Gradient, Method, StepContext, Variant, check_options
from seal_jax.transforms import make_normal_tx
from seal_jax.transforms.sam import sharpness_aware, sharpness_aware_gradient

ORDER = 30
# The PoF paper trains with Nesterov momentum.
_NESTEROV = {"optimizer.nesterov": True}
VARIANTS = {
    "sam": Variant(
        "SAM", "Foret et al. 2021; PoF paper, section 4.1", "pof_cifar10.py", digits=_NESTEROV
    ),
    "asam": Variant(
        "ASAM",
        "Kwon et al. 2021",
        "pof_cifar10.py",
        {"adaptive": True, "rho": 0.5},
        digits=_NESTEROV,
    ),
    "sam_late": Variant(
        "SAM in the last epochs",
        "Zhou et al. 2024",
        "pof_cifar10.py",
        {"last_epochs": 25},
        digits={**_NESTEROV, "last_epochs": 2},
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of SAM.

    Attributes:
      rho: ρ, radius of the perturbation; 0 is plain training, bit for bit.
      adaptive: scale it by the size of each parameter (ASAM; its usual ρ is ten times SAM's).
      eta: added to that size, so that parameters at zero are perturbed too; 0.01 in ASAM's paper.
      decay_in_perturbation: add the weight decay to g for the direction of the perturbation.
      sharpness: one perturbation for the whole batch ("synchronised"), or one on each device from
        its own part ("device", m-sharpness).
      last_epochs: the epochs at the end of a generation (of the training, with ``optimizer.schedule`` "single") that
        are SAM's, after plain training at its cost; ``None`` for all.
    """

    rho: float = 0.05
    adaptive: bool = False
    eta: float = 0.0
    decay_in_perturbation: bool = False
    sharpness: Literal["synchronised", "device"] = "synchronised"
    last_epochs: int | None = None


def build(options: Options, context: Context) -> Method:
    """Return SAM around the optimizer of plain training."""
    check_options(options, "be 0 or positive", "rho", "eta")
    # A device's gradient is only its part of the batch's mean; beside it the whole decay would weigh too much.
    if options.sharpness == "device" and options.decay_in_perturbation:
        raise UsageError(
            'method.decay_in_perturbation = True does not go with method.sharpness = "device"'
        )
    if options.decay_in_perturbation and context.optimizer.of_optax:
        raise UsageError(
            "method.decay_in_perturbation = True needs the coupled decay of sgd, adam or radam, and "
            f"optimizer.name is {context.optimizer.name!r}"
        )
    if options.sharpness == "device" and options.last_epochs is not None:
        raise UsageError(
            'method.last_epochs does not go with method.sharpness = "device"; use "synchronised"'
        )
    decay = context.optimizer.weight_decay if options.decay_in_perturbation else 0.0
    perturbation: dict[str, Any] = {
        "rho": options.rho,
        "adaptive": options.adaptive,
        "eta": options.eta,
        "weight_decay": decay,
    }
    if options.sharpness == "synchronised":
        descent = make_normal_tx(**context.arguments())
        when = None
        if options.last_epochs is not None:
            try:
                when = context.schedule_clock.last(options.last_epochs)
            except UsageError as error:
                raise UsageError(f"method.{error}") from None
        return context.plain(tx=sharpness_aware(descent, when=when, **perturbation))

    # In `tx` the gradient is already summed over devices; here each device perturbs by its own.
    def gradient(step: StepContext, params) -> Gradient:
        value_and_grad = jax.value_and_grad(step.objective, has_aux=True)
        # `auxiliary`, with BatchNorm's statistics, is that of the first pass.
        (_, auxiliary), updates = sharpness_aware_gradient(value_and_grad, params, **perturbation)
        return Gradient(auxiliary, updates, {})

    return context.plain(gradient=gradient)
