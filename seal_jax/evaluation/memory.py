"""How much of a device's memory a program may take, and how much it will."""

from __future__ import annotations

from typing import Any


def written(jaxpr: Any) -> int:
    """Return the bytes of all values that a traced program computes, those of a loop once.

    >>> import jax
    >>> written(jax.make_jaxpr(lambda x: (x + 1) * 2)(jax.numpy.zeros(3)).jaxpr)
    24
    """
    total = 0
    for equation in jaxpr.eqns:
        inner = [
            getattr(value, "jaxpr", value)
            for value in equation.params.values()
            if hasattr(getattr(value, "jaxpr", value), "eqns")
        ]
        if inner:
            total += sum(map(written, inner))
        else:
            total += sum(out.aval.size * out.aval.dtype.itemsize for out in equation.outvars)
    return total


def budget(device: Any) -> int:
    """Return how many bytes of a device to fill: a third of what it has, or 256 MiB (CPU)."""
    about = device.memory_stats() or {}
    return about["bytes_limit"] // 3 if "bytes_limit" in about else 2**28
