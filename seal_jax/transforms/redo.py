"""ReDo: recycle dormant units, those that are hardly ever active (Sokar et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import optax

from seal_jax import units as units_lib
from seal_jax.errors import check_number, nonnegative
from seal_jax.forgetting import Initialiser
from seal_jax.generations import Clock, Schedule
from seal_jax.transforms.recycle import recycle
from seal_jax.transforms.sgd import descent, make_normal_tx, takes_options_of
from seal_jax.units import Units


def redo(
    inner: optax.GradientTransformation,
    units: Sequence[Units],
    *,
    init_fn: Initialiser,
    threshold: Any = 0.025,
    every: Any = 1000,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that every F updates all dormant units are replaced.

    Which they are :func:`seal_jax.units.dormant` says, by the batch of that update; for the new ones, the
    optimizer's memory and what ``update`` needs see :func:`seal_jax.transforms.recycle.recycle`.

    Args:
      inner: any optax optimizer.
      units: the layers of hidden units.
      init_fn: maps a key to a whole tree of fresh parameters, or "torch_default".
      threshold: tau, at least 0; 0 takes only units that are never active. The paper has 0.025 and 0.1, for
        different trainings.
      every: F, updates from one replacement to the next; the paper's 1000 are gradient steps too.
      key: a random key, for calls of ``update`` without one.

    References:
      Sokar et al., `The Dormant Neuron Phenomenon in Deep Reinforcement Learning`, 2023, Algorithm 1.

    >>> import jax.numpy as jnp
    >>> params = {"a": {"kernel": jnp.ones((1, 2))}, "b": {"kernel": jnp.ones((2, 1))}}
    >>> tx = redo(optax.sgd(0.0), [Units("hidden", ("a",), ("b",))], every=1, key=jax.random.key(0),
    ...           init_fn=lambda key: jax.tree.map(lambda leaf: 5 * leaf, params))
    >>> updates, _ = tx.update(params, tx.init(params), params,
    ...                        activations={"hidden": jnp.array([1.0, 0.0])})
    >>> new = optax.apply_updates(params, updates)
    >>> new["a"]["kernel"].tolist(), new["b"]["kernel"].tolist()
    ([[1.0, 5.0]], [[1.0], [0.0]])
    """
    check_number("threshold", threshold, nonnegative, "be 0 or positive")
    check_number("every", every, lambda value: value >= 1, "be at least 1")

    def choose(count, kept, params, activations):
        del params
        due = (count + 1) % every == 0
        chosen = {
            layer.name: due & units_lib.dormant(activations[layer.name], threshold)
            for layer in units
        }
        return chosen, kept

    return recycle(inner, units, init_fn, choose, key=key)


@takes_options_of(make_normal_tx)
def make_redo_tx(
    units: Sequence[Units],
    learning_rate: float | Schedule = 0.01,
    *,
    init_fn: Initialiser,
    threshold: Any = 0.025,
    every: Any = 1000,
    steps_per_epoch: int,
    epochs_per_generation: int = 160,
    key: jax.Array | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Return plain training in generations that recycles dormant units, as one optax transformation.

    Args:
      units: the layers of hidden units.
      learning_rate: a float, or a schedule of the step within the generation.
      init_fn, threshold, every, key: see :func:`redo`, also for what ``update`` needs.
      steps_per_epoch: S.
      epochs_per_generation: E.
      **options: of momentum SGD, see :func:`make_normal_tx`.
    """
    inner = descent(Clock(steps_per_epoch, epochs_per_generation), learning_rate, **options)
    return redo(inner, units, init_fn=init_fn, threshold=threshold, every=every, key=key)
