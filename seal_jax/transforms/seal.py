"""SEAL: short stints of gradient ascent in early layers."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import optax

from seal_jax import masks
from seal_jax.errors import UsageError, check_integer, check_number
from seal_jax.generations import Clock, Schedule
from seal_jax.transforms.ascent import ascend
from seal_jax.transforms.reinit import Initialiser, masked_reinit, reinit_moments
from seal_jax.transforms.sgd import ResetMomentum, decay_weights, descent, moments

FitInAscent = Literal["descend", "freeze", "reinit"]


def make_seal_tx(
    mask: masks.Mask,
    learning_rate: float | Schedule = 0.01,
    *,
    steps_per_epoch: int,
    epochs_per_generation: int = 160,
    ascent_epochs: float | None = None,
    ascent_scale: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    ascent_weight_decay_factor: float = -1.0,
    reset_momentum: ResetMomentum = "phase",
    optimizer: optax.GradientTransformation | None = None,
    preconditioner: optax.GradientTransformation | None = None,
    fit_in_ascent: FitInAscent = "descend",
    init_fn: Initialiser | None = None,
    key: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Return SEAL as one optax transformation.

    In generations from 1 on, the first k epochs ascend on the forget subtree:

    .. math::
        g' = g + \lambda' p, \quad b \leftarrow \mu b + g', \quad
        p \leftarrow p + S \eta b \ \text{(ascent)}, \quad p \leftarrow p - \eta b \ \text{(descent)},

    with :math:`\lambda' = f \lambda` during ascent. The momentum starts from zero where a generation
    starts and again where ascent turns into descent, and the learning rate restarts with every
    generation. The fit subtree descends all the time.

    Args:
      mask: the forget subtree (True), in any form of :mod:`seal_jax.masks`: a pytree of bool, a
        callable of the parameters, path rules, an NNX filter. For the paper's choice see
        :func:`seal_jax.masks.before`; "SEAL+Reverse" is ``masks.invert(mask)``.
      learning_rate: a float, or an optax schedule of the step within the generation.
      steps_per_epoch: S, calls of ``update`` in an epoch (of applied updates, in ``MultiSteps``).
      epochs_per_generation: E.
      ascent_epochs: k; ``None`` means E / 4. k times S must be whole.
      ascent_scale: S of eq. 2, the ratio of the ascent's learning rate to the descent's.
      momentum: of SGD, undamped.
      weight_decay: :math:`\lambda`, coupled L2.
      ascent_weight_decay_factor: f; -1 as in the paper, 0 as in the released code; not positive.
      reset_momentum: "phase" (both moments), "generation" (only its start), or "never".
      optimizer: a whole optax optimizer, learning rate included, in place of momentum SGD:
        ``learning_rate``, ``momentum`` and ``weight_decay`` must then be left alone; the optimizer's
        state is re-initialised at the same moments and its schedules restart every generation.
      fit_in_ascent: what the fit subtree does during ascent (Table 7): "descend"; "freeze", no
        update; "reinit", it descends after a re-initialisation where the generation starts.
      init_fn: for "reinit": maps a key to a whole tree of freshly initialised parameters, or
        "torch_default".
      key: for "reinit": the random key; each generation draws anew from it.

    Raises:
      UsageError: an argument out of its range, or a mask that selects nothing or everything.

    References:
      Sarfi et al., `Simulated Annealing in Early Layers Leads to Better Generalization`, section 3.

    >>> import jax.numpy as jnp
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
        ascent_epochs = check_integer("epochs_per_generation", epochs_per_generation, 1) / 4
    clock = Clock(steps_per_epoch, epochs_per_generation, ascent_epochs)
    if clock.ascent_steps == 0:
        raise UsageError(
            "ascent_epochs = 0 leaves no ascent; use make_normal_tx for plain training"
        )
    check_number(
        "ascent_scale",
        ascent_scale,
        lambda value: 0 < value < math.inf,
        "be positive; the paper uses 0.01",
    )
    if fit_in_ascent not in get_args(FitInAscent):
        choices = ", ".join(get_args(FitInAscent))
        raise UsageError(f"fit_in_ascent = {fit_in_ascent!r} must be one of {choices}")
    when = moments(clock, reset_momentum)
    turned = ascend(mask, clock.ascending, ascent_scale, freeze_fit=fit_in_ascent == "freeze")
    if fit_in_ascent == "reinit":
        when = reinit_moments(clock, when)
    decay = decay_weights(
        weight_decay, mask=mask, when=clock.ascending, factor=ascent_weight_decay_factor
    )
    descending = descent(
        clock,
        when,
        learning_rate,
        momentum,
        weight_decay,
        optimizer,
        decay=decay,
        preconditioner=preconditioner,
    )
    links = [descending, turned]
    if fit_in_ascent == "reinit":
        if init_fn is None or key is None:
            raise UsageError('fit_in_ascent = "reinit" needs init_fn and key')
        links.append(masked_reinit(masks.invert(mask), init_fn, clock.starts_generation, key=key))
    return optax.chain(*links)
