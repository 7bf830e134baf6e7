"""Cloud TPU VMs, by queued resources: spot, flex-start, reserved or on demand; several hosts and slices.

The committed code goes to the bucket of --workdir; every host fetches it when it boots, trains, and after the
end the first one gives the machines back. Nothing on this machine needs to go on running, unless --watch is to
ask for another slice after a preemption.
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch import chips
from launch.job import Job, check_bucket, check_devices, check_paths, folder_beside
from launch.shell import Shell, ToolError
from seal_jax.errors import CRASHED, OK, STOPPED, UsageError
from seal_jax.training import loggers

_HOST = Path(__file__).parent / "tpu_host.sh"
_SHUTDOWN = _HOST.with_name("tpu_shutdown.sh")
_TPUS = ("gcloud", "compute", "tpus", "queued-resources")
# Queued resources that are gone from the machines' side, and have to be asked for again.
_LOST = ("SUSPENDING", "SUSPENDED", "GONE")
_POLL_SECONDS = 60.0


def add_place(to: argparse.ArgumentParser) -> None:
    """Add the options that every action takes."""
    to.add_argument("--zone", required=True, help="such as us-west4-a")
    to.add_argument("--project", help="default: gcloud's")


def add_arguments(to: argparse.ArgumentParser) -> None:
    """Add the options of `run`."""
    add_place(to)
    to.add_argument(
        "--topology",
        default="v5e:2x4",
        metavar="KIND:SHAPE",
        help="of a slice (default: %(default)s)",
    )
    to.add_argument(
        "--slices", type=int, default=1, metavar="N", help="slices of one training (default: 1)"
    )
    tiers = ("spot", "flex-start", "reserved", "on-demand")
    to.add_argument("--tier", choices=tiers, default="spot", help="(default: %(default)s)")
    to.add_argument(
        "--duration", metavar="TIME", help="of --tier=flex-start, at most 7d; such as 12h"
    )
    to.add_argument("--ref", default="HEAD", help="the commit that runs (default: %(default)s)")
    help_text = "a prepared data set, copied to every host: gs://BUCKET/tfds/tiny_imagenet"
    to.add_argument("--data", default="", metavar="gs://...", help=help_text)
    to.add_argument("--service-account", metavar="EMAIL", help="default: the project's")
    to.add_argument(
        "--runtime", metavar="VERSION", help="the TPU software (default: by --topology)"
    )
    help_text = (
        "look once a minute, ask again after a preemption, and end when the training has ended"
    )
    to.add_argument("--watch", action="store_true", help=help_text)


def run(shell: Shell, options: argparse.Namespace, jobs: Sequence[Job]) -> int:
    """Ask for a slice for each job; the training starts as soon as there is one."""
    _check(options, jobs)
    commit = shell.run(
        "git", "rev-parse", "--verify", f"{options.ref}^{{commit}}", fix="give a commit with --ref"
    )
    commit = commit.strip() or options.ref
    for config in dict.fromkeys(job.config for job in jobs if "://" not in job.config):
        fix = "commit the config, or give another commit with --ref"
        shell.run("git", "cat-file", "-e", f"{commit}:./{config}", fix=fix)
    if shell.run("git", "status", "--porcelain", "--untracked-files=no", fix="run it in the clone"):
        print("# changes that are not committed are not launched")
    wanted = [job for job in jobs if _is_wanted(shell, options, job)]
    created: list[Job] = []
    try:
        for job in wanted:
            _upload(shell, commit, folder_beside(job))
            # Before it is there: what fails or is interrupted while it waits may have asked for it.
            created.append(job)
            try:
                _create(shell, options, job)
            except ToolError as error:
                if "ALREADY_EXISTS" in error.stderr:
                    created.remove(job)
                raise
    except BaseException:
        # Of a sweep all or nothing: what was asked for before the failure is taken back.
        for job in created:
            shell.undo(*_delete_words(options, job.name))
        raise
    if options.watch:
        return _watch(shell, options, jobs)
    return OK


def status(shell: Shell, options: argparse.Namespace) -> int:
    """Show the state of requests."""
    return max(
        shell.show(*_TPUS, "describe", name, *place(options), "--format=value(name,state.state)")
        for name in options.names
    )


def logs(shell: Shell, options: argparse.Namespace) -> int:
    """Follow the log of the first host (of the first job)."""
    return _ssh(shell, options, options.names[0], "0", "sudo tail -n 100 -F /opt/seal_jax/run.log")


def stop(shell: Shell, options: argparse.Namespace) -> int:
    """Let the training save and stop; the machines are then given back."""
    # Before there is a training the file alone keeps it from starting.
    command = (
        "sudo touch /opt/seal_jax/stop; if [ -e /opt/seal_jax/pid ]; then "
        'sudo kill -TERM "$(sudo cat /opt/seal_jax/pid)"; fi'
    )
    return max(_ssh(shell, options, name, "all", command) for name in options.names)


def delete(shell: Shell, options: argparse.Namespace) -> int:
    """Give the machines back at once, or take back a request that waits."""
    for name in options.names:
        _delete(shell, options, name)
    return OK


ACTIONS = {"status": status, "logs": logs, "stop": stop, "delete": delete}


def startup_script(options: argparse.Namespace, job: Job) -> str:
    """Return what every host runs when it boots: the values of this job, then `tpu_host.sh`."""
    values = {
        "name": job.name,
        "zone": options.zone,
        "project": options.project or "",
        "folder": folder_beside(job),
        "data": options.data.rstrip("/"),
    }
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    words = shlex.join([*job.words, "--coordinator=auto"])
    shebang, _, script = _HOST.read_text().partition("\n")
    return "\n".join([shebang, *lines, f"words=({words})", script])


def _check(options: argparse.Namespace, jobs: Sequence[Job]) -> None:
    if options.slices < 1:
        raise UsageError(f"--slices={options.slices} must be at least 1")
    check_devices(jobs, chips.parse(options.topology).chips * options.slices)
    if (options.tier == "flex-start") != bool(options.duration):
        raise UsageError("--tier=flex-start and --duration=TIME go together")
    if options.data and not options.data.startswith("gs://"):
        raise UsageError(f"--data={options.data} must be a folder in a bucket, gs://...")
    check_bucket(jobs)
    check_paths(jobs)
    for settings in (settings for job in jobs for settings in job.settings):
        # What the hosts install: see tpu_host.sh.
        if not {*loggers.names(settings)} <= {"tensorboard", "csv"}:
            raise UsageError(
                f"run.loggers = {settings.run.loggers!r}: the hosts have tensorboard and csv only; leave the "
                "others out"
            )


def place(options: argparse.Namespace) -> list[str]:
    """Return the options that every action and every command of gcloud takes."""
    project = [f"--project={options.project}"] if options.project else []
    return [f"--zone={options.zone}", *project]


def _upload(shell: Shell, commit: str, folder: str) -> None:
    with tempfile.NamedTemporaryFile(suffix=".tar.gz") as archive:
        shell.run(
            "git", "archive", "--format=tar.gz", f"--output={archive.name}", commit,
            fix="give a commit with --ref",
        )  # fmt: skip
        fix = "can you write to the bucket of --workdir?"
        shell.run("gcloud", "storage", "cp", archive.name, f"{folder}/code.tar.gz", fix=fix)
    # The first host writes its exit code here at the end; --watch reads it.
    shell.run("gcloud", "storage", "cp", "-", f"{folder}/state", stdin="running\n", fix=fix)


def _create(shell: Shell, options: argparse.Namespace, job: Job) -> None:
    described = chips.parse(options.topology)
    nodes = [f"--node-id={job.name}"]
    if options.slices > 1:
        nodes = [f"--node-count={options.slices}", f"--node-prefix={job.name}"]
    tier = {
        "spot": ["--spot"],
        "reserved": ["--reserved"],
        "on-demand": [],
        "flex-start": ["--provisioning-model=flex-start", f"--max-run-duration={options.duration}"],
    }[options.tier]
    account = [f"--service-account={options.service_account}"] if options.service_account else []
    # Flex-start is an option of the alpha command only.
    tpus = (_TPUS[0], "alpha", *_TPUS[1:]) if options.tier == "flex-start" else _TPUS
    script = startup_script(options, job)
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        if shell.dry:
            print(f"cat >{file.name} <<'END_OF_SCRIPT'\n{script.rstrip()}\nEND_OF_SCRIPT")
        shell.run(
            *tpus, "create", job.name, *place(options), *nodes,
            f"--accelerator-type={described.accelerator_type}",
            f"--runtime-version={options.runtime or described.runtime}", *tier, *account,
            "--scopes=https://www.googleapis.com/auth/cloud-platform",
            f"--metadata-from-file=shutdown-script={_SHUTDOWN},startup-script={file.name}", *options.extra,
            fix="see the quota and the zone of --topology, or give another --name if it exists",
        )  # fmt: skip


def _delete_words(options: argparse.Namespace, name: str) -> list[str]:
    return [*_TPUS, "delete", name, *place(options), "--force", "--quiet"]


def _delete(shell: Shell, options: argparse.Namespace, name: str) -> None:
    fix = f"see `python -m launch tpu status {name}`: it may still be billed"
    shell.run(*_delete_words(options, name), fix=fix)


def _ssh(shell: Shell, options: argparse.Namespace, name: str, hosts: str, command: str) -> int:
    # By the request and not the node, so that it is the same for one slice and for several.
    return shell.show(
        *_TPUS, "ssh", name, *place(options), f"--node={hosts}",
        f"--worker={hosts}", f"--command={command}",
    )  # fmt: skip


def _state(shell: Shell, options: argparse.Namespace, name: str) -> str:
    try:
        return shell.run(
            *_TPUS, "describe", name, *place(options), "--format=value(state.state)",
            fix="see --zone, --project and `gcloud auth login`",
        ).strip()  # fmt: skip
    except ToolError as error:
        if "NOT_FOUND" in error.stderr:
            return "GONE"
        raise


def _is_wanted(shell: Shell, options: argparse.Namespace, job: Job) -> bool:
    """Return whether to ask for a slice, and not only to take up a watch that ended."""
    if shell.dry:
        return True
    folder = folder_beside(job)
    if options.watch and _marker(shell, folder) == "0":
        print(f"# {job.name} is done; to train it on, remove {folder}/state first")
        return False
    state = _state(shell, options, job.name)
    if state != "GONE" and not options.watch:
        # Its code and state in the bucket stay as they are.
        raise UsageError(
            f"the request {job.name} exists ({state}): --watch takes it up; or `delete` it and wait until it "
            "is gone, or give another --name"
        )
    return state == "GONE"


def _watch(shell: Shell, options: argparse.Namespace, jobs: Sequence[Job]) -> int:
    """Ask for another slice whenever one is lost; return the worst exit code once all have ended."""
    if shell.dry:
        print("# then, once a minute and for each job, until its state is an exit code:")
        for job in jobs:
            _marker(shell, folder_beside(job))
            _state(shell, options, job.name)
        return OK
    codes: dict[str, int] = {}
    before: dict[str, str] = {}
    given_back: set[str] = set()  # lost, and not yet asked for again
    while len(codes) < len(jobs):
        for job in jobs:
            if job.name in codes:
                continue
            folder = folder_beside(job)
            try:
                state = _state(shell, options, job.name)
            except ToolError:
                # An error of the network is not news about the slice.
                state = "UNKNOWN"
            marker = _marker(shell, folder)
            if state not in (*_LOST, "DELETING", "UNKNOWN"):
                given_back.discard(job.name)
            if before.get(job.name) != state:
                _say(f"{time.strftime('%F %T')} {job.name}: {state}")
            before[job.name] = state
            if marker.isdecimal():
                codes[job.name] = int(marker)
                _say(f"{job.name} ended with exit code {marker}; its log is in {folder}")
            elif state == "FAILED":
                codes[job.name] = CRASHED
                _say(
                    f"the request {job.name} has failed: see `gcloud compute tpus queued-resources describe "
                    f"{job.name} {shlex.join(place(options))}`, then delete it"
                )
                continue
            elif state == "GONE" and marker == "running" and job.name not in given_back:
                # A preempted request is suspended, one that has ended leaves its code: a person has deleted it.
                codes[job.name] = STOPPED
                _say(f"{job.name} was deleted before its training ended: not asked for again")
            try:
                # The first host does this itself; here for one that may not.
                if job.name in codes and state not in (*_LOST, "DELETING", "UNKNOWN"):
                    _delete_if_there(shell, options, job.name)
                elif job.name not in codes and marker == "running":
                    if state == "SUSPENDED":
                        given_back.add(job.name)
                        _delete_if_there(shell, options, job.name)
                    if job.name in given_back and state in ("SUSPENDED", "GONE"):
                        _create(shell, options, job)
            except ToolError as error:
                # Quota, the network: of this job alone, and tried again if it has not ended.
                _say(f"error: {error}")
                if job.name in codes:
                    codes[job.name] = codes[job.name] or error.code
        if len(codes) < len(jobs):
            time.sleep(_POLL_SECONDS)
    return max(codes.values())


def _marker(shell: Shell, folder: str) -> str:
    """Return "running", the exit code of a training that has ended, or "unknown"."""
    try:
        return shell.run("gcloud", "storage", "cat", f"{folder}/state", fix="").strip()
    except ToolError:
        return "unknown"


def _delete_if_there(shell: Shell, options: argparse.Namespace, name: str) -> None:
    try:
        _delete(shell, options, name)
    except ToolError as error:
        # The first host may have been faster.
        if "NOT_FOUND" not in error.stderr:
            raise


def _say(line: str) -> None:
    print(line, flush=True)
