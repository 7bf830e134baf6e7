"""The README's tables agree with the command line; shown code is the real code."""

import argparse
import re
from pathlib import Path

import pytest

from seal_jax import evaluators
from seal_jax.cli import main as cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def table(heading):
    """Return the rows of the first table of a section, by their first cell, links left as they are."""
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


def test_commands_are_those_of_the_command_line():
    (commands,) = (
        action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    assert {row.strip("`").split()[0] for row in table("Commands")} == set(commands.choices)


def test_kinds_are_those_of_the_command_line():
    page = (ROOT / "docs" / "evaluators.md").read_text()
    section = page.partition("## Kinds")[2].partition("\n##")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert [row.strip("| ").split("`")[1] for row in rows] == list(evaluators.NAMES)


def test_links():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 50
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize(("file", "number"), [("forgetting.py", 0)])
def test_the_worked_example_is_the_code(file, number):
    """Docstrings apart, the lines shown stand in the file, in this order and together."""
    page = (ROOT / "docs" / "adding_a_method.md").read_text()
    shown = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[number]
    code = (ROOT / "seal_jax" / file).read_text()
    code = re.sub(r'\n +r?""".*?"""', "", code, flags=re.DOTALL)

    def lines(text):
        return "\n".join(line for line in text.splitlines() if line.strip())

    assert lines(shown) in lines(code)
