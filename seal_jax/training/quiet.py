"""Keeps what Orbax says in a normal run off stderr."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from absl import logging as absl_logging

# Part of the path of Orbax's source files.
_ORBAX = os.path.join("orbax", "checkpoint", "")


def quiet_orbax() -> None:
    """Keep Orbax's log lines off stderr; ``absl.logging.set_verbosity("info")`` shows them.

    What it warns of in a normal run is normal. When one array cannot be read or written Orbax closes
    its event loop under the others, and each of those complains; the one error or warning that this
    module gives instead would be lost among hundreds of lines.
    """
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).addFilter(_not_from_orbax)
    outer = sys.unraisablehook
    if getattr(outer, "func", None) is not _unraisable:
        sys.unraisablehook = functools.partial(_unraisable, outer)


def _wanted_on_stderr(source: str) -> bool:
    verbose = absl_logging.get_verbosity() > absl_logging.WARNING
    return verbose or not (_ORBAX in source or "tensorstore" in source)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return _wanted_on_stderr(record.pathname if record.name == "absl" else record.getMessage())


def _unraisable(outer: Callable[[Any], Any], unraisable: Any) -> None:
    """Pass on what is neither a coroutine of Orbax's nor TensorStore's answer to a closed loop."""
    code = getattr(unraisable.object, "cr_code", None)
    closed = unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
    if _wanted_on_stderr("tensorstore" if closed else code.co_filename if code else ""):
        outer(unraisable)
