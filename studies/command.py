"""The command: keeps the numbers of studies that were trained, and writes them into docs/results.md.

python -m studies collect --config=configs/studies/label_noise.py --workdir=runs/label_noise
python -m studies write
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from seal_jax.cli import configs, main
from seal_jax.core import files, plots
from seal_jax.errors import UsageError
from studies import analysis, figure, results, text
from studies.design import Study
from studies.results import Row

CONFIGS, NUMBERS, PAGE = Path("configs/studies"), Path("docs/results"), Path("docs/results.md")


def run(arguments: Sequence[str]) -> int:
    """Run the command with these arguments; return the exit code."""

    def command() -> int:
        options, _ = main.parse(_parser(), arguments)
        code: int = options.run(options)
        return code

    return main.exit_code(command)


def _parser() -> argparse.ArgumentParser:
    root = main.Parser(prog="python -m studies", description=str(__doc__).splitlines()[0])
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        added.set_defaults(command=name, run=run)
        return added

    to = command(
        "collect",
        _collect,
        f"write what the runs of a study measured into {NUMBERS}/, beside cells that other machines trained",
    )
    to.add_argument("--config", required=True, metavar="FILE", help=f"a file of {CONFIGS}/")
    to.add_argument("--workdir", required=True, metavar="DIR", help="the folder of its sweep")
    to = command(
        "evaluate",
        _evaluate,
        "do the evaluations that a study's measures need; what is done stays done",
    )
    to.add_argument("--config", required=True, metavar="FILE", help=f"a file of {CONFIGS}/")
    to.add_argument("--workdir", required=True, metavar="DIR", help="the folder of its sweep")
    command("write", _write, f"write tables and verdicts of what was collected into {PAGE}")
    return root


def load(config: str | Path) -> Study:
    """Return the study that a config file declares."""
    study = getattr(configs.load_module(str(config)), "STUDY", None)
    if not isinstance(study, Study):
        raise UsageError(f"--config={config} declares no STUDY; see {CONFIGS}/")
    return study


def _collect(options: argparse.Namespace) -> int:
    study = load(options.config)
    collected = results.collect(study, files.as_path(options.workdir))
    path = NUMBERS / f"{Path(options.config).stem}.csv"
    before = results.read(path) if path.exists() else []
    rows = results.merge(study, collected, before)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, results.as_csv(study, rows))
    kept = {row.cell for row in rows}
    for cell in sorted({row.cell for row in before} - kept):
        print(
            f"left out: {'-'.join(cell)}, which was collected with other settings; train it again"
        )
    here = len({row.cell for row in collected})
    print(
        f"{path}: {len(rows)} trainings, {len(kept)} of {len(list(study.cells()))} cells, {here} of them from "
        f"{options.workdir}"
    )
    return main.OK


def _evaluate(options: argparse.Namespace) -> int:
    main.cache_programs()
    results.evaluate(load(options.config), files.as_path(options.workdir))
    return main.OK


def _write(options: argparse.Namespace) -> int:
    studies, rows = _collected()
    files.write(PAGE, page(PAGE.read_text(), studies, rows))
    for name in rows:
        compared = analysis.compare(studies[name], results.scores(studies[name], rows[name]))
        if drawn := figure.drawable(studies[name], compared):
            picture = plots.as_png(figure.draw(studies[name], drawn))
            files.write(NUMBERS / f"{name}.png", picture)
    print(f"{PAGE} and the pictures in {NUMBERS}/ are written")
    return main.OK


def _collected() -> tuple[dict[str, Study], dict[str, list[Row]]]:
    """Return all studies, and the rows of those of which some were kept, by name."""
    modules = {path.stem: configs.load_module(str(path)) for path in sorted(CONFIGS.glob("*.py"))}
    studies = {name: of.STUDY for name, of in modules.items() if hasattr(of, "STUDY")}
    paths = {name: NUMBERS / f"{name}.csv" for name in studies}
    return studies, {name: results.read(path) for name, path in paths.items() if path.exists()}


def page(old: str, studies: Mapping[str, Study], rows: Mapping[str, Sequence[Row]]) -> str:
    """Return the page with the section of every study between its marks."""
    for name in rows:
        old = text.replaced(old, f"study {name}", text.section(name, studies[name], rows[name]))
    return text.replaced(old, "verdicts", text.verdicts(studies, rows))
