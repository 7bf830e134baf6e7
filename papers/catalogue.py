"""Every table and figure of the four papers, and the commands that make its counterpart.

The list is ``catalogue.toml`` beside this file.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import NamedTuple


class Item(NamedTuple):
    """A table or figure.

    Attributes:
      paper: SEAL, LW, PoF or FAST.
      name: the paper's name for it.
      shows: what it shows.
      commands: commands on small data, in order; none for a drawing of an idea. Those that do not start
        with "python" follow ``python -m seal_jax``.
      paper_size: the config, or what else to change, for the paper's size.
    """

    paper: str
    name: str
    shows: str
    commands: tuple[str, ...] = ()
    paper_size: str = ""


_DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
# The sweep whose runs, in ``runs/digits``, most items look at.
RUNS: str = _DATA.pop("runs")
ITEMS = tuple(
    Item(paper, **{**record, "commands": tuple(record.get("commands", ()))})
    for paper, records in _DATA.items()
    for record in records
)


def whole(command: str) -> str:
    """Return a command of the list as it is typed in a shell."""
    return command if command.startswith("python") else f"python -m seal_jax {command}"


def as_text() -> str:
    """Return the items for a terminal, each with its commands below."""
    lines = ["First, for everything that looks at runs/digits:", f"    {whole(RUNS)}"]
    for item in ITEMS:
        lines.append(f"{item.paper}, {item.name}: {item.shows}")
        lines += [f"    {whole(command)}" for command in item.commands]
        if item.paper_size:
            lines.append(f"    at the paper's size: {item.paper_size}")
    return "\n".join(lines)


def as_markdown() -> str:
    """Return the items as the list in ``docs/reproduce.md``, which a test compares with it."""
    lines = []
    for paper in dict.fromkeys(item.paper for item in ITEMS):
        lines += [f"### {paper}", "", "| item | shows | commands | at the paper's size |"]
        lines.append("| --- | --- | --- | --- |")
        for item in ITEMS:
            if item.paper == paper:
                commands = "<br>".join(f"`{command}`" for command in item.commands) or "-"
                cells = (item.name, item.shows, commands, item.paper_size or "-")
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)
