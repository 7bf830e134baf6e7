"""Forget what an optimizer remembers at chosen moments, for chosen parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from seal_jax import masks, optimizer_state
from seal_jax.errors import NO_PARAMS, UsageError


class ResetState(NamedTuple):
    """State of :func:`reset_state`.

    Attributes:
      count: updates so far, int32.
      inner: the state of the wrapped optimizer.
    """

    count: jax.Array
    inner: optax.OptState


def never(step: Any) -> Any:
    """Return False for every step: the condition of what does not happen."""
    del step
    return False


def split_state(
    inner: optax.GradientTransformation, mask: masks.Mask
) -> optax.GradientTransformationExtraArgs:
    """Hold ``inner`` as two optimizers, of the masked and of the other parameters, if it must be.

    It must where both share a number that belongs to their memory. Adam's count corrects moments
    that have started from zero together: if only some go back to zero, their steps come out as many
    times too large as the moments are too small. Otherwise the result is ``inner`` itself. What
    couples parameters (clipping by a global norm) then couples those of one part only.

    Args:
      inner: any optax transformation.
      mask: one of the two parts, in any form of :mod:`seal_jax.masks`.

    >>> params = {"conv": jnp.ones(()), "fc": jnp.ones(())}
    >>> sorted(split_state(optax.scale_by_adam(), "fc").init(params).inner_states)
    ['masked', 'rest']
    >>> split_state(optax.trace(0.9), "fc").init(params) == optax.trace(0.9).init(params)
    True
    """
    whole = optimizer_state.keep_dtypes(inner)

    def labels(tree):
        return jax.tree.map(lambda flag: "masked" if flag else "rest", masks.resolve(mask, tree))

    parts = optax.partition({"masked": whole, "rest": whole}, labels)

    def suitable(params):
        if params is None:
            raise ValueError(NO_PARAMS)
        flags = masks.resolve(mask, params)
        state = jax.eval_shape(whole.init, params)
        return parts if optimizer_state.shares(state, params, flags) else whole

    def update_fn(updates, state, params=None, **extra_args):
        return suitable(params).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(
        lambda params: suitable(params).init(params), update_fn
    )


def reset_state(
    inner: optax.GradientTransformation,
    when: Callable[[Any], Any],
    *,
    mask: masks.Mask | None = None,
    restart: Callable[[Any], Any] = never,
    frozen: masks.Mask | None = None,
    frozen_when: Callable[[Any], Any] = never,
    view: Callable[[Any, Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap ``inner`` so that its state is re-initialised before an update when a condition holds.

    The conditions are traced: one compiled step serves every moment. What the optimizer holds for a
    parameter (momentum, second moments) goes back to ``inner.init``, and with it a count that
    belongs to it, such as Adam's: steps after a reset are those of a fresh optimizer. With a mask
    ``inner`` is two optimizers where it must be, see :func:`split_state`. The clocks of schedules
    inside ``inner`` follow ``restart`` alone (see :mod:`seal_jax.optimizer_state`).

    Args:
      inner: any optax transformation.
      when: maps the (traced) count of updates to a bool, e.g. ``Clock.starts_generation``.
      mask: the parameters concerned, in any form of :mod:`seal_jax.masks`; ``None`` means all.
      restart: when the clocks inside ``inner`` restart; never by default.
      frozen: parameters whose memory an update leaves as it is while ``frozen_when(count)`` holds.
        Their updates are still ``inner``'s: zero them in a later link.
      frozen_when: maps the count of updates to a bool.
      view: maps the count and the parameters to the parameters that ``inner.update`` is given.

    >>> tx = reset_state(optax.trace(decay=0.9), when=lambda count: count == 2)
    >>> params, state = jnp.zeros(()), tx.init(jnp.zeros(()))
    >>> for _ in range(3):
    ...     update, state = tx.update(jnp.ones(()), state, params)
    ...     print(round(float(update), 3))
    1.0
    1.9
    1.0
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise UsageError(f"optimizer = {inner!r} must be an optax transformation: optax.adam(1e-3)")
    inner = optimizer_state.keep_dtypes(inner)
    for part in (mask, frozen):
        inner = inner if part is None else split_state(inner, part)

    def init_fn(params):
        return ResetState(jnp.zeros((), jnp.int32), inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(NO_PARAMS)
        flags = None if mask is None else masks.resolve(mask, params)
        remembered = optimizer_state.reinitialise(
            state.inner,
            inner.init(params),
            params,
            flags,
            when=when(state.count),
            restart=restart(state.count),
        )
        seen = params if view is None else view(state.count, params)
        updates, new = inner.update(updates, remembered, seen, **extra_args)
        if frozen is not None:
            new = optimizer_state.reinitialise(
                new,
                remembered,
                params,
                masks.resolve(frozen, params),
                when=frozen_when(state.count),
                restart=False,
            )
        return updates, ResetState(optax.safe_increment(state.count), new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
