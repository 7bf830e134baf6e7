"""The loss along one direction of the weights: slices, and how far its minimum is away.

The PoF paper takes for the direction the eigenvector of a layer's block of the training Hessian that
has the largest eigenvalue (:func:`seal_jax.hessian.eigenpairs` with a mask), and asks how much lower
the test loss gets along it: its loss increment (Figure 1 c), with the slices themselves in Figure 1 d.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seal_jax.hessian import trees

PyTree = Any
Loss = Callable[[PyTree, PyTree], jax.Array]

# Distances between which a basin must end.
_NEAREST, _FARTHEST = 2.0**-26, 2.0**20


def moved(whole: PyTree, direction: PyTree, distance: Any) -> PyTree:
    """Return ``whole + distance * direction``; the direction is ``None`` where weights stay.

    >>> moved({"conv": 1.0, "fc": 2.0}, {"conv": None, "fc": 1.0}, -0.5)
    {'conv': 1.0, 'fc': 1.5}
    """
    # Weights outside the direction are returned as they are; to add zeros would compute on all of them.
    return trees.merge(whole, direction, lambda leaf, step: leaf + distance * step)


def exact(loss: Loss) -> Loss:
    """Return the loss in float32 with matrix products in full precision.

    Accelerators round the factors by default, by more than losses nearby differ.
    """

    def exactly(whole: PyTree, batch: PyTree) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return jnp.float32(loss(whole, batch))

    return exactly


def mean_loss(loss: Loss, whole: PyTree, data: PyTree) -> jax.Array:
    """Return the mean loss of batches of one size, which are the first axis of every array of data.

    >>> float(mean_loss(lambda w, x: w * x.sum(), 2.0, jnp.array([[1.0], [2.0]])))
    3.0
    """
    count = len(jax.tree.leaves(data)[0])

    def add(total: jax.Array, batch: PyTree) -> tuple[jax.Array, None]:
        return total + exact(loss)(whole, batch), None

    # Summed in a scan: memory holds the activations of one batch, however much data there is.
    return jax.lax.scan(add, jnp.zeros(()), data)[0] / count


class Increment(NamedTuple):
    """The nearest minimum of a loss on a line; see :func:`increment`.

    Attributes:
      increment: the loss at the weights less that at the minimum, at least 0; NaN without one.
      shift: signed distance of the minimum along the direction; NaN without one.
      bounded: whether there is a minimum.
      loss: at the weights.
    """

    increment: float
    shift: float
    bounded: bool
    loss: float


@partial(jax.jit, static_argnames=("loss",))
def slices(
    loss: Loss, weights: PyTree, direction: PyTree, data: PyTree, distances: Any
) -> jax.Array:
    """Return the mean loss at ``weights + distance * direction`` for every distance, ``[points]``.

    Args:
      loss: ``loss(weights, batch) -> scalar``, the mean over a batch; can be hashed.
      weights: pytree of arrays.
      direction: like the weights, with ``None`` where they stay; of unit norm, for distances in the
        norm of the weights.
      data: batches of one size along the first axis of every array.
      distances: ``[points]``, evaluated one after another.

    References:
      Sato et al., `PoF`, Figure 1 d.

    >>> loss = lambda w, batch: jnp.mean((w["a"] + w["b"] - batch) ** 2)
    >>> weights, direction = {"a": jnp.float32(1), "b": jnp.float32(2)}, {"a": None, "b": 1.0}
    >>> slices(loss, weights, direction, jnp.zeros((1, 1)), jnp.array([-3.0, 0.0, 1.0])).tolist()
    [0.0, 9.0, 16.0]
    """
    # One distance at a time, so that there is one copy of moved weights.
    return jax.lax.map(
        lambda distance: mean_loss(loss, moved(weights, direction, distance), data),
        jnp.asarray(distances, jnp.float32),
    )


def increment(
    loss: Loss,
    weights: PyTree,
    direction: PyTree,
    data: PyTree,
    *,
    second_derivative: float | None = None,
) -> Increment:
    r"""Return how much the loss at the weights exceeds its nearest minimum along the direction.

    .. math:: \Delta L = L(\theta) - \min_t L(\theta + t v)

    The minimum is that of the basin on the side where the loss falls. From a distance of 1 its end is
    bracketed by halving or doubling, to the first point above the weights' loss; within it Brent's
    method finds the root of the slope, since values near a minimum differ by less than their
    rounding. Where the loss stays below up to a distance of :math:`2^{20}` there is no minimum. With
    the test loss and v an eigenvector of the training Hessian this is what the paper plots: "how much
    the test loss increases from its minimum value near the training-set minimizer".

    Args:
      loss, weights, direction, data: as in :func:`slices`.
      second_derivative: along the direction, if known: the bracketing then starts beyond the
        minimum of the parabola instead of at 1, which saves a third of the evaluations.

    References:
      Sato et al., `PoF`, section 1 and Figure 1 a to c.

    >>> loss = lambda w, batch: 1 + 2 * jnp.mean((w - batch) ** 2)
    >>> result = increment(loss, jnp.float32(0.5), jnp.float32(1), jnp.zeros((1, 1)))
    >>> round(result.increment, 5), round(result.shift, 5), result.loss
    (0.5, -0.5, 1.5)
    """
    from scipy import optimize

    # Value and slope come of one program, which also serves all points of the search.
    at_weights, initial_slope = map(float, _line(loss, weights, direction, data, jnp.float32(0)))
    unbounded = Increment(math.nan, math.nan, False, at_weights)
    if not math.isfinite(at_weights + initial_slope):
        return unbounded
    if initial_slope == 0:  # nothing falls: it is the minimum itself
        return Increment(0.0, 0.0, True, at_weights)
    # From here on distances are positive, on the side where the loss falls.
    side = -math.copysign(1.0, initial_slope)

    # Bracketing and Brent's method ask for some points twice, and each costs a pass through the data.
    @functools.cache
    def at(distance: float) -> tuple[float, float]:
        """Return value and slope; where the loss is not finite, a wall, it rises."""
        point = jnp.float32(side * distance)
        value, slope = map(float, _line(loss, weights, direction, data, point))
        return value, side * slope if math.isfinite(value + slope) else 1.0

    def above(distance: float) -> bool:
        value, slope = at(distance)
        # Not where it falls: rounding can make it look higher than at the weights.
        return not value <= at_weights and not slope < 0

    # The bracket ends at a point above the weights' loss whose half is not: the nearest basin is within.
    end = 1.0
    if second_derivative is not None and second_derivative > 0:
        # A parabola is back at its first value at twice the distance of its minimum, |slope| / curvature: 2.5 times
        # is beyond, and half of that before, so a good guess takes two evaluations.
        parabola = 2.5 * abs(initial_slope) / second_derivative
        end = min(max(parabola, 2 * _NEAREST), _FARTHEST / 2)
    while end > _NEAREST and above(end / 2):
        end /= 2
    while end < _FARTHEST and not above(end):
        end *= 2
    # At either limit the loops have ended without a bracket.
    if _NEAREST < end < _FARTHEST:
        shift = optimize.brentq(
            lambda t: at(t)[1] if t else -abs(initial_slope), 0, end, xtol=1e-4 * end, rtol=1e-4
        )
        # A wall counts as a rise, so the root may be the wall itself, or up to 2e-4 of the bracket
        # beyond it (xtol and rtol together): step back by twice that.
        if not math.isfinite(at(shift)[0]):
            shift -= 4e-4 * end
        gained = at_weights - at(shift)[0]
        # A minimum above the weights' loss, by more than rounding, belongs to another basin.
        if gained >= -1e-4 * abs(at_weights):
            return Increment(max(gained, 0.0), side * shift, True, at_weights)
    return unbounded


@partial(jax.jit, static_argnames=("loss",))
def _line(
    loss: Loss, weights: PyTree, direction: PyTree, data: PyTree, distance: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the mean loss and its slope at a distance along the direction."""
    return jax.jvp(
        lambda t: mean_loss(loss, moved(weights, direction, t), data),
        (distance,),
        (jnp.float32(1),),
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
    return jax.jvp(
        lambda t: _line(loss, weights, direction, data, t)[1], (jnp.float32(0),), (jnp.float32(1),)
    )[1]
