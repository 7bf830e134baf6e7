"""The generations table as plain text, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from seal_jax.core.tables import MEANING, MISSING, Spread, cell

if TYPE_CHECKING:
    from seal_jax.reports.generations import Column, Comparison

UNFINISHED = "*"
_CSV_HEADER = (
    "run",
    "workdir",
    "data",
    "model",
    "method",
    "seeds",
    "finished",
    "generation",
    "papers_gen",
    "last_mean",
    "last_std",
    "best_mean",
    "best_std",
    "chosen",
    "paper",
    "paper_table",
    "last_top5_mean",
    "last_top5_std",
    "best_top5_mean",
    "best_top5_std",
)


class Group(NamedTuple):
    """The part of the table that belongs to one run: a title over columns of strings."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    gap: str = "  "

    @property
    def widths(self) -> list[int]:
        """Characters of each column."""
        widths = [max(map(len, cells)) for cells in zip(self.headings, *self.rows, strict=True)]
        # A title wider than its columns widens the first of them.
        widths[0] += max(0, len(self.title) - sum(widths) - len(self.gap) * (len(widths) - 1))
        return widths

    @property
    def width(self) -> int:
        """Characters of all of them."""
        return sum(self.widths) + len(self.gap) * (len(self.headings) - 1)

    def tight(self) -> Group:
        """Return it with fewer blanks."""
        rows = [
            [text.replace(" ± ", "±").replace(" to ", "-") for text in row] for row in self.rows
        ]
        return self._replace(rows=rows, gap=" ")

    def lines(self) -> list[str]:
        """Return the lines of its part of the table."""
        cells = [self.headings, *self.rows]
        return [
            self.title.center(self.width),
            *(
                self.gap.join(
                    text.rjust(width) for text, width in zip(row, self.widths, strict=True)
                )
                for row in cells
            ),
        ]


def text(comparison: Comparison, width: int) -> str:
    """Return ``Comparison.as_text``."""
    if not comparison.shown:
        return "\n".join([title_of(comparison), "", *notes_of(comparison)])
    gens = ["", "Gen", *(str(generation + 1) for generation in comparison.shown)]
    first = max(map(len, gens))
    groups = [group_of(comparison, column) for column in comparison.columns]
    blocks = _fit(groups, width - first)
    if len(blocks) > 1:
        # With fewer blanks they may fit side by side.
        tight = [group.tight() for group in groups]
        if len(_fit(tight, width - first)) == 1:
            blocks = [tight]
    lines = [title_of(comparison), *meaning_of(comparison), ""]
    for block in blocks:
        parts = [[gen.rjust(first) for gen in gens], *(group.lines() for group in block)]
        body = [" │ ".join(row).rstrip() for row in zip(*parts, strict=True)]
        rule = "─┼─".join("─" * len(part[0]) for part in parts)
        lines += [*body[:2], rule, *body[2:], ""]
    for note in notes_of(comparison):
        lines += textwrap.wrap(note, width, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


def markdown(comparison: Comparison) -> str:
    """Return ``Comparison.as_markdown``."""
    groups = [group_of(comparison, column) for column in comparison.columns]
    header = ["Gen"]
    for group in groups:
        header += [f"{_escape(group.title)}<br>{heading}" for heading in group.headings]
    rows = [header, ["---:"] * len(header)]
    for index, generation in enumerate(comparison.shown):
        rows.append(
            [str(generation + 1), *(cell for group in groups for cell in group.rows[index])]
        )
    table = [f"| {' | '.join(row)} |" for row in rows]
    notes = [f"- {_escape(note)}" for note in notes_of(comparison)]
    heading = "\n\n".join([f"**{_escape(title_of(comparison))}**", *meaning_of(comparison)])
    return "\n".join([heading, "", *table, "", *notes])


def csv_text(comparison: Comparison) -> str:
    """Return the content of ``Comparison.to_csv``'s file."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_CSV_HEADER)
    for column in comparison.columns:
        run = column.run
        for generation, last in sorted(column.last.items()):
            best = column.best.get(generation)
            published = column.paper.accuracy.get(generation + 1) if column.paper else None
            writer.writerow(
                (
                    run.name,
                    run.path,
                    run.setting("data.name"),
                    run.setting("model.name"),
                    run.setting("method.name"),
                    run.seeds,
                    run.finished,
                    generation,
                    generation + 1,
                    *_mean_and_std(last),
                    *_mean_and_std(best),
                    generation == column.chosen,
                    published,
                    column.paper.table if column.paper and published is not None else None,
                    *_mean_and_std(column.top5_last.get(generation)),
                    *_mean_and_std(column.top5_best.get(generation)),
                )
            )
    return buffer.getvalue()


def _mean_and_std(stat: Spread | None) -> tuple[float | None, float | None]:
    return (stat.mean, stat.std) if stat else (None, None)


def group_of(comparison: Comparison, column: Column, *, top5: bool = False) -> Group:
    """Return the cells of a run, with its top-5 accuracy if that is asked for and was scored."""
    seeds = column.run.seeds
    mark = "" if column.run.finished else UNFINISHED
    stats = {"last": column.last}
    if column.best:
        stats["best"] = column.best
    if top5 and column.top5_last:
        stats["top-5 last"] = column.top5_last
    if top5 and column.top5_best:
        stats["top-5 best"] = column.top5_best
    headings = list(stats)
    if column.paper:
        headings.append("paper")
    rows = []
    for generation in comparison.shown:
        row = [cell(by_generation.get(generation), Spread.text) for by_generation in stats.values()]
        if column.paper:
            published = column.paper.accuracy.get(generation + 1)
            row.append(MISSING if published is None else f"{published:.2f}")
        rows.append(row)
    title = f"{column.run.name}{mark} ({seeds} seed{'' if seeds == 1 else 's'})"
    return Group(title, headings, rows)


def _fit(groups: Sequence[Group], room: int) -> list[list[Group]]:
    """Divide the groups into blocks no wider than ``room``, one group at least in each."""
    blocks: list[list[Group]] = []
    left = 0
    for group in groups:
        needed = group.width + 3  # the bar between groups
        if not blocks or needed > left:
            blocks.append([])
            left = room
        blocks[-1].append(group)
        left -= needed
    return blocks


def title_of(comparison: Comparison) -> str:
    """Return the table's title."""
    subjects = dict.fromkeys(column.run.subject for column in comparison.columns)
    return f"Test accuracy (%) by generation: {', '.join(subjects)}"


def meaning_of(comparison: Comparison) -> list[str]:
    """Return what ± means, if any run has several seeds."""
    several = any(column.run.seeds > 1 for column in comparison.columns)
    return [MEANING] if several and comparison.shown else []


def notes_of(comparison: Comparison) -> list[str]:
    """Return what stands below the table."""
    columns, shown = comparison.columns, comparison.shown
    notes = []
    unfinished = [_unfinished_note(column) for column in columns if not column.run.finished]
    if not shown:
        return ["No run has finished a generation yet.", *unfinished]
    if len(shown) < len(comparison.generations):
        notes.append(
            f"{len(shown)} of {len(comparison.generations)} generations: 1, 3, 10, and the last and "
            "the chosen of each run; the CSV file has all."
        )
    notes.append(
        "Gen=1, as the papers count, is generation 0 of the metrics: plain training for all methods."
    )
    notes.append("last: the weights at the end of the generation.")
    if any(column.best for column in columns):
        notes.append(
            "best: the weights with the best validation accuracy of that generation; test never "
            "chooses."
        )
    notes += _paper_notes(columns)
    notes += [_best_note(column) for column in columns if column.last]
    return notes + unfinished + [f"Warning: {line}." for line in comparison.warnings]


def _paper_notes(columns: Sequence[Column]) -> list[str]:
    sources: dict[str, list[str]] = {}
    departures: dict[tuple[str, ...], list[str]] = {}
    for column in columns:
        if column.paper:
            name = column.run.name
            source = f'{name}, {column.paper.table} "{column.paper.heading}"'
            sources.setdefault(column.paper.paper, []).append(source)
            departures.setdefault(column.paper.differences, []).append(name)
    notes = [f"paper: the {paper}; {'; '.join(each)}." for paper, each in sources.items()]
    return notes + [
        f"Other settings than the paper's in {', '.join(names)}: {', '.join(differences)}."
        for differences, names in departures.items()
        if differences
    ]


def _best_note(column: Column) -> str:
    name = column.run.name
    if column.chosen is not None:
        accuracy = column.best[column.chosen].text()
        return (
            f"Best generation of {name}, by validation: Gen={column.chosen + 1}, best {accuracy}."
        )
    final = max(column.last)
    why = "validation is not finite" if column.best else "it has no validation split"
    return (
        f"Best generation of {name}: nothing chooses one, as {why}; the last, Gen={final + 1}, has "
        f"{column.last[final].text()}."
    )


def _unfinished_note(column: Column) -> str:
    run = column.run
    return (
        f"{UNFINISHED} {run.name} is not finished: {run.epochs_done} of "
        f"{run.generations * run.epochs_per_generation} epochs, {len(column.last)} of "
        f"{run.generations} generations."
    )


def _escape(line: str) -> str:
    # A folder's name may hold what Markdown takes for a column or an emphasis.
    for character in "\\|*_`<":
        line = line.replace(character, f"\\{character}")
    return line
