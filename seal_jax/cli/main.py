"""The commands: their options, what they do, and one line with an exit code for what users can fix.

Imports are inside the commands, so that ``compare`` does not wait for what ``train`` needs.
"""

from __future__ import annotations

import argparse
import errno
import fnmatch
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from seal_jax.core import files
from seal_jax.errors import (
    CRASHED,
    INTERRUPTED,
    OK,
    STOPPED,
    UNWRITABLE,
    USAGE,
    BucketError,
    UsageError,
)

_EXIT_CODES = (
    f"exit codes: {OK} done; {USAGE} bad input, or a loss that is not finite, explained in one line; "
    f"{UNWRITABLE} the run's folder cannot be written any more (a full disk); "
    f"{STOPPED} stopped by SIGTERM or SIGINT after saving a checkpoint: the same command goes on"
)
# Lines of `prepare --verify`: data of another kind may have one for every image.
_MOST_PROBLEMS = 20
# Where `sweep` trains variants that share a program, before it writes the folder of each.
TOGETHER = "together"
OVERRIDES = (
    "Any setting can be changed with --config.SECTION.FIELD=VALUE, such as "
    "--config.train.seeds=4 or --config.optimizer.learning_rate=0.05."
)


def run(arguments: Sequence[str]) -> int:
    """Run one command; return the exit code."""

    def command() -> int:
        # In two passes: the options of `evaluate` depend on --kind.
        kind = _kind(arguments)
        options, overrides = parse(parser(kind, evaluate="evaluate" in arguments), arguments)
        return options.run(options, overrides)

    return exit_code(command)


def exit_code(command: Callable[[], int]) -> int:
    """Call a command; return its exit code, or that of an error after one line about it on stderr."""
    # A warning without the line of code that raised it.
    warnings.showwarning = _one_line_warning
    try:
        return command()
    except UsageError as error:
        return _fail(str(error), USAGE)
    # Where a folder of the file system has an answer, such as whether a file exists, a bucket may refuse one.
    except BucketError as error:
        # What is out of reach may be back when the command is started again.
        return _fail(str(error), USAGE if error.errno == errno.EACCES else CRASHED)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of the output has ended, as `head` does. Python flushes stdout at its exit and would
        # complain again, so let it write to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CRASHED
    except ModuleNotFoundError as error:
        # A missing module of this package is a defect and keeps its traceback.
        if error.name and error.name.split(".")[0] == "seal_jax":
            raise
        return _fail(
            f'{error.name} is not installed; pip install "seal_jax[train]" has what the trainer needs',
            USAGE,
        )


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    return code


def _one_line_warning(message, category, filename, lineno, file=None, line=None):
    del category, filename, lineno, line
    print(f"warning: {message}", file=file or sys.stderr)


def _kind(arguments: Sequence[str]) -> str | None:
    """Return what ``--kind`` says: the options of ``evaluate`` depend on it."""
    # A small parser, before the real one can be built. Anything else on the line is left to that one, and
    # so are errors: a --kind without a value is None here.
    before = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    before.add_argument("--kind", nargs="?")
    return before.parse_known_args(list(arguments))[0].kind if "evaluate" in arguments else None


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        """Raise a ``UsageError``; ``argparse`` would print the usage and exit."""
        raise UsageError(f"{message}; see {self.prog} --help")


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of a command, and overrides of settings if it takes a config."""
    # Settings are not options of the parser: which ones exist is known when the config is loaded.
    options, overrides = parser.parse_known_args(list(arguments))
    takes_config = hasattr(options, "config")
    for override in overrides:
        if not (takes_config and override.startswith("--config.") and "=" in override):
            hint = (
                "settings are --config.section.field=value"
                if takes_config
                else f"see {parser.prog} {options.command} --help"
            )
            raise UsageError(f"{override} is not an option of {options.command}; {hint}")
    return options, overrides


def parser(kind: str | None = None, *, evaluate: bool = True) -> argparse.ArgumentParser:
    """Return the parser of all commands, ``evaluate`` with the options of this kind.

    Without ``evaluate`` that command has no options, since listing the kinds imports all evaluators.
    """
    from seal_jax.evaluators import command as evaluation

    root = Parser(
        prog="python -m seal_jax", description=__import__("seal_jax").__doc__, epilog=_EXIT_CODES
    )
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(run: Callable[..., int], epilog: str = "") -> argparse.ArgumentParser:
        # The function declares the command: its name, and its docstring as the help.
        name, summary = run.__name__.removeprefix("_"), str(run.__doc__).rstrip(".")
        summary = " ".join(summary.split())
        summary = summary[0].lower() + summary[1:]
        # No abbreviations: --conf=x must be an error, neither --config=x nor an override.
        added = commands.add_parser(
            name, help=summary, description=summary, epilog=epilog, allow_abbrev=False
        )
        added.set_defaults(command=name, run=run)
        return added

    for train, config, folder in ((_train, "FILE[:VARIANT]", "run"), (_sweep, "FILE", "runs")):
        to = command(train, OVERRIDES)
        to.add_argument("--config", required=True, metavar=config, help="a file of configs/")
        help_text = f"the folder of the {folder}"
        to.add_argument("--workdir", required=True, metavar="DIR", help=help_text)
        if train is _sweep:
            help_text = "patterns of variants, with commas between: llf,seal*"
            to.add_argument("--only", metavar="NAMES", help=help_text)
            to.add_argument(
                "--together",
                type=int,
                default=64,
                metavar="N",
                help="trainings in one program, of variants that differ in numbers alone (default: %(default)s; 1: "
                "each variant in its own)",
            )
        group = to.add_argument_group("several processes (on Cloud TPU: --coordinator=auto alone)")
        group.add_argument("--coordinator", metavar="HOST:PORT", help='process 0, or "auto"')
        group.add_argument("--processes", type=int, metavar="N", help="how many there are")
        group.add_argument("--process", type=int, metavar="I", help="which this is, from 0")

    to = command(_compare)
    to.add_argument("workdirs", nargs="+", metavar="DIR", help="folders of runs")
    to.add_argument("--output", metavar="DIR", help="where report.html and its files go")

    to = command(
        _evaluate,
        "python -m seal_jax evaluate --kind=KIND --help lists the options of a kind. What was "
        "done stays done: the same command goes on where it stopped.",
    )
    if evaluate:
        evaluation.add_arguments(to, kind)
        if kind:
            to.set_defaults(command=f"evaluate --kind={kind}")

    command(_methods)

    to = command(_slim)
    to.add_argument("run_folder", metavar="DIR", help="the folder of the run")
    help_text = "where slim.npz and slim.json go"
    to.add_argument("--output", required=True, metavar="DIR", help=help_text)

    to = command(_export)
    to.add_argument("--checkpoint", required=True, metavar="RUN", help="the folder of the run")
    help_text = "the safetensors file to write"
    to.add_argument("--output", required=True, metavar="FILE", help=help_text)
    help_text = '"last", the default, "best" by validation, or "ema", the average'
    to.add_argument("--weights", default="last", metavar="NAME", help=help_text)
    to.add_argument("--seed", type=int, metavar="N", help="default: the first of the run")
    help_text = '"torchvision", "timm" or "seal_jax"; default: the first that has the network'
    to.add_argument("--names", metavar="NAME", help=help_text)

    data_dir: Any = {"metavar": "DIR", "help": "default: TFDS_DATA_DIR, or TFDS's own"}
    command(_datasets).add_argument("--data-dir", **data_dir)

    to = command(_prepare)
    help_text = "such as tiny_imagenet; see `datasets`"
    to.add_argument("--dataset", required=True, metavar="NAME", help=help_text)
    to.add_argument("--data-dir", **data_dir)
    to.add_argument("--manual-dir", metavar="DIR", help="the folder of the original files")
    help_text = "read prepared data whole and check counts, classes, images and checksums"
    to.add_argument("--verify", action="store_true", help=help_text)
    return root


def _train(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Train one experiment, or resume it where it stopped."""
    from seal_jax.cli import configs
    from seal_jax.training import points

    root = files.as_path(options.workdir)
    _start_jax(options)
    settings = points.tuned(configs.load(options.config, overrides), root)
    code = _train_one(settings, root, alone=True)
    if code == OK and settings.train.vary and _is_main_process():
        _write_report(points.folders(root, settings), root)
    return code


def _sweep(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Train every variant of a config, each in a folder of its own, then compare them."""
    from seal_jax.cli import configs
    from seal_jax.core import programs, vary
    from seal_jax.training import points

    root = files.as_path(options.workdir)
    if options.together < 1:
        raise UsageError(f"--together={options.together} must be at least 1")
    if configs.split(options.config)[1]:
        raise UsageError(f"--config={options.config} must be a file; sweep trains all its variants")
    variants = configs.variants(options.config)
    if not variants:
        raise UsageError(f"--config={options.config} declares no VARIANTS; use train")
    if options.only:
        patterns = options.only.split(",")
        chosen = [name for name in variants if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
        if not chosen:
            raise UsageError(f"--only={options.only} fits none of {', '.join(variants)}")
        variants = tuple(chosen)
    # All errors of settings come before any training.
    runs = {variant: configs.load(f"{options.config}:{variant}", overrides) for variant in variants}
    for run in runs.values():
        for point in vary.points(run):
            vary.at(run, point)
    _start_jax(options)
    # In the order of VARIANTS: a later one may start from the run of an earlier one, as PoF from SAM.
    waiting, apart = list(variants), set[str]()
    lost: dict[str, str] = {}  # why, by variant
    while waiting := [name for name in waiting if not _is_lost(name, runs[name].train, root, lost)]:
        ready: dict[str, Any] = {}
        untrained = {(root / name).resolve() for name in waiting}
        for name in waiting:
            source = runs[name].train.tuned_on
            if not source or files.relative_to(root / name, source).resolve() not in untrained:
                ready[name] = runs[name] = points.tuned(runs[name], root / name)
        if not ready:
            raise UsageError(f"{waiting[-1]}: train.tuned_on = {source!r} waits for it in turn")
        group = points.together(ready, apart, options.together)
        programs.make_room()
        try:
            code = _train_group({name: runs[name] for name in group}, root, lost)
        except vary.CannotVary as error:
            # Of the group, or of what a variant itself varies.
            if len(group) == 1:
                raise
            apart.update(error.fields)
            continue
        # A stop or a full disk ends the sweep. The same command finds the finished variants done and resumes
        # this one.
        if code:
            return code
        waiting = [name for name in waiting if name not in group]
    ended = {name: run for name, run in runs.items() if name not in lost}
    if ended and _is_main_process():
        # Those that others were tuned on are many, and not what was asked for.
        single = [root / name for name, run in ended.items() if not run.train.vary]
        every = [
            folder for name, run in ended.items() for folder in points.folders(root / name, run)
        ]
        _write_report(single or every, root)
    if lost:
        reasons = "; ".join(f"{name}: {why}" for name, why in lost.items())
        raise UsageError(f"{len(lost)} of {len(runs)} variants did not end: {reasons}")
    return OK


def _is_lost(name: str, train: Any, root: Path, lost: dict[str, str]) -> bool:
    """Return whether a variant is lost, and note so of one that starts from another that is."""
    for source in (train.tuned_on, train.pretrained):
        if source.startswith(".."):
            folder = files.relative_to(root / name, source).resolve()
            if any((root / other).resolve() == folder for other in lost):
                lost[name] = f"it starts from {source}"
    return name in lost


def _train_group(runs: Mapping[str, Any], root: Path, lost: dict[str, str]) -> int:
    """Train runs that differ in numbers alone as one, unless some have folders of their own already.

    Those that diverge are noted in ``lost``; they do not end the sweep.
    """
    from seal_jax.training import metrics, points
    from seal_jax.training import workdir as workdirs
    from seal_jax.training.loop import NonFiniteError

    def note(error: NonFiniteError) -> int:
        lost.update(dict.fromkeys(runs, str(error)))
        print(f"left out: {', '.join(runs)}: {error}", flush=True)
        return OK

    def steps(folder: Path) -> int:
        return max((row["step"] for row in metrics.read(folder)), default=0)

    def each(groups: Iterable[Mapping[str, Any]]) -> int:
        return next((code for group in groups if (code := _train_group(group, root, lost))), OK)

    first, *others = runs
    if not others:
        try:
            return _train_one(runs[first], root / first)
        except NonFiniteError as error:
            return note(error)
    joint, joined = root / TOGETHER / first, points.joined(list(runs.values()))
    alone = {name: run for name, run in runs.items() if (root / name / workdirs.CONFIG).exists()}
    begun = (joint / workdirs.CONFIG).exists()
    same = begun and workdirs.read(joint)["train"].get("vary") == joined.train.vary
    if same or not (begun or alone):
        try:
            code = _train_one(joined, joint, [root / name for name in runs])
        except NonFiniteError as error:
            return note(error)
        # Folders that it found were left as they are, and what was begun alone, maybe meanwhile, may not have ended.
        return code or each(
            {name: run} for name, run in runs.items() if steps(root / name) < steps(joint)
        )
    if alone:
        rest = {name: run for name, run in runs.items() if name not in alone}
        return each([*({name: run} for name, run in alone.items()), *[rest] * bool(rest)])
    raise UsageError(
        f"{joint} holds a run of other points than {', '.join(runs)}: sweep as it was begun (--config, --only, "
        "--together), or give another --workdir"
    )


def _start_jax(options: argparse.Namespace) -> None:
    """Join the other processes, if there are any, before anything starts JAX's devices for one."""
    from seal_jax.cli import processes

    processes.join(options.coordinator, options.processes, options.process)
    cache_programs()


def cache_programs() -> None:
    """Keep compiled programs on disk, so that a resumed run does not compile again."""
    import jax

    # A folder that the user has chosen wins, with JAX's settings for it.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "seal_jax" / "xla"))
        # JAX's default of a second would leave out the many small programs.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _is_main_process() -> bool:
    import jax

    return jax.process_index() == 0


def _train_one(
    settings: Any, workdir: Path, points: Sequence[Path] = (), *, alone: bool = False
) -> int:
    """Train a run; of one that ended at a signal OK is returned if it is ``alone``, with nothing after it to stop."""
    import jax

    from seal_jax import reports
    from seal_jax.training import experiment, loop
    from seal_jax.training import workdir as workdirs

    dataset = experiment.load(settings)
    try:
        outcome = loop.train(settings, workdir, dataset, points=points)
    except OSError as error:  # a full disk, or a folder that went away
        # Of stdout, not of the folder: `exit_code` handles it.
        if isinstance(error, BrokenPipeError):
            raise
        code = _fail(str(error), UNWRITABLE)
        if jax.process_count() > 1:
            # The other processes wait for this one in the step, and a normal exit would wait for them.
            sys.stdout.flush()
            os._exit(code)
        return code
    try:
        if _is_main_process() and not settings.train.vary:
            record, picture = ((workdir / name) for name in (workdirs.METRICS, reports.CURVES))
            # Drawing takes longer than all else that a sweep does with a variant that it has trained before.
            drawn = picture.exists() and picture.stat().st_mtime > record.stat().st_mtime
            # A run that stopped within its first epoch has no row to draw.
            if record.stat().st_size and not drawn:
                reports.draw_run(workdir)
    except (OSError, UsageError) as error:
        # The run is whole without its picture, and so is its exit code.
        warnings.warn(f"no curves were drawn: {error}", stacklevel=1)
    if not outcome.finished:
        print(f"stopped at step {outcome.step}; the same command goes on from there", flush=True)
        return STOPPED
    if outcome.signalled and not alone:
        print(f"stopped after {workdir}; the same command goes on from there", flush=True)
        return STOPPED
    return OK


def _compare(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print the generations table of runs and write a report of them, a page with its files."""
    output = files.as_path(options.output or ".")
    _write_report([files.as_path(name) for name in options.workdirs], output)
    return OK


def _write_report(workdirs: list[Path], output: Path) -> None:
    from seal_jax import reports

    comparison = reports.write_report(workdirs, output)
    print(comparison.as_text())
    print(f"report: {output / 'report.html'}, with generations.csv, curves.png and more beside it")


def _evaluate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Evaluate a run's networks as the papers do; each kind has options of its own."""
    from seal_jax.evaluators import command

    cache_programs()
    print(command.run(options))
    return OK


def _methods(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """List every system of the papers, with its method, config and source."""
    from seal_jax import methods
    from seal_jax.core.tables import aligned

    header = ("system", "method.name and options", "configs/", "source")
    rows = [
        (system.name, f"{system.method} {system.options}".strip(), system.config, system.source)
        for system in methods.VARIANTS.values()
    ]
    print("\n".join(aligned([header, *rows])))
    print("\nAll of them train in seconds as variants of configs/digits.py.")
    print("What the methods do, one file each in seal_jax/methods/:")
    width = max(map(len, methods.NAMES))
    for name in methods.NAMES:
        print(f"  {name:{width}}  {methods.summary(name)}")
    return OK


def _slim(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Export the slim network of a KELS run, scored beside the whole one."""
    from seal_jax.training import slim

    if not options.output:
        raise UsageError("--output= is empty; name a folder")
    print(slim.export(files.as_path(options.run_folder), files.as_path(options.output)))
    return OK


def _export(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Write a trained network as safetensors, under the names of torchvision or timm where these have it."""
    from seal_jax.cli import export

    line = export.export(
        files.as_path(options.checkpoint),
        files.as_path(options.output),
        weights=options.weights,
        seed=options.seed,
        names=options.names,
    )
    print(line)
    return OK


def _datasets(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """List the papers' data sets, and which of them are prepared."""
    from seal_jax.cli import datasets

    print(datasets.as_text(options.data_dir))
    return OK


def _prepare(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Prepare a data set for training, without TensorFlow."""
    from seal_jax import data

    if options.verify:
        return _verify(options)
    where = data.prepare(options.dataset, data_dir=options.data_dir, manual_dir=options.manual_dir)
    print(f"{options.dataset} is prepared in {where}")
    return OK


def _verify(options: argparse.Namespace) -> int:
    from seal_jax.data import verification

    if options.manual_dir:
        raise UsageError("--verify checks data that is prepared; leave --manual-dir out")
    verified = verification.verify(options.dataset, data_dir=options.data_dir)
    shown = verified.problems[:_MOST_PROBLEMS]
    for problem in shown:
        print(f"error: {problem}", file=sys.stderr)
    if len(verified.problems) > len(shown):
        print(f"error: and {len(verified.problems) - len(shown):,} more", file=sys.stderr)
    print(verified.as_text())
    return USAGE if verified.problems else OK
