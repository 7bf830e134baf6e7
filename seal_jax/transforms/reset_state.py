"""Reset the state of an optimizer when a condition holds, or freeze parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from seal_jax import masks, optimizer_state
from seal_jax.errors import UsageError, require_params
from seal_jax.generations import never


class ResetState(NamedTuple):
    """State of :func:`reset_state`: updates so far, int32, and the state of the wrapped optimizer."""

    count: jax.Array
    inner: optax.OptState


def split_state(
    inner: optax.GradientTransformation, mask: masks.Mask
) -> optax.GradientTransformationExtraArgs:
    """Split ``inner`` into an optimizer of the masked and one of the other parameters, if necessary.

    It is necessary where both share a number that belongs to their memory. Adam's count corrects moments
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
    whole, mask = optimizer_state.keep_dtypes(inner), masks.fixed(mask)

    def labels(tree):
        return jax.tree.map(lambda flag: "masked" if flag else "rest", mask(tree))

    # Each part has its own state, and so its own count.
    parts = optax.partition({"masked": whole, "rest": whole}, labels)

    def suitable(params):
        # Only with the parameters is it known whether to split; shapes suffice for it.
        require_params(params)
        state = jax.eval_shape(whole.init, params)
        return parts if optimizer_state.shares(state, params, mask(params)) else whole

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
    view: Callable[..., Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap ``inner`` so that its state is reinitialized before an update when a condition holds.

    The conditions are traced: one compiled step serves every moment. What the optimizer holds for a
    parameter (momentum, second moments) goes back to ``inner.init``, and with it a count that
    belongs to it, such as Adam's: steps after a reset are those of a fresh optimizer. With a mask
    ``inner`` is two optimizers where necessary, see :func:`split_state`.

    Args:
      inner: any optax transformation.
      when: maps the (traced) count of updates to a bool, e.g. ``Clock.starts_generation``.
      mask: the parameters concerned, in any form of :mod:`seal_jax.masks`; ``None`` means all.
      restart: when the clocks of schedules inside ``inner`` restart; never by default.
      frozen: parameters whose memory an update leaves as it is while ``frozen_when(count)`` holds.
        Their updates are still ``inner``'s: zero them in a later link.
      frozen_when: maps the count of updates to a bool.
      view: maps the count, the parameters and the keyword arguments of ``update`` to the parameters that
        ``inner.update`` is given.

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
    # A reset chooses between old and fresh state by `where`: both must have the same dtypes.
    inner = optimizer_state.keep_dtypes(inner)
    if mask is not None:
        mask = masks.fixed(mask)
        inner = split_state(inner, mask)
    if frozen is not None:
        frozen = masks.fixed(frozen)
        inner = split_state(inner, frozen)

    def init_fn(params):
        return ResetState(jnp.zeros((), jnp.int32), inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        require_params(params)
        # ``init`` in every update: the reset is a choice between values, so that one program serves all steps.
        before = optimizer_state.reinitialise(
            state.inner,
            inner.init(params),
            params,
            None if mask is None else mask(params),
            when=when(state.count),
            restart=restart(state.count),
        )
        # `inner` sees its state after the reset, and the reset goes by the parameters as they are.
        viewed = params if view is None else view(state.count, params, **extra_args)
        updates, after = inner.update(updates, before, viewed, **extra_args)
        if frozen is not None:
            # The memory of frozen parameters is put back; clocks inside ``inner`` go on (``restart=False``).
            after = optimizer_state.reinitialise(
                after,
                before,
                params,
                frozen(params),
                when=frozen_when(state.count),
                restart=False,
            )
        return updates, ResetState(optax.safe_increment(state.count), after)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def freeze_while(
    mask: masks.Mask, inner: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    """Give the masked parameters no update while the extra argument ``warming`` is true.

    ``warming`` is a bool scalar, traced or not; without it nothing is frozen. Neither momentum nor
    decay moves a frozen parameter if this is at the END of a chain, or around it as ``inner``. The
    latter also resets the optimizer's memory of the frozen parameters, so that they start with a
    fresh optimizer when the warm-up ends; only the clocks of schedules go on.

    Args:
      mask: the parameters to freeze, in any form of :mod:`seal_jax.masks`.
      inner: the transformation to wrap, in two parts where :func:`split_state` needs them; its
        state is then that of the result. ``None``: a link of a chain, without state.

    References:
      Li & Hoiem, `Learning without Forgetting`, 2018: classifier warm-up, compared with FAST in
      section 6.4 of that paper.

    >>> params = {"conv": jnp.ones(()), "fc": jnp.ones(())}
    >>> tx = optax.chain(optax.sgd(0.5), freeze_while("conv"))
    >>> updates, _ = tx.update(params, tx.init(params), params, warming=jnp.array(True))
    >>> float(updates["conv"]), float(updates["fc"])
    (0.0, -0.5)
    """
    mask = masks.fixed(mask)
    wrapped = optax.identity() if inner is None else split_state(inner, mask)
    wrapped = optax.with_extra_args_support(wrapped)

    def init_fn(params):
        mask(params)
        return wrapped.init(params)

    def update_fn(updates, state, params=None, *, warming=None, **extra_args):
        updates, state = wrapped.update(updates, state, params, warming=warming, **extra_args)
        if warming is None:
            return updates, state
        # By the updates: a link of a chain need not be given the parameters.
        flags = mask(updates)
        if inner is not None:
            # After the update, so that not even the last step of the warm-up leaves anything in the memory.
            state = optimizer_state.reinitialise(
                state, wrapped.init(params), params, flags, when=warming, restart=False
            )

        def hold(flag, update):
            return jnp.where(warming, jnp.zeros_like(update), update) if flag else update

        return jax.tree.map(hold, flags, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def freeze(mask: masks.Mask) -> optax.GradientTransformationExtraArgs:
    """Give the masked parameters, in any form of :mod:`seal_jax.masks`, no update: the last link.

    >>> params = {"conv": jnp.ones(()), "fc": jnp.ones(())}
    >>> tx = optax.chain(optax.sgd(0.5, momentum=0.9), freeze("conv"))
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> float(updates["conv"]), float(updates["fc"])
    (0.0, -0.5)
    """
    # Not ``optax.partition``: the optimizer's state keeps the structure of all parameters.
    return optax.with_extra_args_support(optax.masked(optax.set_to_zero(), masks.fixed(mask)))
