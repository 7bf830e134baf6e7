"""The loss along one direction of the weights: slices, and how far its minimum is away.

The PoF paper takes for the direction the eigenvector of a layer's block of the training Hessian that
has the largest eigenvalue (:func:`seal_jax.hessian.eigenpairs` with a mask), and asks how much lower
the test loss gets along it: its loss increment (Figure 1 c), with the slices themselves in Figure 1 d.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from seal_jax.evaluation.subtree import Loss, PyTree, mean_loss, moved
from seal_jax.line_search import minimise


class Increment(NamedTuple):
    """Where on a line the nearest minimum of a loss lies; see :func:`increment`.

    Attributes:
      increment: the loss at the weights less that at the minimum, at least 0; NaN without one.
      shift: signed distance of the minimum along the direction; NaN without one.
      bounded: bool, whether there is a minimum.
      loss: at the weights.
    """

    increment: jax.Array
    shift: jax.Array
    bounded: jax.Array
    loss: jax.Array


@partial(jax.jit, static_argnames=("loss", "chunk"))
def slices(
    loss: Loss, weights: PyTree, direction: PyTree, data: PyTree, distances: Any, *, chunk: int = 8
) -> jax.Array:
    """Return the mean loss at ``weights + distance * direction`` for every distance, ``[points]``.

    Args:
      loss: ``loss(weights, batch) -> scalar``, the mean over a batch; can be hashed.
      weights: pytree of arrays.
      direction: like the weights, with ``None`` where they stay; of unit norm, for distances in the
        norm of the weights.
      data: batches of one size along the first axis of every array.
      distances: ``[points]``.
      chunk: how many points are evaluated side by side; memory grows with it.

    References:
      Sato et al., `PoF`, Figure 1 d.

    >>> loss = lambda w, batch: jnp.mean((w["a"] + w["b"] - batch) ** 2)
    >>> weights, direction = {"a": jnp.float32(1), "b": jnp.float32(2)}, {"a": None, "b": 1.0}
    >>> slices(loss, weights, direction, jnp.zeros((1, 1)), jnp.array([-3.0, 0.0, 1.0])).tolist()
    [0.0, 9.0, 16.0]
    """
    return jax.lax.map(
        lambda distance: mean_loss(loss, moved(weights, direction, distance), data),
        jnp.asarray(distances, jnp.float32),
        batch_size=chunk,
    )


@partial(jax.jit, static_argnames=("loss",))
def increment(loss: Loss, weights: PyTree, direction: PyTree, data: PyTree) -> Increment:
    r"""Return how much the loss at the weights exceeds its nearest minimum along the direction.

    .. math:: \Delta L = L(\theta) - \min_t L(\theta + t v)

    The minimum is that of the basin on the side where the loss falls, found by
    :func:`seal_jax.line_search.minimise`; where the loss falls without end there is none. With the
    test loss and v an eigenvector of the training Hessian this is what the paper plots: "how much the
    test loss increases from its minimum value near the training-set minimizer".

    Args:
      loss, weights, direction, data: as in :func:`slices`.

    References:
      Sato et al., `PoF`, section 1 and Figure 1 a to c.

    >>> loss = lambda w, batch: 1 + 2 * jnp.mean((w - batch) ** 2)
    >>> found = increment(loss, jnp.float32(0.5), jnp.float32(1), jnp.zeros((1, 1)))
    >>> round(float(found.increment), 5), round(float(found.shift), 5), float(found.loss)
    (0.5, -0.5, 1.5)
    """

    def along(distance: jax.Array) -> jax.Array:
        return mean_loss(loss, moved(weights, direction, distance), data)

    at_weights, slope = jax.jvp(along, (jnp.float32(0),), (jnp.float32(1),))
    side = -jnp.sign(slope)
    found = minimise(lambda distance: along(side * distance), cells=2)
    # At a stationary point nothing falls: it is the minimum itself.
    bounded = found.accepted | (slope == 0)
    gained = jnp.maximum(at_weights - jnp.where(found.accepted, found.value, at_weights), 0)
    return Increment(
        jnp.where(bounded, gained, jnp.nan),
        jnp.where(bounded, side * found.xi, jnp.nan),
        bounded,
        at_weights,
    )


@partial(jax.jit, static_argnames=("loss",))
def curvature(loss: Loss, weights: PyTree, direction: PyTree, data: PyTree) -> jax.Array:
    """Return the second derivative of the mean loss along the direction, ``v' H v``.

    >>> weights = {"a": jnp.float32(1), "b": jnp.float32(2)}
    >>> direction = {"a": jnp.float32(1), "b": None}
    >>> data = jnp.array([[3.0]])
    >>> float(curvature(lambda w, x: w["a"] ** 2 * w["b"] * x.mean(), weights, direction, data))
    12.0
    """

    def slope(t: jax.Array) -> jax.Array:
        return jax.jvp(
            lambda t: mean_loss(loss, moved(weights, direction, t), data), (t,), (jnp.float32(1),)
        )[1]

    return jax.jvp(slope, (jnp.float32(0),), (jnp.float32(1),))[1]


def oriented(direction: PyTree, shift: Any) -> PyTree:
    """Return the direction or its opposite, whichever has the minimum at a positive distance.

    An eigenvector's sign is a matter of chance; so turned, slices of several trainings agree.
    """
    return optax.tree.scale(jnp.where(jnp.asarray(shift) < 0, -1.0, 1.0), direction)
