"""A progress bar with an estimate of what is left."""

from __future__ import annotations

import math
import sys
import time
from contextlib import AbstractContextManager
from typing import TextIO

import jax
from tqdm import tqdm

from seal_jax.training.loggers import Value, mean

# tqdm's own line without the bar.
_LINE = (
    "{n_fmt}/{total_fmt} {unit}s ({percentage:.0f}%) [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
)


class Progress(AbstractContextManager["Progress"]):
    """A progress bar on stderr: done, left, speed and the newest values.

    On a terminal it is a tqdm bar; elsewhere a plain line ``every`` so many seconds, which a log file
    can hold. By default only the first process prints.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        unit: str = "step",
        enabled: bool | None = None,
        every: float = 30.0,
        stream: TextIO | None = None,
    ) -> None:
        enabled = jax.process_index() == 0 if enabled is None else enabled
        self._stream = sys.stderr if stream is None else stream
        bar = {"total": total, "initial": initial, "unit": unit}
        terminal = enabled and self._stream.isatty()
        self._bar = tqdm(**bar, file=self._stream, disable=not terminal, dynamic_ncols=True)
        # Elsewhere tqdm only formats: it would redraw one line, with carriage returns.
        self._line = {**bar, "bar_format": _LINE}
        self._step, self._postfix = initial, ""
        self._every, self._begin = every, time.monotonic()
        # Infinity: no plain line ever, on a terminal or in a process that does not print.
        self._next = self._begin + every if enabled and not terminal else math.inf
        self._unprinted = False

    def update(self, step: int, **latest: Value) -> None:
        """Show that ``step`` steps are done, and the newest values (of a list, the mean)."""
        if latest:
            self._postfix = ", ".join(f"{name}={mean(v):.4g}" for name, v in latest.items())
        self._bar.set_postfix_str(self._postfix, refresh=False)
        self._bar.update(step - self._step)
        self._step = step
        self._unprinted = self._next < math.inf
        if time.monotonic() >= self._next:
            self._print_line()

    def close(self) -> None:
        """Leave the last state printed."""
        self._bar.close()
        if self._unprinted:
            self._print_line()
        self._next = math.inf

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print_line(self) -> None:
        now = time.monotonic()
        elapsed = now - self._begin
        line = tqdm.format_meter(self._step, elapsed=elapsed, postfix=self._postfix, **self._line)
        print(line, file=self._stream, flush=True)
        self._next, self._unprinted = now + self._every, False
