"""Masks that split a network into the forget subtree (``True``) and the fit subtree (``False``).

A mask may be given as any of

* a pytree of ``bool`` with the structure of the parameters (or a prefix of it);
* a callable that maps the parameters to such a pytree;
* path rules: a path such as ``"layer1/conv/kernel"``, or a leading part of its components; a
  compiled regular expression (or a string that begins with ``re:``), which must match a path or a
  leading part in full; a sequence of these, or of ``(rule, bool)`` pairs of which the first that matches
  counts. A key that contains ``/`` is written as :func:`seal_jax.paths.escape` returns it;
* an NNX filter (``nnx.PathContains("fc")``, a ``Variable`` type, ...) or any predicate
  ``(path, leaf) -> bool``.

:func:`resolve` turns all of these into a pytree of ``bool``, at trace time: masks are static, and
may depend on the structure, the shapes and the dtypes of the parameters, but not on their values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from seal_jax import layers, paths
from seal_jax.errors import UsageError, nearest, shown

PyTree = Any
Mask = Any


def resolve(mask: Mask, params: PyTree) -> PyTree:
    """Return ``mask`` as a pytree of ``bool`` with the structure of ``params``.

    Parameters that ``optax.masked`` or ``optax.partition`` hides take part in the matching and stay
    hidden in the result.

    Raises:
      UsageError: the mask selects no parameter, or every parameter, or does not fit ``params``.

    >>> params = {"conv1": {"kernel": 1.0}, "fc": {"kernel": 2.0, "bias": 3.0}}
    >>> resolve("conv1", params)
    {'conv1': {'kernel': True}, 'fc': {'bias': False, 'kernel': False}}
    >>> resolve([("fc/bias", False), ("fc", True)], params)["fc"]
    {'bias': False, 'kernel': True}
    """
    if isinstance(mask, Fixed):
        return mask(params)
    leaves = paths.named_leaves(params)
    if not leaves:
        raise UsageError("mask: there are no parameters to select from")
    flags = flags_of(mask, params)
    if leaves[0][0] == "":
        raise UsageError("mask: the parameters are a single array, which no mask can split")
    # An error, not a warning: a mask that silently matches nothing trains plainly and looks like a result.
    if not any(flags) or all(flags):
        amount = "every parameter" if flags[0] else "no parameter"
        raise UsageError(f"mask {shown(mask)} selects {amount}; it must split {top_levels(params)}")
    return paths.map_named(lambda path, leaf, flag: flag, params, flags)


class Fixed:
    """A mask that is resolved again only for parameters of another structure, shape or dtype."""

    def __init__(self, mask: Mask):
        self.mask = mask
        self._last: tuple[Any, PyTree] = (None, None)

    def __call__(self, params: PyTree) -> PyTree:
        """Return the mask as a pytree of ``bool`` for ``params``; see :func:`resolve`."""
        leaves, structure = jax.tree.flatten(params, is_leaf=paths.is_placeholder)
        kinds = [(getattr(leaf, "shape", None), getattr(leaf, "dtype", None)) for leaf in leaves]
        # By shape and dtype too, since a mask may depend on them; on values it may not, and they may be traced.
        # Only the last answer is kept: `init` and all links of `update` ask for the same one after another.
        if self._last[0] != (structure, kinds):
            self._last = (structure, kinds), resolve(self.mask, params)
        return self._last[1]

    def __repr__(self) -> str:
        return repr(self.mask)


def fixed(mask: Mask) -> Fixed:
    """Return ``mask``, in any form, as one that is resolved once for all links of a chain.

    Every transformation of this package holds its mask like this and resolves it in ``init``, where
    errors in it show.

    >>> params = {"conv": jax.numpy.ones(2), "fc": jax.numpy.ones(2)}
    >>> calls = []
    >>> mask = fixed(lambda params: calls.append("resolved") or {"conv": True, "fc": False})
    >>> mask(params) == mask(params), calls
    (True, ['resolved'])
    """
    return mask if isinstance(mask, Fixed) else Fixed(mask)


def flags_of(mask: Mask, params: PyTree) -> list[bool]:
    """Return one ``bool`` per parameter, hidden ones included; all of them may be equal."""
    if isinstance(mask, Fixed):
        mask = mask.mask
    leaves = paths.named_leaves(params)
    names = [path for path, _ in leaves]
    # One placeholder may hide a whole subtree, with names that nobody knows here.
    strict = not any(paths.is_placeholder(leaf) for _, leaf in leaves)
    # First of the forms: a type or an NNX filter is callable as well, and must not be called with the parameters.
    if _is_nnx_filter(mask):
        # Imported for NNX's own filters alone: the library needs no Flax.
        from flax.nnx import filterlib

        return _predicate_flags(filterlib.to_predicate(mask), params)
    rules = [mask] if paths.is_rule(mask) else mask
    # Only if every entry is a rule: a list may also be the tree of bool of parameters in a list.
    if isinstance(rules, list | tuple) and rules and all(map(_is_rule, rules)):
        pairs = [(rule, True) if paths.is_rule(rule) else tuple(rule) for rule in rules]
        return paths.first_match(pairs, names, False, strict=strict)
    # A tree of bool may itself be callable: an Equinox module.
    if callable(mask) and not any(map(is_bool, jax.tree.leaves(mask))):
        # Two required arguments are (path, leaf), as of NNX predicates; one is the parameters.
        if count_arguments(mask) == 2:
            return _predicate_flags(mask, params)
        mask = mask(params)
    return _tree_flags(mask, leaves)


def _is_rule(rule: Any) -> bool:
    return paths.is_rule(rule) or (
        isinstance(rule, tuple | list)
        and len(rule) == 2
        and paths.is_rule(rule[0])
        and isinstance(rule[1], bool)
    )


def _is_nnx_filter(mask: Any) -> bool:
    if isinstance(mask, list | tuple):  # NNX reads a sequence of filters as "any of them"
        return any(_is_nnx_filter(part) for part in mask)
    return isinstance(mask, type) or type(mask).__module__.startswith("flax.nnx.filterlib")


def count_arguments(function: Callable) -> int:
    """Return how many positional arguments ``function`` requires."""
    parameters = inspect.signature(function).parameters.values()
    return sum(
        p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
        for p in parameters
    )


def _predicate_flags(predicate: Callable, params: PyTree) -> list[bool]:
    """Apply an NNX-style predicate to each variable (or bare leaf) and spread it over its arrays."""
    # NNX filters by type look at the ``Variable``. ``nnx.Optimizer`` hands ``update`` bare arrays, on
    # which they cannot decide; filters by path work in both places.
    flags: list[bool] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=paths.is_variable):
        # NNX writes the indices of lists as integers, as its predicates expect.
        keys = tuple(int(key) if key.isdigit() else key for key in paths.keys_of(path))
        arrays = jax.tree.leaves(leaf, is_leaf=paths.is_placeholder)
        flags.extend([bool(predicate(keys, leaf))] * len(arrays))
    return flags


def _tree_flags(mask: PyTree, leaves: list[tuple[str, Any]]) -> list[bool]:
    """Look each parameter up in a tree of ``bool`` (or a prefix of one) by its path."""
    # By paths and not by structure: a mask made of dicts fits NNX states, and a prefix fits a tree.
    entries = dict(paths.named_leaves(mask))
    for path, value in entries.items():
        where = path or "its root"
        if isinstance(value, jax.core.Tracer):
            raise UsageError(f"mask is traced at {where!r}; masks are static: use Python's bool")
        if not paths.is_placeholder(value) and not is_bool(value):
            raise UsageError(
                f"mask has {shown(value)} at {where!r}; a mask holds bool, True = forget"
            )
    flags, used = [], set()
    for path, leaf in leaves:
        if paths.is_placeholder(leaf):
            # One flag for a hidden subtree, of which the mask may list the parts: another
            # transformation has it, so that only "all of it" or "not all of it" can matter here.
            parts = [entry for entry in entries if entry != path and paths.below(entry, path)]
            if parts:
                used.update(parts)
                flags.append(all(entries[entry] is True for entry in parts))
                continue
        # The nearest parent with an entry: a prefix of a tree stands for all below it.
        owner = path
        while owner not in entries and owner:
            owner = owner.rpartition("/")[0]
        if owner not in entries:
            near = nearest(path, paths.with_parents(list(entries)))
            raise UsageError(f"mask has no entry for the parameter {path!r}{near}")
        used.add(owner)
        flags.append(is_bool(entries[owner]) and bool(entries[owner]))
    for path in entries:
        if path not in used:
            near = nearest(path, paths.with_parents([path for path, _ in leaves]))
            raise UsageError(f"mask has an entry {path!r} that is no parameter{near}")
    return flags


def is_bool(value: Any) -> bool:
    """Tell whether ``value`` is one bool, of Python, NumPy or JAX."""
    # numpy.bool counts too; its dtype is compared by name, which needs no import of NumPy.
    return isinstance(value, bool) or (
        getattr(value, "shape", None) == () and str(getattr(value, "dtype", "")) == "bool"
    )


def top_levels(params: PyTree) -> str:
    """Return the top-level names of ``params``, at most eight, for an error message."""
    tops = list(dict.fromkeys(path.split("/")[0] for path, _ in paths.named_leaves(params)))
    return ", ".join(tops if len(tops) <= 8 else [*tops[:7], "..."])


def before(order: Sequence[str], threshold: str) -> tuple[str, ...]:
    """Return rules for everything declared before ``threshold`` (SEAL's forget subtree).

    Args:
      order: path prefixes of the parameters from the input to the output, as the model declares
        them; together they cover the network.
      threshold: a prefix of the first entry that is not selected any more.

    >>> before(("conv1", "layer1/block0", "layer2/block0", "fc"), "layer2")
    ('conv1', 'layer1/block0')
    """
    return tuple(order[: _position(order, threshold)])


def since(order: Sequence[str], threshold: str) -> tuple[str, ...]:
    """Return rules for ``threshold`` and everything declared after it (LLF's forget subtree).

    >>> since(("conv1", "layer1/block0", "layer2/block0", "fc"), "layer2")
    ('layer2/block0', 'fc')
    """
    return tuple(order[_position(order, threshold) :])


def _position(order: Sequence[str], threshold: str) -> int:
    for index, entry in enumerate(order):
        if paths.below(entry, threshold):
            if index == 0:
                raise UsageError(
                    f"layer threshold {threshold!r} is the first of the order: no split"
                )
            return index
    raise UsageError(
        f"layer threshold {threshold!r} is not in the declared order{nearest(threshold, order)}"
    )


def invert(mask: Mask) -> Callable[[PyTree], PyTree]:
    """Return the mask with the forget and the fit subtree swapped.

    >>> resolve(invert("conv1"), {"conv1": 1.0, "fc": 2.0})
    {'conv1': False, 'fc': True}
    """
    # `resolve`, so that a mask that selects nothing is reported as itself, not as its inverse.
    return lambda params: jax.tree.map(lambda flag: not flag, resolve(mask, params))


def restrict(mask: Mask, *, norms: bool = False, biases: bool = True) -> Callable[[PyTree], PyTree]:
    """Return ``mask`` without the normalisation parameters, or without the biases.

    See :func:`seal_jax.layers.roles` for which are which.

    >>> params = {"bn": {"scale": jax.numpy.ones(2)}, "fc": {"kernel": jax.numpy.ones((2, 2))}}
    >>> resolve(restrict(lambda p: jax.tree.map(lambda _: True, p)), params)
    {'bn': {'scale': False}, 'fc': {'kernel': True}}
    """

    def restricted(params: PyTree) -> PyTree:
        # `flags_of`, not `resolve`: before the restriction the mask may well take everything.
        wanted = {"kernel": True, "bias": biases, "norm": norms}
        flags = [
            flag and wanted[role]
            for flag, role in zip(flags_of(mask, params), layers.roles(params), strict=True)
        ]
        return paths.unflatten_like(params, flags)

    return restricted


class Report(NamedTuple):
    """Counts of the tensors and parameters that a mask selects."""

    tensors: int
    all_tensors: int
    parameters: int
    all_parameters: int

    def __str__(self) -> str:
        return (
            f"{self.tensors} of {self.all_tensors} tensors, "
            f"{self.parameters:,} of {self.all_parameters:,} parameters"
        )


def report(mask: Mask, params: PyTree) -> Report:
    """Count what ``mask`` selects from ``params`` (arrays or ``jax.ShapeDtypeStruct``).

    >>> str(report("fc", {"conv1": jax.numpy.ones(3), "fc": jax.numpy.ones((2, 5))}))
    '1 of 2 tensors, 10 of 13 parameters'
    """
    flags = jax.tree.leaves(resolve(mask, params))
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    chosen = [size for flag, size in zip(flags, sizes, strict=True) if flag]
    return Report(len(chosen), len(sizes), sum(chosen), sum(sizes))
