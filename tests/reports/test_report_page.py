"""The page: well-formed, by itself, complete, and everything beside it."""

from __future__ import annotations

import base64
import csv
import html.parser
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from seal_jax.cli import main
from seal_jax.core import plots
from seal_jax.core.tables import MEANING
from seal_jax.errors import UsageError
from seal_jax.reports import (
    compare,
    evaluations,
    write_report,
)
from seal_jax.reports.runs import differences, read_all
from seal_jax.reports.studies import settings

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(html.parser.HTMLParser):
    """Checks that tags balance; collects text, anchors, references and pictures."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.sources, self.tags = [], [], [], [], set()
        self.words = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.add(tag)
        assert not any(name.startswith("on") for name in given), given
        if "id" in given:
            self.ids.append(given["id"])
        if "href" in given:
            assert tag == "a"
            self.links.append(given["href"])
        if "src" in given:
            assert tag == "img"
            assert given["alt"]
            self.sources.append(given["src"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        section = self.ids[-1] if self.ids else ""
        if "style" not in self.open:
            self.words[section] = f"{self.words.get(section, '')} {data}"

    def pictures(self):
        for source in self.sources:
            kind, _, content = source.partition(",")
            assert kind == "data:image/png;base64"
            with Image.open(io.BytesIO(base64.b64decode(content))) as image:
                yield np.asarray(image.convert("RGB"))


def check(path):
    """Return the page, after what must hold of every one."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    page = Page(text)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "embed", "base"})
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} == set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert not re.search(r"https?:|//|@import|url\(", re.sub('base64,[^"]*"', "", text))
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    for picture in page.pictures():
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 5  # something is drawn
    return page


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def margins():
    """Write results of the evaluation of margins into a run's folder, as the command does."""

    def make(run, step, seeds=(0, 1), size=10.0, options=None, **changes):
        from seal_jax.evaluators import command, load

        label = {"run": run.name, "data": "d", "model": "m", "method": "x"}
        rows = [
            {
                **label,
                "weights": "last",
                "seed": seed,
                "step": step,
                "generation": 0,
                "train_accuracy": 1.0,
                "median": 0.99,
                "size_of_weights": size + seed,
                "smallest": [0.125, 0.5 + seed / 10],
                **changes,
            }
            for seed in seeds
        ]
        header = {"kind": "margins", "run": label, "options": options or {"count": 2}}
        (run / "evaluations" / "margins").mkdir(parents=True, exist_ok=True)
        command.write(load("margins"), header, rows, run / "evaluations" / "margins")

    return make


def checkpoint(run, *steps):
    for step in steps:
        (run / "checkpoints" / str(step)).mkdir(parents=True)
    for other in ("damaged-9999", "8888.orbax-checkpoint-tmp-1"):
        (run / "checkpoints" / other).mkdir(exist_ok=True)


def test_command(seal, tmp_path, capsys):
    output = tmp_path / "new" / "report"
    assert main.run(["compare", str(seal), f"--output={output}"]) == main.OK
    printed = capsys.readouterr().out
    assert "  1 │ 50.00 to 52.00  53.00 to 55.00  54.37" in printed
    assert f"report: {output / 'report.html'}" in printed
    page = check(output / "report.html")
    assert page.ids == ["generations", "curves", "runs", "training_speed", "not-shown"]
    words = " ".join(page.words["generations"].split())
    assert "seal (2 seeds) last best paper" in words
    assert "1 50.00 to 52.00 53.00 to 55.00 54.37 2 60.00 to 64.00 61.00 to 67.00 -" in words
    assert MEANING in words
    assert "Gen=1, as the papers count" in words
    missing = page.words["not-shown"]
    for title in (
        "Evaluations",
        "Significance",
        "One method against another",
        "Decision tree",
        "Accuracy against compute budget",
        "Size of the weights",
    ):
        assert f"{title} : needs " in missing
    assert "top-5" not in words
    assert table(output / "generations.csv")[0]["last_top5_mean"] == ""
    (curves, speed) = page.pictures()
    assert curves.shape == (1350, 1650, 3)
    assert sorted(path.name for path in output.iterdir()) == [  # and nothing half-written
        "curves.png",
        "generations.csv",
        "report.html",
        "runs.csv",
        "training_speed.csv",
        "training_speed.png",
    ]
    with Image.open(output / "training_speed.png") as image:
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), speed)


def test_all_text_is_escaped(make_run, tmp_path):
    evil = "<script>\"&'$x^"
    run = make_run(evil, test=[([0.5, 0.5], None)], data={"name": "<b>&amp;"}, epochs=5)
    write_report([run], tmp_path / "out")
    page = check(tmp_path / "out" / "report.html")
    assert f"{evil}: resnet50 on <b>&amp;" in page.words[""]
    assert evil in page.words["runs"]


def test_no_generation_finished(make_run, tmp_path):
    write_report(make_run(epochs=1, train={"seeds": 1}), tmp_path)
    page = check(tmp_path / "report.html")
    assert "No run has finished a generation yet." in page.words["generations"]


def test_top5_and_the_average_are_in_page_and_csv(seal, tmp_path):
    path = seal / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if "test_last/accuracy" in row:
            row["test_last/top5_accuracy"] = [0.8, 0.9]
            row["test_best/top5_accuracy"] = [0.7, 0.7]
            row["test_ema/accuracy"] = [0.5, 0.6]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    comparison = compare(seal)
    assert "top-5" not in comparison.as_text()  # the printed table has no room
    comparison.to_csv(tmp_path / "generations.csv")
    first, _ = table(tmp_path / "generations.csv")
    assert float(first["last_top5_mean"]) == pytest.approx(85)
    assert float(first["last_top5_std"]) == pytest.approx(50**0.5)
    assert float(first["best_top5_mean"]) == pytest.approx(70)
    assert float(first["ema_mean"]) == pytest.approx(55)
    words = " ".join(Page(comparison.table(top5=True).as_html()).words[""].split())
    assert "last best top-5 last top-5 best EMA paper" in words
    assert (
        "1 50.00 to 52.00 53.00 to 55.00 80.00 to 90.00 70.00 to 70.00 50.00 to 60.00 54.37"
        in words
    )


def test_differences_of_settings(make_run):
    first = make_run("first", epochs=1, data={"flip": True, "data_dir": "here"})
    second = make_run(
        "second",
        epochs=1,
        data={"data_dir": "there"},  # where the data lies is no difference
        method={"name": "llf", "own": 1},
        optimizer={"weight_decay": 0.0},
        run={"keep_checkpoints": 9},
    )
    found = differences(read_all([first, second]))
    assert found is not None
    cells = {row[0]: dict(zip(found.header[1:], row[1:], strict=True)) for row in found.rows}
    assert cells == {
        "first": {
            "data.flip": "true",
            "method.name": "seal",
            "optimizer.weight_decay": "0.0005",
        },
        "second": {"data.flip": "false", "method.name": "llf", "optimizer.weight_decay": "0"},
    }
    assert differences(read_all([first])) is None


def test_evaluations_of_two_runs(seal, make_run, margins, tmp_path):
    other = make_run("$other", test=[([0.3, 0.4], None)], method={"name": "llf"}, epochs=6)
    plain = make_run("plain", epochs=2)
    checkpoint(seal, 40, 80)
    checkpoint(other, 40, 60)
    margins(seal, 80)
    margins(other, 40, options={"count": 3})
    write_report([seal, other, plain], tmp_path / "out")
    page = check(tmp_path / "out" / "report.html")
    words = " ".join(page.words["margins"].split())
    assert "$other† was evaluated at step 40, and its newest checkpoint is of step 60" in words
    assert "seal† " not in words
    assert "different --count: 2 for seal; 3 for $other." in words
    assert "Not evaluated for margins: plain." in words
    rows = table(tmp_path / "out" / "margins.csv")
    assert [(row["run"], row["step"]) for row in rows] == [("seal", "80"), ("$other†", "40")]
    assert rows[0]["smallest"].startswith("0.125")
    with Image.open(tmp_path / "out" / "margins.png") as image:
        assert image.format == "PNG"
    assert "Evaluations" not in page.words["not-shown"]


def test_a_run_has_one_colour_whatever_others_were_evaluated(make_run, margins):
    runs = [
        make_run(name, test=[([0.5, 0.6], None)] * 2, method={"name": method})
        for name, method in (("plain", "normal"), ("lw", "lw"), ("dsd", "dsd"))
    ]
    margins(runs[2], 80)
    read = read_all(runs)
    results, _ = evaluations.read(read)
    ((section,), _) = evaluations.sections(results, read)
    figure = Figure()
    section.draw(figure)
    assert figure.axes[0].get_lines()[0].get_color() == plots.COLOURS[2]
    # And in the studies, which compare methods.
    looks = settings.styles(settings.entries(read))
    assert {name: look["color"] for name, look in looks.items()} == dict(
        zip(("normal", "lw", "dsd"), plots.COLOURS, strict=False)
    )


ROW = {"run": "a", "weights": "last", "seed": 0, "step": 1, "train_accuracy": 0.5}
ROW |= {"smallest": [0.1, 0.2], "median": 0.5, "size_of_weights": 1.0}


def results(**values):
    """Return a ``results.json`` of one row, with values as JSON writes them."""
    row = {"run": '"a"', "weights": '"last"', "seed": "0", "step": "1"} | values
    fields = ", ".join(f'"{name}": {value}' for name, value in row.items())
    return f'{{"kind": "margins", "rows": [{{{fields}}}]}}'


def test_runs_without_checkpoints_are_not_stale(seal, margins):
    margins(seal, 40)
    found, _ = evaluations.read(read_all(seal))
    assert [each.stale for each in found["margins"]] == [False]
    checkpoint(seal, 40)
    assert [each.stale for each in found["margins"]] == [False]
    checkpoint(seal, 80)
    assert [each.stale for each in found["margins"]] == [True]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read"),
        ("{}", "kind is missing"),
        ('{"kind": "x", "rows": []}', "kind = 'x' is none"),
        ("[" * 100_000, "nested more than"),
        ('{"kind": "margins", "rows": [3]}', "rows[0] = 3 must be a mapping"),
        (results(step="NaN"), "rows[0].step = nan must be of type int"),
        (results(step="1e400"), "rows[0].step = inf must be of type int"),
        (results(weights="3"), "rows[0].weights = 3 must be of type str"),
        (results(seed="null"), "rows[0].seed = None must be of type int"),
        (results()[:-1] + ', "options": "none"}', "options = 'none' must be a mapping of names"),
        ('{"kind": "margins", "rows": []}', "holds no rows; evaluate again"),
        ('{"kind": "flatness", "rows": []}', "holds results of flatness; evaluate again"),
        ('{"kind": "margins", "rows": [{"run": "seal"}]}', "rows[0].weights is missing"),
    ],
)
def test_broken_results_are_left_out_and_named(seal, content, says):
    path = seal / "evaluations" / "margins" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    found, (line,) = evaluations.read(read_all(seal))
    assert found == {}
    assert line.startswith(f"seal: {path} ")
    assert says in line


@pytest.mark.parametrize(
    "content",
    [
        "{",
        # Of another version, as it were.
        results(),
        results(train_accuracy="[1]", smallest='["x"]'),
        json.dumps({"kind": "margins", "rows": [ROW, {**ROW, "seed": 1, "smallest": [0.1]}]}),
    ],
)
def test_what_is_left_out_is_named_in_the_page(make_run, tmp_path, content):
    run = make_run(epochs=1)
    path = run / "evaluations" / "margins" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    write_report(run, tmp_path / "out")
    page = check(tmp_path / "out" / "report.html")
    assert (
        "Left out: seal: " if content == "{" else "Left out: seal: its results of margins"
    ) in page.words[""]
    assert "Evaluations" in page.words["not-shown"]


def test_run_that_validation_ended_early_is_finished(seal):
    path = seal / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    last = rows.pop()
    rows[-1] |= {key: value for key, value in last.items() if key.startswith("test")}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run,) = read_all(seal)
    assert run.epochs_done == 7
    assert run.finished


@pytest.mark.slow
def test_more_runs_than_can_be_told_apart(make_run, tmp_path):
    runs = [
        make_run(
            f"run{index}",
            test=[([0.5 + index % 3 / 10], None)],
            train={"seeds": 1, "generations": 1, "epochs_per_generation": 1},
            data={"name": f"data{index // 2}"},
            method={"name": ("normal", "lw")[index % 2]},
        )
        for index in range(22)
    ]
    write_report(runs, tmp_path / "out")
    page = check(tmp_path / "out" / "report.html")
    sections = "generations curves runs settings significance scatter not-shown"
    assert page.ids == sections.split()
    assert len(table(tmp_path / "out" / "scatter.csv")) == 11
    assert (tmp_path / "out" / "significance.png").exists()
    assert "The first 21 of 22 runs" in page.words["generations"]
    assert "run21" not in page.words["generations"]
    assert "run21" in page.words["runs"]
    assert len(table(tmp_path / "out" / "generations.csv")) == 22


def test_output_that_cannot_be_written(seal, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file/out cannot be written"):
        write_report(seal, tmp_path / "file" / "out")


def test_what_a_report_without_evaluations_loads(seal, tmp_path):
    code = """if True:
        import sys
        from seal_jax import reports
        reports.write_report(sys.argv[1], sys.argv[2])
        print(sorted({*sys.modules} & {"flax", "orbax", "scipy.stats", "sklearn", "torch"}))
    """
    command = [sys.executable, "-c", code, str(seal), str(tmp_path / "out")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
