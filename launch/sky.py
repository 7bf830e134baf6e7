"""Any cloud through SkyPilot, as managed jobs: it finds machines, recovers from preemptions and gives them back.

The clone as it is, changes that are not committed included, goes to the machines. The run's folder is in a
bucket, or on a disk that the machines share.
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
from collections.abc import Sequence
from typing import Any

from launch import yaml
from launch.job import Job, check_devices, check_paths
from launch.shell import Shell
from seal_jax.errors import OK, UsageError

_PYTHON = '"$HOME/seal_venv/bin/python"'


def add_arguments(to: argparse.ArgumentParser) -> None:
    """Add the options of `run`."""
    help_text = "of a node: H100:8, A100:1, tpu-v5litepod-8, tpu-v6e-8, ..."
    to.add_argument("--accelerators", required=True, metavar="NAME[:N]", help=help_text)
    to.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="of one training (default: 1)"
    )
    to.add_argument("--infra", metavar="CLOUD[/REGION]", help="default: where it is cheapest")
    to.add_argument(
        "--tier", choices=("spot", "on-demand"), default="spot", help="(default: %(default)s)"
    )
    help_text = "a prepared data set, copied to every node: gs://BUCKET/tfds/tiny_imagenet"
    to.add_argument("--data", default="", metavar="gs://...", help=help_text)


def run(shell: Shell, options: argparse.Namespace, jobs: Sequence[Job]) -> int:
    """Launch a managed job for each job."""
    tasks = [yaml.dump(task(options, job)) + "\n" for job in jobs]
    launched: list[Job] = []
    try:
        for job, text in zip(jobs, tasks, strict=True):
            # Before it is there: what is interrupted may have been launched.
            launched.append(job)
            with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
                file.write(text)
                file.flush()
                if shell.dry:
                    print(f"cat >{file.name} <<'END_OF_TASK'\n{text}END_OF_TASK")
                shell.run(
                    "sky", "jobs", "launch", "--yes", "--detach-run", f"--name={job.name}",
                    *options.extra, file.name,
                    fix="`sky check` says which clouds it may use, `sky show-gpus` what they have",
                )  # fmt: skip
    except BaseException:
        # Of a sweep all or nothing: what was launched before the failure is taken back.
        for job in launched:
            shell.undo("sky", "jobs", "cancel", "--yes", f"--name={job.name}")
        raise
    return OK


def status(shell: Shell, options: argparse.Namespace) -> int:
    """Show the queue of managed jobs."""
    return shell.show("sky", "jobs", "queue")


def logs(shell: Shell, options: argparse.Namespace) -> int:
    """Follow the log (of the first job)."""
    return shell.show("sky", "jobs", "logs", f"--name={options.names[0]}")


def stop(shell: Shell, options: argparse.Namespace) -> int:
    """Cancel jobs and give their machines back; they go on from the last checkpoint when launched again."""
    return max(
        shell.show("sky", "jobs", "cancel", "--yes", f"--name={name}") for name in options.names
    )


ACTIONS = {"status": status, "logs": logs, "stop": stop}


def task(options: argparse.Namespace, job: Job) -> dict[str, Any]:
    """Return SkyPilot's task of a job.

    Raises:
      UsageError: an option does not fit.
    """
    if options.nodes < 1:
        raise UsageError(f"--nodes={options.nodes} must be at least 1")
    if job.workdir.startswith("gs://"):
        check_paths([job])
    elif not job.workdir.startswith("/"):  # nothing for other buckets is installed there
        raise UsageError(
            f"--workdir={job.workdir} must be in a bucket, gs://BUCKET/..., or an absolute path that "
            "outlives the machines"
        )
    name, _, count = options.accelerators.partition(":")
    tpu = name.startswith("tpu-")
    if not tpu:
        if not (count or "1").isdecimal():
            raise UsageError(f"--accelerators={options.accelerators} must be NAME or NAME:N")
        check_devices([job], int(count or 1) * options.nodes)
    command = shlex.join(job.words)
    if tpu:
        command += " --coordinator=auto"
    elif options.nodes > 1:
        command += (
            ' --coordinator="$(head -n1 <<<"$SKYPILOT_NODE_IPS"):9911"'
            ' --processes="$SKYPILOT_NUM_NODES" --process="$SKYPILOT_NODE_RANK"'
        )
    resources: dict[str, Any] = {
        "accelerators": options.accelerators,
        "use_spot": options.tier == "spot",
    }
    if options.infra:
        resources["infra"] = options.infra
    extra = "tpu" if tpu else "cuda"
    described: dict[str, Any] = {
        "name": job.name,
        "resources": resources,
        "num_nodes": options.nodes,
        "workdir": ".",
        "setup": "set -e\n"
        "curl -LsSf https://astral.sh/uv/install.sh | sh\n"
        '~/.local/bin/uv venv --quiet --allow-existing --python=3.12 "$HOME/seal_venv"\n'
        f'~/.local/bin/uv pip install --quiet --python={_PYTHON} ".[{extra},gcs]"',
        # The machines' own crashes are SkyPilot's, those of the training supervise.sh's.
        "run": f"exec launch/supervise.sh {_PYTHON} -m seal_jax {command}",
    }
    if options.data:
        data = options.data.rstrip("/")
        described["file_mounts"] = {f"/tmp/tfds/{data.rpartition('/')[2]}": data}
        described["envs"] = {"TFDS_DATA_DIR": "/tmp/tfds"}
    return described
