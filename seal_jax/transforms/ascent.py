"""Gradient ascent on a subtree: the last link of a chain turns its updates round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from seal_jax import masks


class AscentState(NamedTuple):
    """State of :func:`ascend`. ``count``: updates so far, int32."""

    count: jax.Array


def ascend(
    mask: masks.Mask,
    when: Callable[[Any], Any],
    scale: float = 0.01,
    *,
    freeze_fit: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiply the masked updates by :math:`-S` while ``when(count)`` holds.

    Put it at the END of a chain, after momentum and learning rate: with
    :math:`b \leftarrow \mu b + g` the update of the forget subtree is then :math:`+S \eta b`. Turning
    the gradient round before the momentum would make the first descent steps go on ascending.

    Args:
      mask: the forget subtree, in any form of :mod:`seal_jax.masks`.
      when: maps the (traced) count of updates to a bool, e.g. ``Clock.ascending``.
      scale: S, at least 0.
      freeze_fit: give the other parameters no update meanwhile ("SEAL+Freeze", Table 7).

    Returns:
      A transformation whose updates keep the dtype of those it is given.

    References:
      Sarfi et al., `Simulated Annealing in Early Layers Leads to Better Generalization`, eq. 2, 3.

    >>> tx = ascend("conv", when=lambda count: count < 1, scale=0.5)
    >>> params = {"conv": jnp.zeros(()), "fc": jnp.zeros(())}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"conv": jnp.ones(()), "fc": jnp.ones(())}, state, params)
    >>> float(updates["conv"]), float(updates["fc"])
    (-0.5, 1.0)
    """

    def init_fn(params):
        masks.resolve(mask, params)  # a mask that cannot be used fails here, before any training
        return AscentState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        ascending = when(state.count)
        sign = jnp.where(ascending, -scale, 1.0)

        def turn(flag, update):
            if flag:
                return (update * sign).astype(update.dtype)
            return jnp.where(ascending, jnp.zeros_like(update), update) if freeze_fit else update

        updates = jax.tree.map(turn, masks.resolve(mask, updates), updates)
        return updates, AscentState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
