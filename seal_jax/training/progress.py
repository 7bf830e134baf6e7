"""A progress bar with an estimate of what is left."""

from __future__ import annotations

import math
import sys
import time
from typing import Any, TextIO

import jax
from tqdm import tqdm

from seal_jax.training.metrics import Value, mean


class Progress:
    """A progress bar on stderr: done, left, speed and the newest values.

    On a terminal it is a tqdm bar; elsewhere one plain line now and then, which a log file can hold.

    Args:
      total: the step the run ends at.
      initial: the step it starts or resumes from.
      unit: what is counted.
      enabled: whether to print; by default only on the first process.
      every: seconds between two plain lines.
      stream: where to print; stderr by default.
    """

    _DONE = "{n_fmt}/{total_fmt} {unit}s ({percentage:.0f}%)"
    _LINE = _DONE + " [{elapsed}<{remaining}, {rate_fmt}{postfix}]"

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
        if enabled is None:
            enabled = jax.process_index() == 0
        self._stream = sys.stderr if stream is None else stream
        self._total, self._initial, self._step = total, initial, initial
        self._unit = unit
        self._every, self._begin = every, time.monotonic()
        self._next = self._begin + every if enabled else math.inf
        self._unprinted = False
        self._bar: Any = None
        self._postfix = ""
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                total=total, initial=initial, file=self._stream, unit=unit, dynamic_ncols=True
            )
            self._next = math.inf

    def update(self, step: int, **latest: Value) -> None:
        """Show that ``step`` steps are done, and the newest values (of a list, the mean)."""
        self._step = step
        if latest:
            self._postfix = ", ".join(f"{name}={mean(value):.4g}" for name, value in latest.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._postfix, refresh=False)
            self._bar.update(step - self._bar.n)
        self._unprinted = self._next < math.inf
        if time.monotonic() >= self._next:
            self._print_line()

    def close(self) -> None:
        """Leave the last state printed."""
        if self._bar is not None:
            self._bar.close()
        elif self._unprinted:
            self._print_line()
        self._next = math.inf

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print_line(self) -> None:
        now = time.monotonic()
        line = tqdm.format_meter(
            self._step,
            self._total,
            now - self._begin,
            unit=self._unit,
            initial=self._initial,
            postfix=self._postfix,
            bar_format=self._LINE,
        )
        print(line, file=self._stream, flush=True)
        self._next = now + self._every
        self._unprinted = False
