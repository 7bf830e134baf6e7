"""The generations table as HTML."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from seal_jax.reports import tables

if TYPE_CHECKING:
    from seal_jax.reports.generations import Comparison

# Columns side by side; more runs follow below, for the page to fit a sheet of paper.
MOST_COLUMNS = 9


def markup(comparison: Comparison) -> str:
    """Return the table, with top-5 accuracy where it was scored, and its notes."""
    groups = [tables.group_of(comparison, column, top5=True) for column in comparison.columns]
    gens = [str(generation + 1) for generation in comparison.shown]
    each = max((len(group.headings) for group in groups), default=1)
    across = max(1, MOST_COLUMNS // each)
    blocks = [groups[start : start + across] for start in range(0, len(groups), across)]
    found = [_block(gens, block) for block in blocks] if gens else []
    caption = f"<p>{html.escape(tables.title_of(comparison))}</p>"
    meaning = "".join(f"<p>{html.escape(line)}</p>" for line in tables.meaning_of(comparison))
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in tables.notes_of(comparison))
    return f'{caption}{meaning}{"".join(found)}<ul class="notes">{notes}</ul>'


def _block(gens: list[str], groups: list[tables.Group]) -> str:
    titles = "".join(
        f'<th class="group" colspan="{len(group.headings)}">{html.escape(group.title)}</th>'
        for group in groups
    )
    headings = "".join(_cells("th", group.headings) for group in groups)
    rows = "".join(
        f"<tr><th>{gen}</th>{''.join(_cells('td', group.rows[index]) for group in groups)}</tr>"
        for index, gen in enumerate(gens)
    )
    return (
        '<div class="scroll"><table class="generations">'
        f'<thead><tr><th rowspan="2">Gen</th>{titles}</tr><tr>{headings}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _cells(tag: str, texts: list[str]) -> str:
    first = ' class="first"'  # a line between one run and the next
    return "".join(
        f"<{tag}{'' if index else first}>{html.escape(text)}</{tag}>"
        for index, text in enumerate(texts)
    )
