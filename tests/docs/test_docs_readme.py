"""The README's tables agree with the catalogue and the command line; shown code is the real code."""

import argparse
import re
from pathlib import Path

import pytest

from seal_jax import evaluators
from seal_jax.cli import configs
from seal_jax.cli import main as cli
from seal_jax.methods import catalogue

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# Rows for variants of configs that are no systems of their own.
OTHER_ROWS = {"Normal (long)", "SEAL+Freeze, +Reinit, +Reverse", "SEAL, forgetting frequency"}


def table(heading):
    """Return the rows of the first table of a section, by their first cell, links left as they are."""
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


def test_methods_are_those_of_the_catalogue():
    rows = table("Methods")
    assert set(rows) == {system.name for system in catalogue.SYSTEMS} | OTHER_ROWS
    for system in catalogue.SYSTEMS:
        file, source, config = rows[system.name]
        options = f" `{system.changes}`" if system.changes else ""
        assert file == f"[{system.method}.py](seal_jax/methods/{system.method}.py){options}"
        assert source == system.source
        name, _, variant = system.config.partition(":")
        assert config.split(", ")[0] == f"[{name}](configs/{name}) `{variant}`"
        assert variant in configs.variants(str(ROOT / "configs" / name))


def test_variants_of_other_rows_exist():
    for name in OTHER_ROWS:
        config = table("Methods")[name][2]
        file = re.search(r"\]\((.*?)\)", config)[1]
        named = re.findall("`(.*?)`", config)
        assert set(named) <= set(configs.variants(str(ROOT / file)))
        assert named


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


@pytest.mark.parametrize(
    ("file", "number"), [("forgetting.py", 0), ("methods/shrink_perturb.py", 1)]
)
def test_the_worked_example_is_the_code(file, number):
    """Docstrings apart, the lines shown stand in the file, in this order and together."""
    page = (ROOT / "docs" / "adding_a_method.md").read_text()
    shown = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[number]
    code = (ROOT / "seal_jax" / file).read_text()
    code = re.sub(r'\n +r?""".*?"""', "", code, flags=re.DOTALL)

    def lines(text):
        return "\n".join(line for line in text.splitlines() if line.strip())

    assert lines(shown) in lines(code)
