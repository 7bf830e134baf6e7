"""Tables of strings, and the statistics over seeds that stand in them."""

from __future__ import annotations

import csv
import html
import io
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

MISSING = "-"


class Table(NamedTuple):
    """A table as it is printed, shown in a page and written to a file.

    Attributes:
      title: one line.
      header: names of the columns.
      rows: a cell for every column; the first column is text, the others are set to the right.
      notes: sentences below the table.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

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
                cell.rjust(size) if index else cell.ljust(size)
                for index, (cell, size) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        lines.insert(1, "  ".join("-" * size for size in widths))
        notes = [
            line
            for note in self.notes
            for line in textwrap.wrap(note, width, subsequent_indent="  ")
        ]
        return "\n".join([self.title, "", *lines, *([""] if notes else []), *notes])

    def as_markdown(self) -> str:
        """Return the table in Markdown."""

        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        rule = ["---", *("---:" for _ in self.header[1:])]
        notes = [f"- {note}" for note in self.notes]
        table = [line(self.header), line(rule), *map(line, self.rows)]
        return "\n".join([f"**{self.title}**", "", *table, *([""] if notes else []), *notes])

    def as_html(self) -> str:
        """Return a ``<table>`` and its notes, all text escaped."""

        def row(cells: Iterable[str], tag: str) -> str:
            found = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
            return f"<tr>{found}</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return (
            f'<div class="scroll"><table><caption>{html.escape(self.title)}</caption>'
            f"<thead>{row(self.header, 'th')}</thead><tbody>{body}</tbody></table></div>"
            + (f'<ul class="notes">{notes}</ul>' if notes else "")
        )

    def as_csv(self) -> str:
        """Return the cells as CSV."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([self.header, *self.rows])
        return buffer.getvalue()


class Spread(NamedTuple):
    """Mean over seeds; sample standard deviation and half the 95 % interval, ``None`` for one seed."""

    mean: float
    std: float | None
    interval: float | None
    seeds: int

    def text(self, digits: int = 2, scale: float = 1.0) -> str:
        """Return ``mean ± interval``, both times ``scale``.

        >>> spread([0.5, 0.7]).text(1, scale=100)
        '60.0 ± 127.1'
        """
        if not math.isfinite(self.mean):
            return "not finite"
        mean = f"{scale * self.mean:.{digits}f}"
        return mean if self.interval is None else f"{mean} ± {scale * self.interval:.{digits}f}"


# Half the 95 % interval of a mean over n seeds, in standard errors: Student's t, n - 1 degrees of
# freedom. A table, since scipy takes a second to import; beyond it the normal's value is near enough.
_STUDENT = (
    (2, 12.7062),
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
    """Summarise one number a seed.

    The interval is Student's; between tabulated counts the next smaller one, which errs wide.

    >>> spread([1.0, 2.0, 3.0]).interval.__round__(4)
    2.4842
    """
    found = np.asarray(list(values), np.float64)
    if len(found) < 2:
        return Spread(float(found.mean()) if len(found) else math.nan, None, None, len(found))
    std = float(found.std(ddof=1))
    factor = next(t for count, t in reversed(_STUDENT) if count <= len(found))
    return Spread(float(found.mean()), std, factor * std / math.sqrt(len(found)), len(found))


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
