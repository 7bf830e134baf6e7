"""LookSAM: SAM's second gradient every few steps, and in between what it had across the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from seal_jax import optimizer_state
from seal_jax.errors import check_integer, check_number, known_zero, nonnegative, require_params
from seal_jax.generations import Clock, Schedule, branch
from seal_jax.transforms.sam import check_radius, perturb, require_gradient
from seal_jax.transforms.sgd import ClockState, make_normal_tx, takes_options_of

PyTree = Any


class LookSamState(NamedTuple):
    """State of :func:`look_sharpness_aware`: a count, the last g_v, float32, and that of the wrapped optimizer."""

    clock: ClockState  # apart, or the count would pass for one that belongs to g_v
    across: PyTree
    inner: optax.OptState


def look_sharpness_aware(
    inner: optax.GradientTransformation,
    rho: Any = 0.05,
    alpha: Any = 0.7,
    *,
    when: Callable[[Any], Any] = lambda count: count % 5 == 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap ``inner`` so that it gets SAM's gradient in some steps and LookSAM's approximation in the others.

    .. math::
        \text{SAM's steps:} \quad g_s = \nabla L(w + \rho \frac{g}{\|g\|}), \quad
        g_v = g_s - \frac{g \cdot g_s}{\|g\|^2} g; \qquad
        \text{others:} \quad g_s = g + \alpha \frac{\|g\|}{\|g_v\|} g_v

    with norms over the whole tree, in float32. ``inner`` is given :math:`g_s`. What SAM's gradient has across the
    plain one, :math:`g_v`, changes slowly, so that it serves several steps; only SAM's steps compute a second
    gradient. Seeds that are batched by ``vmap`` still skip it where none of them needs it.

    Args:
      inner: any optax optimizer.
      rho: :math:`\rho`, at least 0. At 0 the result is ``inner``, bit for bit.
      alpha: :math:`\alpha`, at least 0, the share of the reused part; 0.7 as in public code for the paper.
      when: maps the (traced) count of updates to a bool: SAM's steps. The first must be one, or :math:`g_v` is 0
        until one comes.

    Raises:
      ValueError: ``update`` was called without ``grad_fn``, see :func:`seal_jax.transforms.sharpness_aware`.

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization`, 2022, Algorithm 1.

    >>> gradient = jax.grad(lambda w: 0.5 * jnp.sum(jnp.array([1.0, 3.0]) * w**2))
    >>> tx, w = look_sharpness_aware(optax.sgd(1.0), rho=1.0, alpha=0.5), jnp.ones(2)
    >>> state = tx.init(w)
    >>> for _ in range(2):  # the first is SAM's; g_v points along (-3, 1), across (1, 3)
    ...     updates, state = tx.update(gradient(w), state, w, grad_fn=gradient)
    ...     print([round(float(x), 3) for x in -updates])
    [1.316, 5.846]
    [-0.5, 3.5]
    """
    check_radius(rho, 0.0)
    check_number("alpha", alpha, nonnegative, "be 0 or positive")
    wrapped = optimizer_state.keep_dtypes(inner)

    def init_fn(params):
        across = optax.tree.zeros_like(params, dtype=jnp.float32)
        return LookSamState(ClockState(jnp.zeros((), jnp.int32)), across, wrapped.init(params))

    def update_fn(updates, state, params=None, *, grad_fn=None, **extra_args):
        count, across = state.clock.count, state.across
        # Decided at trace time, as SAM's: a program for radius 0 has no second pass.
        if not known_zero(rho):
            require_params(params)
            require_gradient(grad_fn)
            updates, across = gradient_and_across(updates, across, params, grad_fn, count)
        updates, inner_state = wrapped.update(
            updates, state.inner, params, grad_fn=grad_fn, **extra_args
        )
        clock = ClockState(optax.safe_increment(count))
        return updates, LookSamState(clock, across, inner_state)

    def gradient_and_across(first, across, params, grad_fn, count):
        square = _dot(first, first)

        def sam():
            second = grad_fn(perturb(params, first, rho))
            # A gradient of 0 has no direction: the quotient must not be NaN there.
            along = _dot(first, second) / jnp.where(square > 0, square, 1.0)
            rest = jax.tree.map(lambda s, g: (s - along * g).astype(jnp.float32), second, first)
            return second, rest

        factor = alpha * jnp.sqrt(square) / (jnp.sqrt(_dot(across, across)) + 1e-12)
        reused = jax.tree.map(lambda g, v: (g + factor * v).astype(g.dtype), first, across)
        gradient, across = branch(when(count), sam, (reused, across))
        # At a traced radius of 0 g_v is rounding alone, which must not be blown up to the size of the gradient.
        gradient = jax.tree.map(lambda new, old: jnp.where(rho == 0, old, new), gradient, first)
        return gradient, across

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _dot(a: PyTree, b: PyTree) -> jax.Array:
    """Return the inner product of two trees, in float32."""
    products = jax.tree.map(
        lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), a, b
    )
    return sum(jax.tree.leaves(products), start=jnp.zeros(()))


@takes_options_of(make_normal_tx)
def make_looksam_tx(
    learning_rate: float | Schedule = 0.01,
    *,
    rho: Any = 0.05,
    alpha: Any = 0.7,
    every: int = 5,
    steps_per_epoch: int,
    epochs_per_generation: int = 160,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Return LookSAM over momentum SGD as one optax transformation.

    ``update`` also needs the gradient of the batch as a function, ``grad_fn``.

    Args:
      learning_rate: a float, or a schedule of the step within the generation.
      rho, alpha: see :func:`look_sharpness_aware`.
      every: k, the steps from one of SAM's to the next; 1 is SAM. A generation starts with one.
      steps_per_epoch: S.
      epochs_per_generation: E; the whole training where nothing is to restart.
      **options: of momentum SGD, see :func:`make_normal_tx`.

    References:
      Liu et al., 2022, Algorithm 1.

    >>> gradient = jax.grad(lambda params: 0.5 * params**2)
    >>> tx = make_looksam_tx(1.0, rho=0.5, weight_decay=0.0, steps_per_epoch=1, epochs_per_generation=9)
    >>> params = jnp.array(1.0)
    >>> updates, _ = tx.update(gradient(params), tx.init(params), params, grad_fn=gradient)
    >>> float(updates)
    -1.5
    """
    every = check_integer("every", every, 1)
    clock = Clock(steps_per_epoch, epochs_per_generation)
    inner = make_normal_tx(
        learning_rate,
        steps_per_epoch=steps_per_epoch,
        epochs_per_generation=epochs_per_generation,
        **options,
    )
    return look_sharpness_aware(
        inner, rho, alpha, when=lambda count: clock.step_in_generation(count) % every == 0
    )
