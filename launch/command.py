"""The command: its targets, their options, and one line with an exit code for what goes wrong.

python -m launch slurm run --gpus=1 -- sweep --config=configs/quickstart.py --workdir=/shared/quickstart
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from launch import gke, job, sky, slurm, tpu
from launch.shell import Shell, ToolError
from seal_jax.cli import main

_TARGETS: dict[str, Any] = {"tpu": tpu, "gke": gke, "slurm": slurm, "sky": sky}
_EPILOG = (
    "A sweep becomes one job for each variant; every job can be stopped, preempted and launched again, and "
    "goes on from its last checkpoint. --dry-run prints the commands and manifests and runs nothing. Exit "
    "codes: 0 done; 2 bad input, found before anything was created; otherwise that of the tool that failed."
)


def run(arguments: Sequence[str]) -> int:
    """Run the command with these arguments; return the exit code."""

    def command() -> int:
        # What follows "--" is the command line of the training.
        own = list(arguments)
        words = own[own.index("--") + 1 :] if "--" in own else []
        options = parser().parse_args(own[: len(own) - len(words) - ("--" in own)])
        shell = Shell(dry=options.dry_run)
        if options.action != "run":
            for name in options.names:
                job.check_name(name)
            return options.function(shell, options)
        array = job.jobs(options.name, words, one_job=options.one_job)
        code = options.function(shell, options, array)
        if not code:
            target = _TARGETS[options.target]
            # An array of Slurm has one name; of the others each job has its own.
            names = (
                target.names(options, array)
                if hasattr(target, "names")
                else [entry.name for entry in array]
            )
            place = target.place(options) if hasattr(target, "place") else []
            called = shlex.join([*names, *place])
            for action in target.ACTIONS:
                print(f"# {action}: python -m launch {options.target} {action} {called}")
            if len(array) > 1:
                print(f"# when all are done: {job.compare(array)}")
        return code

    try:
        return main.exit_code(command)
    except ToolError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code


def parser() -> main.Parser:
    """Return the parser of all targets and actions."""
    root = main.Parser(
        prog="python -m launch", description=__import__("launch").__doc__, epilog=_EPILOG
    )
    targets = root.add_subparsers(title="targets", metavar="TARGET", required=True, dest="target")
    for name, module in _TARGETS.items():
        summary = module.__doc__.splitlines()[0]
        target = targets.add_parser(name, help=summary, description=module.__doc__)
        actions = target.add_subparsers(
            title="actions", metavar="ACTION", required=True, dest="action"
        )
        to = _action(actions, "run", module.run)
        to.usage = (
            f"python -m launch {name} run [options] -- train|sweep --config=FILE --workdir=DIR ..."
        )
        to.add_argument("--name", default="seal", help="of the job (default: %(default)s)")
        help_text = "do not divide a sweep: its variants run one after the other"
        to.add_argument("--one-job", action="store_true", help=help_text)
        help_text = "further options for the tool that creates the job, in one word"
        to.add_argument("--extra", type=_words, default=[], metavar='"OPTIONS"', help=help_text)
        module.add_arguments(to)
        for action, function in module.ACTIONS.items():
            to = _action(actions, action, function)
            to.add_argument(
                "names", nargs="+", metavar="NAME", help="of the jobs, as `run` prints them"
            )
            if hasattr(module, "add_place"):
                module.add_place(to)
    return root


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no part of a command: {error}") from None


def _action(actions: Any, name: str, function: Any) -> argparse.ArgumentParser:
    summary = " ".join(function.__doc__.split())
    added = actions.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    added.set_defaults(function=function)
    added.add_argument("--dry-run", action="store_true", help="print, and run nothing")
    return added
