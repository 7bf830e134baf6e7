"""Write the parts of README.md and docs/ that the code declares: methods, options, commands, evaluations.

    python -m tools.generate_docs

A part is between ``<!-- generated: NAME -->`` and ``<!-- end -->``. A method that docs/methods.md does not have
yet gets a section at the end of the methods; the text below the generated part is written by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from seal_jax import evaluators, methods, models
from seal_jax.cli import main as cli
from seal_jax.methods import Variant

ROOT = Path(__file__).parents[1]


def table(*rows: Iterable[str]) -> str:
    """Return a table in Markdown; the first row is its header."""
    # Markdown would take a bar in a cell for the end of the cell.
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    rule = "| --- " * (lines[0].count(" | ") + 1) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def configs(variant: Variant, folder: str) -> str:
    """Return links to the configs of a system, with the names of its variants there."""
    variants: dict[str, list[str]] = {}  # by file, which is linked once
    for config in (variant.config, *variant.also):
        file, _, names = config.partition(":")
        variants.setdefault(file, []).extend(names.split(",") if names else [])
    return ", ".join(
        f"[{file}]({folder}/{file}) {', '.join(f'`{name}`' for name in names)}".strip()
        for file, names in variants.items()
        if file
    )


def methods_table() -> str:
    """Return the table of all systems."""
    rows = []
    for variant in methods.VARIANTS.values():
        file = f"[{variant.method}.py](seal_jax/methods/{variant.method}.py)"
        options = f" `{variant.options}`" if variant.options else ""
        rows.append((variant.name, file + options, variant.source, configs(variant, "configs")))
    return table(("system", "file and options", "source", "config"), *rows)


def method_section(name: str) -> str:
    """Return the generated head of a method's section: what it does, its systems and its options."""
    summary = methods.summary(name)
    parts = [f"## {name}", f"{summary[0].upper()}{summary[1:]}."]
    parts.append(
        "\n".join(
            f"- **{variant.name}**{f' (`{variant.options}`)' if variant.options else ''}: "
            f"{'; '.join(filter(None, [variant.source, configs(variant, '../configs')]))}"
            for variant in methods.VARIANTS.values()
            if variant.method == name
        )
    )
    options = methods.options(name)
    meanings = attributes(type(options))
    rows = [
        (f"`{field}`", f"`{value!r}`".replace("'", '"'), meanings[field])
        for field, value in dataclasses.asdict(options).items()
    ]
    if rows:
        parts.append(table(("option", "default", "meaning"), *rows))
    return "\n\n".join(parts)


def attributes(kind: type) -> dict[str, str]:
    """Return what the docstring of a class says about its attributes, as Markdown by name."""
    # `evaluators/options.py` reads the help of the command line in the same way: the docstring is the one
    # place where an option is described.
    text = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    return {
        field: " ".join(meaning.split()).rstrip(".").replace("``", "`")
        for field, meaning in re.findall(r"^  (\w+): (.*?)(?=^  \w+: |\Z)", text, re.M | re.S)
    }


def commands_table() -> str:
    """Return the table of the commands, with the arguments that each of them requires."""
    # The parser itself is asked, so that a new command is in the table. argparse has no public way to its
    # subparsers.
    (commands,) = (
        action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    rows = []
    for name, parser in commands.choices.items():
        words = [name]
        for action in parser._actions:
            value = action.metavar or "{" + ",".join(action.choices or ()) + "}"
            if action.option_strings and action.required:
                words.append(f"{action.option_strings[0]}={value}")
            elif not action.option_strings:
                words.append(f"{value}..." if action.nargs == "+" else value)
        rows.append((f"`{' '.join(words)}`", parser.description))
    return table(("command", "what it does"), *rows)


def networks_table() -> str:
    """Return the table of the networks: who made them, who trains them here, and whose weights they take."""
    rows = []
    for name, entry in models.entries().items():
        module = entry.build(num_classes=2)
        file = f"{type(module).__module__.rpartition('.')[2]}.py"
        libraries: dict[str, Any] = getattr(module, "torch_layers", dict)()
        weights = ", ".join((*libraries, "own runs"))
        config, _, variant = entry.config.partition(":")
        # A config without a variant for it trains another network when it is given alone.
        trains = f"`{variant}`" if variant else f"`--config.model.name={name}`"
        rows.append(
            (
                f"`{name}`",
                f"[{file}](seal_jax/models/{file})",
                entry.source,
                entry.used or "no paper",
                weights,
                ", ".join(f"`{option}`" for option in entry.options) or "none of its own",
                f"[{config}](configs/{config}) {trains}",
            )
        )
    head = ("network", "file", "source", "trained in", "weights from", "options", "config")
    return table(head, *rows)


def evaluations_table() -> str:
    """Return the table of the kinds of evaluation."""
    kinds = evaluators.registry().values()
    rows = [(f"`{kind.name}`", kind.summary, kind.source) for kind in kinds]
    return table(("kind", "measures", "source"), *rows)


def generate() -> dict[Path, str]:
    """Return the whole text of each file with generated parts, up to date."""
    # Writes nothing: a test compares the texts with the files.
    sections = {name: method_section(name) for name in methods.NAMES}
    page = ROOT / "docs" / "methods.md"
    text = page.read_text()
    for name in sections:
        # The marker of a new method, before the chapter that follows the methods.
        if f"<!-- generated: {name} -->" not in text:
            first, mark, rest = text.partition("## Where this differs")
            text = f"{first}<!-- generated: {name} -->\n<!-- end -->\n\n{mark}{rest}"
    texts = {page: filled(text, sections)}
    for file, parts in (
        (
            "README.md",
            {
                "methods": methods_table(),
                "networks": networks_table(),
                "commands": commands_table(),
            },
        ),
        ("docs/running.md", {"commands": commands_table()}),
        ("docs/evaluations.md", {"kinds": evaluations_table()}),
    ):
        texts[ROOT / file] = filled((ROOT / file).read_text(), parts)
    return texts


def filled(text: str, parts: dict[str, str]) -> str:
    """Return ``text`` with each part between its markers."""
    for name, part in parts.items():
        before, mark, rest = text.partition(f"<!-- generated: {name} -->\n")
        assert mark, f"no marker for {name}"
        text = f"{before}{mark}{part}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return text


if __name__ == "__main__":
    for path, new in generate().items():
        path.write_text(new)
