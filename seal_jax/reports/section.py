"""A part of the report: what stands in the page, and what goes into files of its own."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from seal_jax.core.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120


class Section(NamedTuple):
    """One section of the report.

    Attributes:
      name: of its files and its anchor: letters, digits and underscores.
      title: its heading.
      summary: what it shows and where in the papers that is from.
      tables: shown one below the other.
      data: the table that is written to ``name.csv``; the first of ``tables`` if there is none.
      draw: draws onto a figure, for the page and ``name.png``.
      size: of that figure, in inches.
      describe: the figure in words, for those who cannot see it.
      text: shown as it is, every character as wide as the others.
      markup: HTML that is shown before all of these.
      picture: a PNG, where it is drawn already.
      warnings: sentences that stand out.
      files: names of files that hold the same, besides those written for this section.
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
    markup: str = ""
    picture: bytes = b""
    warnings: Sequence[str] = ()
    files: Sequence[str] = ()

    @property
    def csv(self) -> str:
        """The content of ``name.csv``, or "" if there is none."""
        table = self.data or (self.tables[0] if self.tables else None)
        return table.as_csv() if table else ""

    def png(self) -> bytes:
        """Return the picture, drawn now unless there is one; b"" if there is none to draw."""
        if self.draw is None or self.picture:
            return self.picture
        from matplotlib.figure import Figure

        figure = Figure(figsize=self.size, dpi=DPI, layout="constrained")
        self.draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()


class Missing(NamedTuple):
    """A section that these runs do not allow.

    Attributes:
      title: its heading.
      reason: what is missing: "needs ...".
    """

    title: str
    reason: str
