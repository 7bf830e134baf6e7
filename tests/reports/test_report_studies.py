"""Studies across runs against numbers worked out by hand, scipy's own test, and planted rules."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from seal_jax import papers
from seal_jax.evaluation import significance as library
from seal_jax.reports.page import Missing, Section
from seal_jax.reports.runs import read_all
from seal_jax.reports.studies import (
    budget,
    scatter,
    significance,
    size,
    speed,
    surface,
    tree,
)
from seal_jax.reports.studies import settings as grouping

NAMES = ("normal", "lw", "fc")


@pytest.fixture
def trained(make_run):
    """Write a run of one epoch a generation; ``test`` has a fraction a seed."""

    def make(name, method, test, *, generations=1, validation=False, epochs=1, **sections):
        train = {"generations": generations, "epochs_per_generation": epochs, "seeds": len(test)}
        options = method if isinstance(method, dict) else {"name": method}
        ends = [(test, [value + 0.01 for value in test])] * generations
        return make_run(
            name,
            test=ends,
            validation=[[0.5] * len(test)] * generations if validation else (),
            **{**sections, "method": options, "train": {**train, **sections.get("train", {})}},
        )

    return make


@pytest.fixture
def grid(trained):
    """Three methods in 6 settings: LW always beats normal by 2 to 7 points; FC wins 3 of 6."""
    folders = []
    for index in range(6):
        model, flip = ("scnn", "vgg16")[index % 2], index >= 3
        base = 0.3 + index / 20
        scores = {
            "normal": [base, base + 0.02],
            "lw": [base + 0.02 + index / 100, base + 0.04 + index / 100],
            "fc": [base + 0.02 * (1 if index < 3 else -1), base + 0.02],
        }
        for method, test in scores.items():
            name = f"{model}{index}{method}"
            sections = {"model": {"name": model}, "data": {"name": f"data{index}", "flip": flip}}
            folders.append(trained(name, method, test, **sections))
    return grouping.entries(read_all(folders))


def drawn(section):
    """Return the figure of a section, after it was rendered."""
    figure = Figure(figsize=section.size, layout="constrained")
    section.draw(figure)
    figure.savefig(io.BytesIO(), format="png")
    return figure


def csv_rows(section):
    table = section.data or section.tables[0]
    return list(csv.DictReader(io.StringIO(table.as_csv())))


def test_significance_is_the_binomial_test_with_holm(grid):
    found = significance.section(grid)
    rows = {
        (row["row"], row["column"]): row for row in csv_rows(found) if row["model"] == "all models"
    }
    wins = {("normal", "lw"): (6, 0), ("normal", "fc"): (3, 3), ("fc", "lw"): (6, 0)}
    wins |= {pair[::-1]: counts[::-1] for pair, counts in wins.items()}
    # FC's first seed loses where index >= 3: mean -0.01; otherwise +0.01.
    assert {
        pair: (int(row["column better"]), int(row["row better"])) for pair, row in rows.items()
    } == wins
    expected = {
        pair: stats.binomtest(counts[0], sum(counts), alternative="greater").pvalue
        for pair, counts in wins.items()
    }
    for pair, row in rows.items():
        assert float(row["p"]) == pytest.approx(expected[pair], rel=1e-4)
    # 1/64 twice among six: Holm asks for 0.05/6 of the first, which 0.0156 misses.
    assert {pair for pair, row in rows.items() if row["mark"] == "*"} == {
        ("normal", "lw"),
        ("fc", "lw"),
    }
    assert not [row for row in rows.values() if row["mark"] == "o"]
    whole = found.tables[0]
    assert whole.rows[0] == ["normal", "", "★ 6:0", "3:3"]
    assert [table.title for table in found.tables] == [
        f"Is the column better? {model}, last weights" for model in ("all models", "scnn", "vgg16")
    ]
    figure = drawn(found)
    assert [axes.get_title() for axes in figure.axes] == [
        "all models, last",
        "scnn, last",
        "vgg16, last",
    ]


def test_significance_of_a_whole_table_is_that_of_the_library(grid):
    scores = grouping.by_setting(grid, "last")
    values = np.array(list(grouping.means(scores, NAMES).values()))
    found, whole = significance.pairwise(NAMES, scores), library.compare(NAMES, values)
    assert found is not None
    assert found.methods == whole.methods
    for ours, theirs in zip(found[1:], whole[1:], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_circles_come_with_more_settings():
    one = frozenset({("model.name", "m"), ("data.name", "d")})
    scores = {one | {("number", index)}: {"a": {0: 0.5}, "b": {0: 0.6}} for index in range(6)}
    found = significance.pairwise(("a", "b", "c"), scores)
    assert found is not None
    assert found.methods == ("a", "b")  # nobody trained with c
    assert found.corrected.tolist() == [[False, True], [False, False]]  # 1/64 under 0.05 / 2


@pytest.mark.parametrize(
    ("model", "marked"),
    [
        # The marks of Table 3 that can be told in our copy of the paper, row over column.
        (
            "scnn",
            {"BL FC", "BL LW", "WELSR LW", "DSD FC", "DSD LW", "DSD WELSR", "WELS FC", "WELS LW"},
        ),
        ("vgg16", {"WELSR LW", "DSD WELSR", "DSD FC", "DSD LW", "WELS FC", "WELS LW"}),
        ("mobilenet", {"WELSR LW", "DSD LW", "WELS LW", "FC LW"}),
        (
            "resnet50",
            {"BL WELSR", "BL WELS", "BL FC", "BL LW", "WELSR WELS", "WELSR LW", "FC WELS"},
        ),
    ],
)
def test_the_papers_tables_give_its_marks(model, marked):
    """From Tables 2, 6 and 7; the paper's Table 3 is from these and some more settings."""
    scores = {}
    tables = {name: papers.load("LW", name) for name in ("Table 2", "Table 6", "Table 7")}
    for name, table in tables.items():
        for (data, row_model), numbers in table.rows.items():
            if row_model == model:
                scores[frozenset({("data.name", data), ("table", name)})] = {
                    method: {0: number.mean} for method, number in numbers.items()
                }
    found = significance.pairwise(tables["Table 2"].columns, scores)
    assert found is not None
    ours = {
        f"{row} {column}"
        for row, column in itertools.product(found.methods, repeat=2)
        if found.significant[found.methods.index(row), found.methods.index(column)]
    }
    assert marked <= ours
    # "There is no architecture where an algorithm outperforms LW statistically significantly."
    assert not [pair for pair in ours if pair.startswith("LW ")]


def test_pairs_use_the_settings_they_share(trained):
    folders = [
        trained("a1", "normal", [0.5], data={"name": "x"}),
        trained("b1", "lw", [0.6], data={"name": "x"}),
        trained("a2", "normal", [0.5], data={"name": "y"}),
        trained("b2", "lw", [0.4], data={"name": "y"}),
        trained("c2", "fc", [0.4], data={"name": "y"}),
    ]
    found = significance.section(grouping.entries(read_all(folders)))
    assert isinstance(found, Section)
    assert found.tables[0].rows == [["normal", "", "1:1"], ["lw", "1:1", ""]]
    found = significance.section(grouping.entries(read_all(folders[1:3])))
    assert isinstance(found, Missing)


def test_what_a_setting_is(trained):
    plain = trained("plain", "normal", [0.5], epochs=6, optimizer={"schedule": "single"})
    rounds = trained("rounds", "lw", [0.5], generations=3, epochs=2, run={"keep_checkpoints": 9})
    other = trained("other", "lw", [0.5], generations=3, epochs=2, optimizer={"weight_decay": 0.0})
    longer = trained("longer", "lw", [0.5], generations=3, epochs=3)
    settings = [grouping.setting_of(run) for run in read_all([plain, rounds, other, longer])]
    assert settings[0] == settings[1]
    assert len(set(settings)) == 3
    assert grouping.without(settings[3], grouping.EPOCHS) == grouping.without(
        settings[0], grouping.EPOCHS
    )
    names = grouping.describe(settings)
    subject = "resnet50 on tiny_imagenet"
    assert names[settings[0]] == f"{subject}, epochs in all 6, optimizer.weight_decay 0.0005"
    assert names[settings[3]] == f"{subject}, epochs in all 9, optimizer.weight_decay 0.0005"


def test_methods_are_told_apart_only_where_they_meet(trained):
    folders = [
        trained("wels", {"name": "wels", "redraw": False, "share": 0.2}, [0.5]),
        trained("welsr", {"name": "wels", "redraw": True, "share": 0.2}, [0.5]),
        trained("lw", {"name": "lw", "rounds": 1}, [0.5]),
        trained("tuned", {"name": "lw", "rounds": 2}, [0.5], data={"name": "other"}),
    ]
    labels = [entry.method for entry in grouping.entries(read_all(folders))]
    assert labels == ["wels (redraw=false)", "wels (redraw=true)", "lw", "lw"]


def test_seeds_in_several_runs_count_once(trained):
    folders = [
        trained("both", "lw", [0.50, 0.60]),
        trained("again", "lw", [0.10, 0.20], train={"seed": 1}),
        trained("same", "lw", [0.9]),  # nothing new
        trained("base", "normal", [0.40], train={"seed": 2}),
        trained("more", "normal", [0.30], train={"seed": 1}),
    ]
    entries = grouping.entries(read_all(folders))
    assert [entry.seeds for entry in entries] == [(0, 1), (2,), (2,), (1,)]
    ((setting, scores),) = grouping.by_setting(entries, "last").items()
    assert scores == {"lw": {0: 0.5, 1: 0.6, 2: 0.2}, "normal": {2: 0.4, 1: 0.3}}
    # Seeds 1 and 2 are common.
    means = grouping.means({setting: scores}, ["normal", "lw"])
    assert means[setting] == pytest.approx([0.35, 0.4])
    assert grouping.methods_of(entries) == ["normal", "lw"]


def test_unfinished_runs_do_not_count(make_run):
    run = make_run(test=[([0.5, 0.5], None)], epochs=6)
    (entry,) = grouping.entries(read_all(run))
    assert entry.scores("last") == {}
    assert grouping.available([entry]) == []


def test_not_finite_scores_do_not_count(trained):
    run = trained("run", "lw", [0.5, 0.6, 0.7])
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace("[0.5, 0.6, 0.7]", "[0.5, null, 0.7]"))
    (entry,) = grouping.entries(read_all(run))
    assert entry.scores("last") == {0: 0.5, 2: 0.7}


def test_scatter(grid):
    found = scatter.section(grid)
    rows = [row for row in csv_rows(found) if row["method of y"] == "lw"]
    assert [float(row["x: accuracy %"]) for row in rows] == pytest.approx(
        [100 * (0.31 + index / 20) for index in range(6)]
    )
    gains = [2 + index for index in range(6)]
    assert [float(row["y: accuracy %"]) - float(row["x: accuracy %"]) for row in rows] == (
        pytest.approx(gains)
    )
    assert found.tables[0].rows[0] == [
        "lw over normal",
        "last",
        "6",
        "6",
        "+4.50",
        "+2.00",
        "+7.00",
    ]
    figure = drawn(found)
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("normal (%)", "lw (%)")
    assert axes.get_xlim() == axes.get_ylim()
    diagonal, *points = axes.get_lines()
    assert diagonal.get_slope() == 1
    assert [line.get_markerfacecolor() == "white" for line in points] == [True] * 3 + [False] * 3
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0] == "scnn on data0"
    assert labels[-2:] == ["with augmentation", "without"]


def test_scatter_of_best_weights_too(trained):
    folders = [
        trained(f"{method}{name}", method, [score], data={"name": name}, validation=True, epochs=3)
        for method, score in (("normal", 0.5), ("lw", 0.6))
        for name in ("x", "y")
    ]
    rows = csv_rows(scatter.section(grouping.entries(read_all(folders))))
    assert [(row["weights"], float(row["y: accuracy %"])) for row in rows] == [
        ("last", 60),
        ("last", 60),
        ("best", pytest.approx(61)),
        ("best", pytest.approx(61)),
    ]


def test_decision_tree(trained):
    folders = []
    for index in range(28):
        model, fine = ("scnn", "vgg16")[index % 2], index >= 14
        sections = {
            "data": {"name": "cifar100" if fine else "cifar10", "validation_seed": index},
            "model": {"name": model, "initialiser": "xavier"},
        }
        gain = 0.1 if fine else -0.1
        folders.append(trained(f"n{index}", "normal", [0.5], **sections))
        folders.append(trained(f"l{index}", "lw", [0.5 + gain], **sections))
    rare = trained("rare", "fc", [0.9], data={"name": "cifar10", "validation_seed": 0})
    entries = grouping.entries(read_all([*folders, rare]))
    found = tree.section(entries)
    assert isinstance(found, Section)
    lines = found.text.splitlines()
    assert lines == [
        "classes <= 55?  (normal 14, lw 14)",
        "  yes: normal  (Gini 0.00; normal 14)",
        "  no:  lw  (Gini 0.00; lw 14)",
    ]
    assert found.warnings == ["Left out, as trained in too few settings: fc."]
    first = csv_rows(found)[0]
    assert (first["training images"], first["classes"], first["model"]) == ("320", "10", "scnn")
    assert (first["dropout"], first["augmentation"], first["initializer"]) == (
        "0.0",
        "False",
        "xavier",
    )
    assert (first["best"], first["normal %"], first["lw %"]) == ("normal", "50", "40")
    texts = [text.get_text() for text in drawn(found).axes[0].texts]
    assert "classes <= 55?\nn = 28" in texts
    assert "normal\nGini 0.00, n = 14" in texts
    few = tree.section(entries[:26])
    assert isinstance(few, Missing)
    assert "at least 14 settings" in few.reason
    assert few.reason.endswith("here are 13")


def test_classes_of_other_data_come_from_a_checkpoint(trained):
    run = trained("run", "lw", [0.5], data={"name": "mine"})
    assert tree.classes_in_checkpoint(read_all(run)[0]) is None
    folder = run / "checkpoints" / "10" / "metadata"
    folder.mkdir(parents=True)
    leaves = {"weights/params/fc/kernel": {"shape": [1, 32, 17]}}
    (folder / "metadata").write_text(json.dumps({"leaves": leaves}))
    (found,) = read_all(run)
    assert tree.design(found, grouping.setting_of(found))["classes"] == 17


def test_budget(trained):
    folders = [
        trained("lw2", "lw", [0.50, 0.52], generations=3, epochs=2),
        trained("lw4", "lw", [0.60, 0.64], generations=3, epochs=4),
        trained("bl6", "normal", [0.40, 0.44], epochs=6),
        trained("bl12", "normal", [0.45], epochs=12),
        trained("other", "lw", [0.9], generations=3, epochs=4, data={"name": "digits"}),
    ]
    found = budget.section(grouping.entries(read_all(folders)))
    rows = [
        (row["method"], row["steps per round"], row["steps in all"], row["mean"], row["std"])
        for row in csv_rows(found)
    ]
    # 10 steps an epoch; the baseline's 60 and 120 are a third each beside three rounds.
    assert sorted(rows) == [
        ("lw", "20", "60", "51.00", "1.41"),
        ("lw", "40", "120", "62.00", "2.83"),
        ("normal", "20", "60", "42.00", "2.83"),
        ("normal", "40", "120", "45.00", ""),
    ]
    (axes,) = drawn(found).axes
    lines = {
        line.get_color(): line.get_xydata().tolist()
        for line in axes.get_lines()
        if line.get_linestyle() == "-"
    }
    assert [[20, 51], [40, 62]] in [np.round(line, 9).tolist() for line in lines.values()]
    one = budget.section(grouping.entries(read_all([folders[0], folders[2], folders[4]])))
    assert isinstance(one, Missing)


def test_training_speed(make_run):
    run = make_run(test=[([0.5, 0.5], None)] * 3, train={"generations": 4}, epochs=14)
    short = make_run("short", epochs=4)
    found = speed.section(read_all([run, short]))
    rows = csv_rows(found)
    assert {row["run"] for row in rows} == {"seal"}
    # Of generations 0 to 3 the middle is 1; the last has two epochs so far.
    assert [row["papers_gen"] for row in rows] == ["1"] * 4 + ["2"] * 4 + ["4"] * 2
    assert [float(row["mean %"]) for row in rows[4:8]] == pytest.approx(
        [100 * epoch / (epoch + 2) for epoch in range(4, 8)], rel=1e-5
    )
    # Goal: 0.9 of 3/5, the best of the first; later generations start over it.
    assert [row[-2:] for row in found.tables[0].rows] == [
        ["4", "54.00"],
        ["1", "54.00"],
        ["1", "54.00"],
    ]
    lines = drawn(found).axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["Gen=1", "Gen=2", "Gen=4"]
    assert isinstance(speed.section(read_all([short])), Missing)


def test_size_of_weights(trained):
    folders = [
        trained("bl", "normal", [0.5] * 3),
        trained("lw", "lw", [0.5] * 3),
        trained("else", "lw", [0.5] * 3, data={"name": "digits"}),  # no baseline beside it
    ]
    entries = grouping.entries(read_all(folders))

    def rows(*sizes):
        return [
            {"weights": "last", "seed": seed, "size_of_weights": value}
            for seed, value in enumerate(sizes)
        ]

    margins = {"bl": rows(10, 20, 40), "lw": rows(9, 22, 44), "else": rows(1, 2, 3)}
    found = size.section(entries, margins)
    assert isinstance(found, Section)
    # Ratios 0.9, 1.1 and 1.1: mean 31/30, squares (4/30)^2 + 2 (2/30)^2 over 2.
    mean, std = 31 / 30, math.sqrt((16 + 8) / 900 / 2)
    assert found.tables[0].rows == [
        ["lw", "last", "3", f"{mean:.3f}", f"{std:.3f}", "0.900", "1.100"]
    ]
    assert [float(row["ratio"]) for row in csv_rows(found)] == pytest.approx([0.9, 1.1, 1.1])
    (axes,) = drawn(found).axes
    (curve,) = [line for line in axes.get_lines() if len(line.get_xdata()) > 100]
    x, density = curve.get_data()
    np.testing.assert_allclose(density, stats.norm(mean, std).pdf(x), rtol=1e-9)
    for too_little in ({"lw": rows(1, 2, 3)}, {"bl": rows(1), "lw": rows(1)}, {}):
        assert isinstance(size.section(entries, too_little), Missing)


def test_surface_over_the_settings_that_differ(make_run):
    """Of three settings two are drawn, with the best of the third by validation; names are left apart."""
    folders = []
    for rate in (0.1, 0.2):
        for scale in (0.01, 0.02, 0.03):
            for decay in (0.0, 0.5):
                # The higher decay tests better, and validates worse.
                test = [([0.5] * 2, [0.5] * 2), ([rate + scale + 0.1 * decay] * 2, [0.5] * 2)]
                folders.append(
                    make_run(
                        f"{rate}-{scale}-{decay}",
                        test=test,
                        validation=[[0.3] * 2] * 2,
                        method={"ascent_scale": scale},
                        optimizer={"learning_rate": rate, "weight_decay": decay},
                    )
                )
                path = folders[-1] / "metrics.jsonl"
                *rows, last = map(json.loads, path.read_text().splitlines())
                last["validation/accuracy"] = [0.9 - decay] * 2
                path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, last]))
    plain = make_run("plain", test=[([0.5] * 2, [0.5] * 2)] * 2, method={"name": "normal"})
    runs = read_all([*folders, plain])
    (group,) = surface.surfaces(runs)
    assert group.fields[0] == "method.ascent_scale"
    assert {*group.fields} == {
        "method.ascent_scale",
        "optimizer.learning_rate",
        "optimizer.weight_decay",
    }
    section = surface.section(runs).drawn()
    (table,) = section.tables
    assert len(table.rows) == 12
    assert {row[group.fields.index("optimizer.weight_decay") + 1] for row in table.rows[:6]} == {
        "0"
    }
    figure = Figure()
    section.draw(figure)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(texts) == sorted(
        f"{100 * (rate + scale):.2f}\nto {100 * (rate + scale):.2f}"
        for rate in (0.1, 0.2)
        for scale in (0.01, 0.02, 0.03)
    )
    # One setting is a line; two runs are too few.
    line = [run for run in runs if run.name.startswith("0.1-") and run.name.endswith("-0.0")]
    assert len(line) == 3
    surface.section(line).drawn()
    assert isinstance(surface.section(line[:2]), Missing)
