"""Momentum SGD with coupled decay over generations: the base of every iterative method."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from seal_jax import masks
from seal_jax.errors import NO_PARAMS, UsageError, check_number, check_tree
from seal_jax.generations import Clock, Schedule
from seal_jax.transforms.reset_state import never, reset_state

ResetMomentum = Literal["phase", "generation", "never"]


class ClockState(NamedTuple):
    """State of a transformation that only counts. ``count``: updates so far, int32."""

    count: jax.Array


def decay_weights(
    weight_decay: float,
    *,
    mask: masks.Mask | None = None,
    when: Callable[[Any], Any] = never,
    factor: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Add :math:`\lambda p` to the gradient (coupled L2), on a subtree :math:`\lambda f` for a time.

    SEAL "adjusts the sign" of the weight decay where it ascends, since the update is turned round at
    the end: f = -1. The released code has f = 0. A positive f would let the norms grow without bound.

    Args:
      weight_decay: :math:`\lambda`, at least 0.
      mask: the parameters to which ``factor`` applies; ``None`` means none.
      when: maps the (traced) count of updates to a bool.
      factor: f, at most 0 where a mask is given.
    """
    if mask is not None:
        check_number(
            "ascent_weight_decay_factor",
            factor,
            lambda value: -math.inf < value <= 0,
            "not be positive, the weights would diverge; use -1 (paper) or 0 (released code)",
        )
    check_number(
        "weight_decay", weight_decay, lambda value: 0 <= value < math.inf, "be 0 or positive"
    )

    def init_fn(params):
        if mask is not None:
            masks.resolve(mask, params)
        return ClockState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS)
        check_tree("updates", updates, params)
        in_phase = weight_decay * jnp.where(when(state.count), factor, 1.0)

        def add(flag, update, param):
            rate = in_phase if flag else weight_decay
            return update + (rate * param).astype(update.dtype)

        flags = (
            jax.tree.map(lambda _: False, params) if mask is None else masks.resolve(mask, params)
        )
        updates = jax.tree.map(add, flags, updates, params)
        return updates, ClockState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_restarting_rate(
    learning_rate: float | Schedule, clock: Clock
) -> optax.GradientTransformationExtraArgs:
    """Multiply by minus the learning rate, its schedule restarted every generation.

    Args:
      learning_rate: a float, or an optax schedule of the step WITHIN the generation.
      clock: the generations.
    """
    if not callable(learning_rate):
        check_number(
            "learning_rate",
            learning_rate,
            lambda value: 0 < value < math.inf,
            "be positive, or a schedule",
        )
    rate_at = clock.restart(learning_rate)

    def init_fn(params):
        del params
        return ClockState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        step_size = -rate_at(state.count)
        updates = jax.tree.map(lambda update: (step_size * update).astype(update.dtype), updates)
        return updates, ClockState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def moments(clock: Clock, reset_momentum: ResetMomentum) -> Callable[[Any], Any]:
    """Return the condition on which momentum is zeroed: the choices of ``reset_momentum``."""
    if reset_momentum not in get_args(ResetMomentum):
        choices = ", ".join(get_args(ResetMomentum))
        raise UsageError(f"reset_momentum = {reset_momentum!r} must be one of {choices}")
    if reset_momentum == "phase":
        return lambda step: clock.starts_generation(step) | clock.starts_descent(step)
    return clock.starts_generation if reset_momentum == "generation" else never


def make_normal_tx(
    learning_rate: float | Schedule = 0.01,
    *,
    steps_per_epoch: int,
    epochs_per_generation: int = 160,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    nesterov: bool = False,
    reset_momentum: ResetMomentum = "generation",
    optimizer: optax.GradientTransformation | None = None,
    preconditioner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return plain training in generations: nothing is forgotten, the schedule restarts.

    The three "Normal" baselines of the SEAL paper differ in ``epochs_per_generation`` and in how long
    one trains: one generation ("Normal"); G generations, the cosine restarted in each ("Normal
    (long)", restarts); or all G times E epochs declared as one generation under one long cosine.

    Args:
      learning_rate: a float, or a schedule of the step within the generation.
      steps_per_epoch: S.
      epochs_per_generation: E.
      momentum: of SGD, undamped, as in PyTorch.
      weight_decay: coupled L2, added to the gradient before the momentum.
      nesterov: whether the momentum is Nesterov's.
      reset_momentum: "generation" zeroes it where a generation starts, "never" keeps it.
      optimizer: a whole optax optimizer in place of decay, momentum and learning rate, which must
        then be left alone.
      preconditioner: what stands between decay and learning rate in place of the momentum, e.g.
        :func:`seal_jax.transforms.preconditioners.preconditioner` of "adam"; ``momentum`` and
        ``nesterov`` must then be left alone.
    """
    clock = Clock(steps_per_epoch, epochs_per_generation)
    when = moments(clock, reset_momentum)
    return descent(
        clock,
        when,
        learning_rate,
        momentum,
        weight_decay,
        optimizer,
        nesterov=nesterov,
        preconditioner=preconditioner,
    )


def descent(
    clock: Clock,
    when: Callable[[Any], Any],
    learning_rate: float | Schedule,
    momentum: float,
    weight_decay: float,
    optimizer: optax.GradientTransformation | None,
    *,
    nesterov: bool = False,
    decay: optax.GradientTransformation | None = None,
    preconditioner: optax.GradientTransformation | None = None,
    default_rate: float = 0.01,
    view: Callable[[Any, Any], Any] | None = None,
    **frozen: Any,
) -> optax.GradientTransformationExtraArgs:
    """Return the part that all methods share: an optimizer that starts anew at chosen moments.

    Args:
      clock: the generations; the learning rate restarts with each.
      when: the moments at which the optimizer's memory starts anew.
      learning_rate: of momentum SGD; like the next two it must be left alone beside ``optimizer``.
      momentum: of momentum SGD.
      weight_decay: of momentum SGD.
      optimizer: a whole optax optimizer in place of momentum SGD.
      nesterov: whether the momentum is Nesterov's.
      decay: what stands in for plain coupled decay.
      preconditioner: what stands in for the momentum.
      default_rate: the learning rate that counts as left alone.
      view: what ``optimizer`` sees of the parameters; see :func:`reset_state`.
      **frozen: ``frozen`` and ``frozen_when`` of :func:`reset_state`.
    """
    if optimizer is not None:
        if preconditioner is not None:
            raise UsageError("preconditioner has no effect beside optimizer=: give one of the two")
        reject_unused(learning_rate, momentum, weight_decay, default_rate)
        return reset_state(optimizer, when, restart=clock.starts_generation, view=view, **frozen)
    return optax.chain(
        decay_weights(weight_decay) if decay is None else decay,
        reset_state(preconditioned(preconditioner, momentum, nesterov), when, **frozen),
        scale_by_restarting_rate(learning_rate, clock),
    )


def preconditioned(
    preconditioner: optax.GradientTransformation | None, momentum: float, nesterov: bool
) -> optax.GradientTransformation:
    """Return the given ``preconditioner``, else undamped momentum."""
    if preconditioner is None:
        return optax.trace(checked_momentum(momentum), nesterov=nesterov)
    if not (hasattr(preconditioner, "init") and hasattr(preconditioner, "update")):
        raise UsageError(
            f"preconditioner = {preconditioner!r} must be an optax transformation: "
            'preconditioner("adam")'
        )
    for field, value, default in (("momentum", momentum, 0.9), ("nesterov", nesterov, False)):
        if not isinstance(value, Real) or value != default:
            raise UsageError(
                f"{field} has no effect beside preconditioner=: put it into the preconditioner"
            )
    return preconditioner


def reject_unused(
    learning_rate: Any, momentum: float, weight_decay: float, default_rate: float = 0.01
) -> None:
    """Raise if hyper-parameters of momentum SGD are given beside ``optimizer``, where none applies."""
    given = {"learning_rate": learning_rate, "momentum": momentum, "weight_decay": weight_decay}
    defaults = {"learning_rate": default_rate, "momentum": 0.9, "weight_decay": 5e-4}
    for field, value in given.items():
        if not isinstance(value, Real) or value != defaults[field]:
            raise UsageError(f"{field} has no effect beside optimizer=: put it into the optimizer")


def checked_momentum(momentum: float) -> float:
    """Return ``momentum`` if it lies in [0, 1)."""
    check_number("momentum", momentum, lambda value: 0 <= value < 1, "lie in [0, 1)")
    return momentum
