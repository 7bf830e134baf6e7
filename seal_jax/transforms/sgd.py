"""Momentum SGD with coupled weight decay over generations: the base of every iterative method."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
import optax

from seal_jax import masks, paths
from seal_jax.errors import (
    UsageError,
    check_choice,
    check_number,
    nonnegative,
    positive,
    require_params,
)
from seal_jax.generations import Clock, Schedule, never
from seal_jax.transforms import preconditioners
from seal_jax.transforms.reset_state import reset_state

Factory = TypeVar("Factory", bound=Callable[..., Any])
ResetMomentum = Literal["phase", "generation", "never"]


class ClockState(NamedTuple):
    """State of a transformation that only counts. ``count``: updates so far, int32."""

    count: jax.Array


def leafwise(
    rule: Callable[[jax.Array], Callable[..., jax.Array]],
    mask: masks.Mask | None = None,
    *,
    with_params: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation that applies a rule of the count of updates to every leaf.

    Args:
      rule: maps the (traced) count to a function of (flag, update), or with ``with_params`` of
        (flag, update, parameter), that returns the new update.
      mask: the parameters whose flag is True, in any form of :mod:`seal_jax.masks`; ``None`` is False everywhere.
      with_params: whether the rule reads the parameters, so that ``update`` needs them.

    >>> tx = leafwise(lambda count: lambda flag, update: update * count if flag else update, "fc")
    >>> updates = {"conv": jnp.ones(()), "fc": jnp.ones(())}
    >>> float(tx.update(updates, tx.init(updates))[0]["fc"])
    0.0
    """
    mask = None if mask is None else masks.fixed(mask)

    def init_fn(params):
        if mask is not None:
            mask(params)  # a mask that cannot be used fails here, before any training
        return ClockState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        trees = (updates,)
        if with_params:
            require_params(params)
            paths.check_tree("updates", updates, params)
            trees = (updates, params)
        # A rule that reads the parameters resolves the mask on them, any other on the updates.
        flags = jax.tree.map(lambda _: False, updates) if mask is None else mask(trees[-1])
        updates = jax.tree.map(rule(state.count), flags, *trees)
        return updates, ClockState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def decay_weights(
    weight_decay: float,
    *,
    mask: masks.Mask | None = None,
    when: Callable[[Any], Any] = never,
    factor: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Add :math:`\lambda p` to the gradient (coupled L2), on a subtree :math:`\lambda f` for a time.

    SEAL "adjusts the sign" of the weight decay where it ascends, since the update is negated at the
    end: f = -1. The released code has f = 0.

    Args:
      weight_decay: :math:`\lambda`, at least 0.
      mask: the parameters to which ``factor`` applies; ``None`` means none.
      when: maps the (traced) count of updates to a bool.
      factor: f.

    >>> tx = decay_weights(0.1, mask="conv", when=lambda count: count < 1, factor=-1.0)
    >>> params = {"conv": jnp.ones(()), "fc": jnp.ones(())}
    >>> gradient = jax.tree.map(jnp.zeros_like, params)
    >>> updates, _ = tx.update(gradient, tx.init(params), params)
    >>> round(float(updates["conv"]), 3), round(float(updates["fc"]), 3)
    (-0.1, 0.1)
    """
    check_number("factor", factor, math.isfinite, "be finite")
    check_number("weight_decay", weight_decay, nonnegative, "be 0 or positive")

    def rule(count):
        # Once per step, not once per leaf.
        in_phase = weight_decay * jnp.where(when(count), factor, 1.0)

        def add(flag, update, param):
            return update + ((in_phase if flag else weight_decay) * param).astype(update.dtype)

        return add

    return leafwise(rule, mask, with_params=True)


def scale_by_restarting_rate(
    learning_rate: float | Schedule, clock: Clock
) -> optax.GradientTransformationExtraArgs:
    """Multiply by minus the learning rate, its schedule restarted every generation.

    Args:
      learning_rate: a float, or an optax schedule of the step WITHIN the generation.
      clock: the generations.

    >>> tx = scale_by_restarting_rate(lambda step: 0.5**step, Clock(2, 1))  # two steps each
    >>> state, rates = tx.init(jnp.ones(())), []
    >>> for _ in range(4):
    ...     update, state = tx.update(jnp.ones(()), state)
    ...     rates.append(-float(update))
    >>> rates
    [1.0, 0.5, 1.0, 0.5]
    """
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate, positive, "be positive, or a schedule")
    rate_at = clock.restart(learning_rate)

    def rule(count):
        step_size = -rate_at(count)
        # The rate is float32 and would widen bfloat16 updates.
        return lambda _, update: (step_size * update).astype(update.dtype)

    return leafwise(rule)


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

    The "Normal" baselines of the SEAL paper are one generation, G generations ("Normal (long)",
    restarts), or all G times E epochs declared as one generation under one long cosine.

    Args:
      learning_rate: a float, or a schedule of the step within the generation.
      steps_per_epoch: S.
      epochs_per_generation: E.
      momentum: of SGD, undamped as in PyTorch, in [0, 1).
      weight_decay: coupled L2, added to the gradient before the momentum.
      nesterov: whether the momentum is Nesterov's.
      reset_momentum: when the optimizer's memory, such as the momentum, is reset:
        "generation", where a generation starts; "phase", also where the ascent of SEAL turns into
        descent; or "never".
      optimizer: a whole optax optimizer in place of decay, momentum and learning rate, which must
        then be left alone. It is reinitialized at the same moments, and its schedules restart with
        every generation.
      preconditioner: the transformation between decay and learning rate, in place of the momentum, such as
        :func:`preconditioner` of "adam"; ``momentum`` and ``nesterov`` must then be left alone.

    >>> tx = make_normal_tx(0.5, steps_per_epoch=10, epochs_per_generation=4, weight_decay=0.0)
    >>> updates, _ = tx.update(jnp.ones(()), tx.init(jnp.ones(())), jnp.ones(()))
    >>> float(updates)
    -0.5
    """
    return descent(
        Clock(steps_per_epoch, epochs_per_generation),
        learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        reset_momentum=reset_momentum,
        optimizer=optimizer,
        preconditioner=preconditioner,
    )


def takes_options_of(source: Callable[..., Any]) -> Callable[[Factory], Factory]:
    """Decorate a function whose ``**options`` are keyword arguments of ``source``.

    Its signature then shows them one by one, with their defaults: to ``help``, and to
    ``optax.inject_hyperparams``, which reads the signature.

    >>> @takes_options_of(make_normal_tx)
    ... def make_tx(*, steps_per_epoch, **options):
    ...     return make_normal_tx(steps_per_epoch=steps_per_epoch, **options)
    >>> list(inspect.signature(make_tx).parameters)[:3]
    ['steps_per_epoch', 'epochs_per_generation', 'momentum']
    """

    def decorate(function: Factory) -> Factory:
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        # Parameters that the function names itself keep their own defaults.
        options = [
            parameter
            for name, parameter in inspect.signature(source).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name not in signature.parameters
        ]
        # Not a wrapper around the function, which doctest would take for one of this module. To mypy a
        # Callable has no such attribute.
        function.__signature__ = signature.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
        return function

    return decorate


def descent(
    clock: Clock,
    learning_rate: float | Schedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    nesterov: bool = False,
    reset_momentum: ResetMomentum = "generation",
    optimizer: optax.GradientTransformation | None = None,
    preconditioner: optax.GradientTransformation | None = None,
    decay: Callable[[float], optax.GradientTransformation] = decay_weights,
    default_rate: float = 0.01,
    starts_with_event: bool = False,
    **wrapping: Any,
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer that all methods have in common: :func:`make_normal_tx` with hooks.

    Args:
      clock: the generations; the learning rate restarts with each.
      learning_rate, momentum, weight_decay, ...: see :func:`make_normal_tx`.
      decay: maps the weight decay to the transformation that applies it.
      default_rate: the learning rate that counts as unchanged where an ``optimizer`` is given.
      starts_with_event: whether the first step of a generation is spent on new values for parameters.
      **wrapping: ``frozen``, ``frozen_when`` and (for ``optimizer``) ``view`` of :func:`reset_state`.
    """
    at_moments = reset_condition(clock, reset_momentum)

    def when(step):
        if not starts_with_event:
            return at_moments(step)
        # The step of an event feeds the optimizer a gradient of the old values: reset once more.
        return at_moments(step) | (at_moments(step - 1) & clock.starts_generation(step - 1))

    decaying = decay(weight_decay)
    if optimizer is None:
        # Momentum SGD has its decay in a link before it, which applies the factor: no changed view is needed.
        wrapping.pop("view", None)
        if preconditioner is None:
            preconditioner = preconditioners.preconditioner(
                "sgd", momentum=momentum, nesterov=nesterov
            )
        elif not (hasattr(preconditioner, "init") and hasattr(preconditioner, "update")):
            raise UsageError(
                f"preconditioner = {preconditioner!r} must be an optax transformation: "
                'preconditioner("adam")'
            )
        else:
            check_untouched("preconditioner", momentum=(momentum, 0.9), nesterov=(nesterov, False))
        # Decay before the momentum, the rate after it, as PyTorch does: a schedule then scales what
        # the momentum already holds.
        return optax.chain(
            decaying,
            reset_state(preconditioner, when, **wrapping),
            scale_by_restarting_rate(learning_rate, clock),
        )
    if preconditioner is not None:
        raise UsageError("preconditioner has no effect beside optimizer=: give one of the two")
    check_untouched(
        "optimizer",
        learning_rate=(learning_rate, default_rate),
        momentum=(momentum, 0.9),
        weight_decay=(weight_decay, 5e-4),
        nesterov=(nesterov, False),
    )
    # Its schedules are inside it and count its own updates: those clocks restart with the generation.
    return reset_state(optimizer, when, restart=clock.starts_generation, **wrapping)


def reset_condition(clock: Clock, reset_momentum: ResetMomentum) -> Callable[[Any], Any]:
    """Return the condition on the count of updates under which momentum is reset before a step."""
    check_choice("reset_momentum", reset_momentum, get_args(ResetMomentum))
    if reset_momentum == "phase":
        return lambda step: clock.starts_generation(step) | clock.starts_descent(step)
    return clock.starts_generation if reset_momentum == "generation" else never


def check_untouched(replaced_by: str, **values: tuple[Any, float]) -> None:
    """Raise unless every (value, default) is the default: ``replaced_by`` takes their place."""
    for field, (value, default) in values.items():
        if not isinstance(value, Real) or value != default:
            raise UsageError(
                f"{field} has no effect beside {replaced_by}=: put it into the {replaced_by}"
            )
