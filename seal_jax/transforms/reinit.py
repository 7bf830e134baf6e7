"""Re-initialisation of a subtree as an optax transformation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from seal_jax import masks, selections
from seal_jax.errors import NO_PARAMS, check_key
from seal_jax.forgetting import Initialiser, check_like, initialiser
from seal_jax.generations import Clock

PyTree = Any
# (key, parameters, generation) -> selection: see seal_jax.transforms.relearn for the usual ones.
Select = Callable[[jax.Array, PyTree, Any], PyTree]

# Steps are int32, so that no event draws its weights from this number.
_SELECTING = np.uint32(0xFFFFFFFF)


class ReinitState(NamedTuple):
    """State of :func:`masked_reinit`.

    Attributes:
      count: updates so far, int32.
      key: the random key all events draw from.
    """

    count: jax.Array
    key: jax.Array


def masked_reinit(
    mask: masks.Mask | Select,
    init_fn: Initialiser,
    when: Callable[[Any], Any],
    *,
    key: jax.Array,
    generation: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Spend an update on moving the masked parameters to freshly initialised values.

    Put it at the END of a chain. When ``when(count)`` holds, the updates of the masked parameters
    become ``fresh - p``, exact up to rounding, and all others become zero: the gradient of that step
    belongs to weights that are no longer there. Updates in bfloat16 or float16 come out in float32,
    in every step, since a sum in that precision would keep digits of the old weights:
    ``optax.apply_updates`` adds in float32 and returns the parameters' dtype. (``apply_if_finite``
    around such a transformation asks for float32 gradients.)

    The event takes the FIRST step of a generation rather than the last of the one before, so that
    the weights a generation ends with can be evaluated. For an exact event between two steps use
    :func:`seal_jax.forgetting.reinitialise`.

    Args:
      mask: the forget subtree, in any form of :mod:`seal_jax.masks`; or a function of (key,
        parameters, generation) that returns a selection (see :mod:`seal_jax.selections`), called at
        every event with a key that the weights are not drawn from.
      init_fn: maps a key to a whole tree of fresh parameters, or "torch_default".
      when: maps the (traced) count of updates to a bool, e.g. ``Clock.starts_generation``.
      key: a random key; every event draws anew from it, reproducibly.
      generation: maps the count to what such a function is told, e.g. ``Clock.generation``; by
        default the count itself.

    >>> params = {"conv": jnp.ones(()), "fc": jnp.ones(())}
    >>> fresh = lambda key: {"conv": jnp.zeros(()), "fc": jnp.full((), 5.0)}
    >>> tx = masked_reinit("fc", fresh, when=lambda count: count == 0, key=jax.random.key(0))
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> float(updates["conv"]), float(updates["fc"])
    (0.0, 4.0)
    """
    check_key("key", key)
    selecting = is_select(mask)

    def selection(state, params):
        if not selecting:
            return masks.resolve(mask, params)
        own = jax.random.fold_in(jax.random.fold_in(state.key, _SELECTING), state.count)
        now = state.count if generation is None else generation(state.count)
        chosen = mask(own, params, now)
        selections.check(chosen, params)
        return chosen

    def init_fn_(params):
        # A copy: a training step that donates its state must not take the caller's key with it.
        state = ReinitState(jnp.zeros((), jnp.int32), jnp.copy(key))
        if selecting:
            jax.eval_shape(selection, state, params)
        else:
            masks.resolve(mask, params)
        check_like(jax.eval_shape(initialiser(init_fn, params), key), params)
        return state

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS)

        def event():
            fresh = initialiser(init_fn, params)(jax.random.fold_in(state.key, state.count))
            return jax.tree.map(_move, selection(state, params), fresh, params, updates)

        updates = jax.tree.map(widen, updates)
        # A branch, so that the initialisation runs in the steps that need it only.
        updates = jax.lax.cond(when(state.count), event, lambda: updates)
        return updates, ReinitState(optax.safe_increment(state.count), state.key)

    return optax.GradientTransformationExtraArgs(init_fn_, update_fn)


def widen(update: jax.Array) -> jax.Array:
    """Return an update in float32 if it is of a narrower floating type."""
    narrow = jnp.issubdtype(update.dtype, jnp.floating)
    return update.astype(jnp.promote_types(update.dtype, jnp.float32)) if narrow else update


def difference(new: Any, old: Any, update: jax.Array) -> jax.Array:
    """Return the update, of the dtype of ``update``, that takes ``old`` to ``new``."""
    return jnp.asarray(new, update.dtype) - jnp.asarray(old, update.dtype)


def _move(chosen: Any, new: Any, old: Any, update: Any) -> jax.Array:
    if isinstance(chosen, bool):
        return difference(new, old, update) if chosen else jnp.zeros_like(update)
    return jnp.where(chosen, difference(new, old, update), 0)


def is_select(mask: Any) -> bool:
    """Tell whether ``mask`` is a function of (key, parameters, generation), not a static mask.

    >>> is_select(lambda key, params, generation: params), is_select(lambda path, leaf: True)
    (True, False)
    """
    if not callable(mask) or isinstance(mask, type):
        return False
    # A tree of bool may itself be callable: an Equinox module.
    holds_bool = any(map(masks._is_bool, jax.tree.leaves(mask)))
    return not holds_bool and masks._arguments(mask) == 3


def reinit_moments(clock: Clock, when: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Extend the moments of a momentum reset to the step after an event of :func:`masked_reinit`.

    The event's own step still feeds a gradient of the old weights to the optimizer.
    """
    return lambda step: when(step) | (when(step - 1) & clock.starts_generation(step - 1))
