"""SA-GD: gradient descent with random ascents, which become rarer over the training."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from seal_jax.errors import check_key, check_number, positive
from seal_jax.generations import Clock, Schedule
from seal_jax.transforms.relearn import require_key
from seal_jax.transforms.sgd import descent, make_normal_tx, takes_options_of


class AnnealState(NamedTuple):
    """State of :func:`anneal`: updates so far, int32, the last loss, float32, and the random key."""

    count: jax.Array
    loss: jax.Array
    key: jax.Array | None


def descent_probability(
    change: Any, epoch: Any, temperature: Any, epsilon: Any, q: Any = 1, ascent_cap: Any = 0.33
) -> Any:
    r"""Return the probability to descend, given the change of the loss and the epoch.

    .. math::
        P = \max\left(\exp\left(-\frac{|\Delta L|^q}{T_0 \epsilon \ln(n + 1)}\right), 1 - c\right)

    The sign of the change does not matter. For the same change, ascents grow rarer with the epochs.

    Args:
      change: :math:`\Delta L`, the loss of this step minus that of the last.
      epoch: n, counted from 1, since ln(0 + 1) = 0 would be in the denominator.
      temperature: :math:`T_0`.
      epsilon: :math:`\epsilon`.
      q: the power of the change.
      ascent_cap: c, the largest probability to ascend.

    >>> [round(float(descent_probability(0.1, epoch, 1.0, 0.5)), 3) for epoch in (1, 10)]
    [0.749, 0.92]
    """
    heat = temperature * epsilon * jnp.log1p(jnp.asarray(epoch, jnp.float32))
    return jnp.maximum(jnp.exp(-(jnp.abs(change) ** q) / heat), 1 - ascent_cap)


def anneal(
    clock: Clock,
    temperature: float,
    epsilon: float | Schedule,
    *,
    q: float = 1,
    ascent_cap: float = 0.33,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Negate all updates with probability 1 - :func:`descent_probability`.

    Put it at the END of a chain, after momentum and learning rate: an ascent goes up the same step
    that a descent would have gone down. The first step, which has no earlier loss, descends; a loss
    of NaN makes its own step and the next one descend. ``update`` needs the loss of the batch,
    ``value=...``, and uses its extra argument ``key``, or else keys derived from the one given here.

    Args:
      clock: for the epoch, which is counted over all generations.
      temperature: T0, positive.
      epsilon: positive, or a schedule of the step within the generation (such as the learning rate's).
      q: the power of the change of the loss, positive.
      ascent_cap: the largest probability to ascend, in [0, 1].
      key: a random key.

    Raises:
      ValueError: ``update`` was called without ``value``, or there is no key of either kind.

    >>> tx = anneal(Clock(1, 1), 1.0, 1.0, ascent_cap=1.0, key=jax.random.key(0))
    >>> state, updates = tx.init(jnp.ones(())), []
    >>> for loss in (5.0, 5.0, 500.0):  # the same loss: descent; quite another: ascent
    ...     update, state = tx.update(jnp.ones(()), state, value=loss)
    ...     updates.append(float(update))
    >>> updates
    [1.0, 1.0, -1.0]
    """
    numbers = {"temperature": temperature, "q": q}
    for field, number in (numbers if callable(epsilon) else numbers | {"epsilon": epsilon}).items():
        check_number(field, number, positive, "be positive")
    check_number("ascent_cap", ascent_cap, lambda number: 0 <= number <= 1, "lie in [0, 1]")
    check_key("key", key, optional=True)
    epsilon_at = clock.restart(epsilon)

    def init_fn(params):
        # Zeros like a parameter: where that differs between devices, so may the loss.
        loss = jnp.zeros_like(jax.tree.leaves(params)[0], jnp.float32, shape=())
        # A copy: a training step that donates its state must not take the caller's key with it.
        return AnnealState(jnp.zeros((), jnp.int32), loss, None if key is None else jnp.copy(key))

    def update_fn(updates, state, params=None, *, value=None, key=None, **extra_args):
        del params, extra_args
        if value is None:
            raise ValueError("update needs value: call update(..., value=loss)")
        if state.key is None:
            require_key(key)
        # Derived from the count, so that a resumed run draws what the uninterrupted one does.
        step_key = jax.random.fold_in(state.key, state.count) if key is None else key
        loss = jnp.asarray(value).astype(jnp.float32)
        # The epoch counts on over generations, the schedule of epsilon restarts with each.
        probability = descent_probability(
            loss - state.loss,
            clock.epoch(state.count) + 1,
            temperature,
            epsilon_at(state.count),
            q,
            ascent_cap,
        )
        # A comparison with NaN is False: such a step descends.
        ascending = (state.count > 0) & (jax.random.uniform(step_key) >= probability)
        # One sign for all parameters: the whole network goes up or down.
        sign = jnp.where(ascending, -1.0, 1.0)
        updates = jax.tree.map(lambda update: update * sign.astype(update.dtype), updates)
        return updates, AnnealState(optax.safe_increment(state.count), loss, state.key)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@takes_options_of(make_normal_tx)
def make_sa_gd_tx(
    learning_rate: float | Schedule = 0.01,
    *,
    temperature: float,
    epsilon: float | Schedule,
    q: float = 1,
    ascent_cap: float = 0.33,
    steps_per_epoch: int,
    epochs_per_generation: int,
    key: jax.Array | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Return SA-GD, random ascents of the whole network, as one optax transformation.

    Each step goes down or, at random, up; see :func:`anneal` for the probability
    and for what ``update`` needs.

    Args:
      learning_rate: a float, or a schedule of the step within the generation.
      temperature, epsilon, q, ascent_cap: of the probability; see :func:`anneal`.
      steps_per_epoch: S.
      epochs_per_generation: E; the whole training where nothing is to restart.
      key: a random key, for calls of ``update`` without one.
      **options: of momentum SGD, see :func:`make_normal_tx`.

    References:
      Cai, `SA-GD: Improved Gradient Descent Learning Strategy with Simulated Annealing`, 2021; the
      SEAL paper, section 2.

    >>> tx = make_sa_gd_tx(0.5, temperature=1.0, epsilon=1.0, steps_per_epoch=10, momentum=0.0,
    ...                    epochs_per_generation=1, weight_decay=0.0, key=jax.random.key(0))
    >>> params = jnp.ones(())
    >>> updates, _ = tx.update(params, tx.init(params), params, value=0.5)
    >>> float(updates)
    -0.5
    """
    clock = Clock(steps_per_epoch, epochs_per_generation)
    annealing = anneal(clock, temperature, epsilon, q=q, ascent_cap=ascent_cap, key=key)

    def view(count, params, *, sign, **extra_args):
        del count, extra_args
        # The decay inside a whole optimizer acts on -p in an ascent, whose update is negated: it shrinks p.
        return jax.tree.map(lambda param: (sign * param).astype(param.dtype), params)

    inner = descent(clock, learning_rate, view=view, **options)

    def update_fn(updates, state, params=None, **extra_args):
        inner_state, anneal_state = state
        # Decided first, on a 1 in place of the updates: a whole optimizer must know whether it ascends.
        sign, anneal_state = annealing.update(jnp.ones(()), anneal_state, params, **extra_args)
        updates, inner_state = inner.update(updates, inner_state, params, sign=sign, **extra_args)
        updates = jax.tree.map(lambda update: update * sign.astype(update.dtype), updates)
        return updates, (inner_state, anneal_state)

    # The state of ``optax.chain``.
    return optax.GradientTransformationExtraArgs(
        lambda params: (inner.init(params), annealing.init(params)), update_fn
    )
