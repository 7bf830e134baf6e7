"""Whatever stops a run, and whenever: taken up again it ends with the bits of one never stopped."""

import os
import random
import re
import shutil
import signal
import time
import warnings

import numpy as np
import pytest
from programs import STRIPES, mlp
from trainer_runs import (
    EPOCHS,
    LAST,
    Runs,
    assert_same_leaves,
    assert_same_run,
    leaves,
    row_count,
    wait_until,
)

from seal_jax.cli import main
from seal_jax.core.settings import Settings
from seal_jax.errors import UsageError
from seal_jax.training import loop
from seal_jax.training import workdir as workdirs

CALLS = "--config.run.steps_per_call=2"


@pytest.fixture(scope="session")
def runs(shared_folder):
    return Runs(shared_folder)


def snapshot(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def is_saving(workdir):
    try:
        return any("tmp" in name for name in os.listdir(workdir / "checkpoints"))
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("method", "arguments"), [("seal", [CALLS]), pytest.param("llf", [], marks=pytest.mark.slow)]
)
def test_killed_at_arbitrary_moments(runs, tmp_path, method, arguments):
    reference = runs.reference(*arguments, method=method)
    workdir = tmp_path / "run"
    seed = random.randrange(10**6)
    dice = random.Random(seed)
    # Somewhere in the start; where generation 1 starts; in its ascent (epochs 4 and 5), when a
    # checkpoint has just appeared; while one is being written.
    moments = [("start", dice.uniform(0.2, 1.5)), ("rows", 4), ("saved", 20), ("saving", 6)]
    for kind, value in moments:
        process = runs.start(workdir, *arguments, method=method)
        if kind == "start":
            time.sleep(value)
        elif kind == "saved":
            checkpoint = workdir / "checkpoints" / str(value)
            wait_until(checkpoint.exists, process)
        else:
            wait_until(lambda rows=value: row_count(workdir) >= rows, process)
            if kind == "saving":
                wait_until(lambda: is_saving(workdir), process)
            else:
                time.sleep(dice.uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert row_count(workdir) < EPOCHS, "the last kill came too late to show anything"
    runs.finish(workdir, *arguments, method=method)
    print(f"seed of the moments: {seed}")  # shown if the following fails
    assert_same_run(workdir, reference)
    assert sorted(os.listdir(workdir / "checkpoints")) == ["24", "28", "32"]


@pytest.mark.slow
def test_stopped_in_the_middle_of_an_ascent(runs, tmp_path, capfd):
    workdir = tmp_path / "run"
    # The ascent is of steps 16 to 23; epochs have 4 steps.
    runs.finish(workdir, CALLS, signalled_at=(18, signal.SIGTERM), code=75)
    assert leaves(workdir, 18)["step"].tolist() == [18]
    assert row_count(workdir) == 4
    before = snapshot(workdir)
    train = ["train", f"--config={runs.config}:seal", f"--workdir={workdir}"]
    assert main.run([*train, "--config.run.steps_per_call=4"]) == main.USAGE
    assert capfd.readouterr().err.startswith("error: run.steps_per_call = 4 does not divide the 2")
    assert snapshot(workdir) == before
    # What is in `run` is not part of the experiment.
    others = ["--config.run.checkpoint_every_epochs=3", "--config.run.keep_checkpoints=2"]
    runs.finish(workdir, CALLS, *others, signalled_at=(22, signal.SIGINT), code=75)
    assert leaves(workdir, 22)["step"].tolist() == [22]
    runs.finish(workdir, CALLS, *others)
    assert_same_run(workdir, runs.reference(CALLS))


@pytest.mark.slow
def test_other_settings_resume_exactly_too(runs, tmp_path):
    overrides = [
        "data.train_split=train[:100]",
        "data.validation_fraction=0",
        "train.batch_size=40",
    ]
    overrides += ["train.drop_last=false", "train.dtype=bfloat16", "run.steps_per_call=1"]
    arguments = [f"--config.{override}" for override in overrides]
    workdir = tmp_path / "run"
    runs.finish(workdir, *arguments, method="llf", signalled_at=(14, signal.SIGTERM), code=75)
    runs.finish(workdir, *arguments, method="llf")
    reference = runs.reference(*arguments, method="llf")
    assert_same_run(workdir, reference, epochs=8, last=24)


def test_truncated_checkpoint_is_passed_over(runs, tmp_path):
    reference = runs.reference(CALLS)
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    newest = workdir / "checkpoints" / str(LAST)
    # All of them: how the state is divided over files, some of it unused, varies with the timing.
    for path in newest.glob("state/**/d/*"):
        os.truncate(path, path.stat().st_size // 2)
    stderr = runs.finish(workdir, CALLS)
    (warning,) = [line for line in stderr.splitlines() if line.startswith("warning: ")]
    assert f"{newest} is damaged" in warning
    assert f"using step {LAST - 4}" in warning
    assert_same_run(workdir, reference)
    assert (workdir / "checkpoints" / f"damaged-{LAST}").is_dir()


def test_finished_run_is_left_alone(runs, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(runs.reference(CALLS), workdir)
    (workdir / "curves.png").unlink()
    before = snapshot(workdir)
    train = ["train", f"--config={runs.config}:seal", f"--workdir={workdir}", CALLS]
    assert main.run(train) == main.OK
    after = snapshot(workdir)
    assert after.pop(workdir / "curves.png")
    assert after == before


def test_a_start_that_was_killed_while_it_wrote_the_settings(tmp_path):
    (tmp_path / ".config.json.partial").write_text('{"data": ')
    workdirs.claim(tmp_path, Settings())
    assert workdirs.read(tmp_path)["train"]["generations"] == Settings().train.generations
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_folder_that_another_process_trains_in_is_refused(tmp_path):
    config = mlp()
    workdirs.claim(tmp_path, config)
    says = f"--workdir={tmp_path} is in use by another process; wait until it ends, or give another"
    # The kernel locks what was opened, so that two of one process are as good as two processes.
    with (
        workdirs.locked(tmp_path / "config.json", "--workdir"),
        pytest.raises(UsageError, match=re.escape(says)),
    ):
        loop.train(config, tmp_path, STRIPES, devices=1)
    assert os.listdir(tmp_path) == ["config.json"]
    with workdirs.locked(tmp_path / "config.json", "--workdir"):
        pass  # nothing is held any more


def only_error(stderr):
    """Return the one error among what was printed; the rest is how far the run came."""
    assert "Traceback" not in stderr
    errors = [line for line in stderr.splitlines() if " steps (" not in line]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    return errors[0]


def test_diverged_run_keeps_its_last_good_checkpoint(runs, tmp_path, capfd):
    workdir = tmp_path / "run"
    arguments = ["--config.method.ascent_scale=1e30"]
    error = only_error(runs.finish(workdir, *arguments, code=2))
    assert re.search(r"the loss is not finite at step 1[6-9] \(generation 1, epoch 4\)", error)
    assert "the checkpoint of step 16 is kept" in error
    assert np.isfinite(leaves(workdir, 16)["weights/params/fc/kernel"]).all()
    assert row_count(workdir) == 4
    before = snapshot(workdir / "checkpoints")
    assert only_error(runs.finish(workdir, *arguments, code=2)) == error
    assert snapshot(workdir / "checkpoints") == before
    assert row_count(workdir) == 4
    assert main.run(["compare", str(workdir), f"--output={tmp_path / 'table'}"]) == main.OK
    assert "mlp on digits" in capfd.readouterr().out


def test_checkpoint_folder_that_cannot_be_written(runs, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    shutil.copy(runs.reference(CALLS) / "config.json", workdir)
    (workdir / "checkpoints").write_text("in the way")
    error = only_error(runs.finish(workdir, CALLS, code=main.UNWRITABLE))
    assert f"checkpoint 4 was not written to {workdir / 'checkpoints'}" in error


def test_damaged_metrics(runs, tmp_path, capfd):
    reference = runs.reference(CALLS)
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(LAST))
    metrics = workdir / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join([*lines[:2], b"{\x00\n", *lines[3:]]))
    warning = f"warning: {metrics}:3 is not a metrics row"
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main.run(["compare", str(workdir), f"--output={tmp_path / 'table'}"]) == main.OK
    assert set(capfd.readouterr().err.splitlines()) == {f"{warning}: left out"}
    assert f"{warning}: dropped\n" in runs.finish(workdir, CALLS)
    assert metrics.read_bytes() == b"".join([*lines[:2], *lines[3:]])
    assert b"{\x00\n" in (workdir / "metrics.jsonl.damaged").read_bytes()
    assert_same_leaves(leaves(workdir), leaves(reference))
