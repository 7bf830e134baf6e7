"""Runs of the command line on a task of a second, in processes of their own where it matters."""

import contextlib
import fcntl
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from seal_jax.cli import main

ROOT = Path(__file__).parents[2]
EPOCHS, LAST = 8, 32  # two generations of 4 epochs of 4 steps
CONFIG = """\
from seal_jax.cli.configs import base

VARIANTS = ("normal", "llf", "seal")


def get_config(method="seal"):
    config = base(method)
    config.data.name = "digits"
    config.data.data_dir = {data_dir!r}
    config.data.validation_fraction = 0.9
    config.data.crop_padding = 1
    config.model.name = "mlp"
    config.model.norm = "batch"
    config.optimizer.learning_rate = 0.1
    config.train.batch_size = 32
    config.train.generations = 2
    config.train.epochs_per_generation = 4
    if method != "normal":
        config.method.threshold = "dense2"
    if method == "seal":
        config.method.ascent_epochs = 2.0
        config.method.ascent_scale = 0.2
    return config
"""

SIGNALLED = """\
import os
from seal_jax.__main__ import main
from seal_jax.training.progress import Progress

update = Progress.update


def update_and_signal(self, step, **latest):
    update(self, step, **latest)
    if step == {step}:
        os.kill(os.getpid(), {number})


Progress.update = update_and_signal
main()
"""


class Runs:
    """Starts trainings in ``folder``, which the processes of a test session share."""

    def __init__(self, folder):
        self.folder = folder
        self.config = folder / "tiny.py"
        with (folder / "config.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "digits").mkdir(exist_ok=True)
            if not self.config.exists():
                part = folder / "tiny.part"
                part.write_text(CONFIG.format(data_dir=str(folder / "digits")))
                part.rename(self.config)

    def start(self, workdir, *arguments, method="seal", devices=1, signalled_at=None, program=None):
        """Start training in the background; at a step it may send itself a signal.

        The ``program`` is the command line by default.
        """
        if signalled_at:
            program = SIGNALLED.format(step=signalled_at[0], number=int(signalled_at[1]))
        program = ["-c", program] if program else ["-m", "seal_jax"]
        config = f"--config={self.config}:{method}"
        return subprocess.Popen(
            [sys.executable, *program, "train", config, f"--workdir={workdir}", *arguments],
            env=environment(devices),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, workdir, *arguments, code=0, **options):
        """Train to the end; return what was printed on stderr.

        In this process and on its first device, unless the options want other devices or a signal.
        """
        if "signalled_at" not in options and options.get("devices", 1) == 1:
            return self._here(workdir, *arguments, code=code, **options)
        process = self.start(workdir, *arguments, **options)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == code, stderr
        return stderr

    def _here(self, workdir, *arguments, code, method="seal", devices=1):
        device, stderr = jax.devices()[:devices], io.StringIO()
        config = f"--config={self.config}:{method}"
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stderr(stderr),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("default")  # printed, as on the command line, and no error
            patch.setattr(jax, "devices", lambda: device)
            ended = main.run(["train", config, f"--workdir={workdir}", *arguments])
        assert ended == code, stderr.getvalue()
        return stderr.getvalue()

    def reference(self, *arguments, method="seal", devices=1):
        """Return the folder of a run that nothing interrupted, to look at and not to change."""
        name = re.sub(r"[^\w.=]+", "-", "".join([f"{method}{devices}", *arguments]))
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            workdir = self.folder / name
            if not (self.folder / f"{name}.done").exists():
                self.finish(workdir, *arguments, method=method, devices=devices)
                (self.folder / f"{name}.done").touch()
        return workdir


def environment(devices=1):
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
    }


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def row_count(workdir):
    path = Path(workdir) / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(condition, *processes):
    """Wait for a condition, which must come true before any of the processes ends; return its value."""
    end = time.monotonic() + 90
    while not (value := condition()):
        for process in processes:
            if process.poll() is not None:
                raise AssertionError(f"ended too early: {process.communicate()}")
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.001)
    return value


def stop(process, number=signal.SIGTERM):
    """Send a signal and return the exit code."""
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode


def leaves(workdir, step=LAST):
    """Return the leaves of a checkpoint by name, read without the project's code."""
    folder = Path(workdir) / "checkpoints" / str(step) / "state"
    names = json.loads((folder.parent / "metadata" / "metadata").read_text())["leaves"]
    handler = ocp.PyTreeCheckpointHandler()
    restore = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    args = ocp.args.PyTreeRestore(item=dict.fromkeys(names, 0), restore_args=restore)
    return handler.restore(folder, args=args)


def assert_same_leaves(found, expected):
    assert list(found) == list(expected)
    for name, leaf in found.items():
        assert leaf.dtype == expected[name].dtype, name
        assert leaf.tobytes() == expected[name].tobytes(), name


def assert_same_run(workdir, reference, epochs=EPOCHS, last=LAST):
    """Check that two runs ended with the same bits, in weights, optimizer state and metrics."""
    metrics = (Path(workdir) / "metrics.jsonl").read_bytes()
    assert metrics == (Path(reference) / "metrics.jsonl").read_bytes()
    assert row_count(workdir) == epochs
    assert_same_leaves(leaves(workdir, last), leaves(reference, last))
