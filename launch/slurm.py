"""GPU clusters under Slurm, from a login node: a sweep is an array, and jobs requeue themselves.

Runs this clone with this Python, so both, and --workdir, are on a file system that the nodes share. A job that
is preempted, reaches its time limit or crashes after more than ten minutes is queued again and goes on from its last
checkpoint.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.job import Job, check_devices, root
from launch.shell import Shell
from seal_jax.errors import OK, STOPPED, USAGE, UsageError

ROOT = Path(__file__).parents[1]
_SHORT_SECONDS = 600  # as in supervise.sh


def add_arguments(to: argparse.ArgumentParser) -> None:
    """Add the options of `run`."""
    to.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="of one training (default: 1)"
    )
    to.add_argument("--gpus", type=int, default=1, metavar="N", help="of a node (default: 1)")
    to.add_argument(
        "--time",
        default="24:00:00",
        help="limit of a job until it is queued again (default: %(default)s)",
    )
    help_text = (
        "seconds before the limit at which it saves: more than a call of run.steps_per_call takes"
    )
    to.add_argument(
        "--notice", type=int, default=120, metavar="S", help=f"{help_text} (default: 120)"
    )
    help_text = "times that a job is queued again by itself (default: %(default)s)"
    to.add_argument("--max-restarts", type=int, default=100, metavar="N", help=help_text)


def run(shell: Shell, options: argparse.Namespace, jobs: Sequence[Job]) -> int:
    """Submit one job, or an array with a task for each variant."""
    jobs = [_absolute(job) for job in jobs]
    log = log_file(options, jobs)
    text = script(options, jobs)
    if not shell.dry:
        # Slurm does not make the folder of a log, and loses it silently.
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{log.parent} cannot be made: {error.strerror}; change --workdir"
            ) from None
    number = shell.run(
        "sbatch", "--parsable", *options.extra, stdin=text,
        fix='see its partition, account and limits, such as --extra="--partition=gpu"',
    )  # fmt: skip
    if number:
        print(f"submitted job {number.strip()}")
    print(f"# logs: tail -F {shlex.quote(str(log.parent))}/{log.name.replace('%a', '*')}")
    return OK


def status(shell: Shell, options: argparse.Namespace) -> int:
    """Show the queue; of an array give the name of the sweep."""
    return shell.show("squeue", "--me", f"--name={','.join(options.names)}")


def stop(shell: Shell, options: argparse.Namespace) -> int:
    """Let the training save, and cancel; of an array give the name of the sweep."""
    # The script gets SIGTERM too, so that it does not queue the job again. Slurm kills what has not ended 30
    # seconds (KillWait) later.
    return max(shell.show("scancel", "--me", f"--name={name}") for name in options.names)


ACTIONS = {"status": status, "stop": stop}


def names(options: argparse.Namespace, jobs: Sequence[Job]) -> list[str]:
    """Return what the actions call the jobs: an array has one name."""
    return [options.name]


def log_file(options: argparse.Namespace, jobs: Sequence[Job]) -> Path:
    """Return the log: beside the run's folder, or that of the sweep with the task's number."""
    folder = Path(f"{root(jobs)}.launch")
    return folder / (f"{options.name}-%a.log" if len(jobs) > 1 else f"{options.name}.log")


def script(options: argparse.Namespace, jobs: Sequence[Job]) -> str:
    """Return the batch script of one job or an array.

    Raises:
      UsageError: an option does not fit.
    """
    for option, least in (("nodes", 1), ("gpus", 1), ("notice", 30), ("max_restarts", 0)):
        if (value := getattr(options, option)) < least:
            raise UsageError(f"--{option.replace('_', '-')}={value} must be at least {least}")
    check_devices(jobs, options.nodes * options.gpus)
    several = options.nodes * options.gpus > 1
    log = str(log_file(options, jobs))
    # sbatch ends an option at the first blank, and a line cannot be quoted across.
    if any(character.isspace() for character in f"{log}{options.time}{ROOT}"):
        raise UsageError(
            f"{log}, {ROOT} and --time must have no blanks: sbatch reads no quotes there"
        )
    lines = [
        "#!/usr/bin/env bash",
        f"#SBATCH --job-name={options.name}",
        f"#SBATCH --nodes={options.nodes}",
        # JAX gives each process under Slurm the one GPU of its number on the node.
        f"#SBATCH --ntasks-per-node={options.gpus}",
        f"#SBATCH --gpus-per-node={options.gpus}",
        f"#SBATCH --time={options.time}",
        f"#SBATCH --output={log}",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        # To the training and not to this script, which waits for it.
        f"#SBATCH --signal=TERM@{options.notice}",
        f"#SBATCH --chdir={ROOT}",
    ]
    if len(jobs) > 1:
        lines.append(f"#SBATCH --array=0-{len(jobs) - 1}")
    lines.append("case ${SLURM_ARRAY_TASK_ID:-0} in")
    coordinator = ["--coordinator=auto"] if several else []
    lines += [
        f"{index}) words=({shlex.join([*job.words, *coordinator])}) ;;"
        for index, job in enumerate(jobs)
    ]
    lines += [
        "esac",
        "SECONDS=0",
        f'srun {shlex.quote(sys.executable)} -m seal_jax "${{words[@]}}"',
        "code=$?",
        'echo "exit code $code on $(hostname) at $(date)"',
        f"# {USAGE}: bad input or a loss that is not finite, which would come again.",
        # So would a crash at once; one after a while, or by a signal, goes on from the last checkpoint, as does 75.
        f"if ((code != 0 && code != {USAGE} && ${{SLURM_RESTART_COUNT:-0}} < {options.max_restarts} &&",
        f"  (code == {STOPPED} || code > 128 || SECONDS > {_SHORT_SECONDS}))); then",
        '  exec scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def _absolute(job: Job) -> Job:
    if "://" in job.workdir:
        raise UsageError(
            f"--workdir={job.workdir} must be a folder that the nodes share; the log is beside it"
        )
    # A relative folder is one of this clone, which the job runs in.
    folder = os.path.normpath(ROOT / job.workdir)
    words = list(job.words)
    for index, word in enumerate(words):
        if word == "--workdir":
            words[index : index + 2] = [f"--workdir={folder}"]
        elif word.startswith("--workdir="):
            words[index] = f"--workdir={folder}"
    return job._replace(words=tuple(words), workdir=folder)
