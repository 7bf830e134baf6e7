"""IMP: iterative magnitude pruning with rewinding (Frankle & Carbin 2019; Frankle et al. 2020)."""

from __future__ import annotations

import dataclasses

from seal_jax import pruning, selections
from seal_jax.errors import UsageError
from seal_jax.methods.method import Context, HookContext, Method, Variant
from seal_jax.transforms import make_imp_tx

ORDER = 24
VARIANTS = {
    "imp": Variant(
        "IMP",
        "Frankle & Carbin 2019; Frankle et al. 2020",
        "imp_cifar10.py",
        also=("imp_cifar10.py:imp_early",),
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of iterative magnitude pruning.

    Attributes:
      fraction: share of the remaining weights, the smallest, that each new generation prunes.
      rewind_step: step of generation 0 whose values the others go back to; 0 is the initialisation.
      scope: the smallest of all kernels together ("global"), or of each ("tensor").
    """

    fraction: float = 0.2
    rewind_step: int = 0
    scope: selections.Scope = "global"


def build(options: Options, context: Context) -> Method:
    """Return IMP; pruned weights stay exactly zero, and the masks are stored in the optimizer's state."""
    context.require_restarts("imp")
    pruning.check_prunable(options.fraction, "method.fraction")
    most = context.clock.steps_per_generation
    if not 0 <= options.rewind_step < most:
        raise UsageError(
            f"method.rewind_step = {options.rewind_step} must lie in 0..{most - 1}, in generation 0"
        )
    if options.rewind_step and (context.train.patience or context.train.until_accuracy):
        raise UsageError(
            f"method.rewind_step = {options.rewind_step} does not go with train.patience or "
            "train.until_accuracy, which may end generation 0 before it"
        )
    tx = make_imp_tx(rewind_step=options.rewind_step, events=False, **context.arguments())

    def forget(hook: HookContext) -> HookContext:
        # Weights and optimizer state together: the masks in the state say which weights were just zeroed.
        params, opt_state = pruning.prune(
            hook.weights.params, hook.opt_state, options.fraction, options.scope
        )
        return hook.with_params(params)._replace(opt_state=opt_state)

    return context.plain(tx=tx, on_generation_start=forget)
