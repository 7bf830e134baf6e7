"""Runs of two real processes, which talk over the loopback interface."""

import signal

import pytest
from trainer_runs import (
    EPOCHS,
    Runs,
    assert_same_leaves,
    assert_same_run,
    free_port,
    leaves,
    row_count,
    wait_until,
)

pytestmark = pytest.mark.slow

CALLS = "--config.run.steps_per_call=2"
SELDOM = "--config.run.checkpoint_every_epochs=2"


@pytest.fixture(scope="session")
def runs(shared_folder):
    return Runs(shared_folder)


def start(runs, workdir, *arguments, **options):
    coordinator = [f"--coordinator=127.0.0.1:{free_port()}", "--processes=2"]
    return [
        runs.start(workdir, *coordinator, f"--process={process}", *arguments, **options)
        for process in range(2)
    ]


def end(processes):
    """Return the exit codes and what was printed on stderr."""
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


def test_a_seed_on_each_process_is_the_single_run_bit_for_bit(runs, tmp_path):
    workdir = tmp_path / "run"
    arguments = ["--config.train.seeds=2", CALLS, SELDOM]
    processes = start(runs, workdir, *arguments)
    wait_until(lambda: row_count(workdir) >= 4, *processes)
    processes[1].send_signal(signal.SIGTERM)  # one is told, both stop
    codes, errors = end(processes)
    assert codes == [75, 75], errors
    assert 4 <= row_count(workdir) < EPOCHS
    codes, errors = end(start(runs, workdir, *arguments))
    assert codes == [0, 0], errors
    assert errors[1] == ""
    both = leaves(workdir)
    for index, seed in enumerate([[], ["--config.train.seed=1"]]):
        alone = leaves(runs.reference(CALLS, *seed))
        assert_same_leaves({name: leaf[index : index + 1] for name, leaf in both.items()}, alone)
    # Only the first process writes metrics: one row an epoch, one event file.
    assert row_count(workdir) == EPOCHS
    assert len(list((workdir / "tensorboard").iterdir())) == 1


def test_points_with_draws_of_their_own_are_written_by_both(runs, tmp_path):
    arguments = [
        '--config.train.vary={"optimizer.learning_rate": [0.1, 0.2]}',
        "--config.train.seeds=2",
        "--config.data.draws=per_seed",
        "--config.data.label_noise=0.2",
        SELDOM,
    ]
    codes, errors = end(start(runs, tmp_path / "both", *arguments))
    assert codes == [0, 0], errors
    runs.finish(tmp_path / "one", *arguments)
    for rate in (0.1, 0.2):
        both, one = (tmp_path / run / f"points/learning_rate={rate}" for run in ("both", "one"))
        assert_same_run(both, one)
        assert (leaves(both)["varied/draw"] == [0, 1]).all()


@pytest.mark.parametrize(
    ("killed", "arguments"),
    [
        (0, ["--config.run.parameter_sharding=optimizer"]),
        (1, ["--config.data.placement=stream"]),
    ],
)
def test_a_batch_over_two_processes_killed_and_taken_up_again(runs, tmp_path, killed, arguments):
    # Streamed batches are those of a run that has the data on its device.
    reference = runs.reference(*arguments[: 1 - killed], devices=2)
    workdir = tmp_path / "run"
    arguments = [SELDOM, *arguments]
    processes = start(runs, workdir, *arguments)
    wait_until(lambda: row_count(workdir) >= 4, *processes)
    processes[killed].kill()  # and the other one ends
    codes, errors = end(processes)
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] == 1, errors
    line = f"error: process {killed} of 2 is gone; start all again: the run resumes from its last"
    # Of process 0 JAX may say something too, before this process has ended.
    error = errors[1 - killed]
    assert error.count(line) == 1, errors
    assert "Traceback" not in error
    assert row_count(workdir) < EPOCHS
    codes, errors = end(start(runs, workdir, *arguments))
    assert codes == [0, 0], errors
    assert_same_run(workdir, reference)


# Prints the rows of every batch that is decoded for a step, of one seed.
PRINTED = """\
from seal_jax.__main__ import main
from seal_jax.data.streaming import StoredImages

decode = StoredImages.__getitem__


def decode_and_print(images, rows):
    if getattr(rows, "shape", (0,))[0] == 1:
        print("rows", *images.rows[rows[0]], flush=True)
    return decode(images, rows)


StoredImages.__getitem__ = decode_and_print
main()
"""


def test_each_process_decodes_its_part_of_a_batch(runs, tmp_path):
    arguments = ["--config.data.placement=stream", "--config.train.generations=1"]
    processes = start(runs, tmp_path / "run", *arguments, program=PRINTED)
    printed = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    steps = [[line.split()[1:] for line in lines if line.startswith("rows ")] for lines in printed]
    assert len(steps[0]) == len(steps[1]) == 16
    for one, other in zip(*steps, strict=True):
        assert len(one) == len(other) == 16
        assert len({*one, *other}) == 32


def test_bad_workdir_stops_both_with_one_line_each(runs, tmp_path):
    (tmp_path / "other").write_text("of another program")
    codes, errors = end(start(runs, tmp_path))
    assert codes == [2, 2]
    for error in errors:
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
