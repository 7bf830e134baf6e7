"""Hare and Tortoise: fast weights that go back to their slow average every so often."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from seal_jax import optimizer_state
from seal_jax.errors import check_integer, check_number, require_params
from seal_jax.transforms.relearn import difference, widen

PyTree = Any


class HareTortoiseState(NamedTuple):
    """State of :func:`hare_and_tortoise`: updates so far, int32, the average, and the optimizer's state."""

    count: jax.Array
    tortoise: PyTree
    inner: PyTree


def returns_after(every: int) -> Callable[[Any], Any]:
    """Return the condition on the number of updates made under which the weights go back to their average.

    >>> [returns_after(2)(count) for count in range(5)]
    [False, False, True, False, True]
    """
    every = check_integer("every", every, 1)
    return lambda count: (count > 0) & (count % every == 0)


def hare_and_tortoise(
    inner: optax.GradientTransformation, every: int, decay: Any = 0.999
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap ``inner`` so that the parameters go back to their moving average after every so many updates.

    The optimizer trains the hare h, the parameters; the tortoise :math:`t \leftarrow d t + (1 - d) h` follows with
    every update and is in the state. Where the hare goes back, :math:`h \leftarrow t`, the memory of ``inner`` stays.
    An update reaches t up to rounding, in float32. BatchNorm's statistics are no parameters: average and put them back
    likewise, or compute them anew for the tortoise.

    Args:
      inner: any optax optimizer, whole: nothing may follow it in a chain.
      every: updates, static.
      decay: d, in [0, 1); may be traced.

    References:
      Lee et al., `Slow and Steady Wins the Race: Maintaining Plasticity with Hare and Tortoise Networks`, 2024; the
      default is that of its released code.

    >>> tx, params = hare_and_tortoise(optax.sgd(1.0), every=2, decay=0.5), jnp.array(0.0)
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update(jnp.array(-1.0), state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(float(params), float(state.tortoise))
    1.0 0.5
    1.25 1.25
    2.25 1.75
    """
    check_number("decay", decay, lambda value: 0 <= value < 1, "lie in [0, 1)")
    returns = returns_after(every)
    wrapped = optimizer_state.keep_dtypes(inner)

    def init_fn(params):
        # A copy: a training step that donates parameters and state must not give one buffer twice.
        tortoise = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
        return HareTortoiseState(jnp.zeros((), jnp.int32), tortoise, wrapped.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        require_params(params)
        updates, inner_state = wrapped.update(updates, state.inner, params, **extra_args)
        updates = jax.tree.map(widen, updates)
        count = optax.safe_increment(state.count)
        hare = optax.apply_updates(params, updates)
        # In the structure of the parameters, which under nnx.Optimizer are Variables in init alone.
        before = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(state.tortoise))

        def follow(slow, fast):
            # By the difference, so that what does not change stays as it is.
            return slow + ((1 - decay) * (fast - slow)).astype(slow.dtype)

        def choose(update, slow, param):
            return jnp.where(returns(count), difference(slow, param, update), update)

        slow = jax.tree.map(follow, before, hare)
        updates = jax.tree.map(choose, updates, slow, params)
        tortoise = jax.tree.unflatten(jax.tree.structure(state.tortoise), jax.tree.leaves(slow))
        return updates, HareTortoiseState(count, tortoise, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
