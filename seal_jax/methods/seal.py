"""SEAL: gradient ascent in early layers (Sarfi et al. 2023), with the ablations of its Table 7."""

from __future__ import annotations

import dataclasses
from typing import Literal

from seal_jax import forgetting, masks
from seal_jax.errors import UsageError
from seal_jax.methods.method import Context, HookContext, Method, Variant
from seal_jax.transforms import make_seal_tx
from seal_jax.transforms.aliases import SCALES_BY_NORM

ORDER = 12
VARIANTS = {
    "seal": Variant(
        "SEAL",
        "SEAL paper, section 3",
        "seal_tiny_imagenet.py:seal_paper",
        digits={"threshold": "dense2", "ascent_scale": 0.2},
        also=(
            "seal_ablations.py:freeze,reinit,reverse",  # Table 7
            "seal_frequency.py",  # Table 11
            "seal_cifar100.py",
            "seal_fashion_mnist.py",
            "quickstart.py",
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of SEAL; the defaults are the paper's.

    Attributes:
      threshold: the first block, in the model's declared order, that does not ascend.
      ascent_epochs: k, a whole number of steps; ``None`` for E / 4, to the nearest whole step.
      ascent_scale: S, the ascent's learning rate over the descent's.
      ascent_weight_decay_factor: on the weight decay in ascent: -1 (paper) or 0 (released code);
        positive values are refused.
      fit: what the rest does in ascent: "descend"; "freeze", no update and no momentum; "reinit",
        reinitialised where the generation starts, then descends.
      reverse: swap the two subtrees.
    """

    threshold: str = "layer3"
    ascent_epochs: float | None = None
    ascent_scale: float = 0.01
    ascent_weight_decay_factor: float = -1.0
    fit: Literal["descend", "freeze", "reinit"] = "descend"
    reverse: bool = False


def build(options: Options, context: Context) -> Method:
    """Return SEAL over the model's declared block order."""
    context.require_restarts("seal")
    context.require_ascent("seal")
    # With a factor of 0 an optimizer of optax sees weights of 0 in ascent.
    if not options.ascent_weight_decay_factor and context.optimizer.name in SCALES_BY_NORM:
        raise UsageError(
            "method.ascent_weight_decay_factor = 0 does not go with optimizer.name = "
            f"{context.optimizer.name!r}, whose steps scale with the weights; use -1"
        )
    # Equation 3 negates the update, not the look-ahead: SEAL is not defined with Nesterov's momentum.
    if context.optimizer.nesterov:
        raise UsageError(
            "optimizer.nesterov = True does not go with method 'seal'; set it to False"
        )
    # SEAL forgets the early layers, before the threshold; LLF those from it on.
    early = context.at_threshold(masks.before, options.threshold)
    mask = masks.resolve(masks.invert(early) if options.reverse else early, context.params)
    tx = make_seal_tx(
        mask,
        ascent_epochs=options.ascent_epochs,
        ascent_scale=options.ascent_scale,
        ascent_weight_decay_factor=options.ascent_weight_decay_factor,
        # "reinit" descends as well: its event is below.
        fit_in_ascent="freeze" if options.fit == "freeze" else "descend",
        **context.arguments(),
    )
    clock = context.clock
    ascent = clock.quarter if options.ascent_epochs is None else options.ascent_epochs
    note = (
        f"ascent: the first {round(ascent * clock.steps_per_epoch):,} of the "
        f"{clock.steps_per_generation:,} steps of each generation from 1 on"
    )
    method = context.plain(tx=tx, mask=mask, note=note)
    if options.fit != "reinit":
        return method

    # Table 7's Reinit: what does not ascend is reinitialised instead, then trains as usual.
    def reinitialise_fit(hook: HookContext) -> HookContext:
        fit = masks.invert(mask)
        params = forgetting.reinitialise(hook.key, hook.weights.params, fit, context.init_params)
        return hook.with_params(params)

    return dataclasses.replace(method, on_generation_start=reinitialise_fit)
