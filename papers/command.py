"""The command: lists what reproduces the papers, and runs the synthetic experiment of the layerwise paper.

python -m papers list
python -m papers lw-synthetic --table=1
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from papers import catalogue, lw_synthetic, lw_tables
from papers.lw_synthetic import Settings
from seal_jax.cli import main
from seal_jax.core import files
from seal_jax.errors import UsageError, check_integer

OUTPUT = "runs/reproduce_lw_synthetic"
PLOT = "lw_synthetic.png"
# Table 4 is the "average of 100 runs"; for Table 1 the paper does not say.
SEEDS = {"1": 16, "4": 100}
# The settings closest to Table 4 among those that `--search` tries; the paper does not give them.
TABLE_4 = {
    "optimiser": "adam",
    "learning_rate": 0.03,
    "steps": 100,
    "first_round": "algorithm",
    "penalty": "half",
}


def run(arguments: Sequence[str]) -> int:
    """Run the command with these arguments; return the exit code."""

    def command() -> int:
        options, _ = main.parse(_parser(), arguments)
        return options.run(options)

    return main.exit_code(command)


def _parser() -> argparse.ArgumentParser:
    root = main.Parser(
        prog="python -m papers",
        description="Run an experiment of a paper again, its numbers beside the paper's.",
    )
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        added.set_defaults(command=name, run=run)
        return added

    command("list", _list, "print the commands for every table and figure")
    parser = command("lw-synthetic", _lw_synthetic, "Tables 1 and 4 of the layerwise paper")
    parser.add_argument(
        "--table", choices=("1", "4", "all"), default="all", help="of the paper (default: all)"
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="default: 16 for Table 1, 100 for Table 4"
    )
    parser.add_argument(
        "--initialiser", choices=("he", "glorot", "both"), default="both", help="default: both"
    )
    parser.add_argument(
        "--output",
        default=OUTPUT,
        metavar="DIR",
        help="of CSV files and plot (default: %(default)s)",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="print how far other answers to the paper's open questions end from it, for --seeds=N",
    )
    group = parser.add_argument_group("open questions of the paper")
    for field, what in lw_synthetic.HELP.items():
        group.add_argument(f"--{field.replace('_', '-')}", metavar="VALUE", help=what)
    return root


def _list(options: argparse.Namespace) -> int:
    print(catalogue.as_text())
    return 0


def _lw_synthetic(options: argparse.Namespace) -> int:
    """Run the experiment; print, write and draw its tables."""
    # First, before anything starts JAX's devices.
    _use_all_cores()
    chosen = _chosen(options)
    settings = {
        "1": dataclasses.replace(Settings(), **chosen),
        # What the command line says wins over the search's answer.
        "4": dataclasses.replace(Settings(), **{**TABLE_4, **chosen}),
    }
    initialisers = (
        list(lw_synthetic.INITIALISERS) if options.initialiser == "both" else [options.initialiser]
    )
    if options.seeds is not None:
        check_integer("seeds", options.seeds, 1)
    tables = ["1", "4"] if options.table == "all" else [options.table]
    if options.search:
        for table in tables:
            search = {"1": lw_tables.search1, "4": lw_tables.search4}[table]
            for line in search(settings[table], initialisers, options.seeds or 8):
                print(line, flush=True)
        return 0

    output = _folder(options.output)
    for name in (PLOT, *(f"table{table}.csv" for table in tables)):
        # Before the training, which takes minutes to hours.
        if (output / name).is_dir():
            raise UsageError(f"{output / name} is a folder; give another --output")
    drawn = []
    for table in tables:
        plans = lw_synthetic.plans(table, settings[table], initialisers)
        seeds = SEEDS[table] if options.seeds is None else options.seeds
        results = lw_synthetic.train_all(settings[table], plans, seeds, progress=True)
        cells = lw_tables.make_cells(table, results.test, initialisers)
        print(lw_tables.comparison(cells).as_text(), end="\n\n", flush=True)
        files.write(output / f"table{table}.csv", lw_tables.csv_text(cells))
        drawn += cells
    lw_tables.draw(output / PLOT, drawn, settings["1"].steps)
    print(f"tables and plot: {output}")
    return 0


def _use_all_cores() -> None:
    """Make every CPU core a device, since seeds are spread over devices."""
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if jax.config.values["jax_num_cpu_devices"] < 0:  # the user has not set a number
        # An error once JAX has started its devices, as in the tests: the number then stays.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", cores or 1)


def _chosen(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings given on the command line, converted to the types of the defaults."""
    chosen = {}
    for field in lw_synthetic.HELP:
        text, kind = getattr(options, field), type(getattr(Settings, field))
        if text is None:
            continue
        try:
            chosen[field] = kind(text)
        except ValueError:
            raise UsageError(f"{field} = {text!r} must be of type {kind.__name__}") from None
    return chosen


def _folder(name: str) -> Path:
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output={name} cannot be written: {error.strerror}") from None
    return path
