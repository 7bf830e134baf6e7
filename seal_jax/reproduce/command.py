"""The ``reproduce`` command: an experiment of a paper, run again, its numbers beside the paper's."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

from seal_jax.core import files
from seal_jax.errors import UsageError

OUTPUT = "runs/reproduce_lw_synthetic"
PLOT = "lw_synthetic.png"
SEEDS = {"1": 16, "4": 100}
# What comes closest to Table 4 of all that `--search` tries; the paper does not say.
TABLE_4 = {
    "optimiser": "adam",
    "learning_rate": 0.03,
    "steps": 100,
    "first_round": "algorithm",
    "penalty": "half",
}
_FLAGS = {
    "first_round": "LW's first event: after a round of training (default for Table 1), or before",
    "head": "whether LW normalises the logits too (default: bare)",
    "normaliser": "whether LW's normalisers follow the ReLU (default) or precede it",
    "fc": "how many of the uppermost layers FC reinitialises (default: two)",
    "dsd": "smallest magnitudes of each tensor (default) or of all kernels",
    "biases": "of reinitialised layers (default: reinitialised)",
    "share": "what WELS, WELSR and DSD reinitialise (default: 0.2)",
    "data": "whether each seed has its own examples (default)",
    "table4_normaliser": "what LW normalises in Table 4 (default: none)",
    "penalty": "Table 4: the penalty times half the sum of squares, or times the sum",
    "penalise": "Table 4: whether the penalty is on biases too (default: kernels)",
    "optimiser": "default: gd for Table 1, adam for Table 4",
    "learning_rate": "default: 0.05 for Table 1, 0.03 for Table 4",
    "batch_size": "examples of a step (default: 0, all)",
    "steps": "training steps of a round (default: 200 for Table 1, 100 for Table 4)",
    "test_size": "test examples of a seed (default: 2048)",
    "seed": "what all randomness comes from (default: 0)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command, without importing JAX."""
    parser.add_argument(
        "experiment",
        choices=("list", "lw-synthetic"),
        help='the experiment; "list" prints the commands for every table and figure',
    )
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
    for field, what in _FLAGS.items():
        group.add_argument(f"--{field.replace('_', '-')}", metavar="VALUE", help=what)


def run(options: argparse.Namespace) -> int:
    """Run the experiment; print and write its tables, and draw them; return the exit code."""
    if options.experiment == "list":
        from seal_jax.reproduce import catalogue

        print(catalogue.as_text())
        return 0
    _use_all_cores()
    from seal_jax.reproduce import lw_plans, lw_plot, lw_search, lw_synthetic, lw_tables

    given = _given(options, lw_synthetic.Settings, lw_plans.Choices)
    values = {"1": given, "4": {**TABLE_4, **given}}
    choices = {table: _make(lw_plans.Choices, values[table]) for table in values}
    settings = {table: _make(lw_synthetic.Settings, values[table]) for table in values}
    initialisers = (
        list(lw_plans.INITIALISERS) if options.initialiser == "both" else [options.initialiser]
    )
    if options.seeds is not None:
        lw_plans.check_least("seeds", options.seeds)
    tables = ["1", "4"] if options.table == "all" else [options.table]
    if options.search:
        for table in tables:
            search = {"1": lw_search.table1, "4": lw_search.table4}[table]
            for line in search(settings[table], choices[table], initialisers, options.seeds or 8):
                print(line, flush=True)
        return 0

    output = _folder(options.output)
    for name in (PLOT, *(f"table{table}.csv" for table in tables)):
        if (output / name).is_dir():  # said before hours of work
            raise UsageError(f"{output / name} is a folder; give another --output")
    test, cells4 = None, []
    for table in tables:
        plans = {"1": lw_plans.table1, "4": lw_plans.table4}[table](initialisers, choices[table])
        seeds = SEEDS[table] if options.seeds is None else options.seeds
        trained = lw_synthetic.train_all(settings[table], plans, seeds, progress=True)
        if table == "1":
            test = trained.test
            cells = lw_tables.cells1(test, initialisers)
            print(lw_tables.text1(cells), end="\n\n", flush=True)
        else:
            cells = cells4 = lw_tables.cells4(trained.test, initialisers)
            print(lw_tables.text4(cells), end="\n\n", flush=True)
        files.write(output / f"table{table}.csv", lw_tables.csv_text(cells))
    lw_plot.draw(output / PLOT, initialisers, test, settings["1"].steps, cells4)
    print(f"tables and plot: {output}")
    return 0


def _use_all_cores() -> None:
    """Make every CPU core a device; seeds are spread over devices."""
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if jax.config.values["jax_num_cpu_devices"] < 0:  # nobody has said how many
        # Once JAX has started its devices they stay as they are.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", cores or 1)


def _given(options: argparse.Namespace, *kinds: Any) -> dict[str, Any]:
    """Return the options that were given, of the types of the fields."""
    types: dict[str, Any] = {
        field.name: type(field.default) for kind in kinds for field in dataclasses.fields(kind)
    }
    values = {}
    for field in _FLAGS:
        text = getattr(options, field)
        if text is None:
            continue
        try:
            values[field] = types[field](text)
        except ValueError:
            raise UsageError(
                f"{field} = {text!r} must be of type {types[field].__name__}"
            ) from None
    return values


def _make(kind: Any, values: dict[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})


def _folder(name: str) -> Path:
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output={name} cannot be written: {error.strerror}") from None
    return path
