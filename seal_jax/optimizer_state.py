"""Reinitialize what an optimizer remembers about some of the parameters.

Works on any optax state: the parts that follow the parameters are found by their structure, so
``chain``, ``masked``, ``partition``, ``MultiSteps`` and hand-written states need no special care.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

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
      fresh: the values to go back to, of the same structure: ``tx.init(params)``, zeros, or those
        before an update.
      params: parameters, for their structure; hidden ones may be ``optax.MaskedNode``.
      mask: pytree of bool with the structure of ``params``; ``None`` means every parameter.
      when: scalar bool, may be traced: whether to replace the memory.
      restart: scalar bool, may be traced: whether to restart the clocks.

    >>> tx, params = optax.trace(decay=0.9), {"conv": jnp.ones(()), "fc": jnp.ones(())}
    >>> _, state = tx.update(params, tx.init(params))
    >>> mask = {"conv": False, "fc": True}
    >>> state = reinitialise(state, tx.init(params), params, mask, when=True, restart=False)
    >>> float(state.trace["conv"]), float(state.trace["fc"])
    (1.0, 0.0)
    """
    if mask is None:
        mask = jax.tree.map(lambda _: True, params)
    flags = jax.tree.leaves(mask, is_leaf=is_placeholder)
    return _Walker(params, flags, when, restart).node(state, fresh)


def shares(state: PyTree, params: PyTree, mask: PyTree) -> bool:
    """Tell whether masked and other parameters have a leaf in common, such as Adam's count.

    Then the memory of one part cannot be replaced without that of the other.

    Args:
      state: the state of an optax transformation, or its shapes.
      params: parameters, for their structure.
      mask: pytree of bool with the structure of ``params``.

    >>> params, mask = {"conv": jnp.ones(2), "fc": jnp.ones(2)}, {"conv": False, "fc": True}
    >>> shares(optax.adam(0.1).init(params), params, mask), shares(optax.trace(0.9).init(params), params, mask)
    (True, False)
    """
    flags = jax.tree.leaves(mask, is_leaf=is_placeholder)
    return _Walker(params, flags, False, False).shares(state)


def keep_dtypes(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wrap ``inner`` so that its state keeps its dtypes, whatever those of the gradients.

    Momentum that starts in the parameters' bfloat16 would become float32 with float32 gradients,
    and ``lax.scan`` could not carry it. The updates are ``inner``'s.

    >>> tx, params = keep_dtypes(optax.trace(decay=0.9)), jnp.ones(2, jnp.bfloat16)
    >>> _, state = tx.update(jnp.ones(2, jnp.float32), tx.init(params))
    >>> state.trace.dtype.name
    'bfloat16'
    """
    inner = optax.with_extra_args_support(inner)

    def cast(new: Any, old: Any) -> Any:
        dtype = jnp.result_type(old)
        return new if jnp.result_type(new) == dtype else new.astype(dtype)

    def update_fn(updates, state, params=None, **extra_args):
        updates, new = inner.update(updates, state, params, **extra_args)
        return updates, jax.tree.map(cast, new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _is_leaf(tree: PyTree) -> bool:
    structure: Any = jax.tree.structure(tree)
    return structure == jax.tree.structure(0)


def _dtype_is(leaf: Any, *kinds: Any) -> bool:
    return any(jnp.issubdtype(jnp.result_type(leaf), kind) for kind in kinds)


def _is_random_key(leaf: Any) -> bool:
    return _dtype_is(leaf, jax.dtypes.prng_key, jnp.unsignedinteger)


def _open(tree: PyTree) -> tuple[list[PyTree], Any]:
    """Flatten ``tree`` by one level."""
    return jax.tree.flatten(tree, is_leaf=lambda node: node is not tree)


def _align(params: PyTree, node: PyTree) -> list[PyTree] | None:
    """Return the part of ``node`` for each parameter; ``None`` if they differ in structure.

    A part may have a structure of its own. One ``MaskedNode`` may hide a whole subtree.
    """
    if is_placeholder(node):
        return [node] * len(jax.tree.leaves(params, is_leaf=is_placeholder))
    if is_placeholder(params) or _is_leaf(params):
        return [node]
    children, structure = _open(params)
    counterparts, actual = _open(node)
    if actual != structure:
        return None
    parts = []
    for child, counterpart in zip(children, counterparts, strict=True):
        part = _align(child, counterpart)
        if part is None:
            return None
        parts.extend(part)
    return parts


class _Walker:
    """Walks a state and its fresh counterpart side by side."""

    def __init__(self, params, flags, when, restart):
        self.params = params
        self.flags = flags
        self.when = when
        self.restart = restart
        self.lone_shape = jnp.shape(params) if _is_leaf(params) else None
        # A chain's state is a tuple too, and would pass for a tuple of parameters with arrays each.
        self.nests = not isinstance(params, tuple | list)

    def per_parameter(self, node: PyTree) -> list[PyTree] | None:
        """Return what ``node`` remembers about each parameter; ``None`` if it is no such memory."""
        if self.lone_shape is not None:
            # A lone array as the parameters has the structure of any leaf; tell it by its values.
            if not _is_leaf(node) or not _dtype_is(node, jnp.inexact):
                return None
            return [node] if jnp.shape(node) != () or self.lone_shape == () else None
        parts = None if is_placeholder(node) else _align(self.params, node)
        if parts is None or all(_is_leaf(part) or is_placeholder(part) for part in parts):
            return parts
        inexact = all(_dtype_is(leaf, jnp.inexact) for leaf in jax.tree.leaves(parts))
        return parts if self.nests and inexact else None

    def node(self, state: PyTree, fresh: PyTree, shared: bool | None = None) -> PyTree:
        """Handle one node; ``shared`` says whether the leaves right in it go with the memory."""
        parts = self.per_parameter(state)
        if parts is not None:
            return self.memory(parts, state, fresh)
        children, structure = _open(state)
        if _is_leaf(state):
            return self.loose(state, fresh, shared)
        selected = self.selected(children)
        shared = False not in selected if selected is not None else None
        counterparts = structure.flatten_up_to(fresh)
        return jax.tree.unflatten(
            structure,
            [self.node(a, b, shared) for a, b in zip(children, counterparts, strict=True)],
        )

    def memory(self, parts: list[PyTree], state: PyTree, fresh: PyTree) -> PyTree:
        flags = [
            flag
            for flag, part in zip(self.flags, parts, strict=True)
            for _ in jax.tree.leaves(part)  # none where a parameter is hidden
        ]
        leaves, structure = jax.tree.flatten(state)
        replaced = [
            jnp.where(self.when, new, old) if flag is True else old
            for flag, old, new in zip(flags, leaves, jax.tree.leaves(fresh), strict=True)
        ]
        return jax.tree.unflatten(structure, replaced)

    def selected(self, children: list[PyTree]) -> set[bool] | None:
        """Return the flags of all parameters that ``children`` remember; ``None`` without memory."""
        memories = [parts for parts in map(self.per_parameter, children) if parts is not None]
        if not memories:
            return None
        return {
            flag is True
            for parts in memories
            for flag, part in zip(self.flags, parts, strict=True)
            if not is_placeholder(part)
        }

    def shares(self, state: PyTree) -> bool:
        """Tell whether a leaf in ``state`` goes with the memory of masked and other parameters."""
        if _is_leaf(state) or self.per_parameter(state) is not None:
            return False
        children, _ = _open(state)
        common = any(_is_leaf(child) and not _is_random_key(child) for child in children)
        return (common and self.selected(children) == {True, False}) or any(
            map(self.shares, children)
        )

    def loose(self, state: Any, fresh: Any, shared: bool | None) -> Any:
        """Handle a leaf that belongs to no single parameter."""
        if _is_random_key(state):
            return state
        if shared is not None:
            return jnp.where(self.when, fresh, state) if shared else state
        clock = jnp.shape(state) == () and _dtype_is(state, jnp.integer)
        return jnp.where(self.restart, fresh, state) if clock else state
