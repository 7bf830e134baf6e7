"""Runs one kind of evaluation over a run's folder and writes what it found."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from seal_jax import evaluators, records
from seal_jax.core import plots
from seal_jax.errors import UsageError
from seal_jax.evaluators import options as options_lib
from seal_jax.evaluators.evaluator import Evaluator, Record
from seal_jax.evaluators.result_cache import ResultCache

EVALUATIONS = "evaluations"
UNITS, RESULTS, LOCK = "units.jsonl", "results.json", ".lock"


def add_arguments(to: argparse.ArgumentParser, kind: str | None) -> None:
    """Add the options of ``evaluate``, with those of one kind once it is known."""
    to.add_argument(
        "--kind", required=True, metavar="KIND", help=f"one of {', '.join(evaluators.NAMES)}"
    )
    to.add_argument(
        "--checkpoint",
        required=True,
        nargs="+",
        action="extend",
        metavar="RUN",
        help="the folder of a run; several are evaluated in turn and shown in one table",
    )
    to.add_argument(
        "--weights",
        metavar="last,best",
        help="the last weights, or the best by validation accuracy (default: both, apart)",
    )
    to.add_argument(
        "--steps",
        default="newest",
        metavar="newest|all|N,N",
        help="which checkpoints of the run (default: %(default)s)",
    )
    to.add_argument(
        "--output", metavar="DIR", help=f"where results go (default: RUN/{EVALUATIONS}/KIND)"
    )
    to.add_argument(
        "--overwrite", action="store_true", help="begin anew instead of going on with what is there"
    )
    if kind in evaluators.NAMES:
        found = evaluators.load(kind)
        options_lib.add_arguments(
            found.options, to.add_argument_group(f"{kind}: {found.summary} ({found.source})")
        )


def run(parsed: argparse.Namespace) -> str:
    """Evaluate; return the table with the names of the files."""
    from seal_jax.reports.runs import short_names

    kind = evaluators.load(parsed.kind)
    chosen = options_lib.read(kind.options, parsed)
    weights = tuple(parsed.weights.split(",")) if parsed.weights else ()
    folders = [Path(name) for name in parsed.checkpoint]
    if parsed.output and len(folders) > 1:
        raise UsageError(
            f"--output={parsed.output} is for one run, and --checkpoint names {len(folders)}; leave "
            "it out: each has a folder of its own"
        )
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("--checkpoint names a run twice; name each once")
    rows: list[Record] = []
    outputs = []
    for folder, name in zip(folders, short_names(folders), strict=True):
        output = Path(parsed.output) if parsed.output else folder / EVALUATIONS / kind.name
        found = evaluate(
            kind,
            folder,
            chosen,
            output,
            weights=weights,
            steps=parsed.steps,
            overwrite=parsed.overwrite,
        )
        rows += [{**row, "run": name} for row in found]
        outputs.append(f"results: {output / RESULTS}, results.csv, {kind.name}.png")
    return "\n".join([kind.table(rows).as_text(), "", *outputs])


def evaluate(
    kind: Evaluator,
    folder: Path,
    options: Any,
    output: Path,
    *,
    weights: Sequence[str] = (),
    steps: str = "newest",
    overwrite: bool = False,
) -> Sequence[Record]:
    """Do what is left of an evaluation and write its results.

    Args:
      kind: which.
      folder: of the training run.
      options: of the kind.
      output: the folder of the results.
      weights: see :class:`seal_jax.evaluators.loaded_run.Subject`.
      steps: the same.
      overwrite: begin anew.

    Returns:
      The rows, which ``results.json`` holds too.

    Raises:
      UsageError: whatever is wrong with the input, or a folder that cannot be written or that another
        process writes to.
    """
    from seal_jax.evaluators.loaded_run import LoadedRun
    from seal_jax.training import workdir as workdirs
    from seal_jax.training.progress import Progress

    loaded_run = LoadedRun(folder, weights=weights, steps=steps)
    header = {
        "kind": kind.name,
        "run": loaded_run.label,
        "networks": [network.key for network in loaded_run.networks],
        "fingerprint": loaded_run.fingerprint,
        "options": dataclasses.asdict(options),
    }
    # Input that cannot be used is found first, and leaves no file.
    _check_writable(output)
    units = kind.units(loaded_run, options)
    with workdirs.locked(output / LOCK, "--output"):
        ledger = ResultCache(output / UNITS, header, overwrite=overwrite)
        left = [unit for unit in units if unit.key not in ledger.records]
        with Progress(len(units), initial=len(units) - len(left), unit="part") as progress:
            for number, unit in enumerate(left, len(units) - len(left) + 1):
                ledger.keep(unit.key, unit.run())
                progress.update(number)
        try:
            rows = kind.rows([ledger.records[unit.key] for unit in units])
            kind.table(rows)
            write(kind, header, rows, output)
        except evaluators.UNFIT as error:
            if isinstance(error, UsageError) or len(left) == len(units):
                raise
            raise UsageError(
                f"{output / UNITS} holds records that do not fit ({type(error).__name__}: {error}); "
                "evaluate again with --overwrite"
            ) from error
    return rows


def write(kind: Evaluator, header: Mapping[str, Any], rows: Sequence[Record], output: Path) -> None:
    """Write ``results.json``, ``results.csv`` and the plot, each as a whole."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=kind.size(rows), dpi=120, layout="constrained")
    kind.draw(figure, [{**row, "run": plots.drawable(row["run"])} for row in rows])
    record = {**json.loads(json.dumps(header)), "rows": list(rows)}
    try:
        output.mkdir(parents=True, exist_ok=True)
        _whole(output / RESULTS, lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
        _whole(output / "results.csv", lambda path: path.write_text(as_csv(rows)))
        _whole(output / f"{kind.name}.png", lambda path: figure.savefig(path, format="png"))
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}") from None


def read(path: Path) -> dict[str, Any]:
    """Return what ``results.json`` holds.

    Raises:
      UsageError: the file cannot be read.
    """
    found: dict[str, Any] = records.load(path, _Results, "evaluate again", finite=False)
    if found["kind"] not in evaluators.NAMES:
        raise UsageError(f"{path} cannot be read: kind = {found['kind']!r} is none; evaluate again")
    return found


class _Row(TypedDict):
    run: str
    weights: str
    seed: int
    step: int


class _Rows(TypedDict):
    kind: str
    rows: list[_Row]


class _Results(_Rows, total=False):
    options: Mapping[str, records.Scalar | list[records.Scalar]]


def as_csv(rows: Sequence[Record]) -> str:
    """Return the rows as CSV; lists, such as all margins, are left to the JSON file."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if not any(isinstance(row.get(name), list) for row in rows)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([row.get(name) for name in names] for row in rows)
    return buffer.getvalue()


def _check_writable(folder: Path) -> None:
    """Raise unless the folder can be written: not after hours of work, but before."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise UsageError(f"--output={folder}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--output={folder}: {there} cannot be written; name another folder")


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    os.replace(partial, path)
