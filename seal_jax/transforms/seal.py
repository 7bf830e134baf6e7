"""SEAL: short phases of gradient ascent in early layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from seal_jax import masks
from seal_jax.errors import UsageError, check_choice, check_number, positive
from seal_jax.forgetting import Initialiser
from seal_jax.generations import Clock, Schedule
from seal_jax.transforms.relearn import masked_reinit
from seal_jax.transforms.sgd import (
    ResetMomentum,
    decay_weights,
    descent,
    leafwise,
    make_normal_tx,
    takes_options_of,
)

FitInAscent = Literal["descend", "freeze", "reinit"]


def ascend(
    mask: masks.Mask,
    when: Callable[[Any], Any],
    scale: float = 0.01,
    *,
    freeze_fit: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiply the masked updates by :math:`-S` while ``when(count)`` holds.

    Put it at the END of a chain, after momentum and learning rate: with
    :math:`b \leftarrow \mu b + g` the update of the forget subtree is then :math:`+S \eta b`. If the
    gradient were negated before the momentum, the first descent steps would still ascend.

    Args:
      mask: the forget subtree, in any form of :mod:`seal_jax.masks`.
      when: maps the (traced) count of updates to a bool, e.g. ``Clock.ascending``.
      scale: S, at least 0.
      freeze_fit: give the other parameters no update during that time ("SEAL+Freeze", Table 7).

    References:
      Sarfi et al., `Simulated Annealing in Early Layers Leads to Better Generalization`, eq. 2, 3.

    >>> tx = ascend("conv", when=lambda count: count < 1, scale=0.5)
    >>> params = {"conv": jnp.zeros(()), "fc": jnp.zeros(())}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"conv": jnp.ones(()), "fc": jnp.ones(())}, state, params)
    >>> float(updates["conv"]), float(updates["fc"])
    (-0.5, 1.0)
    """

    def rule(count):
        ascending = when(count)
        # Of updates, which already point downhill: eq. 2 and 3 are a step up with S times the learning rate.
        sign = jnp.where(ascending, -scale, 1.0)

        def negate(flag, update):
            if flag:
                return (update * sign).astype(update.dtype)
            # Chosen, not multiplied by 0, which would give NaN for an update that is not finite.
            return jnp.where(ascending, jnp.zeros_like(update), update) if freeze_fit else update

        return negate

    return leafwise(rule, mask)


@takes_options_of(make_normal_tx)
def make_seal_tx(
    mask: masks.Mask,
    learning_rate: float | Schedule = 0.01,
    *,
    steps_per_epoch: int,
    epochs_per_generation: int = 160,
    ascent_epochs: float | None = None,
    ascent_scale: float = 0.01,
    ascent_weight_decay_factor: float = -1.0,
    fit_in_ascent: FitInAscent = "descend",
    init_fn: Initialiser | None = None,
    key: Any = None,
    reset_momentum: ResetMomentum = "phase",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Return SEAL as one optax transformation.

    In generations from 1 on, the first k epochs ascend on the forget subtree:

    .. math::
        g' = g + \lambda' p, \quad b \leftarrow \mu b + g', \quad
        p \leftarrow p + S \eta b \ \text{(ascent)}, \quad p \leftarrow p - \eta b \ \text{(descent)},

    with :math:`\lambda' = f \lambda` during ascent. The momentum starts from zero where a generation
    starts and again where ascent turns into descent; the learning rate restarts with every generation.

    Args:
      mask: the forget subtree (True), in any form of :mod:`seal_jax.masks`: a pytree of bool, a
        callable of the parameters, path rules, an NNX filter. For the paper's choice see
        :func:`seal_jax.masks.before`; "SEAL+Reverse" is ``masks.invert(mask)``.
      learning_rate: a float, or an optax schedule of the step within the generation.
      steps_per_epoch: S, calls of ``update`` in an epoch (of applied updates, in ``MultiSteps``).
      epochs_per_generation: E.
      ascent_epochs: k; k times S must be whole. ``None``: E / 4, to the nearest whole step.
      ascent_scale: S of eq. 2, the ratio of the ascent's learning rate to the descent's.
      ascent_weight_decay_factor: f; -1 as in the paper, 0 as in the released code; not positive.
        A whole ``optimizer`` is given f p for p in ascent, so that any decay inside it has the factor.
        One that does something else with p than decay or norms (SAM, schedule-free averages, the
        distances of DoG and Prodigy) does not go with ascent; put SAM around SEAL. With f = 0 norms of p
        are 0 as well, and with them the scale of LAMB, LARS and Adafactor.
      fit_in_ascent: what the fit subtree does during ascent (Table 7): "descend"; "freeze", neither
        it nor the optimizer's memory of it changes; "reinit", it descends after being
        reinitialized where the generation starts.
      init_fn: for "reinit": maps a key to a whole tree of freshly initialized parameters, or
        "torch_default".
      key: for "reinit": the random key; each generation uses another key derived from it.
      reset_momentum: "phase" (both moments), "generation" (only its start), or "never".
      **options: of momentum SGD, see :func:`make_normal_tx`.

    References:
      Sarfi et al., `Simulated Annealing in Early Layers Leads to Better Generalization`, section 3.

    >>> params = {"conv1": {"kernel": jnp.ones(2)}, "fc": {"kernel": jnp.ones(2)}}
    >>> tx = make_seal_tx("conv1", 0.1, steps_per_epoch=1, epochs_per_generation=4)
    >>> state = tx.init(params)
    >>> for step in range(6):  # generation 1 starts at step 4 and ascends for one epoch
    ...     updates, state = tx.update(params, state, params)
    ...     print(step, bool(updates["conv1"]["kernel"][0] > 0))
    0 False
    1 False
    2 False
    3 False
    4 True
    5 False
    """
    if ascent_epochs is None:
        ascent_epochs = Clock(steps_per_epoch, epochs_per_generation).quarter
    clock = Clock(steps_per_epoch, epochs_per_generation, ascent_epochs)
    if clock.ascent_steps == 0:
        raise UsageError(
            "ascent_epochs = 0 leaves no ascent; use make_normal_tx for plain training"
        )
    # Equation 3 negates the update, not the look-ahead.
    if options.get("nesterov"):
        raise UsageError("nesterov = True is not defined for SEAL; set it to False")
    # The update is negated at the end, so a positive factor would drive the weights to ever larger norms (section 3).
    check_number(
        "ascent_weight_decay_factor",
        ascent_weight_decay_factor,
        lambda value: -math.inf < value <= 0,
        "not be positive, the weights would diverge; use -1 (paper) or 0 (released code)",
    )
    check_number("ascent_scale", ascent_scale, positive, "be positive; the paper uses 0.01")
    check_choice("fit_in_ascent", fit_in_ascent, get_args(FitInAscent))
    mask = masks.fixed(mask)
    fit = masks.fixed(masks.invert(mask))
    factor = ascent_weight_decay_factor

    def view(count, params, **extra_args):
        del extra_args
        # The parameters as a whole optimizer sees them: its decay acts on f p, and its update is negated later.
        scale = jnp.where(clock.ascending(count), factor, 1.0)
        return jax.tree.map(
            lambda flag, param: (scale * param).astype(param.dtype) if flag else param,
            mask(params),
            params,
        )

    # Without an update (`ascend`, below) nor new memory, as if there had been no gradient.
    freeze: dict[str, Any] = {}
    if fit_in_ascent == "freeze":
        freeze = {"frozen": fit, "frozen_when": clock.ascending}
    # Decay, momentum and learning rate first; the factor of the decay changes in the same steps as the sign.
    links = [
        descent(
            clock,
            learning_rate,
            decay=partial(decay_weights, mask=mask, when=clock.ascending, factor=factor),
            starts_with_event=fit_in_ascent == "reinit",
            view=view,
            reset_momentum=reset_momentum,
            **freeze,
            **options,
        ),
        # Last, so that the momentum is that of descent throughout: see `ascend`.
        ascend(mask, clock.ascending, ascent_scale, freeze_fit=fit_in_ascent == "freeze"),
    ]
    if fit_in_ascent == "reinit":
        if init_fn is None or key is None:
            raise UsageError('fit_in_ascent = "reinit" needs init_fn and key')
        # At the very end: in the step of the event it zeroes all other updates, those of the ascent included.
        links.append(masked_reinit(fit, init_fn, clock.starts_generation, key=key))
    return optax.chain(*links)
