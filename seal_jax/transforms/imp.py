"""IMP: iterative magnitude pruning with rewinding as an optax transformation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax

from seal_jax import masks, pruning, selections
from seal_jax.errors import UsageError, check_choice, check_integer, require_params
from seal_jax.generations import Clock, Schedule, never
from seal_jax.pruning import PruneState
from seal_jax.transforms.relearn import difference, widen
from seal_jax.transforms.sgd import descent, make_normal_tx, takes_options_of


def hold_pruned(
    *,
    among: masks.Mask | None = None,
    rewind_step: int = 0,
    when: Callable[[Any], Any] = never,
    fraction: float = 0.2,
    scope: selections.Scope = "global",
) -> optax.GradientTransformationExtraArgs:
    """Hold pruned weights at exactly zero, and keep the parameters that pruning rewinds to.

    Put it at the END of a chain, where no momentum or decay can move a pruned weight any more. The
    snapshot is taken before the update of ``rewind_step``; 0 takes it in ``init``. Events come from
    :func:`seal_jax.pruning.prune` between two steps, which is exact; or, when ``when(count)`` holds,
    take the place of an update: pruned weights are again exactly zero, and the others rewound up
    to rounding, since an update reaches w only as p + (w - p), in float32.

    Args:
      among: the parameters that may be pruned, in any form of :mod:`seal_jax.masks`, which here may
        take all; by default kernels, the leaves of two or more dimensions.
      rewind_step: the number of updates after which the snapshot is taken.
      when: maps the (traced) count of updates to a bool: the steps to spend on an event; never by
        default.
      fraction: of the remaining weights, pruned by such an event.
      scope: "global" or "tensor", for such an event.

    >>> tx = hold_pruned(when=lambda count: count == 1, fraction=0.5)
    >>> params = {"kernel": jnp.array([[1.0, 2.0]])}
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update({"kernel": jnp.ones((1, 2))}, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(params["kernel"].tolist())
    [[2.0, 3.0]]
    [[0.0, 2.0]]
    [[0.0, 3.0]]
    """
    pruning.check_prunable(fraction)
    check_choice("scope", scope, get_args(selections.Scope))
    check_integer("rewind_step", rewind_step, 0)

    def init_fn(params):
        return pruning.initial_state(params, selections.eligible(params, among))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        require_params(params)
        if rewind_step > 0:
            # A branch, so that only the one step moves the parameters through memory.
            rewind = jax.lax.cond(
                state.count == rewind_step,
                # In the snapshot's structure: under nnx.Optimizer only init sees Variables.
                lambda: jax.tree.unflatten(
                    jax.tree.structure(state.rewind), jax.tree.leaves(params)
                ),
                lambda: state.rewind,
            )
            state = state._replace(rewind=rewind)
        if when is not never:  # as in masked_reinit: an event must reach its values
            updates = jax.tree.map(widen, updates)

        def hold(keep, update, param):
            # Minus the parameter, which is zero, and not just zero: should an event on float64
            # parameters with float32 updates have left a residue, it is gone in the next steps.
            # One flag for the whole tensor: a parameter that cannot be pruned.
            if jnp.ndim(keep) == 0:
                return update
            return jnp.where(keep, update, (0 - param).astype(update.dtype))

        def plain():
            return jax.tree.map(hold, state.kept, updates, params), state.kept

        def event():
            kept = pruning.pruned_further(params, state.kept, fraction, scope)
            aims = pruning.rewound(state._replace(kept=kept), params)
            return jax.tree.map(difference, aims, params, updates), kept

        # Without events of its own the program has no branch, and no sort of the weights.
        updates, kept = plain() if when is never else jax.lax.cond(when(state.count), event, plain)
        return updates, PruneState(optax.safe_increment(state.count), kept, state.rewind)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@takes_options_of(make_normal_tx)
def make_imp_tx(
    learning_rate: float | Schedule = 0.01,
    *,
    fraction: float = 0.2,
    rewind_step: int = 0,
    scope: selections.Scope = "global",
    among: masks.Mask | None = None,
    steps_per_epoch: int,
    epochs_per_generation: int = 160,
    events: bool = True,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Return iterative magnitude pruning with rewinding as one optax transformation.

    Where a generation from 1 on starts, the smallest weights are zeroed permanently and the others go
    back to their early values; r events leave (1 - fraction)^r of the prunable weights. The learning
    rate's schedule restarts with every generation, also if ``rewind_step`` is not 0.

    Args:
      learning_rate: a float, or an optax schedule of the step within the generation.
      fraction, scope: of the remaining weights, pruned by each event; see :func:`seal_jax.pruning.prune`.
      rewind_step: the step of generation 0 whose parameters are rewound to; 0 means the initial ones.
      among: the parameters that may be pruned; kernels by default. All parameters are rewound.
      steps_per_epoch: S.
      epochs_per_generation: E.
      events: True spends the first step of every generation from 1 on on the event, as
        :func:`hold_pruned` describes; False leaves it to the caller, who calls
        :func:`seal_jax.pruning.prune` on the parameters and this optimizer's state before it.
      **options: of momentum SGD, see :func:`make_normal_tx`.

    For the papers see :mod:`seal_jax.pruning`.

    >>> params = {"kernel": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
    >>> tx = make_imp_tx(0.1, fraction=0.5, steps_per_epoch=2, epochs_per_generation=1)
    >>> state = tx.init(params)
    >>> for step in range(5):  # events at steps 2 and 4
    ...     updates, state = tx.update(params, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params["kernel"].tolist()
    [[0.0, 0.0, 0.0, 4.0]]
    """
    clock = Clock(steps_per_epoch, epochs_per_generation)
    holding = hold_pruned(
        among=among,
        rewind_step=rewind_step,
        when=clock.starts_generation if events else never,
        fraction=fraction,
        scope=scope,
    )
    # The first event ends generation 0 and rewinds: the snapshot must have been taken by then.
    if rewind_step >= clock.steps_per_generation:
        raise UsageError(
            f"rewind_step = {rewind_step} must lie in generation 0, before step "
            f"{clock.steps_per_generation}: the first event already rewinds"
        )
    # Holding comes last: momentum or decay after it would move pruned weights off zero.
    return optax.chain(descent(clock, learning_rate, starts_with_event=events, **options), holding)
