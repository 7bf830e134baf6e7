"""Continual backpropagation: a few of the least useful units are replaced all the time (Dohare et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from seal_jax import units as units_lib
from seal_jax.errors import check_number
from seal_jax.forgetting import Initialiser
from seal_jax.generations import Clock, Schedule
from seal_jax.transforms.recycle import recycle
from seal_jax.transforms.sgd import descent, make_normal_tx, takes_options_of
from seal_jax.units import Units


class Usefulness(NamedTuple):
    """What continual backpropagation keeps of each layer of n units, by name."""

    utility: dict[str, jax.Array]  # float32 [n]
    age: dict[str, jax.Array]  # updates since the unit was made, int32 [n]
    due: dict[str, jax.Array]  # how many units are to be replaced, float32, a fraction mostly


def continual_backprop(
    inner: optax.GradientTransformation,
    units: Sequence[Units],
    *,
    init_fn: Initialiser,
    replacement_rate: Any = 1e-4,
    decay: Any = 0.99,
    maturity: Any = 100,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap an optimizer so that after every update the least useful of the mature units are replaced.

    The utility of unit i is a running average of its contribution to the layers above,

    .. math:: u_i \leftarrow \eta u_i + (1 - \eta) |h_i| \sum_k |w_{ik}|,

    with the mean of :math:`|h_i|` over the batch and the weights after the update. Each layer adds
    :math:`\rho` times the number of its mature units to what is due to be replaced, and replaces as many
    whole units of the lowest utility. New ones have utility and age 0. For their weights, the
    optimizer's memory and what ``update`` needs see :func:`seal_jax.transforms.recycle.recycle`.

    As Algorithm 1 has it. The released code divides the utility by :math:`1 - \eta^\text{age}`, and adds what a
    replaced unit of a dense layer contributed on average to the biases above; here nothing is added.

    Args:
      inner: any optax optimizer.
      units: the layers of hidden units.
      init_fn: maps a key to a whole tree of fresh parameters, or "torch_default".
      replacement_rate: rho, the share of the mature units replaced in an update, in [0, 1].
      decay: eta, in [0, 1).
      maturity: m; units of more updates than these are mature, at least 0.
      key: a random key, for calls of ``update`` without one.

    References:
      Dohare et al., `Loss of plasticity in deep continual learning`, Nature 632, 2024, Algorithm 1.

    >>> params = {"a": {"kernel": jnp.ones((1, 2))}, "b": {"kernel": jnp.ones((2, 1))}}
    >>> tx = continual_backprop(
    ...     optax.sgd(0.0), [Units("hidden", ("a",), ("b",))], key=jax.random.key(0), maturity=0,
    ...     init_fn=lambda key: jax.tree.map(lambda leaf: 5 * leaf, params), replacement_rate=0.5)
    >>> updates, state = tx.update(params, tx.init(params), params,
    ...                            activations={"hidden": jnp.array([3.0, 1.0])})
    >>> new = optax.apply_updates(params, updates)
    >>> new["a"]["kernel"].tolist(), new["b"]["kernel"].tolist(), state.kept.age["hidden"].tolist()
    ([[1.0, 5.0]], [[1.0], [0.0]], [1, 0])
    """
    check_number("replacement_rate", replacement_rate, lambda v: 0 <= v <= 1, "lie in [0, 1]")
    check_number("decay", decay, lambda value: 0 <= value < 1, "lie in [0, 1)")
    check_number("maturity", maturity, lambda value: value >= 0, "be at least 0")

    def start(zeros):
        return Usefulness(
            zeros,
            {name: jnp.zeros_like(of_layer, jnp.int32) for name, of_layer in zeros.items()},
            {name: jnp.zeros_like(of_layer, shape=()) for name, of_layer in zeros.items()},
        )

    def choose(count, kept, params, activations):
        del count
        reading = units_lib.outgoing_magnitudes(units, params)

        def judge(name):
            contribution = activations[name] * reading[name]
            utility = decay * kept.utility[name] + (1 - decay) * contribution
            age = kept.age[name] + 1
            mature = age > maturity
            due = kept.due[name] + replacement_rate * mature.sum()
            # By rank, since how many are replaced is traced; of equal utilities the first comes first.
            rank = jnp.argsort(jnp.argsort(jnp.where(mature, utility, jnp.inf)))
            chosen = mature & (rank < jnp.floor(due))
            return (
                chosen,
                jnp.where(chosen, 0.0, utility),
                jnp.where(chosen, 0, age),
                due - chosen.sum(),
            )

        chosen, *fields = (
            dict(zip(reading, values, strict=True))
            for values in zip(*map(judge, reading), strict=True)
        )
        return chosen, Usefulness(*fields)

    return recycle(inner, units, init_fn, choose, start=start, key=key)


@takes_options_of(make_normal_tx)
def make_continual_backprop_tx(
    units: Sequence[Units],
    learning_rate: float | Schedule = 0.01,
    *,
    init_fn: Initialiser,
    replacement_rate: Any = 1e-4,
    decay: Any = 0.99,
    maturity: Any = 100,
    steps_per_epoch: int,
    epochs_per_generation: int = 160,
    key: jax.Array | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Return plain training in generations with continual backpropagation, as one optax transformation.

    Args:
      units: the layers of hidden units.
      learning_rate: a float, or a schedule of the step within the generation.
      init_fn, replacement_rate, decay, maturity, key: see :func:`continual_backprop`, also for what ``update``
        needs.
      steps_per_epoch: S.
      epochs_per_generation: E.
      **options: of momentum SGD, see :func:`make_normal_tx`.

    >>> params = {"a": {"kernel": jnp.ones((1, 2))}, "b": {"kernel": jnp.ones((2, 1))}}
    >>> tx = make_continual_backprop_tx(
    ...     [Units("hidden", ("a",), ("b",))], 0.5, init_fn=lambda key: params, steps_per_epoch=1,
    ...     weight_decay=0.0, key=jax.random.key(0))
    >>> updates, _ = tx.update(params, tx.init(params), params, activations={"hidden": jnp.ones(2)})
    >>> updates["b"]["kernel"].tolist()  # no unit is mature yet
    [[-0.5], [-0.5]]
    """
    return continual_backprop(
        descent(Clock(steps_per_epoch, epochs_per_generation), learning_rate, **options),
        units,
        init_fn=init_fn,
        replacement_rate=replacement_rate,
        decay=decay,
        maturity=maturity,
        key=key,
    )
