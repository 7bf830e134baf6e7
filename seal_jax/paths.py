"""Names for the leaves of a parameter tree, and rules that select leaves by name.

The only place that turns key paths into strings such as ``layer3/block0/conv1/kernel``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import optax
from jax.tree_util import GetAttrKey, KeyPath

from seal_jax.errors import UsageError, nearest

T = TypeVar("T")


def is_placeholder(node: Any) -> bool:
    """Tell whether ``node`` stands for a parameter that ``optax.masked``/``partition`` hides."""
    return isinstance(node, optax.MaskedNode)


def name(path: KeyPath) -> str:
    """Return the path as names joined by ``/``.

    ``nnx.Optimizer`` calls ``init`` with paths that end in the variable's ``value`` attribute and
    ``update`` with paths that do not; the name is the same for both.

    >>> tree = {"conv1": {"kernel": 1.0}}
    >>> [name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    ['conv1/kernel']
    """
    if len(path) > 1 and isinstance(path[-1], GetAttrKey) and path[-1].name.lstrip("_.") == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Return ``(name, leaf)`` for every leaf of ``tree``, hidden parameters included."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_placeholder)
    return [(name(path), leaf) for path, leaf in flat]


def matches(pattern: str, path: str) -> bool:
    """Tell whether the regular expression matches ``path`` or a leading part of its components.

    >>> matches("layer1", "layer1/block0/conv1/kernel"), matches("layer1", "layer10/kernel")
    (True, False)
    >>> matches(".*/bias", "fc/bias")
    True
    """
    try:
        return re.fullmatch(f"(?:{pattern})(?:/.*)?", path) is not None
    except re.error as error:
        raise UsageError(f"path rule {pattern!r} is not a regular expression: {error}") from None


def with_parents(names: Sequence[str]) -> list[str]:
    """Return the names and every leading part of them: what a rule or a tree may spell.

    >>> with_parents(["fc/bias", "fc/kernel"])
    ['fc', 'fc/bias', 'fc/kernel']
    """
    parts = (path.split("/") for path in names)
    return list(
        dict.fromkeys("/".join(own[:size]) for own in parts for size in range(1, len(own) + 1))
    )


def first_match(
    rules: Sequence[tuple[str, T]], names: Sequence[str], default: T, *, strict: bool = True
) -> list[T]:
    """Return for each name the value of the first rule that matches it, else ``default``.

    ``strict=False`` lets rules match nothing, for when not every name is known.

    Raises:
      UsageError: a rule is the first match of no name; the message names the closest paths.

    >>> first_match([("fc/bias", 0), ("fc", 1)], ["conv1/kernel", "fc/bias", "fc/kernel"], -1)
    [-1, 0, 1]
    """
    values = [default] * len(names)
    used = [False] * len(rules)
    for index, path in enumerate(names):
        for number, (pattern, value) in enumerate(rules):
            if matches(pattern, path):
                values[index] = value
                used[number] = True
                break
    for (pattern, _), hit in zip(rules, used, strict=True):
        if strict and not hit:
            shadowed = any(matches(pattern, path) for path in names)
            why = "only paths that an earlier rule takes" if shadowed else "no parameter path"
            raise UsageError(
                f"path rule {pattern!r} matches {why}{nearest(pattern, with_parents(names))}"
            )
    return values
