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
      leaf where ``mask`` is True;
    * an integer beside such subtrees in the same node (Adam's ``count``) is shared by all their
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
    walker = _Walker(_structure(params), flags, jax.tree.leaves(params), when, restart)
    return walker.node(state, fresh)


def _structure(tree: PyTree) -> Any:
    return jax.tree.structure(tree, is_leaf=is_placeholder)


class _Walker:
    """Walks a state and its fresh counterpart side by side."""

    def __init__(self, structure, flags, params, when, restart):
        self.structure = structure
        self.flags = flags
        # A lone array as the parameters has the structure of any leaf; tell it by shape and dtype.
        self.lone = params[0] if structure == jax.tree.structure(0) and params else None
        self.when = when
        self.restart = restart

    def follows_params(self, node: PyTree) -> bool:
        if _structure(node) != self.structure:
            return False
        if self.lone is None:
            return True
        return jnp.shape(node) == jnp.shape(self.lone) and jnp.issubdtype(
            jnp.result_type(node), jnp.inexact
        )

    def node(self, state: PyTree, fresh: PyTree, shared: bool | None = None) -> PyTree:
        """Handle one node; ``shared`` says whether the counts right in it go with the memory."""
        if self.follows_params(state):
            return self.memory(state, fresh)
        children, structure = jax.tree.flatten(state, is_leaf=lambda node: node is not state)
        if structure == jax.tree.structure(0):
            return self.count(state, fresh, shared)
        covered = [self.covers(child) for child in children if self.follows_params(child)]
        shared = all(covered) if covered else None
        counterparts = structure.flatten_up_to(fresh)
        return jax.tree.unflatten(
            structure,
            [self.node(a, b, shared) for a, b in zip(children, counterparts, strict=True)],
        )

    def memory(self, state: PyTree, fresh: PyTree) -> PyTree:
        leaves = jax.tree.leaves(state, is_leaf=is_placeholder)
        fresh_leaves = jax.tree.leaves(fresh, is_leaf=is_placeholder)
        replaced = [
            jnp.where(self.when, new, old) if flag is True and not is_placeholder(old) else old
            for flag, old, new in zip(self.flags, leaves, fresh_leaves, strict=True)
        ]
        return jax.tree.unflatten(self.structure, replaced)

    def covers(self, node: PyTree) -> bool:
        """Tell whether the mask takes every parameter that ``node`` remembers something about."""
        leaves = jax.tree.leaves(node, is_leaf=is_placeholder)
        return all(
            flag is True
            for flag, leaf in zip(self.flags, leaves, strict=True)
            if not is_placeholder(leaf)
        )

    def count(self, state: Any, fresh: Any, shared: bool | None) -> Any:
        if jnp.shape(state) != () or not jnp.issubdtype(jnp.result_type(state), jnp.integer):
            return state
        if shared is None:
            return jnp.where(self.restart, fresh, state)
        return jnp.where(self.when, fresh, state) if shared else state
