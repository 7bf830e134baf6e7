"""FAST: a head that starts at zero and has its own learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax

from seal_jax import masks
from seal_jax.errors import UsageError, check_choice, check_number, known_zero, nonnegative
from seal_jax.generations import Clock, Schedule
from seal_jax.transforms.preconditioners import preconditioner
from seal_jax.transforms.reset_state import freeze_while, reset_state
from seal_jax.transforms.sgd import (
    ResetMomentum,
    check_untouched,
    decay_weights,
    leafwise,
    reset_condition,
)

Optimizer = Literal["sgd", "nesterov", "adam", "radam"]


def scale_by_two_rates(
    head: masks.Mask, alpha: float | Schedule, beta: float | Schedule, clock: Clock
) -> optax.GradientTransformationExtraArgs:
    r"""Multiply by :math:`-\alpha` in the head and by :math:`-\beta` elsewhere.

    Where a rate is 0 the updates are exactly zero, whatever went in.

    Args:
      head: the head, in any form of :mod:`seal_jax.masks`.
      alpha, beta: a number each, or a schedule of the step within the generation.
      clock: the generations.

    >>> params = {"conv": jnp.ones(()), "fc": jnp.ones(())}
    >>> tx = scale_by_two_rates("fc", 0.5, 0.0, Clock(1, 1))
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> float(updates["conv"]), float(updates["fc"])
    (0.0, -0.5)
    """
    check_rates(alpha, beta)
    # By the flag of the mask: True is the head. A rate may be a schedule, which restarts with the generation.
    rates_at = {True: clock.restart(alpha), False: clock.restart(beta)}

    def rule(count):
        rates = {flag: rate_at(count) for flag, rate_at in rates_at.items()}

        def scale(flag, update):
            scaled = (-rates[flag] * update).astype(update.dtype)
            # Chosen, not multiplied: 0 times a gradient that is not finite would be NaN.
            return jnp.where(rates[flag] == 0, jnp.zeros_like(update), scaled)

        return scale

    return leafwise(rule, head)


def check_rates(alpha: float | Schedule, beta: float | Schedule) -> None:
    """Raise unless both are rates, and one of them is positive."""
    for field, rate in (("alpha", alpha), ("beta", beta)):
        if not callable(rate):
            check_number(field, rate, nonnegative, "be 0 (frozen), positive, or a schedule")
    if known_zero(alpha) and known_zero(beta):
        raise UsageError("alpha = 0 and beta = 0 leave nothing to train: make one of them positive")


def make_fast_tx(
    head: masks.Mask,
    alpha: float | Schedule = 0.01,
    beta: float | Schedule = 0.001,
    *,
    optimizer: Optimizer | Callable[[Schedule], optax.GradientTransformation] = "sgd",
    momentum: float = 0.9,
    damped_momentum: bool = True,
    weight_decay: float = 0.0,
    steps_per_epoch: int,
    epochs_per_generation: int,
    reset_momentum: ResetMomentum = "generation",
) -> optax.GradientTransformationExtraArgs:
    r"""Return the optimizer of FAST, and of its baselines, as one optax transformation.

    With damped momentum, for the head W and likewise, with :math:`\beta`, for the features:

    .. math:: V \leftarrow M V + (1 - M) g, \qquad W \leftarrow W - \alpha V

    From a head at zero (:func:`seal_jax.heads.initialise`) this is FAST: the first gradient of the
    head is :math:`-\Delta^T A / M`, that of the features 0. Feature extraction is
    :math:`\beta = 0`, a fixed head :math:`\alpha = 0`, ordinary fine-tuning :math:`\alpha = \beta`.
    For classifier warm-up pass ``update`` the extra argument ``warming`` (see
    :func:`seal_jax.transforms.freeze_while`): while it holds, the features stay as they are.

    Args:
      head: the classifier's parameters (True), in any form of :mod:`seal_jax.masks`.
      alpha: the head's learning rate: a number, or a schedule of the step within the generation. At
        0 the head is frozen: neither momentum nor decay moves it.
      beta: the same for the features; not 0 together with ``alpha = 0``.
      optimizer: "sgd" or "nesterov" (momentum), "adam", "radam"; or a function of the learning rate, a
        schedule, that returns a whole optax optimizer, such as ``optax.adamw``: head and features have
        one each, and momentum and decay, which must be left alone, are theirs.
      momentum: M, or the decay of the first moment of "adam" and "radam".
      damped_momentum: whether the momentum of "sgd" and "nesterov" is an average, as in the paper.
        An undamped one needs rates 1 - M times as large, a tenth at M = 0.9.
      weight_decay: coupled L2.
      steps_per_epoch: S.
      epochs_per_generation: E; the whole training where nothing is to restart.
      reset_momentum: "generation" zeroes it where a generation starts, "never" keeps it.

    References:
      Varno et al., `Learn Faster and Forget Slower via Fast and Stable Task Adaptation`, Algorithm
      2 (where the rate is inside V; the same unless the rate varies) and section 6.6.

    >>> params = {"conv": jnp.ones(()), "fc": jnp.zeros(())}
    >>> tx = make_fast_tx("fc", 0.1, 0.01, steps_per_epoch=1, epochs_per_generation=10)
    >>> gradient = {"conv": jnp.ones(()), "fc": jnp.ones(())}
    >>> updates, _ = tx.update(gradient, tx.init(params), params)
    >>> round(float(updates["conv"]), 4), round(float(updates["fc"]), 4)
    (-0.001, -0.01)
    """
    clock = Clock(steps_per_epoch, epochs_per_generation)
    head = masks.fixed(head)
    if callable(optimizer):
        check_untouched("optimizer", momentum=(momentum, 0.9), weight_decay=(weight_decay, 0.0))
        check_rates(alpha, beta)
        # A part at rate 0 has no optimizer whose decay could move it.
        parts = {
            label: optax.set_to_zero() if known_zero(rate) else optimizer(clock.restart(rate))
            for label, rate in (("head", alpha), ("features", beta))
        }

        def labels(tree):
            return jax.tree.map(lambda flag: "head" if flag else "features", head(tree))

        whole = reset_state(
            optax.partition(parts, labels),
            reset_condition(clock, reset_momentum),
            restart=clock.starts_generation,
        )
        return freeze_while(masks.invert(head), whole)
    check_choice("optimizer", optimizer, get_args(Optimizer), suggest=True)
    if optimizer in ("adam", "radam"):
        # Adam's moments are averages in any case: ``damped_momentum`` does not concern them.
        scale = preconditioner(optimizer, momentum=momentum)
    else:
        ahead = optimizer == "nesterov"
        scale = preconditioner("sgd", momentum=momentum, nesterov=ahead, damped=damped_momentum)
    # The rates come last: a head at rate 0 is frozen whatever momentum and decay have made of it.
    chain = optax.chain(
        decay_weights(weight_decay),
        reset_state(scale, reset_condition(clock, reset_momentum)),
        scale_by_two_rates(head, alpha, beta, clock),
    )
    # Around the whole chain, so that no momentum of the features remains after the warm-up.
    return freeze_while(masks.invert(head), chain)
