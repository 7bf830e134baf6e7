"""Names for the leaves of a parameter tree, and rules that select leaves by name.

The only place that turns key paths into strings such as ``layer3/block0/conv1/kernel``. A "hidden"
leaf is an ``optax.MaskedNode``, which ``optax.masked`` and ``optax.partition`` put in the place of
the parameters that belong to another transformation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar
from urllib.parse import unquote

import jax
import optax
from jax.tree_util import KeyPath

from seal_jax.errors import UsageError, nearest

PyTree = Any
T = TypeVar("T")
Rule = str | re.Pattern[str]


def is_placeholder(node: Any) -> bool:
    """Tell whether ``node`` is a hidden leaf."""
    return isinstance(node, optax.MaskedNode)


def is_rule(node: Any) -> bool:
    """Tell whether ``node`` is a path or a compiled regular expression."""
    text = node.pattern if isinstance(node, re.Pattern) else node
    return isinstance(text, str)


def is_variable(node: Any) -> bool:
    """Tell whether ``node`` is an NNX ``Variable``, or hidden."""
    # By a method of NNX's class, in all of its versions, so that Flax need not be imported.
    return is_placeholder(node) or hasattr(type(node), "create_value")


def escape(key: str) -> str:
    """Return ``key`` as it is written in a path: ``/`` as ``%2F`` and ``%`` as ``%25``.

    >>> escape("net/~/linear")
    'net%2F~%2Flinear'
    """
    # `%` first, or the one in %2F would be escaped again.
    return key.replace("%", "%25").replace("/", "%2F")


def keys_of(path: KeyPath) -> tuple[str, ...]:
    """Return the keys of ``path`` as strings."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def name(path: KeyPath) -> str:
    """Return the escaped keys of ``path`` joined by ``/``: a name that no other leaf has.

    >>> tree = {"conv1": {"kernel": 1.0}, "a/b": 2.0}
    >>> [name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    ['a%2Fb', 'conv1/kernel']
    """
    return "/".join(map(escape, keys_of(path)))


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Return ``(name, leaf)`` for every leaf of ``tree``, hidden leaves included.

    >>> named_leaves({"conv1": {"kernel": 1.0, "bias": 2.0}})
    [('conv1/bias', 2.0), ('conv1/kernel', 1.0)]
    """
    # ``nnx.Optimizer`` calls ``init`` with Variables, whose key paths have one key more for the
    # array in them, and ``update`` with bare arrays. Drop that key, so that both have the same names.
    # A Variable may hold a whole tree: the keys below the dropped one stay.
    return [
        (name((*path, *inner[1:])), leaf)
        for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable)
        for inner, leaf in jax.tree_util.tree_leaves_with_path(node, is_leaf=is_placeholder)
    ]


def unflatten_like(tree: PyTree, leaves: Iterable[Any]) -> PyTree:
    """Return a tree with the structure of ``tree`` and these leaves, one for each hidden leaf too."""
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_placeholder), leaves)


def map_named(function: Callable[..., Any], tree: PyTree, *values: Iterable) -> PyTree:
    """Return a tree like ``tree`` of ``function(path, leaf, *values)``; hidden leaves stay hidden.

    Args:
      function: maps the name of a leaf, the leaf, and one entry of each of ``values`` to a new leaf.
      tree: any pytree.
      *values: sequences with one entry for every leaf of ``tree``, hidden leaves included.

    >>> map_named(lambda path, leaf: f"{path} = {leaf}", {"fc": {"bias": 1.0}})
    {'fc': {'bias': 'fc/bias = 1.0'}}
    """
    return unflatten_like(
        tree,
        [
            leaf if is_placeholder(leaf) else function(path, leaf, *entries)
            for (path, leaf), *entries in zip(named_leaves(tree), *values, strict=True)
        ],
    )


def check_tree(field: str, tree: Any, like: Any, name: str = "the parameters") -> None:
    """Raise unless ``tree`` has the structure of ``like``, which messages call ``name``."""
    structures: list[Any] = [jax.tree.structure(node) for node in (tree, like)]
    if structures[0] != structures[1]:
        names, expected = ({path for path, _ in named_leaves(node)} for node in (tree, like))
        # The names can agree where the nodes differ, such as a list and a tuple of the same length.
        differ = ", ".join(sorted(names ^ expected)[:3]) or "another kind of node"
        raise UsageError(f"{field} must be a tree like {name}; they differ in {differ}")


def aligned(field: str, tree: PyTree, params: PyTree) -> list[tuple[str, Any, Any]]:
    """Return ``(name, leaf, param)`` of all that is not hidden; raise if the structures differ."""
    check_tree(field, tree, params)
    pairs = zip(named_leaves(tree), named_leaves(params), strict=True)
    return [(path, leaf, param) for (path, leaf), (_, param) in pairs if not is_placeholder(leaf)]


def below(path: str, layer: str) -> bool:
    """Tell whether ``path`` is ``layer`` or in it.

    >>> below("layer1/conv/kernel", "layer1"), below("layer10/kernel", "layer1")
    (True, False)
    """
    # With the slash: layer1 must not take layer10.
    return path == layer or path.startswith(f"{layer}/")


def matches(rule: Rule, path: str) -> bool:
    """Tell whether ``rule`` takes ``path`` or a leading part of its components.

    A string is compared exactly. A regular expression, compiled or in a string that begins with
    ``re:``, must match in full.

    >>> matches("layer.1", "layer.1/kernel"), matches("layer.1", "layer11/kernel")
    (True, False)
    >>> matches(re.compile(".*/bias"), "fc/bias"), matches("re:fc|conv", "fc/bias")
    (True, True)
    """
    if isinstance(rule, str):
        if not rule.startswith("re:"):
            return below(path, rule)
        try:
            rule = re.compile(rule[3:])
        except re.error as error:
            raise UsageError(f"path rule {rule!r} is not a regular expression: {error}") from None
    return any(rule.fullmatch(part) for part in with_parents([path]))


def with_parents(names: Sequence[str]) -> list[str]:
    """Return the names and every leading part of them: what a rule or a tree may spell.

    >>> with_parents(["fc/bias", "fc/kernel"])
    ['fc', 'fc/bias', 'fc/kernel']
    """
    parts = (path.split("/") for path in names)
    return list(
        dict.fromkeys("/".join(keys[:size]) for keys in parts for size in range(1, len(keys) + 1))
    )


def first_match(
    rules: Sequence[tuple[Rule, T]], names: Sequence[str], default: T, *, strict: bool = True
) -> list[T]:
    """Return for each name the value of the first rule that matches it, else ``default``.

    A string that no name matches is compared with the names as they read without escapes.
    ``strict=False`` lets rules match nothing, for when not every name is known.

    Raises:
      UsageError: a rule is the first match of no name; the message names the closest paths.

    >>> first_match([("fc/bias", 0), ("fc", 1)], ["conv1/kernel", "fc/bias", "fc/kernel"], -1)
    [-1, 0, 1]
    """
    values = [default] * len(names)
    free = set(range(len(names)))
    for rule, value in rules:
        hits = {index for index, path in enumerate(names) if matches(rule, path)}
        # Haiku's keys contain slashes. Where no other leaf has that very name they need no escape.
        hits = hits or {index for index, path in enumerate(names) if matches(rule, unquote(path))}
        # A rule without effect is a spelling mistake, or comes after a broader one.
        if strict and not hits & free:
            why = "only paths that an earlier rule takes" if hits else "no parameter path"
            shown = rule if isinstance(rule, str) else f"re:{rule.pattern}"
            hint = ""
            # A plain string with such characters was probably meant as a pattern.
            if not hits and rule == shown and re.search(r"[*+?|^$\\(){}\[\]]", shown):
                hint = f"; for a pattern write re.compile({shown!r}) or {'re:' + shown!r}"
            near = nearest(shown, with_parents(names))
            raise UsageError(f"path rule {shown!r} matches {why}{hint}{near}")
        for index in hits & free:
            values[index] = value
        # The first match counts: later rules see only the names that are left.
        free -= hits
    return values
