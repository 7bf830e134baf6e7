"""Options of a kind between a frozen dataclass and the command line."""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from typing import Any, Literal

from seal_jax.errors import UsageError


def add_arguments(kind: type, to: Any) -> None:
    """Add ``--field-name`` for every field of a dataclass; the help is the docstring's."""
    texts = descriptions(kind)
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        default = shown(field.default)
        help_text = texts.get(field.name, "").rstrip(".").replace("%", "%%")
        to.add_argument(
            flag(field.name),
            dest=f"option:{field.name}",
            metavar=_metavar(hints[field.name]),
            help=f"{help_text} (default: {default or 'none'})",
        )


def read(kind: type, parsed: argparse.Namespace) -> Any:
    """Return the dataclass filled from the command line.

    Raises:
      UsageError: a value of another type, or one that the dataclass refuses.
    """
    hints = typing.get_type_hints(kind)
    given = {}
    for field in dataclasses.fields(kind):
        text = getattr(parsed, f"option:{field.name}")
        if text is not None:
            given[field.name] = convert(hints[field.name], text, flag(field.name))
    if not 0 <= given.get("seed", 0) < 2**32:  # what all generators of random numbers take
        raise UsageError(f"--seed={given['seed']} must lie in 0..{2**32 - 1}")
    return kind(**given)


def flag(field: str) -> str:
    """Return the option of a field.

    >>> flag("image_size")
    '--image-size'
    """
    return "--" + field.replace("_", "-")


def convert(hint: Any, text: str, name: str) -> Any:
    """Return the value that a text means.

    >>> convert(tuple[int, ...], "1,5", "--shots"), convert(float | None, "none", "--beta")
    ((1, 5), None)
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none":
            return None
        return convert(next(each for each in arguments if each is not type(None)), text, name)
    if origin is Literal:
        if text not in arguments:
            raise UsageError(f"{name}={text} must be one of {', '.join(map(str, arguments))}")
        return text
    if origin is tuple:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not parts:
            raise UsageError(f"{name}= is empty; give one or more, separated by commas")
        values = tuple(convert(arguments[0], part, name) for part in parts)
        for value in values:
            if values.count(value) > 1:  # and would count twice
                raise UsageError(f"{name} names {value} twice; name each once")
        return values
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{name}={text} must be true or false")
        return text.lower() == "true"
    try:
        return hint(text)
    except ValueError:
        raise UsageError(f"{name}={text} must be of type {hint.__name__}") from None


def shown(value: Any) -> str:
    """Return a value as one would type it.

    >>> shown((1, 5)), shown(None), shown(True)
    ('1,5', 'none', 'true')
    """
    if isinstance(value, tuple):
        return ",".join(map(shown, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def descriptions(kind: type) -> dict[str, str]:
    """Return the texts of the ``Attributes:`` section of a docstring, by name."""
    lines = (kind.__doc__ or "").expandtabs().splitlines()
    found: dict[str, str] = {}
    name, inside, indent = "", False, 0
    for line in lines:
        if line.strip() == "Attributes:":
            inside, indent = True, len(line) - len(line.lstrip()) + 2
            continue
        if not inside or not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        if depth < indent:
            break
        start = re.match(r"(\w+): (.*)", line.strip()) if depth == indent else None
        if start:
            name, text = start.groups()
            found[name] = text
        elif name:
            found[name] += " " + line.strip()
    return found


def _metavar(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _metavar(next(each for each in arguments if each is not type(None)))
    if origin is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    names = {int: "N", float: "X", str: "NAME", bool: "true|false"}
    return f"{names[arguments[0]]},..." if origin is tuple else names[hint]
