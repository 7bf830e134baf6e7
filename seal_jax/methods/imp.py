"""IMP: iterative magnitude pruning with rewinding (Frankle & Carbin 2019; Frankle et al. 2020)."""

from __future__ import annotations

import dataclasses

import optax

from seal_jax import pruning, selections
from seal_jax.errors import UsageError, check_number
from seal_jax.methods.method import Context, HookContext, Method, Variant
from seal_jax.transforms import make_normal_tx
from seal_jax.transforms.imp import hold_pruned

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
    check_number(
        "method.fraction",
        options.fraction,
        lambda f: 1 / 30_000 <= f < 1,  # `portion` resolves no finer ones
        "lie between 1/30000 and 1",
    )
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
    # Behind the optimizer, whose momentum and weight decay would move pruned weights off zero.
    tx = optax.chain(
        make_normal_tx(**context.arguments()), hold_pruned(rewind_step=options.rewind_step)
    )

    def forget(hook: HookContext) -> HookContext:
        # Weights and optimizer state together: the masks in the state say which weights were just zeroed.
        params, opt_state = pruning.prune(
            hook.weights.params, hook.opt_state, options.fraction, options.scope
        )
        return hook.with_params(params)._replace(opt_state=opt_state)

    return context.plain(tx=tx, on_generation_start=forget)
