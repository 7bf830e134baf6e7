"""Tables, the columns that evaluations declare for them, and statistics over seeds."""

from __future__ import annotations

import bisect
import csv
import html
import io
import itertools
import math
import operator
import re
import textwrap
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Record = Mapping[str, Any]

MISSING = "-"
# The one meaning of ± in all tables and pages; a paper's own numbers keep theirs, and say so.
MEANING = (
    "±: half the 95 % interval of the mean over seeds (Student's t); of two seeds both, a to b."
)
# Columns of a grouped table that fit on a sheet of paper; further groups follow below.
MOST_COLUMNS = 9


class Table(NamedTuple):
    """A table as it is printed, shown in a page and written to a file.

    Attributes:
      title: one line.
      header: names of the columns.
      rows: a cell for every column; the first column is text, the others are right-aligned.
      notes: sentences below the table.
      groups: titles over the columns after the first, each with the number of its columns. Where the
        table is too wide, further groups follow below.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    groups: Sequence[tuple[str, int]] = ()

    @classmethod
    def of_groups(
        cls,
        title: str,
        columns: Sequence[Column],
        groups: Iterable[Sequence[Record]],
        notes: Sequence[str] = (),
    ) -> Table:
        """Return a table with a row for each group of records, usually those of the seeds.

        A column that is optional is left out where no group has a value.

        >>> rows = [{"run": "a", "loss": 1.0}, {"run": "a", "loss": 2.0}, {"run": "b", "loss": 3.0}]
        >>> columns = [shared("run"), SEEDS, seed_mean("mean loss", "loss", 1)]
        >>> Table.of_groups("T", columns, grouped(rows, ["run"]).values()).rows
        [['a', '2', '1.0 to 2.0'], ['b', '1', '3.0']]
        """
        groups = list(groups)
        cells = [(column, [column.text(records) for records in groups]) for column in columns]
        cells = [item for item in cells if not item[0].optional or {*item[1]} - {MISSING}]
        rows = list(map(list, zip(*(texts for _, texts in cells), strict=True)))
        return cls(title, [column.title for column, _ in cells], rows, notes)

    @property
    def meaning(self) -> list[str]:
        """What ± means, where a cell has a mean over seeds."""
        cells = itertools.chain(*self.rows)
        # Two seeds are shown as "a to b", which needs the explanation as much as ± does.
        return [MEANING] if any(re.search(r"±|\d to -?\d", cell) for cell in cells) else []

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
        if self.groups:
            lines = self._grouped_lines(width)
        else:
            lines = aligned([self.header, *self.rows], range(1, len(self.header)))
        notes = [
            line
            for note in self.notes
            for line in textwrap.wrap(note, width, subsequent_indent="  ", break_on_hyphens=False)
        ]
        parts = [[self.title, *self.meaning], lines, notes]
        return "\n\n".join("\n".join(part) for part in parts if part)

    def _grouped_lines(self, width: int) -> list[str]:
        if not self.rows:
            return []
        # The first column stands before every block of groups, with a blank beside the groups' titles.
        first = ["", self.header[0], *(row[0] for row in self.rows)]
        size = max(map(len, first))
        groups = self._groups()
        blocks = _fit((_lines_of(*group, "  ") for group in groups), width - size)
        if len(blocks) > 1:  # with fewer blanks they may fit side by side
            narrow = _fit((_lines_of(*group, " ") for group in groups), width - size)
            blocks = narrow if len(narrow) == 1 else blocks
        lines: list[str] = []
        for block in blocks:
            parts = [[text.rjust(size) for text in first], *block]
            body = [" │ ".join(row).rstrip() for row in zip(*parts, strict=True)]
            rule = "─┼─".join("─" * len(part[0]) for part in parts)
            lines += ["", *body[:2], rule, *body[2:]]
        return lines[1:]

    def _groups(self) -> list[tuple[str, list[tuple[str, ...]]]]:
        """Return the title of each group with its columns, which begin with their headings."""
        # Transposed: one tuple per column, without the first column, which is in no group.
        columns = iter(list(zip(self.header, *self.rows, strict=True))[1:])
        return [(title, list(itertools.islice(columns, n))) for title, n in self.groups]

    def as_html(self) -> str:
        """Return a ``<table>`` and its notes, all text escaped."""
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        notes = f'<ul class="notes">{notes}</ul>' if notes else ""
        if self.groups:
            paragraphs = [self.title, *self.meaning]
            heading = "".join(f"<p>{html.escape(text)}</p>" for text in paragraphs)
            return heading + "".join(self._html_blocks()) + notes
        body = "".join(f"<tr>{_html_cells('td', row)}</tr>" for row in self.rows)
        meaning = "".join(f"<small>{html.escape(line)}</small>" for line in self.meaning)
        return (
            f'<div class="scroll"><table><caption>{html.escape(self.title)}{meaning}</caption>'
            f"<thead><tr>{_html_cells('th', self.header)}</tr></thead><tbody>{body}</tbody>"
            f"</table></div>{notes}"
        )

    def _html_blocks(self) -> Iterator[str]:
        groups = self._groups() if self.rows else []
        widest = max((len(columns) for _, columns in groups), default=1)
        # This many groups are side by side; the others follow in further tables below.
        across = max(1, MOST_COLUMNS // widest)
        for start in range(0, len(groups), across):
            block = groups[start : start + across]
            titles = "".join(
                f'<th class="group" colspan="{len(columns)}">{html.escape(title)}</th>'
                for title, columns in block
            )
            # Cells of one row of all groups; the first row has the headings.
            parts = [zip(*columns, strict=True) for _, columns in block]
            headings, *rows = zip(*parts, strict=True)
            body = "".join(
                f"<tr><th>{html.escape(row[0])}</th>{_html_groups('td', cells)}</tr>"
                for row, cells in zip(self.rows, rows, strict=True)
            )
            yield (
                '<div class="scroll"><table class="grouped"><thead>'
                f'<tr><th rowspan="2">{html.escape(self.header[0])}</th>{titles}</tr>'
                f"<tr>{_html_groups('th', headings)}</tr></thead>"
                f"<tbody>{body}</tbody></table></div>"
            )

    def as_csv(self) -> str:
        """Return the cells as CSV."""
        return csv_text([self.header, *self.rows])


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Return rows as CSV, the first one the header; ``None`` is an empty cell.

    >>> csv_text([["run", "accuracy"], ["a, b", None]])
    'run,accuracy\\n"a, b",\\n'
    """
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _html_cells(tag: str, texts: Iterable[str], first: str = "") -> str:
    return "".join(
        f"<{tag}{'' if index else first}>{html.escape(text)}</{tag}>"
        for index, text in enumerate(texts)
    )


def _html_groups(tag: str, groups: Iterable[Iterable[str]]) -> str:
    # The class is for a line between one group and the next.
    return "".join(_html_cells(tag, texts, ' class="first"') for texts in groups)


def _lines_of(title: str, columns: Sequence[Sequence[str]], gap: str) -> list[str]:
    """Return the lines of a group of columns under its title; a gap of one saves blanks in cells."""
    if gap == " ":
        columns = [[t.replace(" ± ", "±").replace(" to ", "-") for t in texts] for texts in columns]
    widths = [max(map(len, column)) for column in columns]
    # A title wider than its columns widens the first of them.
    widths[0] += max(0, len(title) - sum(widths) - len(gap) * (len(widths) - 1))
    rows = [
        gap.join(text.rjust(width) for text, width in zip(row, widths, strict=True))
        for row in zip(*columns, strict=True)
    ]
    return [title.center(len(rows[0])), *rows]


def _fit(groups: Iterable[list[str]], room: int) -> list[list[list[str]]]:
    """Divide groups of lines into blocks no wider than ``room``, one group at least in each."""
    blocks: list[list[list[str]]] = []
    left = 0
    for lines in groups:
        needed = len(lines[0]) + 3  # the bar between groups
        if not blocks or needed > left:
            blocks.append([])
            left = room
        blocks[-1].append(lines)
        left -= needed
    return blocks


class Column(NamedTuple):
    """A column of a table whose rows are groups of records; see :meth:`Table.of_groups`.

    Attributes:
      title: the column's name.
      text: returns the cell of a group, :data:`MISSING` where it has none.
      optional: whether the column is left out of a table in which all its cells are missing.
    """

    title: str
    text: Callable[[Sequence[Record]], str]
    optional: bool = False


def shared(
    title: str,
    value: str | Callable[[Record], Any] | None = None,
    form: Callable[[Any], str] = str,
    *,
    optional: bool = False,
) -> Column:
    """Declare a column of a value that all records of a group have in common.

    The value is a field of the records, by default the one that is called like the column, or a
    function of a record; ``None`` is shown as missing. The field of an optional column may be absent.
    """
    read = _reader(title if value is None else value, optional)
    return Column(title, lambda records: cell(read(records[0]), form), optional)


def seed_mean(
    title: str,
    value: str | Callable[[Record], float | None],
    digits: int | None = 2,
    scale: float = 1.0,
    *,
    optional: bool = False,
) -> Column:
    """Declare a column of a mean over seeds with its 95 % interval, as :meth:`Spread.text` shows it.

    The value is a field of the records or a function of a record; records whose value is ``None`` are
    left out of the mean. The field of an optional column may be absent.
    """
    read = _reader(value, optional)

    def text(records: Sequence[Record]) -> str:
        values = [number for number in map(read, records) if number is not None]
        return spread(values).text(digits, scale) if values else MISSING

    return Column(title, text, optional)


def _reader(value: str | Callable[[Record], Any], optional: bool) -> Callable[[Record], Any]:
    """Return a function of a record; a field must be there unless its column is optional."""
    if not isinstance(value, str):
        return value
    return operator.methodcaller("get", value) if optional else operator.itemgetter(value)


def entry(keys: str, values: str, key: Any) -> Callable[[Record], Any]:
    """Return a function of a record: the value at ``key`` in two of its lists, ``None`` without it.

    >>> entry("layers", "accuracies", "b")({"layers": ["a", "b"], "accuracies": [0.5, 0.75]})
    0.75
    """
    return lambda row: dict(zip(row[keys], row[values], strict=True)).get(key)


# The networks of a row's mean: one of each seed.
_CHECKPOINT = ("run", "weights", "step")
SEEDS = Column("seeds", lambda records: str(len(records)))
CHECKPOINT_COLUMNS = (*map(shared, _CHECKPOINT), SEEDS)


def by_checkpoint(rows: Iterable[Record], *fields: str) -> list[list[Record]]:
    """Return the groups of rows of one run, weights and step, and of one value of further fields."""
    return list(grouped(rows, (*_CHECKPOINT, *fields)).values())


class Spread(NamedTuple):
    """Mean over seeds, and its uncertainty.

    Attributes:
      mean: over the seeds.
      std: sample standard deviation; ``None`` for one seed.
      interval: half the 95 % interval of the mean (Student's t); ``None`` for fewer than three seeds,
        since of two it is 12.7 standard errors and says nothing.
      low: the interval's lower end; for two seeds the smaller value, for one its value.
      high: the upper end, likewise.
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
        # Half the width of what is shown beside the mean, in the units shown.
        unsure = abs(scale) * (self.high - self.low) / 2
        largest = max(abs(scale * self.mean), unsure)
        # Of the larger one: a mean near zero in a wide interval must not force tiny units on both.
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
    # -0.0 + 0.0 is 0.0.
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


# Half the 95 % interval of a mean over so many seeds, in standard errors: Student's t with one degree
# of freedom less. A table, since scipy takes a second to import; beyond it the last is near enough.
_SEEDS = (3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 24, 32, 64)
_STUDENT = (
    *(4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622),
    *(2.2010, 2.1314, 2.0687, 2.0395, 1.9983),
)


def spread(values: Iterable[float]) -> Spread:
    """Summarise one number per seed.

    The interval is Student's; between tabulated counts the next smaller one, which errs wide.

    >>> spread([1.0, 2.0, 3.0]).interval.__round__(4)
    2.4842
    """
    per_seed = np.asarray(list(values), np.float64)
    count = len(per_seed)
    if not count:
        return Spread(math.nan, None, None, math.nan, math.nan)
    mean, low, high = float(per_seed.mean()), float(np.min(per_seed)), float(np.max(per_seed))
    if count == 1:
        return Spread(mean, None, None, mean, mean)
    std = float(per_seed.std(ddof=1))
    if count == 2:
        return Spread(mean, std, None, low, high)
    # bisect finds the first tabulated count above; the one before it is at most `count`.
    half = _STUDENT[bisect.bisect(_SEEDS, count) - 1] * std / math.sqrt(count)
    return Spread(mean, std, half, mean - half, mean + half)


def grouped(rows: Iterable[Record], fields: Sequence[str]) -> dict[tuple[Any, ...], list[Record]]:
    """Group rows by the values of ``fields``, in the order in which they first come.

    >>> list(grouped([{"run": "a"}, {"run": "b"}, {"run": "a"}], ["run"]))
    [('a',), ('b',)]
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(field) for field in fields), []).append(row)
    return groups


def newest(rows: Sequence[Record]) -> list[Record]:
    """Return the rows of each run's newest checkpoint.

    >>> [row["step"] for row in newest([{"run": "a", "step": 1}, {"run": "a", "step": 2}])]
    [2]
    """
    by_run = grouped(rows, ("run",)).items()
    last = {run: max(row["step"] for row in of_run) for (run,), of_run in by_run}
    return [row for row in rows if row["step"] == last[row["run"]]]


def cell(value: Any, form: Callable[[Any], str] = str) -> str:
    """Return ``form(value)``, or :data:`MISSING` for ``None``."""
    return MISSING if value is None else form(value)


def aligned(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> list[str]:
    """Return rows of cells as aligned lines, with a rule below the first, the header.

    The columns whose indices are in ``right`` are right-aligned.

    >>> aligned([["run", "n"], ["a", "10"]], right=[1])
    ['run   n', '---  --', 'a    10']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines
