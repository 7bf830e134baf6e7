"""Streamed runs of the command line: whatever ends them, nothing is left of them but what the next start needs."""

import contextlib
import functools
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trainer_runs import (
    Runs,
    assert_same_run,
    row_count,
    wait_until,
)

from seal_jax.cli import main

pytestmark = pytest.mark.slow

# SEAL_JAX_KILLS=50 for a soak.
KILLS = int(os.environ.get("SEAL_JAX_KILLS", "8"))
BATCH = 31
MARK = "SEAL_JAX_TEST_RUN"


@pytest.fixture(scope="session")
def runs(shared_folder):
    return Runs(shared_folder)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Return the folder of temporary files, of this test's processes alone, which a variable marks."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(MARK, str(tmp_path))
    return temporary


def processes():
    """Return the command lines of the processes that this test has started and that still run."""
    mark, running = f"{MARK}={os.environ[MARK]}".encode(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.name) != os.getpid() and mark in (folder / "environ").read_bytes():
                running[int(folder.name)] = (folder / "cmdline").read_bytes().decode()
        except OSError:  # it has ended, or is not ours
            continue
    return running


def workers():
    return [pid for pid, line in processes().items() if "spawn_main" in line]


def shared_memory():
    """Return the names of the shared memory of the size of a batch, and so of this test alone."""
    found = set()
    for path in Path("/dev/shm").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size == BATCH * 64:
                found.add(path.name)
    return found


def arguments_of(epochs):
    """Return arguments for epochs of 23 steps with a call each; every epoch is validated and saved."""
    options = {
        "data.validation_fraction": 0.5,
        "train.epochs_per_generation": epochs // 2,
        "run.steps_per_call": 1,
        "train.batch_size": BATCH,
    }
    return [f"--config.{name}={value}" for name, value in options.items()]


def test_killed_again_and_again(runs, tmp_path, own):
    epochs = 3 * KILLS
    arguments = arguments_of(epochs)
    streamed = ["--config.data.placement=stream", "--config.run.data_workers=2"]
    workdir = tmp_path / "run"
    seed = random.randrange(10**6)
    dice = random.Random(seed)
    print(f"seed of the moments: {seed}")  # shown if the following fails
    for kill in range(KILLS):
        print(f"kill {kill} after row {row_count(workdir)}", flush=True)
        process = runs.start(workdir, *arguments, *streamed)
        if kill % 4 == 0:
            time.sleep(dice.uniform(0.2, 4))
        elif kill % 4 == 1:  # while workers start
            wait_until(workers, process)
            time.sleep(dice.uniform(0, 3))
        else:
            rows = row_count(workdir) + dice.choice((1, 2))
            wait_until(lambda rows=rows: row_count(workdir) >= rows, process)
            time.sleep(dice.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        wait_until(lambda: not processes())
        process.communicate()
        assert not shared_memory()
        # The next start removes what this one had no time for.
        assert len(list(own.glob("seal_jax-*"))) <= 1
    assert row_count(workdir) < epochs, "the last kill came too late to show anything"
    runs.finish(workdir, *arguments, *streamed)
    last = 23 * epochs
    assert_same_run(workdir, runs.reference(*arguments, *streamed), epochs, last)
    assert_same_run(workdir, runs.reference(*arguments), epochs, last)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Return a folder of images in two classes."""
    folder = tmp_path_factory.mktemp("photos")
    values = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)
    for number, pixels in enumerate(values):
        place = folder / ("train" if number < 48 else "test") / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


def of_photos(folder, workers=2):
    options = {
        "data.name": "folder/photos",
        "data.data_dir": folder,
        "data.image_size": 8,
        "data.normalisation": "cifar10",
        "data.placement": "stream",
        "data.validation_fraction": 0.25,
        "run.data_workers": workers,
        "run.steps_per_call": 1,
        "train.batch_size": 4,
    }
    return [f"--config.{name}={value}" for name, value in options.items()]


def start_in_group(runs, monkeypatch, *arguments):
    """Start a run in a process group of its own, which a terminal would signal as a whole."""
    started = functools.partial(subprocess.Popen, start_new_session=True)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", started)
        return runs.start(*arguments)


def test_signals_to_all_processes(runs, tmp_path, photos, own, monkeypatch):
    workdir, arguments = (
        tmp_path / "run",
        [*of_photos(photos), "--config.train.epochs_per_generation=300"],
    )
    for number, times, code in (
        (signal.SIGINT, 1, 75),
        (signal.SIGTERM, 2, 75),
        (signal.SIGINT, 2, 130),
    ):
        rows = row_count(workdir) + 2
        process = start_in_group(runs, monkeypatch, workdir, *arguments)
        wait_until(lambda rows=rows: row_count(workdir) >= rows, process)
        for _ in range(times):
            os.killpg(process.pid, number)
            time.sleep(0.05)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode in {code, 75}, stderr  # the second may come too late
        assert "Traceback" not in stderr
        wait_until(lambda: not processes())
        assert not list(own.glob("seal_jax-*"))


def test_a_signal_while_workers_start(runs, tmp_path, photos, own, monkeypatch):
    process = start_in_group(runs, monkeypatch, tmp_path / "run", *of_photos(photos))
    wait_until(workers, process)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert row_count(tmp_path / "run") == 0
    assert not list(own.glob("seal_jax-*"))


def test_a_worker_that_is_killed_is_one_line(runs, tmp_path, photos, own):
    process = runs.start(
        tmp_path / "run", *of_photos(photos), "--config.train.epochs_per_generation=300"
    )
    wait_until(lambda: row_count(tmp_path / "run") >= 2, process)
    os.kill(wait_until(workers, process)[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    assert "Traceback" not in stderr
    assert "a process that decodes images was ended, with exit code -9: " in stderr
    assert checkpoints(tmp_path / "run")
    wait_until(lambda: not processes())


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_is_corrupt_is_one_line(runs, tmp_path, photos, own, workers):
    folder = shutil.copytree(photos, tmp_path / "photos")
    arguments = of_photos(folder, workers)
    runs.finish(tmp_path / "run", *arguments, signalled_at=(9, signal.SIGTERM), code=75)
    damaged = folder / "train" / "class1" / "7.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    before = checkpoints(tmp_path / "run")
    process = runs.start(tmp_path / "run", *arguments)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"{damaged}: " in errors[0]
    assert "Traceback" not in stderr
    assert set(before) <= set(checkpoints(tmp_path / "run"))
    assert not processes()


def checkpoints(workdir):
    return sorted(os.listdir(workdir / "checkpoints"))


@pytest.mark.parametrize("kind", ["folder", "hf"])
def test_data_that_is_read_where_it_lies(runs, tmp_path, photos, monkeypatch, capfd, kind):
    """Trained on and evaluated, by a relative path, from one process."""
    monkeypatch.chdir(photos.parent)
    folder = photos.name
    if kind == "hf":
        datasets = pytest.importorskip("datasets")
        parts = datasets.load_dataset("imagefolder", data_dir=folder, cache_dir=tmp_path / "cache")
        folder = f"hf-{photos.name}"
        parts.save_to_disk(folder)
    overrides = [*of_photos(folder, workers=0), f"--config.data.name={kind}/photos"]
    workdir = tmp_path / "run"
    runs.finish(workdir, *overrides, "--config.train.epochs_per_generation=2", method="llf")
    assert row_count(workdir) == 4
    evaluate = ["evaluate", "--kind=margins", f"--checkpoint={workdir}", "--sample=20"]
    assert main.run(evaluate) == main.OK
    assert f"{kind}/photos" in capfd.readouterr().out
