"""Reinitialise-and-relearn: parts of the network are drawn anew where a generation starts.

The methods differ in what they select: each function below but the last returns a ``select`` of (key,
parameters, generation) for :func:`make_relearn_tx`, or for an exact event between two steps::

    selection = select(key_to_select, params, generation)
    params = forgetting.reinitialise_selected(key_to_draw, params, selection, init_fn)
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import optax

from seal_jax import masks, selections
from seal_jax.errors import check_key
from seal_jax.forgetting import Initialiser
from seal_jax.generations import Clock, Schedule
from seal_jax.transforms.reinit import Select, masked_reinit, reinit_moments
from seal_jax.transforms.sgd import ResetMomentum, descent, moments


def wels(
    fraction: float, key: jax.Array, *, exact: bool = True, among: masks.Mask | None = None
) -> Select:
    """Weight-level splitting: a random part of the weights, the same in every generation.

    Args:
      fraction: the share that is FORGOTTEN, in (0, 1): 0.2 in the LW paper, 0.5 in knowledge
        evolution.
      key: the random key of the one selection.
      exact: that share of every tensor; see :func:`selections.random_subset`.
      among: the parameters to select from; kernels by default.

    References:
      Taha et al., `Knowledge Evolution in Neural Networks`, 2021, section 3.
    """
    selections.check_static("fraction", fraction)
    check_key("key", key)

    def select(event_key, params, generation):
        del event_key, generation
        return selections.random_subset(key, params, fraction, exact=exact, among=among)

    return select


def welsr(fraction: float, *, exact: bool = True, among: masks.Mask | None = None) -> Select:
    """Return the selection of :func:`wels`, but a new one in every generation."""
    selections.check_static("fraction", fraction)

    def select(key, params, generation):
        del generation
        return selections.random_subset(key, params, fraction, exact=exact, among=among)

    return select


def dsd(
    fraction: float = 0.2,
    *,
    scope: selections.Scope = "tensor",
    among: masks.Mask | None = None,
) -> Select:
    """Dense-sparse-dense in rounds: the smallest magnitudes; see :func:`selections.smallest`.

    References:
      Han et al., `DSD: Dense-Sparse-Dense Training for Deep Neural Networks`, 2017; in many rounds,
      Alabdulmohsin et al., `The Impact of Reinitialization ...`, 2022, section 1.
    """
    selections.check_static("fraction", fraction)
    selections.check_scope(scope)

    def select(key, params, generation):
        del key, generation
        return selections.smallest(params, fraction, scope=scope, among=among)

    return select


def kels(
    keep: float, first: str, head: str, *, flattened: Mapping[str, int] | None = None
) -> Select:
    """Kernel-level splitting: all but a slim network; see :func:`selections.kernel_slices`.

    Args:
      keep: the share of channels that is KEPT, in (0, 1).
      first: path of the first layer.
      head: path of the last layer.
      flattened: dense layers behind a flatten, with the channels before it.
    """
    selections.check_static("keep", keep)

    def select(key, params, generation):
        del key, generation
        return selections.kernel_slices(params, keep, first=first, head=head, flattened=flattened)

    return select


def fc(layers: masks.Mask) -> Select:
    """Whole layers, for the paper's "FC" the dense ones behind the last convolution.

    Args:
      layers: a mask in any form of :mod:`seal_jax.masks`.

    References:
      Li et al., `RIFLE`, 2020; Zhao et al., `Retraining`, 2018.
    """
    whole = selections.by_rule(layers)

    def select(key, params, generation):
        del key, generation
        return whole(params)

    return select


def make_relearn_tx(
    select: Select | masks.Mask,
    learning_rate: float | Schedule = 0.01,
    *,
    init_fn: Initialiser,
    key: jax.Array,
    steps_per_epoch: int,
    epochs_per_generation: int = 160,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    nesterov: bool = False,
    reset_momentum: ResetMomentum = "generation",
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return reinitialise-and-relearn training as one optax transformation.

    The first step of every generation from 1 on is spent on the event (see
    :func:`seal_jax.transforms.masked_reinit`); the rest is momentum SGD with a restarting schedule.

    Args:
      select: maps (key, parameters, generation) to what is forgotten, e.g. ``dsd(0.2)``; or a static
        mask in any form of :mod:`seal_jax.masks`.
      learning_rate: a float, or an optax schedule of the step within the generation.
      init_fn: maps a key to a whole tree of fresh parameters, or "torch_default".
      key: a random key; each generation draws anew from it, weights and selection independently.
      steps_per_epoch: S.
      epochs_per_generation: E.
      momentum: of SGD, undamped.
      weight_decay: coupled L2.
      nesterov: whether the momentum is Nesterov's.
      reset_momentum: "generation" (or "phase", the same here), or "never".
      optimizer: a whole optax optimizer in place of momentum SGD.

    Raises:
      UsageError: an argument out of its range; a selection that does not fit the parameters.

    >>> params = {"kernel": jax.numpy.array([[3.0, -1.0]])}
    >>> tx = make_relearn_tx(dsd(0.5), init_fn=lambda key: {"kernel": jax.numpy.full((1, 2), 9.0)},
    ...                      steps_per_epoch=1, epochs_per_generation=1, key=jax.random.key(0))
    >>> state = tx.init(params)
    >>> for _ in range(2):  # generation 1 starts at step 1
    ...     updates, state = tx.update(jax.tree.map(jax.numpy.zeros_like, params), state, params)
    >>> updates["kernel"].tolist()
    [[0.0, 10.0]]
    """
    clock = Clock(steps_per_epoch, epochs_per_generation)
    when = reinit_moments(clock, moments(clock, reset_momentum))
    descending = descent(
        clock, when, learning_rate, momentum, weight_decay, optimizer, nesterov=nesterov
    )
    event = masked_reinit(
        select, init_fn, clock.starts_generation, key=key, generation=clock.generation
    )
    return optax.chain(descending, event)
