"""Run folders that can and cannot be reported on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from seal_jax import reports
from seal_jax.errors import UsageError
from seal_jax.reports.runs import NAME_LENGTH, read_all, short_names


def draw(folders):
    return reports.draw(folders, "unused.png")


@pytest.mark.parametrize("report", [reports.compare, draw])
def test_no_folders(report):
    with pytest.raises(UsageError, match=r"^no run folders given; give at least one$"):
        report([])


@pytest.mark.parametrize("report", [reports.compare, draw])
def test_folder_without_a_run(report, tmp_path):
    with pytest.raises(UsageError, match=r"holds no run: .*config.json is missing$"):
        report([tmp_path])


@pytest.mark.parametrize("content", [None, "", '{"step": 10, "epo'])
def test_no_finished_epoch(make_run, content):
    run = make_run()
    (run / "metrics.jsonl").unlink()
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    with pytest.raises(UsageError, match=r"metrics.jsonl holds no finished epoch yet; wait"):
        reports.compare([run])


def test_last_line_cut_short(seal):
    path = seal / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 90, "epoch": 8, "gener')
    assert read_all(seal)[0].epochs_done == 8


def test_row_of_something_else(make_run):
    run = make_run()
    (run / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n')
    with pytest.raises(UsageError, match=r"the row of step 10 has epoch = None; it must be"):
        reports.compare([run])


@pytest.mark.parametrize("field", ["data.name", "model.name", "method.name", "train.seeds"])
def test_config_of_something_else(seal, config, field):
    section, name = field.split(".")
    del config[section][name]
    (seal / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=f"config.json has no setting {field}; give the folder"):
        reports.compare([seal])


def test_same_folder_twice(seal):
    with pytest.raises(UsageError, match="is given twice"):
        reports.compare([seal, seal.parent / "." / "seal"])


def test_names_are_short_and_different():
    paths = [Path(f"runs/{'very_' * 8}long_{end}") for end in ("one_two", "six_two")]
    names = short_names([*paths, Path("a/x/run"), Path("a/y/run"), Path("b/y/run")])
    assert names[2:] == ["x/run", "a/y/run", "b/y/run"]
    assert len(set(names)) == 5
    assert max(map(len, names)) <= NAME_LENGTH


def test_series(seal):
    (run,) = read_all(seal)
    epochs, values = run.series("test_last/accuracy")
    assert epochs.tolist() == [4, 8]
    assert values.tolist() == [[0.50, 0.52], [0.60, 0.64]]
    epochs, values = run.series("learning_rate")
    assert values.shape == (8, 1)
    epochs, values = run.series("absent")
    assert epochs.shape == (0,)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"name": "seal", "ascent_epochs": None}, 1),
        ({"name": "seal"}, 1),
        ({"name": "seal", "ascent_epochs": 2.5}, 2.5),
        ({"name": "llf", "ascent_epochs": None}, 0),
    ],
)
def test_ascent_epochs(make_run, method, expected):
    assert read_all(make_run(epochs=1, method=method))[0].ascent_epochs == expected


def test_import_leaves_plots_and_logs_alone():
    code = (
        "import sys, seal_jax.reports; "
        "print(sorted({*sys.modules} & {'matplotlib', 'tensorboard', 'flax', 'orbax'}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
