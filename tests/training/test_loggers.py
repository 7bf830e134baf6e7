"""What the loggers show, through failures and resumes; wandb offline and MLflow in a folder."""

import csv
import importlib.machinery
import json
import math
import struct
import sys
import types
import warnings

import pytest
from programs import STRIPES, mlp

from seal_jax.core.settings import Run, Settings, Train
from seal_jax.errors import UsageError
from seal_jax.training import loggers, loop
from seal_jax.training.metrics import MetricsLog, read

ROWS = [
    {"step": 10, "epoch": 0, "train/loss": [2.0, 4.0]},
    {"step": 20, "epoch": 1, "train/loss": [1.0, math.nan], "test/loss": [0.5, 0.5]},
    {"step": 30, "epoch": 2, "train/loss": [0.5, 1.5]},
]


def settings(names):
    return Settings(train=Train(seeds=2), run=Run(loggers=names))


def write(folder, rows, names, resume_step=-1):
    with MetricsLog(folder, resume_step=resume_step) as log:
        log.show_in(loggers.start(folder, settings(names)))
        for row in rows:
            log.append(row)


def lines(folder):
    with (folder / "metrics.csv").open() as file:
        return [
            {name: float(text) for name, text in line.items() if text}
            for line in csv.DictReader(file)
        ]


def test_csv_has_the_rows_that_the_record_has(tmp_path):
    write(tmp_path, ROWS, "csv")
    first, second, third = lines(tmp_path)
    assert first == {
        "step": 10,
        "epoch": 0,
        "train/loss": 3,
        "train/loss/seed0": 2,
        "train/loss/seed1": 4,
    }
    assert math.isnan(second["train/loss"])
    assert second["test/loss/seed1"] == 0.5
    assert "test/loss" not in third
    write(tmp_path, ROWS[1:2], "csv", resume_step=10)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20]
    # Rows of a run without it are there once it is asked for.
    write(tmp_path, ROWS[2:], "", resume_step=20)
    write(tmp_path, [], "csv", resume_step=30)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("csv,wandbb", r"run.loggers = 'csv,wandbb' must be some of .*nearest: wandb"),
        ("csv,csv", "each once"),
        ("csv,wandb", r"wandb is not installed; pip install wandb, or leave wandb out"),
        ("mlflow", r"mlflow is not installed; pip install mlflow, or leave mlflow out"),
    ],
)
def test_names_and_packages_are_checked(names, message, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: name == "csv" or None)
    with pytest.raises(UsageError, match=message):
        loggers.check(settings(names))


def test_a_logger_that_fails_ends_nothing(tmp_path, monkeypatch):
    log = loggers.Csv.log

    def fail(self, row):
        if row["step"] == 20:
            raise ConnectionError("no\nnetwork")
        log(self, row)

    monkeypatch.setattr(loggers.Csv, "log", fail)
    with pytest.warns(
        UserWarning, match=r"^csv failed at step 20 \(no\): the run goes on without it"
    ):
        write(tmp_path, ROWS, "csv")
    assert [row["step"] for row in read(tmp_path)] == [10, 20, 30]
    assert [line["step"] for line in lines(tmp_path)] == [10]
    monkeypatch.undo()
    write(tmp_path, [], "csv", resume_step=30)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30]


def test_one_that_does_not_start_is_one_line(tmp_path, monkeypatch):
    closed = []

    class Other:
        def __init__(self, workdir, settings):
            pass

        def close(self, *, failed):
            closed.append(failed)

    def refuse(workdir, settings):
        raise RuntimeError("no key\nsee https://...")

    write(tmp_path, ROWS, "csv")
    for name, make in {"mlflow": Other, "wandb": refuse}.items():
        monkeypatch.setitem(loggers._LOGGERS, name, (make, *loggers._LOGGERS[name][1:]))
    with pytest.raises(UsageError, match=r"wandb does not start \(no key\); run `wandb login`, or"):
        loggers.start(tmp_path, settings("csv,mlflow,wandb"))
    # The run itself has not failed, and no file was emptied.
    assert closed == [False]
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30]


def test_points_of_a_program_are_shown_by_their_values(tmp_path):
    """Each is a mean over its seeds, all of them under names that every logger takes."""
    varied = '{"optimizer.learning_rate": [0.1, 0.3]}'
    several = Settings(train=Train(seeds=2, vary=varied), run=Run(loggers="csv"))
    with MetricsLog(tmp_path, resume_step=-1) as log:
        log.show_in(loggers.start(tmp_path, several))
        log.append({"step": 10, "train/loss": [1.0, 2.0, 4.0, 6.0]})
    assert lines(tmp_path) == [
        {
            "step": 10,
            "train/loss": 3.25,
            "train/loss/learning_rate-0.1": 1.5,
            "train/loss/learning_rate-0.3": 5.0,
        }
    ]


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write(tmp_path, ROWS[:2], "wandb")
    run_id = json.loads((tmp_path / loggers.IDS).read_text())["wandb"]
    write(tmp_path, ROWS[1:], "wandb", resume_step=10)
    assert json.loads((tmp_path / loggers.IDS).read_text())["wandb"] == run_id
    # Each start has a folder of its own, all of the same run, and the last one has all rows.
    files = sorted(tmp_path.glob(f"wandb/offline-run-*-{run_id}*/run-{run_id}.wandb"))
    assert len(files) == 2
    shown = [{"_step": row["step"], **loggers.scalars(row, ["seed0", "seed1"])} for row in ROWS]
    # As text: NaN is not equal to itself.
    assert [str(sorted(row.items())) for row in wandb_rows(files[-1])] == [
        str(sorted({name: float(value) for name, value in row.items()}.items())) for row in shown
    ]


def test_wandb_is_told_of_a_failure(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    codes, finish = [], wandb.Run.finish

    def record(self, exit_code=None, **options):
        codes.append(exit_code)
        finish(self, exit_code, **options)

    monkeypatch.setattr(wandb.Run, "finish", record)
    write(tmp_path, ROWS[:1], "wandb")
    with pytest.raises(UsageError, match="comes after the row"):
        write(tmp_path, ROWS[:1], "wandb", resume_step=10)
    assert codes == [0, 1]


def wandb_rows(path):
    """Return the rows of an offline run's file, a log in LevelDB's format after 7 bytes of wandb's own."""
    from wandb.proto import wandb_internal_pb2

    data, offset, record, rows = path.read_bytes(), 7, b"", []
    while offset + 7 <= len(data):
        if (left := -offset % 2**15) < 7:  # what is left of a block is too small for a header
            offset += left
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        record += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last of its parts
            entry, record = wandb_internal_pb2.Record.FromString(record), b""
            if entry.WhichOneof("record_type") == "history":
                items = {"/".join(item.nested_key) or item.key: item for item in entry.history.item}
                rows.append(
                    {
                        name: float(json.loads(item.value_json))
                        for name, item in items.items()
                        if name == "_step" or not name.startswith("_")
                    }
                )
    return rows


def test_mlflow_in_a_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    folder = tmp_path / "sweep" / "seal"
    write(folder, ROWS[:2], "mlflow")
    run_id = json.loads((folder / loggers.IDS).read_text())["mlflow"]
    client = mlflow.MlflowClient()
    assert client.get_run(run_id).info.status == "FINISHED"
    write(folder, ROWS[1:], "mlflow", resume_step=10)
    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("sweep/seal", "FINISHED")
    assert run.data.params["run.loggers"] == "mlflow"
    history = client.get_metric_history(run_id, "train/loss.seed0")
    assert [(metric.step, metric.value) for metric in history] == [(10, 2.0), (20, 1.0), (30, 0.5)]
    assert [metric.step for metric in client.get_metric_history(run_id, "test/loss")] == [20]
    assert len(client.search_runs([run.info.experiment_id])) == 1
    # A run that was killed before it had its parameters gets them, and one that ends by an error says so.
    lacking = client.create_run(run.info.experiment_id).info.run_id
    client.log_param(lacking, "run.loggers", "csv")
    (folder / loggers.IDS).write_text(json.dumps({"mlflow": lacking}))
    with pytest.raises(UsageError, match="comes after the row"):
        write(folder, ROWS[:1], "mlflow", resume_step=30)
    other = client.get_run(lacking)
    assert other.info.status == "FAILED"
    assert other.data.params == run.data.params | {"run.loggers": "csv"}


def test_a_logger_that_cannot_finish_changes_nothing(tmp_path):
    class Broken:
        def log(self, *rows):
            if rows[-1]["step"] == 2:
                raise RuntimeError("the server has gone")

        def close(self, *, failed):
            raise BrokenPipeError("no process")

    closed = []

    class Other(Broken):
        def close(self, *, failed):
            closed.append(failed)

    def diverges():
        with MetricsLog(tmp_path, resume_step=-1) as log:
            log.show_in({"first": Other(), "second": Broken()})
            log.append({"step": 1})
            log.append({"step": 2})
            raise UsageError("diverged")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(UsageError, match="diverged"):
            diverges()
    texts = [str(warning.message) for warning in caught]
    assert [text.partition(":")[0] for text in texts] == [
        "first failed at step 2 (the server has gone)",
        "second failed at step 2 (the server has gone)",
        "second could not finish (no process)",
    ]
    assert closed == [True]
    assert read(tmp_path) == [{"step": 1}, {"step": 2}]


class Wandb(types.ModuleType):
    """What is used of wandb, whose service keeps the rows; it fails where it is told to."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.rows, self.started, self.exit_codes, self.fails = {}, [], [], ""

    def init(self, *, id, **options):
        if self.fails == "init":
            raise RuntimeError("no key")
        self.started.append(id)
        return self

    @property
    def step(self):
        return max(self.rows, default=-1) + 1

    def log(self, row, *, step, commit):
        if self.fails == "log" and self.rows:
            raise ConnectionError("no network")
        self.rows[step] = row

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)


def test_a_finished_run_is_shown_in_loggers_that_lack_rows(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def train(names, fails=""):
        wandb.fails = fails
        sections = {"train": {"generations": 1, "epochs_per_generation": 2}}
        config = mlp(run={"steps_per_call": 0, "loggers": names}, **sections)
        assert loop.train(config, tmp_path, STRIPES, devices=1).finished

    def files():
        paths = [path for path in tmp_path.rglob("*") if path.name != loggers.IDS]
        return {path: path.stat().st_mtime_ns for path in paths}

    train("csv")
    record = files()[tmp_path / "metrics.jsonl"]
    train("tensorboard,csv")
    before = files()
    assert [line["step"] for line in lines(tmp_path)] == [5, 10]
    assert len(list(tmp_path.glob("tensorboard/events.*"))) == 1
    # wandb counts as new until it has all rows. Nothing else is written again, and the record never.
    with pytest.raises(UsageError, match="wandb does not start"):
        train("tensorboard,csv,wandb", fails="init")
    with pytest.warns(UserWarning, match="wandb failed at step 10"):
        train("tensorboard,csv,wandb", fails="log")
    train("tensorboard,csv,wandb")
    train("tensorboard,csv,wandb", fails="init")
    assert sorted(wandb.rows) == [5, 10]
    assert (len(wandb.started), len(set(wandb.started)), wandb.exit_codes) == (2, 1, [1, 0])
    assert files() == before
    assert before[tmp_path / "metrics.jsonl"] == record
    # A file that is gone is written again.
    (tmp_path / "metrics.csv").unlink()
    train("csv")
    assert [line["step"] for line in lines(tmp_path)] == [5, 10]
