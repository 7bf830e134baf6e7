"""Line search: the minimum along a descent direction, inside a compiled program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seal_jax.errors import UsageError, check_number, positive

_CELLS = 32  # of a grid, whose points are evaluated in one batched call
_ROUNDS = 12  # of the grid; the first two or three do
_WIDTH = 1e-3  # of the last cell, relative to its upper end: the parabola does the rest
_RISE = 1e-4  # relative to the loss at 0: a minimum higher than that by rounding still counts


class LineSearch(NamedTuple):
    """Result of :func:`minimise`."""

    xi: jax.Array  # float32, the distance of the minimum; 0 where there is none
    value: jax.Array  # float32, the function there; that at 0 where there is none
    accepted: jax.Array  # bool, whether there is a minimum with an upper bracket
    evaluations: jax.Array  # int32, how often the function (with its slope) was evaluated


def minimise(
    function: Callable[[jax.Array], jax.Array],
    *,
    start: Any = 1.0,
    cap: float = 2.0**20,
    floor: float = 2.0**-26,
) -> LineSearch:
    r"""Return :math:`\xi^* = \arg\min_{\xi > 0} f(\xi)` within the basin that begins at 0.

    The bracket first: from ``start`` the step is halved, or doubled, to the first point above f(0);
    infinity and NaN count as above. If f stays below f(0) up to ``cap`` the landscape is asymmetric
    and the search is rejected; so it is if f does not fall from 0 on, is flat, or is NaN at 0. Then
    a grid of 32 cells, evaluated at once, is laid over the bracket, and again over the cell that
    holds the minimum, until the parabola through the cell's two slopes gives the rest. Of several
    minima that the grid resolves the lowest is returned, of equal ones the nearest.

    Slopes, by forward differentiation, decide where the minimum is; values decide only which of
    several, and where the basin ends. The reason is float32: f changes by a few roundings over a
    relative distance of :math:`10^{-3}` from its minimum, but its slope still changes sign at the
    right place. The limit is the accuracy of the slope: where f'(0) is left over from terms a
    million times larger, a tenth of it is rounding, and so is a tenth of the result.

    Args:
      function: maps a float32 scalar to a scalar; differentiable once. It is evaluated under
        ``jax.vmap`` and in ``jax.lax.while_loop``. Over devices it must return the same everywhere
        (a mean over all of them) if it communicates.
      start: where the bracketing starts; may be traced, e.g. the result of the last search.
      cap: the largest distance looked at.
      floor: the smallest; a basin that ends below it is rejected.

    Returns:
      A :class:`LineSearch`. No derivative is defined through it.

    >>> result = minimise(lambda xi: 3.0 + 1e4 * (xi - 0.02) ** 2)
    >>> round(float(result.xi), 6), float(result.value), bool(result.accepted)
    (0.02, 3.0, True)
    >>> bool(minimise(lambda xi: jnp.exp(-xi)).accepted)
    False

    References:
      Sato et al., `PoF: Post-Training of Feature Extractor for Improving Generalization`, eq. 2 and
      the end of section 3.2 (asymmetric landscapes).
    """
    for field, bound in (("cap", cap), ("floor", floor)):
        check_number(field, bound, positive, "be positive and finite")
    check_number("floor", floor, lambda value: value < cap, f"be less than cap = {cap:g}")
    must = f"lie in [{floor:g}, {cap:g}]"
    check_number("start", start, lambda value: floor <= value <= cap, must)
    shape = jax.eval_shape(function, jax.ShapeDtypeStruct((), jnp.float32)).shape
    if shape != ():
        raise UsageError(f"function returns shape {shape}; it must return a scalar: take the mean")

    def at(xi):
        """Return value and slope; NaN as the slope where the value is not finite."""
        # Forward mode: f has one input, so one tangent gives the slope with the value, and nothing is stored.
        value, slope = jax.jvp(lambda x: jnp.float32(function(x)), (xi,), (jnp.ones_like(xi),))
        return value, jnp.where(jnp.isfinite(value), slope, jnp.nan)

    value_0, slope_0 = at(jnp.float32(0.0))
    # f must fall from 0 on; a NaN or an infinite slope fails the comparison.
    falls = (slope_0 < 0) & (slope_0 > -jnp.inf)

    def above(xi):
        value, slope = at(xi)
        # Not where it falls: below the resolution of f, rounding can make it look higher than f(0).
        return ~(value <= value_0) & ~(slope < 0)

    # Clipped, since 0, the result of a rejected search, would never grow by doubling.
    first = jnp.clip(jnp.where(start > 0, start, 1.0), floor, cap).astype(jnp.float32)
    # Chosen by what the function returned, so that carries vary over a mesh just as it does.
    first = jnp.where(falls, first, 1.0)
    count = jnp.where(falls, 2, 1).astype(jnp.int32)
    inwards = above(first)

    def moved(carry):
        xi, _, count = carry
        # The last step outwards ends at the cap, not beyond it.
        xi = jnp.where(inwards, xi / 2, jnp.minimum(2 * xi, cap))
        return xi, above(xi), count + 1

    def one_sided(carry):
        xi, is_above, _ = carry
        # Inwards while still above f(0), outwards while still below.
        return falls & (is_above == inwards) & jnp.where(inwards, xi > floor, xi < cap)

    xi, is_above, count = jax.lax.while_loop(one_sided, moved, (first, inwards, count))
    # Halving ends at a point below f(0): the last one above it was twice as far.
    upper = jnp.where(inwards, 2 * xi, xi)
    bracketed = falls & (is_above != inwards)

    def refined(carry):
        (low, _), (high, _), _, rounds, count = carry
        # [33] points, [32] cells.
        points = low + (high - low) * (jnp.arange(_CELLS + 1) / _CELLS).astype(jnp.float32)
        values, slopes = jax.vmap(at)(points)
        falling = slopes < 0
        # A cell that falls at its lower end and does not at its upper end; `~`, so that a NaN beyond a wall counts.
        valleys = falling[:-1] & ~falling[1:]
        # `fmin` leaves a NaN beyond a wall out; `argmin` takes the first of equals, the nearest.
        values = jnp.where(valleys, jnp.fmin(values[:-1], values[1:]), jnp.inf)
        cell = jnp.argmin(values)
        ends = [(points[i], slopes[i]) for i in (cell, cell + 1)]
        return *ends, valleys[cell], rounds + 1, count + points.size

    def wide(carry):
        (low, _), (high, _), is_valley, rounds, _ = carry
        return is_valley & (high - low > _WIDTH * high) & (rounds < _ROUNDS)

    # 0 * upper, not 0.0: carries must vary over a mesh as the results do. The slope at ``upper`` is
    # replaced in the first round, which a bracketed search always takes.
    bracket = (0 * upper, slope_0), (upper, slope_0)
    (low, fall), (high, rise), is_valley, _, count = jax.lax.while_loop(
        wide, refined, (*bracket, bracketed, 0 * count, count)
    )
    # Where the line through the two slopes crosses 0: the minimum of the parabola.
    share = fall / (fall - rise)
    share = jnp.where((share >= 0) & (share <= 1), share, 0.0)  # NaN next to a wall: the lower end
    xi = low + (high - low) * share
    value, _ = at(xi)
    # A comparison that NaN fails.
    accepted = is_valley & (value - value_0 <= _RISE * jnp.abs(value_0))
    xi, value = jnp.where(accepted, xi, 0.0), jnp.where(accepted, value, value_0)
    return LineSearch(xi, value, accepted, count + 1)
