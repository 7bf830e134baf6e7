"""The generations table against numbers worked out by hand."""

from __future__ import annotations

import csv
import math

import pytest
from scipy import stats

from seal_jax.core.tables import MEANING, spread
from seal_jax.errors import UsageError
from seal_jax.reports import compare
from seal_jax.reports.generations import stat

LONG = {"train": {"epochs_per_generation": 160}}


def test_mean_and_sample_std(seal):
    (column,) = compare([seal]).columns
    # 50 and 52: mean 51, deviations of 1, so sqrt(2 / (2 - 1)); 60 and 64; 61 and 67.
    assert column.last[0].mean == pytest.approx(51)
    assert column.last[0].std == pytest.approx(math.sqrt(2))
    assert column.last[1].mean == pytest.approx(62)
    assert column.last[1].std == pytest.approx(2 * math.sqrt(2))
    assert column.best[1].mean == pytest.approx(64)
    assert column.best[1].std == pytest.approx(3 * math.sqrt(2))


def test_validation_and_not_test_chooses(seal):
    # Best validation: means of 59 and 58; test is better in the other generation.
    comparison = compare([seal])
    assert comparison.columns[0].chosen == 0
    assert (
        "Best generation of seal, by validation: Gen=1, best 53.00 to 55.00."
        in comparison.as_text()
    )


def test_text(seal):
    lines = compare(seal).as_text().splitlines()
    assert lines[:8] == [
        "Test accuracy (%) by generation: resnet50 on tiny_imagenet",
        MEANING,
        "",
        "    │             seal (2 seeds)",
        "Gen │           last            best  paper",
        "────┼──────────────────────────────────────",
        "  1 │ 50.00 to 52.00  53.00 to 55.00  54.37",
        "  2 │ 60.00 to 64.00  61.00 to 67.00      -",
    ]


def test_plus_minus_is_half_the_interval_of_the_mean(make_run):
    run = make_run(test=[([0.5, 0.51, 0.54], None)], train={"seeds": 3, "generations": 1})
    low, high = stats.t.interval(0.95, 2, loc=155 / 3, scale=stats.sem([50, 51, 54]))
    lines = compare(run).as_text().splitlines()
    assert lines[1] == MEANING
    assert lines[6].split(" │ ")[1].split("  ")[0] == f"51.67 ± {(high - low) / 2:.2f}"
    assert "standard deviation" not in compare(run).as_text()


def test_one_seed_has_no_std(make_run):
    run = make_run(test=[([0.5], [0.25])], validation=[[0.5]], train={"seeds": 1, "generations": 1})
    text = compare([run]).as_text()
    assert "  1 │ 50.00  25.00  54.37" in text
    assert "(1 seed)" in text
    assert "±" not in text


def test_no_validation_split_has_no_best(make_run):
    comparison = compare([make_run(test=[([0.5, 0.5], None), ([0.25, 0.25], None)])])
    assert comparison.columns[0].best == {}
    assert comparison.columns[0].chosen is None
    text = comparison.as_text()
    assert "nothing chooses one, as it has no validation split; the last, Gen=2," in text
    assert "  2 │ 25.00 to 25.00      -" in text


def test_not_finished_is_marked(make_run):
    run = make_run(test=[([0.5, 0.5], [0.5, 0.5])], validation=[[0.5, 0.5]] * 2, epochs=6)
    text = compare([run]).as_text()
    assert "seal* (2 seeds)" in text
    assert "* seal is not finished: 6 of 8 epochs, 1 of 2 generations." in text
    assert "  2 │" not in text


def test_finished_is_not_marked(seal):
    assert "*" not in compare([seal]).as_text()


def test_no_generation_finished(make_run):
    text = compare([make_run(epochs=3)]).as_text()
    assert "No run has finished a generation yet." in text
    assert "3 of 8 epochs" in text


def test_missing_generations_of_a_shorter_run(seal, make_run):
    short = make_run("short", test=[([0.3, 0.3], None)], train={"generations": 1})
    comparison = compare([seal, short])
    assert comparison.generations == [0, 1]
    assert comparison.as_text().splitlines()[7].endswith("│              -      -")


def test_value_that_is_not_finite(make_run):
    text = compare([make_run(test=[([0.5, None], None)], train={"generations": 1})]).as_text()
    assert "not finite" in text
    assert "nan" not in text


def test_differences_between_runs_are_warnings(seal, make_run):
    other = make_run("other", test=[([0.5, 0.5], None)], data={"name": "digits"}, **LONG, epochs=1)
    warnings = compare([seal, other]).warnings
    assert "the runs differ in data.name (tiny_imagenet: seal; digits: other)" in warnings
    assert "the runs differ in train.epochs_per_generation (4: seal; 160: other)" in warnings
    assert len(warnings) == 2
    text = " ".join(compare([seal, other]).as_text().split())
    assert f"Warning: {warnings[0]}." in text
    assert not compare([seal]).warnings


def test_three_runs_with_paper_fit_100_columns(make_run):
    runs = [
        make_run(
            f"{name}_of_the_resnet50_on_tiny_imagenet",
            test=[([0.50, 0.62], [0.53, 0.65])] * 2,
            validation=[[0.5, 0.6]] * 2,
            method={"name": name},
            train={"seeds": 2, "generations": 3},
        )
        for name in ("normal", "llf", "seal")
    ]
    lines = compare(runs).as_text().splitlines()
    assert max(map(len, lines)) <= 100
    (first,) = [line for line in lines if line.startswith("  1 │")]  # side by side: one row
    assert first.count("54.37") == 3
    # A fourth run goes below.
    more = make_run("more", test=[([0.5, 0.6], None)] * 2)
    text = compare([*runs, more]).as_text()
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("\n  1 │") == 2


def test_many_generations_print_a_selection(make_run, tmp_path):
    validation = [[0.5, 0.5]] * 20
    validation[6] = [0.7, 0.7]
    run = make_run(
        test=[([0.5, 0.5], [0.5, 0.5])] * 20,
        validation=validation,
        train={"generations": 20},
    )
    comparison = compare([run])
    assert comparison.shown == [0, 2, 6, 9, 19]
    assert "5 of 20 generations" in comparison.as_text()
    comparison.to_csv(tmp_path / "all.csv")
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 21


def test_csv_comes_back(seal, make_run, tmp_path):
    single = make_run("single", test=[([0.5], None)], train={"seeds": 1}, data={"name": "digits"})
    path = tmp_path / "table.csv"
    compare([seal, single]).to_csv(path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["generation"], row["papers_gen"]) for row in rows] == [
        ("seal", "0", "1"),
        ("seal", "1", "2"),
        ("single", "0", "1"),
    ]
    assert float(rows[1]["last_mean"]) == pytest.approx(62, rel=1e-12)
    assert float(rows[1]["last_std"]) == pytest.approx(math.sqrt(8), rel=1e-12)
    assert float(rows[1]["best_std"]) == pytest.approx(math.sqrt(18), rel=1e-12)
    assert [row["chosen"] for row in rows] == ["True", "False", "False"]
    assert [row["paper"] for row in rows] == ["54.37", "", ""]
    assert rows[0]["paper_table"] == "Table 2"
    assert [row["finished"] for row in rows] == ["True", "True", "False"]
    assert rows[2]["last_std"] == rows[2]["best_mean"] == ""
    assert list(tmp_path.glob(".*")) == []


def test_csv_that_cannot_be_written(seal, tmp_path):
    with pytest.raises(UsageError, match=r"none/table.csv cannot be written: No such file"):
        compare([seal]).to_csv(tmp_path / "none" / "table.csv")


def test_stat_of_three():
    # 1, 2 and 6 %: mean 3, squares 4 + 1 + 9 over 2.
    found = stat([0.01, 0.02, 0.06])
    assert (found.mean, found.std) == (pytest.approx(3), pytest.approx(math.sqrt(7)))


@pytest.mark.parametrize(
    ("values", "digits", "text"),
    [
        ([98.6111, 98.6111, 98.6111], 2, "98.61 ± 0.00"),
        # As many digits as the interval has, and no zero with a sign.
        ([-1e-3, 2e-3, 0.0], 1, "0.000 ± 0.004"),
        ([-0.01, 0.0, 0.0], 1, "0.00 ± 0.01"),
        ([4e-5, 5e-5, 6e-5], None, "(5.0 ± 2.5)e-5"),
        ([-0.004], 1, "-0.00400"),
        ([-0.0], 1, "0.0"),
        ([1.0, 2.0], 1, "1.0 to 2.0"),
        ([2.0, 1.0], None, "1.00 to 2.00"),
        ([1234.5, 1300.0, 1250.0], None, "1262 ± 85"),
        ([1.0, float("nan"), 2.0], 2, "not finite"),
    ],
)
def test_text_of_mean_and_interval(values, digits, text):
    assert spread(values).text(digits) == text
