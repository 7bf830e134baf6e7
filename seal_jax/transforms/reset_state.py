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


def reset_state(
    inner: optax.GradientTransformation,
    when: Callable[[Any], Any],
    *,
    mask: masks.Mask | None = None,
    restart: Callable[[Any], Any] = never,
) -> optax.GradientTransformationExtraArgs:
    """Wrap ``inner`` so that its state is re-initialised before an update when a condition holds.

    The conditions are traced: one compiled step serves every moment. What the optimizer holds for a
    parameter (momentum, second moments) goes back to ``inner.init``; a count that several parameters
    share, such as Adam's, goes back only if the mask covers all of them; the clocks of schedules
    inside ``inner`` follow ``restart`` alone (see :mod:`seal_jax.optimizer_state`).

    Args:
      inner: any optax transformation.
      when: maps the (traced) count of updates to a bool, e.g. ``Clock.starts_generation``.
      mask: the parameters concerned, in any form of :mod:`seal_jax.masks`; ``None`` means all.
      restart: when the clocks inside ``inner`` restart; never by default.

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
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        if mask is not None:
            masks.resolve(mask, params)
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
        updates, remembered = inner.update(updates, remembered, params, **extra_args)
        return updates, ResetState(optax.safe_increment(state.count), remembered)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
