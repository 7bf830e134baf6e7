"""Rows of metrics: names to numbers, or to lists of numbers with one a seed."""

from __future__ import annotations

import statistics
from typing import Any

from seal_jax.errors import UsageError

Value = int | float | bool | list[float]
Row = dict[str, Any]
# As a file holds it: what is not finite is null.
Stored = float | int | bool | None | list[float | int | bool | None]


def plain(name: str, value: Any) -> Any:
    """Return the value as Python numbers; a UsageError names what cannot be."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    numbers = plain if isinstance(plain, list) else [plain]
    if not numbers or not all(isinstance(number, (bool, int, float)) for number in numbers):
        raise UsageError(
            f"metric {name!r} is {value!r}: use a number, or a list of numbers with one a seed"
        )
    return plain


def mean(value: Any) -> float:
    """Return the number, or the mean over the seeds."""
    return statistics.fmean(value) if isinstance(value, list) else float(value)
