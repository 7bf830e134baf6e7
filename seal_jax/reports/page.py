"""The report as sections of one HTML page that needs no other file, no script and no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

from seal_jax.core import plots
from seal_jax.core.tables import MEANING, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120


class Section(NamedTuple):
    """One section of the report.

    Attributes:
      name: name of its files and its anchor: letters, digits and underscores.
      title: heading.
      summary: what it shows and its source in the papers.
      tables: shown one below the other.
      data: the table that is written to ``name.csv``; the first of ``tables`` if it is None.
      draw: function that draws onto a figure, for the page and ``name.png``.
      size: size of that figure in inches.
      describe: the figure in words, for readers who cannot see it.
      text: preformatted text, shown above the figure.
      picture: the figure as a PNG, once it is drawn.
      warnings: sentences that are highlighted.
    """

    name: str
    title: str
    summary: str = ""
    tables: Sequence[Table] = ()
    data: Table | None = None
    draw: Callable[[Figure], None] | None = None
    size: tuple[float, float] = (8.0, 5.0)
    describe: str = ""
    text: str = ""
    picture: bytes = b""
    warnings: Sequence[str] = ()

    @property
    def files(self) -> dict[str, str | bytes]:
        """Contents of the files that hold what the section shows, by name."""
        table = self.data or next(iter(self.tables), None)
        files: dict[str, str | bytes] = {f"{self.name}.csv": table.as_csv()} if table else {}
        return files | ({f"{self.name}.png": self.picture} if self.picture else {})

    def drawn(self) -> Section:
        """Return the section with its picture."""
        # Separate from making the section: results of an evaluation may turn out unfit while they are
        # drawn, and the report then drops them.
        if self.draw is None or self.picture:
            return self
        from matplotlib.figure import Figure

        figure = Figure(figsize=self.size, dpi=DPI, layout="constrained")
        self.draw(figure)
        return self._replace(picture=plots.as_png(figure))


def data_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Return records, all with the same fields, as the table of a section's CSV file."""
    return Table("", list(records[0]), [list(record.values()) for record in records])


class Missing(NamedTuple):
    """A section that these runs do not allow.

    Attributes:
      title: heading.
      reason: what is missing, as "needs ...".
    """

    title: str
    reason: str


def page(
    title: str,
    sections: Sequence[Section],
    missing: Sequence[Missing],
    warnings: Sequence[str],
    version: str,
) -> str:
    """Return the page as HTML.

    Args:
      title: heading.
      sections: what it shows, with their pictures.
      missing: what it does not show, and why.
      warnings: sentences above all sections.
      version: version of seal_jax, for the last line.
    """
    # Everything is inlined, the style here and pictures as data URLs: the file can be mailed alone.
    links = [(section.name, section.title) for section in sections]
    if missing:
        links.append(("not-shown", "Not shown"))
    contents = "".join(
        f'<li><a href="#{name}">{html.escape(text)}</a></li>' for name, text in links
    )
    style = resources.files(__package__).joinpath("report.css").read_text("utf-8")
    body = "\n".join(map(_section, sections))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{html.escape(title)}</h1>\n"
        f'<p class="notes">{html.escape(MEANING)} The same are bars and bands in plots. A run has one '
        "colour in all plots.</p></header>\n"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>\n'
        f"<main>\n{_warnings(warnings)}{body}\n{_missing(missing)}</main>\n"
        f"<footer>Written by seal_jax {html.escape(version)}.</footer>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    parts = [f'<section id="{section.name}">', f"<h2>{html.escape(section.title)}</h2>"]
    if section.summary:
        parts.append(f"<p>{html.escape(section.summary)}</p>")
    # Before the picture and the tables: a warning says what not to read from them.
    parts.append(_warnings(section.warnings))
    if section.text:
        parts.append(f"<pre>{html.escape(section.text)}</pre>")
    if section.picture:
        source = base64.b64encode(section.picture).decode("ascii")
        alt = html.escape(section.describe)
        parts.append(f'<figure><img alt="{alt}" src="data:image/png;base64,{source}"></figure>')
    parts += [table.as_html() for table in section.tables]
    if section.files:
        names = html.escape(", ".join(section.files))
        parts.append(f'<p class="files">Files beside this page: {names}</p>')
    return "\n".join([*parts, "</section>"])


def _warnings(sentences: Sequence[str]) -> str:
    return "".join(f'<p class="warning">{html.escape(text)}</p>\n' for text in sentences)


def _missing(missing: Sequence[Missing]) -> str:
    if not missing:
        return ""
    lines = "".join(
        f"<li><b>{html.escape(title)}</b>: {html.escape(reason)}.</li>" for title, reason in missing
    )
    return f'<section id="not-shown">\n<h2>Not shown</h2>\n<ul>{lines}</ul>\n</section>\n'
