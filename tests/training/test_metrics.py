import io
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from seal_jax.core.settings import Run, Settings, Train
from seal_jax.errors import UsageError
from seal_jax.training import loggers
from seal_jax.training import progress as progress_module
from seal_jax.training.metrics import MetricsLog, read
from seal_jax.training.progress import Progress

ROWS = [
    {"step": 0, "loss": 2.5, "accuracy": [0.125, 0.25], "forgetting": True},
    {"step": 10, "loss": 1e-7, "accuracy": [0.5, 0.75], "forgetting": False},
    {"step": 25, "loss": 0.1 + 0.2, "accuracy": [1.0, 1.0], "forgetting": False},
]


def board(folder):
    """What TensorBoard reads: ``{(tag, step): value}``."""
    (path,) = (folder / "tensorboard").iterdir()
    return {
        (value.tag, event.step): value.tensor.float_val[0]
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
    }


def started(folder, resume_step=-1, names="tensorboard"):
    log = MetricsLog(folder, resume_step=resume_step)
    log.show_in(loggers.start(folder, Settings(train=Train(seeds=2), run=Run(loggers=names))))
    return log


def write(folder, rows, resume_step=-1, names="tensorboard"):
    with started(folder, resume_step, names) as log:
        for row in rows:
            log.append(row)


def test_rows_come_back(tmp_path):
    write(tmp_path / "new" / "run", ROWS)
    assert read(tmp_path / "new" / "run") == ROWS
    text = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == ROWS
    assert read(tmp_path) == []


def test_row_is_on_disk_when_append_returns(tmp_path):
    log = started(tmp_path)
    for count, row in enumerate(ROWS, 1):
        log.append(row)
        assert read(tmp_path) == ROWS[:count]
        assert len({step for _, step in board(tmp_path)}) == count
    log.close()
    log.close()
    log.append({"step": 99})
    assert read(tmp_path) == ROWS


def test_arrays_are_taken_as_numbers(tmp_path):
    write(tmp_path, [{"step": np.int64(3), "a": jnp.float32(0.5), "b": np.arange(2), "c": [1]}])
    assert read(tmp_path) == [{"step": 3, "a": 0.5, "b": [0, 1], "c": [1]}]


def test_numbers_that_are_not_finite_are_valid_json(tmp_path):
    write(tmp_path, [{"step": 1, "loss": math.inf, "each": [1.0, math.nan]}])
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": null, "each": [1.0, null]}\n'
    (row,) = read(tmp_path)
    assert math.isnan(row["loss"])
    assert math.isnan(row["each"][1])
    assert board(tmp_path)["loss", 1] == math.inf
    write(tmp_path, [], resume_step=1)
    assert math.isnan(board(tmp_path)["each", 1])


def test_tensorboard_shows_means_and_seeds(tmp_path):
    write(tmp_path, [*ROWS[:1], {"step": 5, "one": [3.0], "huge": 1e300}])
    assert board(tmp_path) == {
        ("loss", 0): 2.5,
        ("accuracy", 0): 0.1875,
        ("accuracy/seed0", 0): 0.125,
        ("accuracy/seed1", 0): 0.25,
        ("forgetting", 0): 1.0,
        ("one", 5): 3.0,
        ("huge", 5): math.inf,
    }


def test_resume_drops_later_rows_and_makes_the_event_file_anew(tmp_path):
    write(tmp_path, ROWS)
    before = board(tmp_path)
    (tmp_path / "tensorboard" / "events.out.tfevents.1.old").write_bytes(b"")
    write(tmp_path, [], resume_step=10)
    assert read(tmp_path) == ROWS[:2]
    assert board(tmp_path) == {key: value for key, value in before.items() if key[1] <= 10}
    write(tmp_path, ROWS[2:], resume_step=10)
    assert read(tmp_path) == ROWS
    assert board(tmp_path) == before
    write(tmp_path, [])
    assert read(tmp_path) == []


@pytest.mark.parametrize("resume_step", [0, 10])
def test_cut_at_every_byte_then_resumed_has_the_right_rows(tmp_path, resume_step, monkeypatch):
    """A row is on disk before its checkpoint, so only what follows it can be cut."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # 300 times is slow on some disks
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, ROWS)
    whole = path.read_bytes()
    kept = sum(row["step"] <= resume_step for row in ROWS)
    safe = len(b"".join(whole.splitlines(keepends=True)[:kept]))
    for size in range(safe - 1, len(whole) + 1):  # from where only the newline is missing
        path.write_bytes(whole[:size])
        write(tmp_path, ROWS[kept:], resume_step=resume_step)
        assert path.read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == ["loggers.json", "metrics.jsonl", "tensorboard"]
    for size in range(safe):
        path.write_bytes(whole[:size])
        assert read(tmp_path) == ROWS[: whole[: size + 1].count(b"\n")]


def test_broken_line_in_the_middle_is_named(tmp_path):
    write(tmp_path, ROWS)
    path = tmp_path / "metrics.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    for bad in (second[:9] + b"\n", b"\xff\x00\n", b"\n", b"3\n", b'{"loss": 1}\n'):
        path.write_bytes(first + bad + third)
        with pytest.warns(UserWarning, match=r"metrics\.jsonl:2 is not a metrics row: left out$"):
            assert read(tmp_path) == [ROWS[0], ROWS[2]]
    path.write_bytes(first + second + second + third)
    with pytest.warns(UserWarning, match=r"metrics\.jsonl:3: step 10 comes after step 10: dropped"):
        MetricsLog(tmp_path, resume_step=25).close()
    assert path.read_bytes() == first + second + third
    damaged = tmp_path / "metrics.jsonl.damaged"
    assert damaged.read_bytes() == first + second + second + third


def test_bad_rows_are_named(tmp_path):
    with MetricsLog(tmp_path, resume_step=-1) as log:
        log.append({"step": 5})
        for row, words in {
            "loss": ({"loss": 1.0}, "needs an integer 'step', got None"),
            "bool": ({"step": True}, "needs an integer 'step', got True"),
            "same": ({"step": 5}, "row of step 5 comes after the row of step 5"),
            "text": ({"step": 6, "a": "x"}, "metric 'a' is 'x': use a number"),
            "none": ({"step": 6, "a": []}, r"metric 'a' is \[\]"),
            "deep": ({"step": 6, "a": [[1.0]]}, r"metric 'a' is \[\[1.0\]\]"),
        }.values():
            with pytest.raises(UsageError, match=words):
                log.append(row)
        log.append({"step": 6})
    assert read(tmp_path) == [{"step": 5}, {"step": 6}]


def test_full_disk_leaves_no_part_of_a_row(tmp_path):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLog(tmp_path, resume_step=-1) as log:
        log.append({"step": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, old[1]))
        try:
            with pytest.raises(
                OSError, match=r"row of step 2 was not written to .*metrics\.jsonl: "
            ):
                log.append({"step": 2, "values": list(range(50))})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert read(tmp_path) == [{"step": 1}]
        log.append({"step": 2})
    assert read(tmp_path) == [{"step": 1}, {"step": 2}]


def test_needs_no_tensorflow():
    code = (
        "import sys; sys.modules['tensorflow'] = None; import seal_jax.training.loggers as m, tempfile, "
        "pathlib; from seal_jax.core.settings import Settings;"
        "log = m.start(pathlib.Path(tempfile.mkdtemp()), Settings())['tensorboard'];"
        "log.log({'step': 1, 'a': 2.0}); log.close(failed=False); assert 'orbax' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_in_a_log_file_is_plain_lines(monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    with Progress(40, initial=20, enabled=True, every=10, stream=stream) as progress:
        for step in range(21, 31):
            progress.update(step, loss=[1.0, 2.0], accuracy=step / 100)
    lines = stream.getvalue().splitlines()
    assert 2 <= len(lines) < 10
    assert lines[0].startswith("23/40 steps (57%) [00:")
    assert lines[0].endswith("s/step, loss=1.5, accuracy=0.23]")
    assert lines[-1].startswith("30/40 steps")
    assert "\r" not in stream.getvalue()


def test_progress_on_a_terminal_is_a_bar():
    stream = Terminal()
    with Progress(40, initial=20, stream=stream) as progress:
        progress.update(30, loss=0.25)
        progress.update(40)
    assert "50%" in stream.getvalue()
    assert "40/40" in stream.getvalue()
    assert "loss=0.25" in stream.getvalue()


def test_progress_of_other_processes_is_silent():
    for stream in (io.StringIO(), Terminal()):
        with Progress(3, enabled=False, stream=stream, every=0) as progress:
            progress.update(2)
        assert stream.getvalue() == ""
