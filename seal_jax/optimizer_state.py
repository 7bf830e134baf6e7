"""Re-initialise what an optimizer remembers about some of the parameters.

Works on any optax state: the parts that follow the parameters are found by their structure, so
``chain``, ``masked``, ``partition``, ``MultiSteps`` and hand-written states need no special care.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from seal_jax.paths import is_placeholder

PyTree = Any


def reinitialise(
    state: PyTree, fresh: PyTree, params: PyTree, mask: PyTree | None, *, when: Any, restart: Any
) -> PyTree:
    """Return ``state`` with the memory of the masked parameters replaced by that in ``fresh``.

    Three kinds of leaf are told apart:

    * a subtree with the structure of ``params`` (momentum, second moments, ...) is replaced leaf by
      leaf where ``mask`` is True; so is one with several arrays for each parameter (SM3's);
    * a leaf beside such subtrees in the same node (Adam's ``count``) is shared by all their
      parameters: it is replaced if the mask covers every one of them, otherwise it stays;
    * any other integer scalar is a clock (the step of a schedule): it follows ``restart`` alone.

    Random keys and hyper-parameters stay.

    Args:
      state: the state of an optax transformation.
      fresh: the values to go back to, of the same structure: ``tx.init(params)``, or zeros.
      params: parameters, for their structure; hidden ones may be ``optax.MaskedNode``.
      mask: pytree of bool with the structure of ``params``; ``None`` means every parameter.
      when: scalar bool, may be traced: whether to replace the memory.
      restart: scalar bool, may be traced: whether to restart the clocks.
    """
    if mask is None:
        mask = jax.tree.map(lambda _: True, params)
    flags = jax.tree.leaves(mask, is_leaf=is_placeholder)
    return _Walker(params, flags, when, restart).node(state, fresh)


def _structure(tree: PyTree) -> Any:
    return jax.tree.structure(tree, is_leaf=is_placeholder)


def _is_leaf(tree: PyTree) -> bool:
    return jax.tree.structure(tree) == jax.tree.structure(0)


def _dtype_is(leaf: Any, *kinds: Any) -> bool:
    return any(jnp.issubdtype(jnp.result_type(leaf), kind) for kind in kinds)


class _Walker:
    """Walks a state and its fresh counterpart side by side."""

    def __init__(self, params, flags, when, restart):
        self.structure = _structure(params)
        self.flags = flags
        self.when = when
        self.restart = restart
        self.lone_shape = jnp.shape(params) if _is_leaf(params) else None
        # A chain's state is a tuple too, and would pass for a tuple of parameters with arrays each.
        self.nests = not _is_leaf(params) and not isinstance(params, tuple | list)

    def per_parameter(self, node: PyTree) -> list[PyTree] | None:
        """Return what ``node`` remembers about each parameter; ``None`` if it is no such memory."""
        if self.lone_shape is not None:
            # A lone array as the parameters has the structure of any leaf; tell it by its values.
            if not _is_leaf(node) or not _dtype_is(node, jnp.inexact):
                return None
            return [node] if jnp.shape(node) != () or self.lone_shape == () else None
        if _structure(node) == self.structure:
            return jax.tree.leaves(node, is_leaf=is_placeholder)
        if not self.nests:
            return None
        try:
            parts = self.structure.flatten_up_to(node)
        except (ValueError, TypeError):
            return None
        return (
            parts if all(_dtype_is(leaf, jnp.inexact) for leaf in jax.tree.leaves(parts)) else None
        )

    def node(self, state: PyTree, fresh: PyTree, shared: bool | None = None) -> PyTree:
        """Handle one node; ``shared`` says whether the leaves right in it go with the memory."""
        parts = self.per_parameter(state)
        if parts is not None:
            return self.memory(parts, self.structure.flatten_up_to(fresh))
        children, structure = jax.tree.flatten(state, is_leaf=lambda node: node is not state)
        if _is_leaf(state):
            return self.loose(state, fresh, shared)
        memories = [part for part in map(self.per_parameter, children) if part is not None]
        shared = all(map(self.covers, memories)) if memories else None
        counterparts = structure.flatten_up_to(fresh)
        return jax.tree.unflatten(
            structure,
            [self.node(a, b, shared) for a, b in zip(children, counterparts, strict=True)],
        )

    def memory(self, parts: list[PyTree], fresh: list[PyTree]) -> PyTree:
        replaced = [
            jax.tree.map(lambda new, old: jnp.where(self.when, new, old), new, old)
            if flag is True
            else old
            for flag, old, new in zip(self.flags, parts, fresh, strict=True)
        ]
        return jax.tree.unflatten(self.structure, replaced)

    def covers(self, parts: list[PyTree]) -> bool:
        """Tell whether the mask takes every parameter that ``parts`` remember something about."""
        return all(
            flag is True
            for flag, part in zip(self.flags, parts, strict=True)
            if not is_placeholder(part)
        )

    def loose(self, state: Any, fresh: Any, shared: bool | None) -> Any:
        """Handle a leaf that belongs to no single parameter."""
        if _dtype_is(state, jax.dtypes.prng_key, jnp.unsignedinteger):
            return state
        if shared is not None:
            return jnp.where(self.when, fresh, state) if shared else state
        clock = jnp.shape(state) == () and _dtype_is(state, jnp.integer)
        return jnp.where(self.restart, fresh, state) if clock else state
