"""Parses the command line and turns errors that the user can mend into one line and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from seal_jax.errors import UsageError

OK, CRASHED, USAGE, UNWRITABLE, STOPPED, INTERRUPTED = 0, 1, 2, 74, 75, 130
_EXIT_CODES = (
    f"exit codes: {OK} done; {USAGE} bad input, or a loss that is not finite, explained in one line; "
    f"{UNWRITABLE} the run's folder cannot be written any more (a full disk); "
    f"{STOPPED} stopped by SIGTERM or SIGINT after saving a checkpoint: the same command goes on"
)
_OVERRIDES = (
    "Any setting can be changed with --config.SECTION.FIELD=VALUE, such as "
    "--config.train.seeds=4 or --config.optimizer.learning_rate=0.05."
)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        raise UsageError(f"{message}; see {self.prog} --help")


def parser(kind: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of all commands, ``evaluate`` with the options of this kind."""
    root = _Parser(
        prog="python -m seal_jax", description=__import__("seal_jax").__doc__, epilog=_EXIT_CODES
    )
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, summary: str, epilog: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=summary, description=summary, epilog=epilog, allow_abbrev=False
        )
        added.set_defaults(command=name)
        return added

    def config(to: argparse.ArgumentParser) -> None:
        to.add_argument(
            "--config", required=True, metavar="FILE[:VARIANT]", help="a file of configs/"
        )

    def processes(to: argparse.ArgumentParser) -> None:
        group = to.add_argument_group("several processes (on Cloud TPU: --coordinator=auto alone)")
        group.add_argument("--coordinator", metavar="HOST:PORT", help='process 0, or "auto"')
        group.add_argument("--processes", type=int, metavar="N", help="how many there are")
        group.add_argument("--process", type=int, metavar="I", help="which this is, from 0")

    train = command("train", "train one experiment, or take it up where it stopped", _OVERRIDES)
    config(train)
    train.add_argument("--workdir", required=True, metavar="DIR", help="the folder of the run")
    processes(train)

    sweep = command(
        "sweep",
        "train every variant of a config, each in a folder of its own, then compare them",
        _OVERRIDES,
    )
    config(sweep)
    sweep.add_argument("--workdir", required=True, metavar="DIR", help="the folder of the runs")
    processes(sweep)

    compare = command(
        "compare",
        "print the generations table of runs and write a report of them, a page with its files",
    )
    compare.add_argument("workdirs", nargs="+", metavar="DIR", help="folders of runs")
    compare.add_argument("--output", metavar="DIR", help="where report.html and its files go")

    from seal_jax.evaluators import command as evaluation

    evaluation.add_arguments(
        command(
            "evaluate",
            "evaluate a run's networks as the papers do; each kind has options of its own",
            "python -m seal_jax evaluate --kind=KIND --help lists the options of a kind. What was "
            "done stays done: the same command goes on where it stopped.",
        ),
        kind,
    )

    command("methods", "list every system of the papers, with its method, config and source")

    slim = command("slim", "export the slim network of a KELS run, scored beside the whole one")
    slim.add_argument("run", metavar="DIR", help="the folder of the run")
    slim.add_argument(
        "--output", required=True, metavar="DIR", help="where slim.npz and slim.json go"
    )

    datasets = command("datasets", "list the papers' data sets, and which of them are prepared")
    datasets.add_argument("--data-dir", metavar="DIR", help="default: TFDS_DATA_DIR, or TFDS's own")

    prepare = command("prepare", "prepare a data set for training, without TensorFlow")
    prepare.add_argument(
        "--dataset", required=True, metavar="NAME", help="such as tiny_imagenet; see `datasets`"
    )
    prepare.add_argument("--data-dir", metavar="DIR", help="default: TFDS_DATA_DIR, or TFDS's own")
    prepare.add_argument("--manual-dir", metavar="DIR", help="the folder of the original files")

    preflight = command(
        "preflight",
        "compile a config's train program with the real TPU compiler, on any machine; print its cost",
        _OVERRIDES,
    )
    config(preflight)
    preflight.add_argument(
        "--topology", default="v5e:2x4", metavar="KIND:SHAPE", help="chips (default: %(default)s)"
    )
    preflight.add_argument("--json", metavar="FILE", help="write the report there too")

    from seal_jax.reproduce import command as reproduction

    reproduction.add_arguments(
        command("reproduce", "run an experiment of a paper again, its numbers beside the paper's")
    )
    return root


def run(arguments: Sequence[str]) -> int:
    """Run one command; return the exit code."""
    warnings.showwarning = _one_line_warning
    try:
        options, overrides = parser(_kind(arguments)).parse_known_args(list(arguments))
        takes_config = hasattr(options, "config")
        for override in overrides:
            if not (takes_config and override.startswith("--config.") and "=" in override):
                raise UsageError(_unknown(override, options, arguments, takes_config))
        return _commands()[options.command](options, overrides)
    except UsageError as error:
        return fail(str(error), USAGE)
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the output has left, as `head` does; Python would complain at its exit too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CRASHED
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "seal_jax":
            raise
        return fail(
            f'{error.name} is not installed; pip install "seal_jax[train]" has what the trainer needs',
            USAGE,
        )


def _kind(arguments: Sequence[str]) -> str | None:
    """Return what ``--kind`` says: the options of ``evaluate`` depend on it."""
    before = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    before.add_argument("--kind", nargs="?")
    return before.parse_known_args(list(arguments))[0].kind if "evaluate" in arguments else None


def _unknown(
    argument: str, options: argparse.Namespace, arguments: Sequence[str], takes_config: bool
) -> str:
    """Return what to say about an argument that no option is."""
    command = options.command
    if takes_config:
        return (
            f"{argument} is not an option of {command}; settings are --config.section.field=value"
        )
    kind = _kind(arguments)
    subject = f"{command} --kind={kind}" if command == "evaluate" else command
    return f"{argument} is not an option of {subject}; see python -m seal_jax {subject} --help"


def fail(message: str, code: int) -> int:
    """Print an error as one line and return the exit code."""
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    return code


def _commands():
    # Imported where they are needed: `compare` must not wait for the trainer's imports.
    from seal_jax.cli import commands

    return {
        "train": commands.train,
        "sweep": commands.sweep,
        "compare": commands.compare,
        "methods": commands.methods,
        "evaluate": commands.evaluate,
        "slim": commands.slim,
        "datasets": commands.datasets,
        "prepare": commands.prepare,
        "preflight": commands.preflight,
        "reproduce": commands.reproduce,
    }


def _one_line_warning(message, category, filename, lineno, file=None, line=None):
    del category, filename, lineno, line
    print(f"warning: {message}", file=file or sys.stderr)
