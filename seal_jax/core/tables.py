"""Tables of strings, and the statistics over seeds that stand in them."""

from __future__ import annotations

import csv
import html
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

MISSING = "-"
# The one meaning of ± in all tables and pages; a paper's own numbers keep theirs, and say so.
MEANING = (
    "±: half the 95 % interval of the mean over seeds (Student's t); of two seeds both, a to b."
)


class Table(NamedTuple):
    """A table as it is printed, shown in a page and written to a file.

    Attributes:
      title: one line.
      header: names of the columns.
      rows: a cell for every column.
      notes: sentences below the table.
      text_columns: columns that are text, set to the left; the others are set to the right.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    text_columns: Sequence[int] = (0,)

    @property
    def meaning(self) -> list[str]:
        """What ± means, where a cell has a mean over seeds."""
        cells = [cell for row in self.rows for cell in row]
        return (
            [MEANING]
            if any("±" in cell or re.search(r"\d to -?\d", cell) for cell in cells)
            else []
        )

    def as_text(self, width: int = 100) -> str:
        """Return the table for a terminal.

        >>> print(Table("T", ["run", "accuracy"], [["a", "1.0"]], ["A note."]).as_text())
        T
        <BLANKLINE>
        run  accuracy
        ---  --------
        a         1.0
        <BLANKLINE>
        A note.
        """
        cells = [list(self.header), *map(list, self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(size) if index in self.text_columns else cell.rjust(size)
                for index, (cell, size) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        lines.insert(1, "  ".join("-" * size for size in widths))
        heading = [self.title, *self.meaning]
        notes = [
            line
            for note in self.notes
            for line in textwrap.wrap(note, width, subsequent_indent="  ", break_on_hyphens=False)
        ]
        return "\n".join([*heading, "", *lines, *([""] if notes else []), *notes])

    def as_markdown(self) -> str:
        """Return the table in Markdown."""

        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        columns = range(len(self.header))
        rule = ["---" if index in self.text_columns else "---:" for index in columns]
        notes = [f"- {note}" for note in self.notes]
        table = [line(self.header), line(rule), *map(line, self.rows)]
        heading = "\n\n".join([f"**{self.title}**", *self.meaning])
        return "\n".join([heading, "", *table, *([""] if notes else []), *notes])

    def as_html(self) -> str:
        """Return a ``<table>`` and its notes, all text escaped."""

        def row(cells: Iterable[str], tag: str) -> str:
            found = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
            return f"<tr>{found}</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        meaning = "".join(f"<small>{html.escape(line)}</small>" for line in self.meaning)
        return (
            f'<div class="scroll"><table><caption>{html.escape(self.title)}{meaning}</caption>'
            f"<thead>{row(self.header, 'th')}</thead><tbody>{body}</tbody></table></div>"
            + (f'<ul class="notes">{notes}</ul>' if notes else "")
        )

    def as_csv(self) -> str:
        """Return the cells as CSV."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([self.header, *self.rows])
        return buffer.getvalue()


class Spread(NamedTuple):
    """Mean over seeds, and how far it can be trusted.

    Attributes:
      mean: over the seeds.
      std: sample standard deviation; ``None`` for one seed.
      interval: half the 95 % interval of the mean (Student's t); ``None`` for fewer than three seeds,
        since of two it is 12.7 standard errors and says nothing.
      low: the interval's lower end; of two seeds the smaller value, of one its value.
      high: the upper end, alike.
    """

    mean: float
    std: float | None
    interval: float | None
    low: float
    high: float

    def text(self, digits: int | None = 2, scale: float = 1.0) -> str:
        """Return ``mean ± interval``, of two seeds ``low to high``, of one its value.

        Args:
          digits: decimals, and more where these would round all of the interval away; ``None`` for
            two digits of the interval, or three of a value that has none.
          scale: a factor for all numbers.

        >>> spread([0.5, 0.7, 0.6]).text(2, scale=100), spread([0.5, 0.7]).text(1), spread([3]).text(1)
        ('60.00 ± 24.84', '0.5 to 0.7', '3.0')
        >>> spread([-0.004, 0.002, 0.001]).text(1), spread([4e-5, 5e-5]).text(1)
        ('0.000 ± 0.008', '(4.0 to 5.0)e-5')
        """
        if not (math.isfinite(self.mean) and math.isfinite(self.high - self.low)):
            return "not finite"
        single = self.std is None
        unsure = abs(scale) * (self.high - self.low) / 2
        largest = max(abs(scale * self.mean), unsure)
        power = _power(largest)
        if largest and not -3 <= power < 6:
            text = self.text(digits, scale / 10.0**power)
            return f"{text}e{power}" if single else f"({text})e{power}"
        decimals = max(digits or 0, 0)
        # An interval of less than a millionth is that of rounding.
        if unsure > 1e-6 * largest:
            decimals = max(decimals, (1 if digits is None else 0) - _power(unsure))
        elif digits is None or power < -digits:
            decimals = max(decimals, 2 - power)
        numbers = (self.low, self.high) if self.interval is None else (self.mean, self.interval)
        parts = [_rounded(scale * number, decimals) for number in numbers]
        return parts[0] if single else (" to " if self.interval is None else " ± ").join(parts)


def _power(value: float) -> int:
    """Return the power of ten of the first digit of a positive number."""
    return math.floor(math.log10(value)) if value else 0


def _rounded(value: float, decimals: int) -> str:
    """Return a number with so many decimals, and zero without a sign."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


# Half the 95 % interval of a mean over n seeds, in standard errors: Student's t, n - 1 degrees of
# freedom. A table, since scipy takes a second to import; beyond it the normal's value is near enough.
_STUDENT = (
    (3, 4.3027),
    (4, 3.1824),
    (5, 2.7764),
    (6, 2.5706),
    (7, 2.4469),
    (8, 2.3646),
    (9, 2.3060),
    (10, 2.2622),
    (12, 2.2010),
    (16, 2.1314),
    (24, 2.0687),
    (32, 2.0395),
    (64, 1.9983),
)


def spread(values: Iterable[float]) -> Spread:
    """Summarise one number per seed.

    The interval is Student's; between tabulated counts the next smaller one, which errs wide.

    >>> spread([1.0, 2.0, 3.0]).interval.__round__(4)
    2.4842
    """
    found = np.asarray(list(values), np.float64)
    if not len(found):
        return Spread(math.nan, None, None, math.nan, math.nan)
    mean, low, high = float(found.mean()), float(np.min(found)), float(np.max(found))
    if len(found) == 1:
        return Spread(mean, None, None, mean, mean)
    std = float(found.std(ddof=1))
    if len(found) == 2:
        return Spread(mean, std, None, low, high)
    factor = next(t for count, t in reversed(_STUDENT) if count <= len(found))
    half = factor * std / math.sqrt(len(found))
    return Spread(mean, std, half, mean - half, mean + half)


def grouped(
    rows: Iterable[Mapping[str, Any]], fields: Sequence[str]
) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """Group rows by the values of ``fields``, in the order in which they first come.

    >>> list(grouped([{"run": "a"}, {"run": "b"}, {"run": "a"}], ["run"]))
    [('a',), ('b',)]
    """
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(field) for field in fields), []).append(row)
    return found


def newest(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of each run's newest checkpoint.

    >>> [row["step"] for row in newest([{"run": "a", "step": 1}, {"run": "a", "step": 2}])]
    [2]
    """
    last = {run: max(row["step"] for row in own) for (run,), own in grouped(rows, ("run",)).items()}
    return [row for row in rows if row["step"] == last[row["run"]]]


def cell(value: Any, form: Callable[[Any], str] = str) -> str:
    """Return ``form(value)``, or the sign for what is missing."""
    return MISSING if value is None else form(value)
