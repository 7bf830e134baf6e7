"""Run folders that can and cannot be reported on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from seal_jax import reports
from seal_jax.cli import main
from seal_jax.core import files
from seal_jax.core.files import NAME_LENGTH, short_names
from seal_jax.errors import UsageError
from seal_jax.reports.runs import read_all


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


@pytest.mark.parametrize(
    ("field", "says"),
    [(f"{section}.name", f"{section}.name is missing") for section in ("data", "model", "method")]
    + [("train.seeds", "has no setting train.seeds")],
)
def test_config_of_something_else(seal, config, field, says):
    section, name = field.split(".")
    del config[section][name]
    (seal / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=f"config.json .*{says}; give the folder"):
        reports.compare([seal])


def change(section, **fields):
    """Return a damage: settings of ``config.json``."""

    def damage(run):
        config = json.loads((run / "config.json").read_text())
        config[section] = {**config[section], **fields} if fields else None
        (run / "config.json").write_text(json.dumps(config))

    return damage


def row(number=3, **values):
    """Return a damage: values of a row of ``metrics.jsonl``."""

    def damage(run):
        path = run / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[number].update(values)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    return damage


def write(name, text):
    return lambda run: (run / name).write_text(text)


DEEP = "[" * 100_000
DAMAGED = {
    "deep config": (write("config.json", '{"train": ' + DEEP), "config.json cannot be read: it is"),
    "surrogate": (change("data", name="\ud800"), "it holds half of a surrogate pair"),
    "no accuracies": (
        write("metrics.jsonl", '{"step": 1, "epoch": 0, "generation": 0, "train/loss": [1, 2]}\n'),
        "has no train/accuracy",
    ),
    "no method": (change("method"), "method = None must be a mapping"),
    "data null": (change("data"), "data = None must be a mapping"),
    "seeds null": (change("train", seeds=None), "train.seeds = None must be of type int"),
    "epochs null": (change("train", epochs_per_generation=None), "generation = None must be of"),
    "generations x": (change("train", generations="x"), "train.generations = 'x' must be of type"),
    "generations": (
        change("train", generations=10**9),
        "epochs_per_generation = 4 must be at most",
    ),
    "seeds": (change("train", seeds=10**9), "2 values of train/loss, and config.json has"),
    "name list": (change("model", name=["a"]), "model.name = ['a'] must be of type str"),
    "name mapping": (change("data", name={"a": 1}), "data.name = {'a': 1} must be of type str"),
    "ascent": (change("method", ascent_epochs="x"), "method.ascent_epochs = 'x' must be of type"),
    "option": (change("method", mask={"a": 1}), "method.mask = {'a': 1} must be of type"),
    "option list": (change("method", fit=["a"]), "method.fit = ['a'] must be of type"),
    "no optimizer": (change("optimizer"), "optimizer = None must be a mapping"),
    "momentum": (change("optimizer", momentum=[1]), "optimizer.momentum = [1] must be of type"),
    "epoch": (row(epoch=10**12), "has epoch = 1000000000000; it must be a whole number below 8"),
    "epoch true": (row(epoch=True), "has epoch = True"),
    "generation": (row(generation=-1), "has generation = -1; it must be a whole number below 2"),
    "seeds of a row": (row(**{"train/accuracy": [0.1] * 3}), "3 values of train/accuracy, and"),
    "no seeds of a row": (row(**{"train/accuracy": 0.5}), "no list of values of train/accuracy"),
}
LEFT_OUT = {
    "text": row(**{"train/accuracy": "high"}),
    "texts": row(**{"train/accuracy": ["high", "low"]}),
    "nested": row(**{"train/accuracy": [[1.0], [2.0]]}),
    "huge": row(**{"train/loss": 10**400}),
    "mapping": row(**{"train/loss": {"a": 1}}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_folder_is_one_line(seal, tmp_path, capfd, name):
    damage, says = DAMAGED[name]
    damage(seal)
    assert main.run(["compare", str(seal), f"--output={tmp_path / 'out'}"]) == main.USAGE
    error = capfd.readouterr().err
    assert says in error
    assert str(seal) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", LEFT_OUT)
def test_row_that_holds_no_numbers_is_left_out(seal, name):
    LEFT_OUT[name](seal)
    with pytest.warns(UserWarning, match=r"metrics\.jsonl:4 is not a metrics row: left out$"):
        (run,) = read_all(seal)
    assert [row["epoch"] for row in run.rows] == [0, 1, 2, 4, 5, 6, 7]


def test_same_folder_twice(seal):
    with pytest.raises(UsageError, match="is given twice"):
        reports.compare([seal, seal.parent / "." / "seal"])


def test_names_are_short_and_different():
    paths = [Path(f"runs/{'very_' * 8}long_{end}") for end in ("one_two", "six_two")]
    names = short_names([*paths, Path("a/x/run"), Path("a/y/run"), Path("b/y/run")])
    assert names[2:] == ["x/run", "a/y/run", "b/y/run"]
    assert len(set(names)) == 5
    assert max(map(len, names)) <= NAME_LENGTH


def test_equal_folders_are_numbered():
    assert short_names([Path("a/run"), Path("a/run"), Path("b/run")]) == [
        "a/run",
        "a/run2",
        "b/run",
    ]


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(UsageError, match=r"results\.json cannot be written"):
        files.write(tmp_path / "results.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


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
