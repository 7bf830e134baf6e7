"""The command ``evaluate``: run an evaluator over runs' folders and write its results."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any, TypedDict

from seal_jax import evaluators, records
from seal_jax.core import files, plots, programs
from seal_jax.core.settings import differences
from seal_jax.core.tables import Record, csv_text
from seal_jax.errors import UsageError
from seal_jax.evaluators import options as options_lib
from seal_jax.evaluators.evaluator import Evaluator

EVALUATIONS = "evaluations"
UNITS, RESULTS, LOCK = "units.jsonl", "results.json", ".lock"


def add_arguments(parser: argparse.ArgumentParser, name: str | None) -> None:
    """Add the options of ``evaluate``, with those of one evaluator once its name is known."""
    parser.add_argument(
        "--kind", required=True, metavar="KIND", help=f"one of {', '.join(evaluators.registry())}"
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        nargs="+",
        action="extend",
        metavar="RUN",
        help="the folder of a run; several are evaluated in turn and shown in one table",
    )
    parser.add_argument(
        "--weights",
        metavar="last,best,ema",
        help="the last weights, the best by validation accuracy, or their moving average (default: those that the run "
        "has, apart)",
    )
    parser.add_argument(
        "--steps",
        default="newest",
        metavar="newest|all|N,N",
        help="which checkpoints of the run (default: %(default)s)",
    )
    parser.add_argument(
        "--output", metavar="DIR", help=f"where results go (default: RUN/{EVALUATIONS}/KIND)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="begin anew instead of going on with what is there"
    )
    # An unknown name is reported by run(), with the nearest one that there is.
    evaluator = evaluators.registry().get(name or "")
    if evaluator:
        title = f"{evaluator.name}: {evaluator.summary} ({evaluator.source})"
        options_lib.add_arguments(evaluator.options, parser.add_argument_group(title))


def run(parsed: argparse.Namespace) -> str:
    """Evaluate; return the table with the names of the files."""
    evaluator = evaluators.load(parsed.kind)
    options = options_lib.read(evaluator.options, parsed)
    weights = tuple(parsed.weights.split(",")) if parsed.weights else ()
    folders = [files.as_path(name) for name in parsed.checkpoint]
    # Their caches would be one file, which belongs to one run.
    if parsed.output and len(folders) > 1:
        raise UsageError(
            f"--output={parsed.output} is for one run, and --checkpoint names {len(folders)}; leave "
            "it out: each has a folder of its own"
        )
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("--checkpoint names a run twice; name each once")
    # Every run's results are written to its own folder. Only the printed table has all runs.
    rows: list[Record] = []
    outputs = []
    for folder, name in zip(folders, files.short_names(folders), strict=True):
        default = folder / EVALUATIONS / evaluator.name
        output = files.as_path(parsed.output) if parsed.output else default
        which: dict[str, Any] = {"weights": weights, "steps": parsed.steps}
        programs.make_room()
        of_run = evaluate(evaluator, folder, options, output, **which, overwrite=parsed.overwrite)
        # Folders of one name in different places would otherwise be one run in the table.
        rows += [{**row, "run": name} for row in of_run]
        outputs.append(f"results: {output / RESULTS}, results.csv, {evaluator.name}.png")
    return "\n".join([evaluator.table(rows).as_text(), "", *outputs])


def evaluate(
    evaluator: Evaluator,
    folder: Path,
    options: Any,
    output: Path,
    *,
    weights: Sequence[str] = (),
    steps: str = "newest",
    overwrite: bool = False,
) -> Sequence[Record]:
    """Do the remaining work of an evaluation, write its results and return their rows.

    Args:
      evaluator: which evaluation.
      folder: of the training run.
      options: of the evaluator.
      output: the folder of the results.
      weights, steps: which networks, see :class:`seal_jax.evaluators.loaded_run.LoadedRun`.
      overwrite: start again and discard earlier records.

    Raises:
      UsageError: anything wrong with the input, or a folder that cannot be written or that another
        process writes to.
    """
    # Not at the top: the command line imports this module for every command, and these import Flax and Orbax.
    from seal_jax.evaluators import loaded_run
    from seal_jax.training import workdir as workdirs
    from seal_jax.training.progress import Progress

    loaded = loaded_run.load(folder, weights=weights, steps=steps)
    # What a cached record depends on. Records under another header are refused, not mixed with new ones.
    header = {
        "kind": evaluator.name,
        "run": loaded[0].label,
        "networks": [network.key for part in loaded for network in part.networks],
        "fingerprint": " ".join(part.fingerprint for part in loaded),
        "options": dataclasses.asdict(options),
    }
    # Unusable input is an error before the first file is written.
    files.check_writable(output, "--output")
    items = [item for part in loaded for item in evaluator.work_items(part, options)]
    with workdirs.locked(output / LOCK, "--output"):
        # Read under the lock: another process could be in the middle of a line.
        cache = ResultCache(output / UNITS, header, overwrite=overwrite)
        remaining = [item for item in items if item.key not in cache.records]
        done = len(items) - len(remaining)
        with Progress(len(items), initial=done, unit="part") as progress:
            for number, item in enumerate(remaining, done + 1):
                cache.keep(item.key, item.run())
                progress.update(number)
        try:
            rows = evaluator.rows([cache.records[item.key] for item in items])
            # The caller prints the table. Here it finds cached records that do not fit before anything is written.
            evaluator.table(rows)
            write(evaluator, header, rows, output)
        except evaluators.UNFIT as error:
            # Where nothing was cached it is a defect, and keeps its traceback.
            if isinstance(error, UsageError) or not done:
                raise
            raise UsageError(
                f"{output / UNITS} holds records that do not fit ({type(error).__name__}: {error}); "
                "evaluate again with --overwrite"
            ) from error
    return rows


class ResultCache:
    """The records of finished work items, in a file that only grows.

    Its first line says what is evaluated and how; a file that begins with another is refused.

    Args:
      path: the file, which is made when the first record is kept.
      header: JSON values, nested by name.
      overwrite: start again and discard the file's records.

    Raises:
      UsageError: the file belongs to another evaluation, or cannot be read.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], *, overwrite: bool = False):
        self._path = path
        # As it will be read back: JSON has lists only, and a tuple never equals one.
        self._header = json.loads(json.dumps(header))
        self.records: dict[str, dict[str, Any]] = {}
        self._begun = False
        if path.exists() and not overwrite:
            self._read()

    def keep(self, key: str, record: Mapping[str, Any]) -> None:
        """Write the record of a finished work item to the disk.

        Raises:
          UsageError: the file cannot be written.
        """
        self.records[key] = dict(record)
        try:
            # On disk before the next begins: a kill loses the work item in progress, and no other.
            if self._begun:
                files.append(self._path, f"{_line(key, record)}\n".encode())
            else:
                # The readable lines are written again: the last may have been cut off by a kill.
                lines = [json.dumps(self._header), *starmap(_line, self.records.items())]
                content = "".join(f"{line}\n" for line in lines)
                files.replace(self._path, content.encode(), sync=True)
                self._begun = True
        except OSError as error:
            raise UsageError(f"{self._path} cannot be written: {error.strerror}") from None

    def _read(self) -> None:
        lines = records.lines(self._path, Mapping[str, Any], finite=False)
        # A file always has a first line, an empty one if need be, which is a problem.
        _, header, problem = next(lines)
        if problem:
            raise UsageError(
                f"{self._path} cannot be read: {problem}; give another --output, or --overwrite"
            )
        changed = differences(header, self._header)
        if changed:
            more = ", ..." if len(changed) > 3 else ""
            raise UsageError(
                f"{self._path.parent} holds another evaluation ({'; '.join(changed[:3])}{more}); "
                "give another --output, or --overwrite"
            )
        # Lines after the first bad one are dropped too: only the last can have been cut off, any other is damaged.
        for _, entry, problem in lines:
            try:
                entry = records.check(_Entry, entry, "")
            except UsageError as error:
                problem = str(error)
            if problem or not entry["record"]:
                break  # cut off by a kill or a full disk; the work that follows is done again
            self.records[entry["key"]] = entry["record"]


class _Entry(TypedDict):
    key: str
    record: Mapping[str, Any]


def _line(key: str, record: Mapping[str, Any]) -> str:
    return json.dumps({"key": key, "record": record})


def write(
    evaluator: Evaluator, header: Mapping[str, Any], rows: Sequence[Record], output: Path
) -> None:
    """Write ``results.json``, ``results.csv`` and the plot into a folder, each file atomically."""
    from matplotlib.figure import Figure

    # Drawn before the first file is written: records that do not fit fail here, and earlier results stay whole.
    figure = Figure(figsize=evaluator.size(rows), dpi=120, layout="constrained")
    evaluator.draw(figure, [{**row, "run": plots.drawable(row["run"])} for row in rows])
    picture = plots.as_png(figure)
    files.write(output / RESULTS, json.dumps({**header, "rows": list(rows)}, indent=1) + "\n")
    # Lists, such as all margins, are left to the JSON file.
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if not any(isinstance(row.get(name), list) for row in rows)]
    csv = csv_text([names, *([row.get(name) for name in names] for row in rows)])
    files.write(output / "results.csv", csv)
    files.write(output / f"{evaluator.name}.png", picture)


def read(path: Path) -> dict[str, Any]:
    """Return the content of ``results.json``, checked."""
    results: dict[str, Any] = records.load(path, _Results, "evaluate again", finite=False)
    if results["kind"] not in evaluators.registry():
        raise UsageError(
            f"{path} cannot be read: kind = {results['kind']!r} is none; evaluate again"
        )
    return results


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
