"""L2-Init: weight decay towards the initial parameters instead of towards zero."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from seal_jax import masks
from seal_jax.errors import check_number, nonnegative, require_params
from seal_jax.generations import Clock, Schedule
from seal_jax.transforms.sgd import descent, make_normal_tx, takes_options_of


class InitialState(NamedTuple):
    """State of :func:`decay_towards_initial`: the leaves of the parameters at its start, in their order."""

    initial: tuple[jax.Array, ...]


def decay_towards_initial(
    weight_decay: Any = 5e-4, *, mask: masks.Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Add :math:`\lambda (w - w_0)` to the gradient, :math:`w_0` being the parameters that ``init`` is given.

    This is the gradient of :math:`\tfrac{\lambda}{2} \|w - w_0\|^2` in the loss; the paper writes
    :math:`\lambda \|w - w_0\|^2`, so its :math:`\lambda` is half of this one. Put it at the START of a
    chain, before momentum and learning rate. No reset of an optimizer's memory changes :math:`w_0`, whether
    by :func:`seal_jax.transforms.reset_state` or by :func:`seal_jax.forgetting.forget_state`.

    Args:
      weight_decay: :math:`\lambda`, at least 0; may be traced.
      mask: the parameters that are pulled, in any form of :mod:`seal_jax.masks`; ``None`` for all.

    References:
      Kumar, Marklund and Van Roy, `Maintaining Plasticity in Continual Learning via Regenerative
      Regularization`, 2023, section 3.

    >>> tx = decay_towards_initial(0.5)
    >>> state = tx.init({"w": jnp.array([1.0, 2.0])})
    >>> updates, _ = tx.update({"w": jnp.zeros(2)}, state, {"w": jnp.array([3.0, 2.0])})
    >>> updates["w"].tolist()
    [1.0, 0.0]
    """
    check_number("weight_decay", weight_decay, nonnegative, "be 0 or positive")
    mask = None if mask is None else masks.fixed(mask)

    def init_fn(params):
        if mask is not None:
            mask(params)  # a mask that cannot be used fails here, before any training
        # Copies: a training step that donates parameters and state must not give one buffer twice. And not a tree
        # like the parameters: by that resets know the memory of past gradients, which this is not.
        return InitialState(tuple(jnp.array(leaf, copy=True) for leaf in jax.tree.leaves(params)))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        require_params(params)
        initial = jax.tree.unflatten(jax.tree.structure(params), state.initial)
        flags = jax.tree.map(lambda _: True, params) if mask is None else mask(params)

        def pull(flag, update, param, start):
            # Cast at the end: a traced weight decay is float32 and would widen bfloat16 updates.
            return (
                update + (weight_decay * (param - start)).astype(update.dtype) if flag else update
            )

        return jax.tree.map(pull, flags, updates, params, initial), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@takes_options_of(make_normal_tx)
def make_l2_init_tx(
    learning_rate: float | Schedule = 0.01,
    *,
    weight_decay: Any = 5e-4,
    mask: masks.Mask | None = None,
    steps_per_epoch: int,
    epochs_per_generation: int = 160,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Return L2-Init, plain training whose weight decay pulls towards the initial weights, as one transformation.

    Args:
      learning_rate: a float, or a schedule of the step within the generation.
      weight_decay, mask: see :func:`decay_towards_initial`; there is no other decay, unless ``optimizer`` has one.
      steps_per_epoch: S.
      epochs_per_generation: E; the initial weights stay those of the first generation.
      **options: of momentum SGD, see :func:`make_normal_tx`.

    >>> tx, params = make_l2_init_tx(1.0, weight_decay=0.5, momentum=0.0, steps_per_epoch=1), jnp.ones(())
    >>> updates, _ = tx.update(jnp.zeros(()), tx.init(params), params + 2)
    >>> float(updates)
    -1.0
    """
    clock = Clock(steps_per_epoch, epochs_per_generation)
    # In the place of the decay, whose weight `descent` is not told: beside a whole optimizer it would refuse it.
    pulling = decay_towards_initial(weight_decay, mask=mask)
    descending = descent(
        clock, learning_rate, decay=lambda weight_decay: optax.identity(), **options
    )
    return optax.chain(pulling, descending)
