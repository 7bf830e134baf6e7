"""A run whose state is in slices, killed and resumed on more and fewer devices and processes."""

import json
import random
import signal
import time

import numpy as np
import pytest
from trainer_runs import Runs, free_port, row_count, wait_until

pytestmark = pytest.mark.slow

# With 20 and 60 it was seen to hold too.
KILLS, EPOCHS = 6, 30
LONG = [
    f"--config.train.epochs_per_generation={EPOCHS // 2}",
    "--config.optimizer.ema=0.9",
    "--config.optimizer.learning_rate=0.01",
    "--config.run.steps_per_call=2",
]
# Devices of each process, and what they hold slices of.
LAYOUTS = [((8,), "all"), ((4,), "all"), ((8,), "optimizer"), ((4, 4), "all"), ((2,), "none")]


@pytest.fixture(scope="session")
def runs(shared_folder):
    return Runs(shared_folder)


def start(runs, workdir, devices, sharding):
    """Start the processes of a run, by the devices of each."""
    arguments = [*LONG, f"--config.run.parameter_sharding={sharding}"]
    coordinator = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={len(devices)}"]
    return [
        runs.start(
            workdir,
            *arguments,
            *([*coordinator, f"--process={process}"] if len(devices) > 1 else []),
            method="normal",
            devices=count,
        )
        for process, count in enumerate(devices)
    ]


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_killed_and_resumed_on_other_devices(runs, tmp_path):
    seed = random.randrange(10**6)
    dice, workdir = random.Random(seed), tmp_path / "run"
    print(f"seed of the moments: {seed}")  # shown if the following fails
    for kill in range(KILLS):
        processes = start(runs, workdir, *LAYOUTS[kill % len(LAYOUTS)])
        before = row_count(workdir)
        wait_until(lambda count=before: row_count(workdir) > count, *processes)
        time.sleep(dice.uniform(0, 0.05))
        number = dice.choice([signal.SIGKILL, signal.SIGTERM])
        for process in processes:
            process.send_signal(number)
        for process in processes:
            process.communicate(timeout=120)
            # 1: it saw that the other one was gone before it was killed itself.
            assert process.returncode in (75, -signal.SIGKILL, 1)
    assert row_count(workdir) < EPOCHS, "the last kill came too late to show anything"
    (last,) = start(runs, workdir, (8,), "all")
    last.communicate(timeout=120)
    (reference,) = start(runs, tmp_path / "reference", (8,), "none")
    reference.communicate(timeout=120)
    assert (last.returncode, reference.returncode) == (0, 0)
    found, expected = rows(workdir), rows(tmp_path / "reference")
    # No row is missing and none is there twice; another order of the images would give other losses.
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    assert len(found) == EPOCHS
    for name in ("train/loss", "validation_ema/loss"):
        losses = [np.array([row[name] for row in of]) for of in (found, expected)]
        np.testing.assert_allclose(*losses, rtol=1e-5)
