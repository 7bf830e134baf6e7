"""Replace single hidden units while a network trains: what ReDo and continual backpropagation share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.custom_batching
import jax.numpy as jnp
import optax

from seal_jax import optimizer_state
from seal_jax import units as units_lib
from seal_jax.errors import UsageError, check_key, require_params
from seal_jax.forgetting import Initialiser, check_like, initialiser
from seal_jax.transforms.relearn import difference, widen
from seal_jax.units import Units

PyTree = Any
# (updates so far, what is kept, parameters after the update, activations) -> chosen units, what is kept.
Choose = Callable[[Any, PyTree, PyTree, Mapping[str, jax.Array]], tuple[units_lib.Chosen, PyTree]]


class RecycleState(NamedTuple):
    """State of :func:`recycle`: updates so far, int32, the random key, what is kept of units, the optimizer's."""

    count: jax.Array
    key: jax.Array | None
    kept: PyTree
    inner: optax.OptState


def recycle(
    inner: optax.GradientTransformation,
    units: Sequence[Units],
    init_fn: Initialiser,
    choose: Choose,
    *,
    start: Callable[[Mapping[str, jax.Array]], PyTree] = lambda zeros: (),
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that after its update chosen units are replaced, see :func:`seal_jax.units.replace`.

    It must be OUTERMOST: nothing may scale an update that has to reach given values, which it does up to
    rounding. All other weights get the optimizer's update, in the same step. What the optimizer holds for
    the replaced weights (momentum, second moments) is reset; a count that entries share, such as
    Adam's, goes on.

    ``update`` needs ``activations``, the mean magnitude of every unit over the batch (see
    :func:`seal_jax.units.mean_magnitude`), ``[n]`` by name of the layer; it uses its extra argument ``key``, or else
    keys derived from the one given here.

    Args:
      inner: any optax optimizer.
      units: the layers of units.
      init_fn: maps a key to a whole tree of fresh parameters, or "torch_default".
      choose: maps (updates so far, what is kept, parameters after the update, activations) to the units
        to be replaced, bool ``[n]`` by name, and what is kept.
      start: maps zeros for each unit, float32 ``[n]`` by name, to what is kept before the first update.
      key: a random key.

    Raises:
      UsageError: no units, or such as the parameters do not have.
      ValueError: ``update`` was called without ``activations``, or there is no key of either kind.

    >>> params = {"a": {"kernel": jnp.ones((1, 2))}, "b": {"kernel": jnp.ones((2, 1))}}
    >>> def choose(count, kept, params, activations):  # the most active unit
    ...     return {name: h == h.max() for name, h in activations.items()}, kept
    >>> tx = recycle(optax.sgd(0.0), [Units("hidden", ("a",), ("b",))], "torch_default", choose,
    ...              key=jax.random.key(0))
    >>> updates, _ = tx.update(params, tx.init(params), params,
    ...                        activations={"hidden": jnp.array([1.0, 2.0])})
    >>> optax.apply_updates(params, updates)["b"]["kernel"].tolist()
    [[1.0], [0.0]]
    """
    units = tuple(units)
    if not units:
        raise UsageError("units = () names no layer of hidden units: give at least one")
    check_key("key", key, optional=True)
    inner = optimizer_state.keep_dtypes(inner)

    def init(params):
        kept = start(units_lib.zeros(units, params))
        check_like(jax.eval_shape(initialiser(init_fn, params), jax.random.key(0)), params)
        # A copy: a training step that donates its state must not take the caller's key with it.
        copied = None if key is None else jnp.copy(key)
        return RecycleState(jnp.zeros((), jnp.int32), copied, kept, inner.init(params))

    def update(updates, state, params=None, *, activations=None, key=None, **extra_args):
        require_params(params)
        if not activations:
            raise ValueError("update needs activations: call update(..., activations={name: [n]})")
        if key is None and state.key is None:
            raise ValueError(
                "update needs key: call update(..., key=...), or make the transformation with key=..."
            )
        # Derived from the count, so that a resumed run draws what the uninterrupted one does.
        step_key = jax.random.fold_in(state.key, state.count) if key is None else key
        updates, memory = inner.update(updates, state.inner, params, key=key, **extra_args)
        updates = jax.tree.map(widen, updates)
        moved = optax.apply_updates(params, updates)
        chosen, kept = choose(state.count, state.kept, moved, activations)

        def replace():
            fresh = initialiser(init_fn, params)(step_key)
            new = units_lib.replace(moved, fresh, chosen, units)
            touched = jax.tree.map(jnp.logical_or, *units_lib.selections(chosen, units, params))

            def move(flags, new, old, update):
                return jnp.where(flags, difference(new, old, update), update)

            return (
                jax.tree.map(move, touched, new, params, updates),
                optimizer_state.reinitialise_entries(memory, inner.init(params), params, touched),
            )

        # A branch, so that the initialisation runs in the steps that need it only. Without chosen units it changes
        # nothing, so trainings that run side by side may take it together.
        some = _anywhere(jnp.any(jnp.stack([flags.any() for flags in chosen.values()])))
        updates, memory = jax.lax.cond(some, replace, lambda: (updates, memory))
        return updates, RecycleState(optax.safe_increment(state.count), state.key, kept, memory)

    return optax.GradientTransformationExtraArgs(init, update)


@jax.custom_batching.custom_vmap
def _anywhere(flag: jax.Array) -> jax.Array:
    """Return a flag; under ``vmap`` whether it is True anywhere, or ``cond`` would compute both branches."""
    return flag


@_anywhere.def_vmap
def _anywhere_vmapped(
    axis_size: int, in_batched: list[bool], flag: jax.Array
) -> tuple[jax.Array, bool]:
    del axis_size
    return (_anywhere(flag.any()) if in_batched[0] else flag), False
