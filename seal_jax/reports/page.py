"""The report as one HTML page that needs no other file, no script and no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from seal_jax.core.tables import MEANING
from seal_jax.reports.section import Missing, Section

# Plots are on white also in the dark: their colours are chosen for it.
STYLE = """
:root { color-scheme: light dark; --text: #1c1c1c; --back: #ffffff; --soft: #5c5c5c;
  --line: #d4d4d4; --shade: #f4f5f7; --link: #0b5cad; --mark: #fff4d6; --edge: #d99a00;
  --shadow: #00000059; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6e6; --back: #16181c; --soft: #a6abb3;
  --line: #3a3e45; --shade: #1f2227; --link: #7db8f5; --mark: #33290f; --edge: #d9a62e;
  --shadow: #ffffff66; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; color: var(--text); background: var(--back);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.25rem; margin: 0 0 0.5rem; }
section { margin-top: 2.5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
a { color: var(--link); }
nav ul { margin: 0; padding: 0; list-style: none; display: flex; flex-wrap: wrap;
  gap: 0.2rem 1.2rem; }
nav a { display: inline-block; padding: 0.35rem 0; }
/* Wider than the text where the window has room; else shades at the sides, and a scrollbar that
   never hides, say that there is more. */
.scroll { overflow: auto; margin: 0.8rem 0; max-height: 80vh; width: max-content;
  max-width: calc(50vw + 50% - 1.5rem);
  background: linear-gradient(to right, transparent, var(--back) 60%) right / 3rem 100% local,
    linear-gradient(to left, var(--shadow), transparent) right / 1rem 100% scroll;
  background-repeat: no-repeat; }
.scroll::-webkit-scrollbar { width: 0.7rem; height: 0.7rem; }
.scroll::-webkit-scrollbar-thumb { background: var(--soft); border-radius: 0.35rem; }
.scroll::-webkit-scrollbar-track { background: var(--shade); }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.4rem; white-space: nowrap; }
caption small { display: block; font-weight: 400; color: var(--soft); }
th, td { padding: 0.25rem 0.7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; background: var(--shade); vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
.scroll tr > :first-child { position: sticky; left: 0; background: var(--back); }
.scroll tr > th:first-child { background: var(--shade); }
.scroll thead tr:first-child > * { position: sticky; top: 0; z-index: 1; }
.scroll thead tr:first-child > :first-child { z-index: 2; }
.grouped thead tr + tr > :first-child { position: static; }
.grouped th.group { text-align: center; }
.grouped .group, .grouped .first { border-left: 1px solid var(--line); }
.grouped .first { text-align: right; }
.notes, .files { color: var(--soft); font-size: 0.875rem; }
ul.notes { padding-left: 1.2rem; }
.warning { background: var(--mark); border-left: 4px solid var(--edge); padding: 0.4rem 0.8rem;
  margin: 0.6rem 0; }
figure { margin: 1rem 0; overflow-x: auto; }
figure img { max-width: 100%; min-width: 40rem; height: auto; background: #ffffff;
  border-radius: 4px; display: block; }
pre { overflow-x: auto; background: var(--shade); padding: 0.8rem; font-size: 0.8125rem;
  line-height: 1.4; }
footer { margin-top: 2.5rem; color: var(--soft); font-size: 0.875rem; }
@media print {
  :root { --text: #000000; --back: #ffffff; --soft: #444444; --line: #bbbbbb; --shade: #f2f2f2;
    --link: #000000; --mark: #ffffff; color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  table { font-size: 7.5pt; }
  th, td { padding: 1pt 3pt; }
  th, td, caption { white-space: normal; }
  .scroll, pre { overflow: visible; max-height: none; max-width: none; background: none; }
  .scroll { width: auto; }
  @page { size: A4 landscape; margin: 12mm; }
  pre { white-space: pre-wrap; }
  figure img { min-width: 0; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""


def page(
    title: str,
    sections: Sequence[tuple[Section, bytes]],
    missing: Sequence[Missing],
    warnings: Sequence[str],
    version: str,
) -> str:
    """Return the page.

    Args:
      title: its heading.
      sections: what it shows, each with its picture, a PNG or b"".
      missing: what it does not, and why.
      warnings: sentences above everything.
      version: of seal_jax, for the last line.
    """
    links = [(section.name, section.title) for section, _ in sections]
    if missing:
        links.append(("not-shown", "Not shown"))
    contents = "".join(f'<li><a href="#{name}">{escape(text)}</a></li>' for name, text in links)
    body = "\n".join(_section(section, picture) for section, picture in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>\n"
        f'<p class="notes">{escape(MEANING)} The same are bars and bands in plots. A run has one '
        "colour in all plots.</p></header>\n"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>\n'
        f"<main>\n{_warnings(warnings)}{body}\n{_missing(missing)}</main>\n"
        f"<footer>Written by seal_jax {escape(version)}.</footer>\n</body>\n</html>\n"
    )


def escape(text: str) -> str:
    """Return text as it may stand in HTML, inside elements and attributes."""
    return html.escape(text, quote=True)


def _section(section: Section, picture: bytes) -> str:
    parts = [f'<section id="{section.name}">', f"<h2>{escape(section.title)}</h2>"]
    if section.summary:
        parts.append(f"<p>{escape(section.summary)}</p>")
    parts.append(_warnings(section.warnings) + section.markup)
    if section.text:
        parts.append(f"<pre>{escape(section.text)}</pre>")
    if picture:
        source = base64.b64encode(picture).decode("ascii")
        parts.append(
            f'<figure><img alt="{escape(section.describe)}" src="data:image/png;base64,{source}">'
            "</figure>"
        )
    parts += [table.as_html() for table in section.tables]
    if names := files(section, picture):
        parts.append(f'<p class="files">Files beside this page: {escape(", ".join(names))}</p>')
    return "\n".join([*parts, "</section>"])


def files(section: Section, picture: bytes) -> list[str]:
    """Return the names of the files that hold what a section shows."""
    names = list(section.files)
    if section.csv:
        names.append(f"{section.name}.csv")
    if picture and section.draw is not None:
        names.append(f"{section.name}.png")
    return names


def _warnings(sentences: Sequence[str]) -> str:
    return "".join(f'<p class="warning">{escape(each)}</p>\n' for each in sentences)


def _missing(missing: Sequence[Missing]) -> str:
    if not missing:
        return ""
    lines = "".join(
        f"<li><b>{escape(each.title)}</b>: {escape(each.reason)}.</li>" for each in missing
    )
    return f'<section id="not-shown">\n<h2>Not shown</h2>\n<ul>{lines}</ul>\n</section>\n'
