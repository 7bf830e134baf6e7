"""Options of an evaluator: a frozen dataclass, filled from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Collection, Iterable
from typing import Any, Literal

from seal_jax.errors import UsageError, nearest


def add_arguments(options: type, parser: Any) -> None:
    """Add ``--field-name`` for every field of a dataclass; the help is the docstring's."""
    # Help is written once, in the docstring; a test checks that every field has an entry.
    texts = descriptions(options)
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        default = shown(field.default)
        # argparse formats help with %.
        help_text = texts.get(field.name, "").rstrip(".").replace("%", "%%")
        parser.add_argument(
            flag(field.name),
            dest=f"option:{field.name}",
            metavar=_metavar(hints[field.name]),
            help=f"{help_text} (default: {default or 'none'})",
        )


def read(options: type, parsed: argparse.Namespace) -> Any:
    """Return the dataclass filled from the command line.

    Raises:
      UsageError: a value of another type, or one that the dataclass refuses.
    """
    values = {
        name: convert(hint, text, flag(name))
        for name, hint in typing.get_type_hints(options).items()
        if (text := getattr(parsed, f"option:{name}")) is not None
    }
    # All generators of random numbers take these seeds.
    if not 0 <= values.get("seed", 0) < 2**32:
        raise UsageError(f"--seed={values['seed']} must lie in 0..{2**32 - 1}")
    return options(**values)


def check_least(options: Any, **least: float) -> None:
    """Raise unless each of the named options is finite and at least its bound; ``None`` passes.

    A label smoothing and tolerances are checked by their own rules, in whichever options have them.
    """
    for field, bound in least.items():
        value = getattr(options, field)
        if value is not None and not bound <= value < math.inf:
            raise UsageError(f"{flag(field)}={shown(value)} must be at least {bound:g}")
    smoothing = getattr(options, "label_smoothing", None)
    if smoothing is not None and not 0 <= smoothing < 1:
        raise UsageError(f"--label-smoothing={smoothing:g} must lie in [0, 1)")
    for field in ("tolerance", "batch_tolerance"):
        tolerance = getattr(options, field, 1.0)
        if not 0 < tolerance < math.inf:
            raise UsageError(f"{flag(field)}={tolerance:g} must be positive and finite")


def check_names(field: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise unless all names that an option was given are known."""
    for name in names:
        if name not in known:
            raise UsageError(
                f"{flag(field)}={name} must be one of {', '.join(known)}{nearest(name, known)}"
            )


def flag(field: str) -> str:
    """Return the command-line option of a field.

    >>> flag("image_size")
    '--image-size'
    """
    return "--" + field.replace("_", "-")


def convert(hint: Any, text: str, name: str) -> Any:
    """Return the value that a text means.

    >>> convert(tuple[int, ...], "1,5", "--shots"), convert(float | None, "none", "--beta")
    ((1, 5), None)
    """
    # "none" can be said only where ``None`` is allowed: elsewhere it is a name like any other.
    hint, optional = _without_none(hint)
    if optional and text.lower() == "none":
        return None
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
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
    # bool("false") is True.
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{name}={text} must be true or false")
        return text.lower() == "true"
    try:
        return hint(text)
    except ValueError:
        raise UsageError(f"{name}={text} must be of type {hint.__name__}") from None


def shown(value: Any) -> str:
    """Return a value as typed on the command line.

    >>> shown((1, 5)), shown(None), shown(True)
    ('1,5', 'none', 'true')
    """
    if isinstance(value, tuple):
        return ",".join(map(shown, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def descriptions(options: type) -> dict[str, str]:
    """Return the texts of the ``Attributes:`` section of a docstring, by name."""
    section = inspect.cleandoc(options.__doc__ or "").partition("Attributes:\n")[2]
    # The section ends at the next line that is not indented; an entry begins with two blanks and a name.
    section = re.split(r"^(?=\S)", section, flags=re.MULTILINE)[0]
    entries = re.split(r"^  (?=\w+: )", section, flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, _, text in (e.partition(": ") for e in entries)}


def _without_none(hint: Any) -> tuple[Any, bool]:
    """Return a type without ``None``, and whether it had it."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, False
    return next(part for part in typing.get_args(hint) if part is not type(None)), True


def _metavar(hint: Any) -> str:
    hint, _ = _without_none(hint)
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    names = {int: "N", float: "X", str: "NAME", bool: "true|false"}
    return f"{names[arguments[0]]},..." if arguments else names[hint]
