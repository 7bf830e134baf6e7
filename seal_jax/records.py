"""Strict reading of JSON files and nested mappings into declared schemas.

A schema is a type: a dataclass (fields it does not have are refused), a ``TypedDict`` (its fields are
required, others may be there), ``Mapping[str, X]``, ``list[X]``, ``Literal``, a union or a plain type.
Whatever a file holds, a reader gets values of these types, or the user one line that names the file,
the field and its value.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from seal_jax.errors import UsageError, nearest, shown

T = TypeVar("T")

MAX_BYTES = 2**30
MAX_DEPTH = 32  # our own files have under ten levels; Python's parser stops at about a thousand
MAX_INTEGER = 2**63 - 1  # NumPy converts no larger one

Scalar = bool | int | float | str | None


def load(path: Path, schema: Any, remedy: str, *, finite: bool = True) -> Any:
    """Return the value of a JSON file, checked against ``schema``.

    ``finite`` refuses NaN, infinity and numbers beyond float64.

    Raises:
      UsageError: the file cannot be read, or holds something else; ends in the ``remedy``.
    """
    try:
        size = path.stat().st_size
        # Refused before it is read: a file of the wrong kind could fill the memory.
        if size > MAX_BYTES:
            raise UsageError(f"it has {size:,} bytes, more than {MAX_BYTES:,}")
        return parse(path.read_bytes(), schema, finite=finite)
    except (OSError, UsageError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path} cannot be read: {reason}; {remedy}") from None


def lines(path: Path, schema: Any, *, finite: bool = True) -> Iterator[tuple[bytes, Any, str]]:
    """Yield each line of a file of JSON lines, its value, and what is wrong with it (or "").

    Raises:
      UsageError: the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    # What follows the last newline is yielded too: nothing, or a line that a kill cut short.
    for line in data.split(b"\n"):
        try:
            yield line, parse(line, schema, finite=finite), ""
        except UsageError as error:
            yield line, None, str(error)


def parse(text: bytes | str, schema: Any, *, finite: bool = True) -> Any:
    """Return the value that a JSON text means, checked against ``schema``.

    >>> parse('{"seeds": 2}', Mapping[str, int])
    {'seeds': 2}
    >>> parse('{"seeds": null}', Mapping[str, int])
    Traceback (most recent call last):
    ...
    seal_jax.errors.UsageError: seeds = None must be of type int

    Raises:
      UsageError: it is not JSON, is nested too deep, or does not fit.
    """
    # Python reads NaN, Infinity and 1e999 as floats, which JSON does not know.
    hooks: dict[str, Any] = {"parse_constant": _finite, "parse_float": _finite} if finite else {}
    try:
        value = json.loads(text, **hooks)
    except RecursionError:
        raise UsageError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise UsageError(f"it is not JSON ({str(error).partition(';')[0]})") from None
    if _is_deeper(value, MAX_DEPTH):
        raise UsageError(f"it is nested more than {MAX_DEPTH} levels deep")
    # Half a pair reads as a string that no file can be written with; few texts need the slow check.
    if "\\ud" in (text if isinstance(text, str) else text.decode("latin-1")).lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UsageError("it holds half of a surrogate pair") from None
    return check(schema, value, "")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(
        _is_deeper(part, levels - 1) for part in below if isinstance(part, dict | list)
    )


# Settings of earlier run folders and configs that were renamed.
RENAMED = {
    "method.rate": "method.fraction in wels (to resume a run, with method.exact = False) and "
    "method.keep in kels"
}


def renamed(path: str) -> str:
    """Return the part of an error message about a setting that was renamed, else ""."""
    return f", it is now {RENAMED[path]}: rename it" if path in RENAMED else ""


def read(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Return the dataclass ``kind`` filled from ``values``, checking names and types.

    >>> from seal_jax.core.settings import Train
    >>> read(Train, {"seeds": 2}).seeds
    2
    >>> read(Train, {"seads": 2}, where="train")
    Traceback (most recent call last):
    ...
    seal_jax.errors.UsageError: train.seads is not a setting; nearest: seeds, seed, ...
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{where or 'it'} = {shown(values)} must be a section of settings")
    hints = typing.get_type_hints(kind)
    filled: dict[str, Any] = {}
    for field, value in values.items():
        path = _join(where, field)
        # Refused, not ignored: a misspelt setting would otherwise train with its default.
        if field not in hints:
            raise UsageError(
                f"{path} is not a setting{renamed(path) or nearest(str(field), hints)}"
            )
        filled[field] = check(hints[field], value, path)
    return kind(**filled)


def check(hint: Any, value: Any, path: str) -> Any:
    """Return ``value`` as the type ``hint``; integers are taken as floats, nothing else is converted.

    Raises:
      UsageError: it has another type; the message names ``path``.
    """
    if hint is Any:
        return value
    # Arrays pass unread, as in `errors.check_number`: a traced one has no value yet.
    if hint in (int, float) and hasattr(value, "aval"):
        return value.astype("float32") if hint is float and value.dtype.kind == "i" else value
    if dataclasses.is_dataclass(hint):
        return read(typing.cast(type, hint), value, path)
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    must = ""
    if typing.is_typeddict(hint):
        if isinstance(value, Mapping):
            fields = dict(value)
            for field, kind in typing.get_type_hints(hint).items():
                if field in value:
                    fields[field] = check(kind, value[field], _join(path, field))
                elif field in hint.__required_keys__:
                    raise UsageError(f"{_join(path, field)} is missing")
            return fields
        must = "be a mapping"
    elif origin is Literal:
        if value in choices:
            return value
        must = f"be one of {', '.join(map(str, choices))}"
    elif origin in (typing.Union, types.UnionType):
        if type(value) in choices:  # first: an integer is not to become a float
            return None if value is None else check(type(value), value, path)
        for choice in choices:
            if choice is not type(None):
                try:
                    return check(choice, value, path)
                except UsageError as error:
                    # An optional value has one real choice, whose message is more exact than the list of types.
                    must = str(error).rpartition(" must ")[2]
        if len(choices) > 2 or type(None) not in choices:
            names = [getattr(choice, "__name__", str(choice)) for choice in choices]
            must = f"be of type {' or '.join('none' if n == 'NoneType' else n for n in names)}"
    elif origin is not None and issubclass(origin, Mapping):
        if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            return {
                name: check(choices[1], part, _join(path, name)) for name, part in value.items()
            }
        must = "be a mapping of names"
    elif origin is list:
        if isinstance(value, list):
            # Rows of metrics are lists of floats, and many; integers have a bound to be checked.
            if {*map(type, value)} <= {*typing.get_args(choices[0])} - {int}:
                return value
            return [check(choices[0], part, f"{path}[{i}]") for i, part in enumerate(value)]
        must = "be a list"
    elif hint in (int, float) and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) <= MAX_INTEGER:
            return hint(value)
        must = f"be at most {MAX_INTEGER:,} in size"
    # True is an int to Python, and to nobody who writes a config.
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise UsageError(
        f"{path or 'it'} = {shown(value)} must {must or f'be of type {hint.__name__}'}"
    )


def _join(where: str, field: str) -> str:
    return f"{where}.{field}" if where else str(field)
