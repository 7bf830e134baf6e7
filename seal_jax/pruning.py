"""Iterative magnitude pruning with rewinding: the state it needs and its exact event.

Frankle and Carbin, `The Lottery Ticket Hypothesis`, 2019, section 2; Frankle et al., `Linear Mode
Connectivity and the Lottery Ticket Hypothesis`, 2020, for rewinding to an early step.

The transformation that holds pruned weights at zero is in :mod:`seal_jax.transforms.imp`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seal_jax import paths, selections
from seal_jax.errors import UsageError, check_number

PyTree = Any


class PruneState(NamedTuple):
    """State of iterative pruning: updates so far, masks, and the parameters to rewind to.

    ``kept`` is a tree like the parameters, of arrays of bool, False where a weight is pruned.
    Parameters that cannot be pruned have a single True.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, which hides tuple.count
    kept: PyTree
    rewind: PyTree


def prune(
    params: PyTree, state: Any, fraction: float = 0.2, scope: selections.Scope = "global"
) -> tuple[PyTree, Any]:
    """Prune the smallest of the remaining weights and rewind the others: an exact event.

    Of n remaining weights ``fraction * n``, rounded to the nearest, become 0.0 permanently; every other
    parameter goes back, bit for bit, to the snapshot. After r events (1 - fraction)^r remain.

    Args:
      params: the trained parameters.
      state: a :class:`PruneState`, or the state of any optax transformation with one in it, such as
        :func:`seal_jax.transforms.imp.make_imp_tx`.
      fraction: of the remaining weights, in (0, 1), static; resolved to at least 1/30000.
      scope: "global" compares the weights of all layers, "tensor" takes the fraction of each.

    Returns:
      The new parameters and the state, in which only ``kept`` has changed.

    Raises:
      UsageError: there is no such state in ``state``, or more than one.

    >>> w = jnp.array([[4.0, -1.0, 2.0, 3.0]])
    >>> initial = PruneState(jnp.zeros((), jnp.int32), {"w": w > 0}, {"w": jnp.full((1, 4), 7.0)})
    >>> params, state = prune({"w": jnp.array([[4.0, 0.0, 2.0, 3.0]])}, initial, 1 / 3)
    >>> params["w"].tolist(), state.kept["w"].tolist()
    ([[7.0, 0.0, 0.0, 7.0]], [[True, False, False, True]])
    """
    check_prunable(fraction)
    states = [node for node in jax.tree.leaves(state, is_leaf=is_state) if is_state(node)]
    if len(states) != 1:
        raise UsageError(f"state holds {len(states)} pruning states; prune needs exactly one")
    kept = pruned_further(params, states[0].kept, fraction, scope)
    # Put in its place in the whole state, which may be that of a chain; everything else in there stays.
    new = states[0]._replace(kept=kept)
    state = jax.tree.map(lambda node: new if is_state(node) else node, state, is_leaf=is_state)
    return rewound(new, params), state


def is_state(node: Any) -> bool:
    """Tell whether ``node`` is a :class:`PruneState`."""
    return isinstance(node, PruneState)


def check_prunable(fraction: float, field: str = "fraction") -> None:
    """Raise unless ``fraction``, which messages call ``field``, is one that an event can prune."""
    selections.check_fraction(field, fraction)
    # `portion` resolves no finer ones.
    check_number(field, fraction, lambda value: value >= 1 / 30_000, "be at least 1/30000")


def pruned_further(
    params: PyTree, kept: PyTree, fraction: float, scope: selections.Scope
) -> PyTree:
    """Return ``kept`` without the smallest ``fraction`` of the weights that it still keeps."""

    def magnitude(param, keep):
        # A lone bool stands for a parameter that cannot be pruned.
        if jnp.shape(keep) != jnp.shape(param) or jnp.ndim(keep) == 0:
            return None
        # Pruned weights are zero, the smallest of all; infinity keeps them out of the ranking.
        return jnp.where(keep, jnp.abs(param), jnp.inf)

    def count_of(values):
        # Of what is still kept alone: pruned weights are infinite here.
        return selections.portion(fraction, jnp.sum(values < jnp.inf, dtype=jnp.int32))

    leaves, structure = jax.tree.flatten(kept)
    # By leaves: under nnx.Optimizer the parameters of an update have another structure.
    magnitudes = list(map(magnitude, jax.tree.leaves(params), leaves))
    chosen = selections.lowest(magnitudes, count_of, scope)
    remaining = (
        keep if lowest is None else keep & ~lowest
        for keep, lowest in zip(leaves, chosen, strict=True)
    )
    return jax.tree.unflatten(structure, remaining)


def rewound(state: PruneState, params: PyTree) -> PyTree:
    """Return the snapshot with 0.0 for the pruned weights, in the structure of ``params``."""
    # The snapshot keeps the structure it had in ``init``: under nnx.Optimizer the parameters have another one.
    pairs = zip(*map(jax.tree.leaves, (state.kept, state.rewind)), strict=True)
    leaves = [jnp.where(keep, old, jnp.zeros_like(old)) for keep, old in pairs]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def remaining(state: PruneState) -> jax.Array:
    """Return the fraction of the prunable weights that remain.

    >>> kept = {"bias": jnp.array(True), "kernel": jnp.array([[True, False]])}
    >>> float(remaining(PruneState(0, kept, {})))
    0.5
    """
    # A single True stands for a parameter that cannot be pruned: it is not counted.
    kept = [leaf for leaf in jax.tree.leaves(state.kept) if jnp.ndim(leaf)]
    return sum(jnp.sum(leaf) for leaf in kept) / sum(leaf.size for leaf in kept)


def initial_state(params: PyTree, flags: list[bool]) -> PruneState:
    """Return the state before any pruning; ``flags`` marks the parameters that may be pruned."""

    def nothing_pruned(path, leaf, flag):
        # From the leaf, so that under shard_map it varies over the same axes as later values do.
        return (leaf == leaf) | True if flag else jnp.ones((), bool)

    kept = paths.map_named(nothing_pruned, params, flags)
    # Copies: a training step that donates parameters and state must not give one buffer twice.
    snapshot = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
    return PruneState(jnp.zeros((), jnp.int32), kept, snapshot)
