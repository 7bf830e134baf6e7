"""Reinitialize an optimizer's memory of some of the parameters.

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

    There are three kinds of leaf:

    * a subtree with the structure of ``params`` (momentum, second moments, ...) is replaced leaf by
      leaf where ``mask`` is True; so is one with several arrays for each parameter (SM3's);
    * a leaf in the same node as such subtrees (Adam's ``count``) is shared by all their
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
    flags = _flags(mask)

    def choose(owners, old, new):
        # The mask is static and decides in Python; when the reset takes place is traced.
        if owners is not None:
            return jnp.where(when, new, old) if all(flags[index] for index in owners) else old
        # Unsigned integers are random keys of the old style.
        is_clock = jnp.shape(old) == () and _dtype_is(old, jnp.signedinteger)
        return jnp.where(restart, new, old) if is_clock else old

    leaves, structure = jax.tree.flatten(state)
    chosen = map(choose, _owners(state, params), leaves, jax.tree.leaves(fresh))
    return jax.tree.unflatten(structure, chosen)


def reinitialise_entries(state: PyTree, fresh: PyTree, params: PyTree, selection: PyTree) -> PyTree:
    """Return ``state`` with the memory of single entries of the parameters replaced by that in ``fresh``.

    What has the shape of a parameter is replaced where its entry is selected. All else stays: clocks, and
    a number that entries share, such as Adam's count.

    Args:
      state: the state of an optax transformation.
      fresh: the values to go back to, of the same structure: ``tx.init(params)``.
      params: parameters, for their structure and shapes.
      selection: a tree of bool as in :mod:`seal_jax.selections`; may be traced.

    >>> tx, params = optax.trace(decay=0.9), {"fc": jnp.ones(2)}
    >>> _, state = tx.update(params, tx.init(params))
    >>> selection = {"fc": jnp.array([False, True])}
    >>> reinitialise_entries(state, tx.init(params), params, selection).trace["fc"].tolist()
    [1.0, 0.0]
    """
    shapes, chosen = map(jnp.shape, jax.tree.leaves(params)), jax.tree.leaves(selection)
    parameters = list(zip(shapes, chosen, strict=True))

    def choose(owners, old, new):
        if owners is None or len(owners) > 1:
            return old
        (owner,) = owners
        shape, flags = parameters[owner]
        return jnp.where(flags, new, old) if jnp.shape(old) == shape else old

    leaves, structure = jax.tree.flatten(state)
    replaced = map(choose, _owners(state, params), leaves, jax.tree.leaves(fresh))
    return jax.tree.unflatten(structure, replaced)


def shares(state: PyTree, params: PyTree, mask: PyTree) -> bool:
    """Tell whether masked and other parameters have a leaf in common, such as Adam's count.

    Then the memory of one part cannot be replaced without that of the other.

    ``state`` may be shapes alone; ``mask`` is a pytree of bool with the structure of ``params``.

    >>> params, mask = {"conv": jnp.ones(2), "fc": jnp.ones(2)}, {"conv": False, "fc": True}
    >>> shares(optax.adam(0.1).init(params), params, mask), shares(optax.trace(0.9).init(params), params, mask)
    (True, False)
    """
    flags = _flags(mask)
    # A leaf with both kinds of owners belongs to masked and to other parameters.
    owned = [{flags[index] for index in owners or ()} for owners in _owners(state, params)]
    return {True, False} in owned


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

    # To the dtype before the update, which is that of ``init``: a carry of ``lax.scan`` may not change its own.
    def cast(new: Any, old: Any) -> Any:
        dtype = jnp.result_type(old)
        return new if jnp.result_type(new) == dtype else new.astype(dtype)

    def update_fn(updates, state, params=None, **extra_args):
        updates, new = inner.update(updates, state, params, **extra_args)
        return updates, jax.tree.map(cast, new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _flags(mask: PyTree) -> list[bool]:
    """Return whether each parameter is masked; a hidden one is not."""
    return [flag is True for flag in jax.tree.leaves(mask, is_leaf=is_placeholder)]


def _owners(state: PyTree, params: PyTree) -> list[set[int] | None]:
    """Return, for each leaf of ``state``, the indices of the parameters whose memory it belongs to.

    ``None`` is a leaf that belongs to no parameter: a clock, a hyper-parameter or a random key.
    """

    def of_node(node: PyTree, shared: set[int] | None) -> list[set[int] | None]:
        # Before anything else: a subtree like the parameters is memory as a whole, whatever its leaves hold.
        parts = _parts(node, params)
        if parts is not None:  # no leaf where a parameter is hidden
            return [{index} for index, part in enumerate(parts) for _ in jax.tree.leaves(part)]
        if _is_leaf(node):
            is_key = _dtype_is(node, jax.dtypes.prng_key, jnp.unsignedinteger)
            return [None if is_key else shared]
        # Any other node is opened one level at a time, so that memory is found at whatever depth a wrapper puts it.
        children, _ = _open(node)
        memories = [parts for child in children if (parts := _parts(child, params)) is not None]
        # A leaf in the same node as memory, such as Adam's count, belongs to all of it.
        indexed = [pair for parts in memories for pair in enumerate(parts)]
        inside = {index for index, part in indexed if not is_placeholder(part)}
        # In a node without memory an integer is a clock.
        shared = inside if memories else None
        return [owners for child in children for owners in of_node(child, shared)]

    return of_node(state, None)


def _parts(node: PyTree, params: PyTree) -> list[PyTree] | None:
    """Return the part of ``node`` that is memory of each parameter; ``None`` if it is no memory."""
    if _is_leaf(params):
        # A lone array as the parameters has the structure of any leaf; recognize it by its values.
        if not _is_leaf(node) or not _dtype_is(node, jnp.inexact):
            return None
        return [node] if jnp.shape(node) != () or jnp.shape(params) == () else None
    parts = None if is_placeholder(node) else _align(params, node)
    if parts is None or all(_is_leaf(part) or is_placeholder(part) for part in parts):
        return parts
    # Several arrays for each parameter count as memory if all hold floating-point numbers.
    inexact = all(_dtype_is(leaf, jnp.inexact) for leaf in jax.tree.leaves(parts))
    # A chain's state is a tuple too, and would pass for a tuple of parameters with arrays each.
    return parts if inexact and not isinstance(params, tuple | list) else None


def _align(params: PyTree, node: PyTree) -> list[PyTree] | None:
    """Return the part of ``node`` for each parameter; ``None`` if they differ in structure.

    A part may itself be a tree. One ``MaskedNode`` may hide a whole subtree.
    """
    if is_placeholder(node):
        return [node] * len(jax.tree.leaves(params, is_leaf=is_placeholder))
    if is_placeholder(params) or _is_leaf(params):
        return [node]
    # In step: where the parameters have a leaf, the node may have anything.
    children, structure = _open(params)
    counterparts, actual = _open(node)
    if actual != structure:
        return None
    parts: list[PyTree] = []
    for pair in zip(children, counterparts, strict=True):
        aligned = _align(*pair)
        if aligned is None:
            return None
        parts += aligned
    return parts


def _open(tree: PyTree) -> tuple[list[PyTree], Any]:
    """Flatten ``tree`` by one level."""
    # Everything but the root counts as a leaf.
    return jax.tree.flatten(tree, is_leaf=lambda node: node is not tree)


def _is_leaf(tree: PyTree) -> bool:
    return jax.tree_util.all_leaves([tree])


def _dtype_is(leaf: Any, *kinds: Any) -> bool:
    return any(jnp.issubdtype(jnp.result_type(leaf), kind) for kind in kinds)
