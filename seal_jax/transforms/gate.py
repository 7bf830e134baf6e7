"""Hold a subtree still: for as long as a warm-up lasts, or for good."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from seal_jax import masks, optimizer_state
from seal_jax.transforms.reset_state import split_state


def gate(
    mask: masks.Mask, inner: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    """Give the masked parameters no update while ``warming`` holds.

    ``warming`` is a bool scalar, traced or not, handed over as ``update(..., warming=...)``;
    without it nothing is held. Neither momentum nor decay moves a held parameter, since its update
    becomes exactly zero after both: put the gate at the END of a chain, or around it as ``inner``.
    The latter also forgets what the optimizer remembers about the held parameters, so that they
    start with a fresh optimizer when the warm-up ends; only the clocks of schedules go on.

    Args:
      mask: the parameters to hold, in any form of :mod:`seal_jax.masks`.
      inner: the transformation to wrap, in two parts where :func:`split_state` needs them; its
        state is then the gate's. ``None``: a mere link.

    References:
      Li & Hoiem, `Learning without Forgetting`, 2018: classifier warm-up, held against FAST in
      section 6.4 of that paper.

    >>> params = {"conv": jnp.ones(()), "fc": jnp.ones(())}
    >>> tx = optax.chain(optax.sgd(0.5), gate("conv"))
    >>> updates, _ = tx.update(params, tx.init(params), params, warming=jnp.array(True))
    >>> float(updates["conv"]), float(updates["fc"])
    (0.0, -0.5)
    """
    wrapped = optax.identity() if inner is None else split_state(inner, mask)
    wrapped = optax.with_extra_args_support(wrapped)

    def init_fn(params):
        masks.resolve(mask, params)
        return wrapped.init(params)

    def update_fn(updates, state, params=None, *, warming=None, **extra_args):
        updates, state = wrapped.update(updates, state, params, warming=warming, **extra_args)
        if warming is None:
            return updates, state
        flags = masks.resolve(mask, updates)
        if inner is not None:
            state = optimizer_state.reinitialise(
                state, wrapped.init(params), params, flags, when=warming, restart=False
            )

        def hold(flag, update):
            return jnp.where(warming, jnp.zeros_like(update), update) if flag else update

        return jax.tree.map(hold, flags, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def freeze(mask: masks.Mask) -> optax.GradientTransformationExtraArgs:
    """Give the masked parameters no update, ever: the last link of a chain.

    Args:
      mask: the parameters to freeze, in any form of :mod:`seal_jax.masks`.

    >>> params = {"conv": jnp.ones(()), "fc": jnp.ones(())}
    >>> tx = optax.chain(optax.sgd(0.5, momentum=0.9), freeze("conv"))
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> float(updates["conv"]), float(updates["fc"])
    (0.0, -0.5)
    """

    def init_fn(params):
        masks.resolve(mask, params)
        return optax.EmptyState()

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        flags = masks.resolve(mask, updates)
        zeroed = jax.tree.map(
            lambda flag, update: jnp.zeros_like(update) if flag else update, flags, updates
        )
        return zeroed, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
