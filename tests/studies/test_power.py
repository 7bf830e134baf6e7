"""Studies: their variants, the statistics against scipy and by simulation, and their page from kept numbers."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from seal_jax.cli import configs, main
from seal_jax.errors import UsageError
from seal_jax.training import experiment, loop, metrics
from studies import analysis, command, figure, results, text
from studies.design import ACCURACY, OURS, Cell, Claim, Measure, Study, System

CONFIGS = sorted(
    path for path in Path("configs/studies").glob("*.py") if "STUDY" in path.read_text()
)

STUDY = Study(
    title="Tiny study",
    question="Is it?",
    points=16,
    finalists=3,
    seeds=10,
    fields={"train.generations": 1, "train.epochs_per_generation": 1, "data.draws": "per_seed"},
    sources={
        "plain": {
            "data.name": "digits",
            "model.name": "mlp",
            "train.generations": 1,
            "train.epochs_per_generation": 1,
        }
    },
    settings={
        "mlp": {"data.name": "digits", "model.name": "mlp"},
        "adapted": {
            "data.name": "digits",
            "model.name": "mlp",
            "train.pretrained": "../source-plain",
        },
    },
    conditions={"clean": {}, "noise": {"data.label_noise": 0.4}},
    some={"adapted": (("slow",), ("noise",))},
    names={
        "mlp": "MLP on digits",
        "adapted": "Digits to digits",
        "clean": "right labels",
        "noise": "40 % wrong",
    },
    systems={
        "slow": System("Slow", space={"optimizer.learning_rate": (1e-6, 1e-5)}),
        "quick": System("Quick", space={"optimizer.learning_rate": (1e-6, 0.2)}),
        "best": System("Best", space={"optimizer.learning_rate": (0.05, 1e30)}, weights="best"),
        "on": System("On", space={"optimizer.learning_rate": (1e-9, 1e-8)}, continues="quick"),
    },
    claims=(
        Claim("Quick beats slow", "no paper", "quick", "slow"),
        Claim("Quick is smaller", "no paper", "quick", "slow", "size", conditions=("noise",)),
        Claim("Slow begins better", "no paper", "slow", "quick", "first", conditions=("noise",)),
        Claim("Medians are larger", "no paper", "quick", "quick", "median", "worst", ("noise",)),
    ),
    measures={
        "size": Measure(
            "size of the weights", "size_of_weights", "margins", {"sample": 20}, lower=True
        ),
        "median": Measure("median margin", "median", "margins", {"sample": 20}),
        "worst": Measure("smallest margin", "smallest/0", "margins", {"sample": 20}),
        "mean": Measure("mean margin", "smallest/mean", "margins", {"sample": 20}),
        "first": Measure(
            "accuracy of the first epoch", "train/accuracy", where={"epoch": 0}, scale=100
        ),
    },
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_variant_loads_and_is_tuned_before_it_is_trained(path):
    study, variants = command.load(path), configs.variants(str(path))
    assert len(variants) == len({*variants})
    stages = 3 if study.finalists else 2
    assert len(variants) == stages * len(list(study.cells())) + len(study.sources)
    for variant in variants[:: max(len(variants) // 40, 1)]:
        settings = configs.load(f"{path}:{variant}")
        if source := settings.train.pretrained.removeprefix("../"):
            assert variants.index(source) < variants.index(variant)
        if variant.startswith("source-"):
            assert settings.train.seeds >= 10
            continue
        first = "screen-" if study.finalists else "tuning-"
        assert bool(settings.train.vary) == variant.startswith(first)
        if variant.startswith(first):
            continue
        source = settings.train.tuned_on.removeprefix("../")
        assert variants.index(source) < variants.index(variant)
        tuning = configs.load(f"{path}:{source}")
        # Nothing differs but what is tuned and the seeds.
        assert tuning.data == settings.data
        own, its = settings.train, tuning.train
        reported = range(own.seed, own.seed + own.seeds)
        assert own.seeds == (8 if variant.startswith("tuning-") else study.seeds)
        assert study.seeds >= 10
        assert not {*reported} & {*range(its.seed, its.seed + its.seeds)}
    for claim in study.claims:
        assert {claim.better, claim.worse} <= {*study.systems}
        assert {claim.measure, claim.worse_measure or claim.measure} <= {ACCURACY, *study.measures}
        # Its comparison is made somewhere.
        cells = {*study.cells()}
        assert any(
            {Cell(*where, condition) for where in zip([setting] * 2, claim[2:4], strict=True)}
            <= cells
            for setting in study.settings
            for condition in claim.conditions or study.conditions
        )


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"systems": {"a": System("A", continues="b"), "b": System("B")}},
            "a starts from b: declare that before it",
        ),
        ({"some": {"mlp": (("slow", "slwo"), ("noise",))}}, "slwo is no setting, system or cond"),
        (
            {"measures": {n: Measure(n, n, "margins", {"sample": n}) for n in (1, 2)}},
            "measures of margins differ in its options",
        ),
        ({"ranges": {"mlpp": {}}}, "mlpp is no setting, system or condition"),
        ({"ranges": {"mlp": {"optimizer.decay": (1, 2)}}}, "optimizer.decay, which no system is"),
    ],
)
def test_studies_that_cannot_be_trained_alike_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(STUDY, **fields)


def test_ranges_of_a_setting_replace_those_of_its_systems():
    study = dataclasses.replace(STUDY, ranges={"mlp": {"optimizer.learning_rate": (1.0, 4.0)}})
    for setting, low, high in (("mlp", 1.0, 4.0), ("adapted", 1e-6, 1e-5)):
        points = json.loads(study.config(f"screen-{setting}-slow-noise").train.vary)
        rates = [point["optimizer.learning_rate"] for point in points]
        assert len(rates) == study.points
        assert low <= min(rates) < 1.3 * low
        assert high / 1.3 < max(rates) <= high


def planted(differences):
    """Accuracies of two systems that differ by these amounts, in both conditions."""
    random = np.random.default_rng(0)
    base = 50 + 10 * random.normal(size=len(differences))
    return {
        Cell("mlp", system, condition): dict(enumerate(base + sign * scale * differences))
        for (condition, scale), (system, sign) in itertools.product(
            (("clean", 1.0), ("noise", -0.02)), (("quick", 0.5), ("slow", -0.5))
        )
    }


def test_comparisons_are_paired_t_tests_with_holm():
    differences = np.random.default_rng(1).normal(1.5, 1, 10)
    scores = planted(differences)
    clean, noise = analysis.compare(STUDY, {ACCURACY: scores})
    quick, slow = (
        np.array([*scores[Cell("mlp", system, "clean")].values()]) for system in ("quick", "slow")
    )
    test = stats.ttest_rel(quick, slow)
    low, high = test.confidence_interval(0.95)
    assert clean.effect == pytest.approx((low + high) / 2)
    assert clean.half == pytest.approx((high - low) / 2)
    # The same test in both conditions, but for the sign: Holm takes the smaller as often as the study has comparisons,
    # with those that are not trained yet, and the larger no less.
    family = len(STUDY.comparisons())
    assert family == 5
    assert clean.p_value == pytest.approx(family * test.pvalue)
    assert noise.p_value == pytest.approx(family * test.pvalue, rel=1e-6)
    assert (clean.verdict, noise.verdict) == ("shown", "contradicted")
    # What would have been seen is so in four of five draws of ten seeds with this spread, at the level of Holm's first.
    error = differences.std(ddof=1)
    draws = np.random.default_rng(2).normal(clean.detectable, error, (20_000, 10))
    seen = stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05 / family
    assert seen.mean() == pytest.approx(0.8, abs=0.01)


def test_a_verdict_lists_what_is_shown_and_the_ends_of_what_is_not():
    differences = np.random.default_rng(1).normal(0, 1, 10)
    compared = analysis.compare(STUDY, {ACCURACY: planted(differences + 2)})
    verdict = text._verdict(STUDY, compared)
    assert verdict.startswith("**shown** in 1 of 2: MLP on digits, right labels (+")
    assert "); **contradicted** in 1 of 2: MLP on digits, 40 % wrong (-" in verdict
    compared = analysis.compare(STUDY, {ACCURACY: planted(differences)})
    low, high = sorted(one.effect for one in compared)
    verdict = text._verdict(STUDY, compared)
    assert verdict.startswith(f"**not shown** in 2 of 2: {low:+.2f} ± ")
    assert f" to {high:+.2f} ± " in verdict
    rows = [
        results.Row(cell, seed, {"last": score}, "", STUDY.fingerprint(cell))
        for cell, of_seeds in planted(differences).items()
        for seed, score in of_seeds.items()
    ]
    asked = dataclasses.replace(STUDY, claims=[STUDY.claims[0]._replace(source=OURS)])
    for study, said in ((STUDY, True), (asked, False)):
        table = text.verdicts({"tiny": study}, {"tiny": rows})
        assert ("| Quick beats slow | **not shown** in 2 of 2" in table) == said
    claim = STUDY.claims[0]._replace(said_of=["clean"], elsewhere="another one")
    twice = dataclasses.replace(STUDY, claims=[claim])
    table = text._comparisons(
        twice, "mlp", analysis.compare(twice, {ACCURACY: planted(differences)})
    )
    assert "| Quick beats slow | no paper; another one | " in table


def test_the_picture_shows_every_difference_with_its_interval():
    differences = np.random.default_rng(1).normal(1.5, 1, 10)
    compared = analysis.compare(STUDY, {ACCURACY: planted(differences)})
    panels = figure.draw(STUDY, figure.drawable(STUDY, compared)).axes
    assert [panel.get_title() for panel in panels] == ["right labels", "40 % wrong"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["Quick beats slow"]
    for panel, one in zip(panels, compared, strict=True):
        ((point, _, (bar,)),) = panel.containers
        assert point.get_xdata() == pytest.approx([one.effect])
        ends = bar.get_segments()[0][:, 0]
        assert ends == pytest.approx([one.effect - one.half, one.effect + one.half])
        # Both verdicts are significant, one of them against the claim.
        assert point.get_markerfacecolor() == point.get_color()
    # To the right is as claimed: of what is better when it is less, less.
    (panel,) = figure.draw(STUDY, [compared[0]._replace(lower=True)]).axes
    assert panel.containers[0][0].get_xdata() == pytest.approx([-compared[0].effect])
    (open_one, _) = analysis.compare(STUDY, {ACCURACY: planted(differences - 1.5)})
    (panel,) = figure.draw(STUDY, [open_one]).axes
    assert panel.containers[0][0].get_markerfacecolor() == "white"


def test_a_training_that_diverged_counts_as_chance_and_no_difference_is_none():
    scores = planted(np.zeros(10))
    assert all(
        one.p_value == 1 and one.effect == 0 for one in analysis.compare(STUDY, {ACCURACY: scores})
    )
    # The same difference in every seed: all signs are equal, which is so in two of 2 ** 10 draws.
    equal = {cell: dict.fromkeys(of, 50.0) for cell, of in scores.items()}
    equal[Cell("mlp", "quick", "clean")] = dict.fromkeys(range(10), 51.0)
    clean, noise = analysis.compare(STUDY, {ACCURACY: equal})
    assert (clean.p_value, noise.p_value) == (5 * 2 / 2**10, 1)
    scores[Cell("mlp", "quick", "clean")] |= {0: float("nan")}
    clean, _ = analysis.compare(STUDY, {ACCURACY: scores})
    expected = (10 - scores[Cell("mlp", "slow", "clean")][0]) / 10  # of 10 % and of ten seeds
    assert clean.effect == pytest.approx(expected)
    assert "(1 diverged)" in text._accuracies(STUDY, "mlp", scores)


@pytest.mark.slow
def test_from_training_to_page(tmp_path, monkeypatch, capsys, shared_folder):
    config = tmp_path / "tiny.py"
    config.write_text(
        "from test_power import STUDY\nVARIANTS = STUDY.variants\nget_config = STUDY.config\n"
    )
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    (shared_folder / "digits").mkdir(exist_ok=True)
    sweep = [
        "sweep",
        f"--config={config}",
        f"--workdir={tmp_path / 'runs'}",
        "--only=source-*,*noise",
    ]
    assert main.run([*sweep, f"--config.data.data_dir={shared_folder / 'digits'}"]) == 0
    printed = capsys.readouterr().out
    # Those of a system that differ in numbers are trained together.
    assert "16 points of optimizer.learning_rate with 1 seed(s)" in printed
    assert "3 points of optimizer.learning_rate with 8 seed(s)" in printed
    monkeypatch.setattr(command, "NUMBERS", tmp_path / "results")
    monkeypatch.setattr(command, "CONFIGS", tmp_path)
    monkeypatch.setattr(command, "PAGE", tmp_path / "results.md")
    evaluate = ["evaluate", f"--config={config}", f"--workdir={tmp_path / 'runs'}"]
    assert command.run(evaluate) == 0
    collect = ["collect", f"--config={config}", f"--workdir={tmp_path / 'runs'}"]
    (tmp_path / "results").mkdir()
    older = results.Row(Cell("mlp", "slow", "clean"), 0, {"last": 50.0}, "", "of other settings")
    (tmp_path / "results/tiny.csv").write_text(results.as_csv(STUDY, [older]))
    assert command.run(collect) == 0
    printed = capsys.readouterr().out
    assert "left out: mlp-slow-clean, which was collected with other settings" in printed
    assert "50 trainings, 5 of 9 cells" in printed
    rows = results.read(tmp_path / "results/tiny.csv")
    chosen = {row.cell.system: row.chosen for row in rows if row.cell.setting == "mlp"}
    for system in ("slow", "quick"):
        screened, tuned = (
            {
                json.loads((point / "config.json").read_text())["optimizer"]["learning_rate"]: (
                    np.mean((last := metrics.read(point)[-1])["validation/accuracy"]),
                    -np.mean(last["validation/loss"]),
                )
                for point in (tmp_path / f"runs/{stage}-mlp-{system}-noise/points").iterdir()
            }
            for stage in ("screen", "tuning")
        )
        assert {*tuned} == {*sorted(screened, key=screened.get, reverse=True)[:3]}
        assert chosen[system] == f"learning_rate={max(tuned, key=tuned.get):g}"
    # At a rate of almost zero what started from another run still is that run, seed by seed.
    for run, source in (
        ("mlp-on-noise", "mlp-quick-noise"),
        ("adapted-slow-noise", "source-plain"),
    ):
        ends, begins = (
            metrics.read(tmp_path / f"runs/{of}")[-1]["test_last/accuracy"] for of in (run, source)
        )
        np.testing.assert_allclose(ends, begins, atol=0.01)
    for system, key in (("quick", "test_last/accuracy"), ("best", "test_best/accuracy")):
        last = metrics.read(tmp_path / f"runs/mlp-{system}-noise")[-1]
        scored = results.scores(STUDY, rows)[ACCURACY][Cell("mlp", system, "noise")]
        assert [*scored] == [*range(10)]
        np.testing.assert_allclose([*scored.values()], 100 * np.array(last[key]), rtol=1e-4)
    evaluated = json.loads(
        (tmp_path / "runs/mlp-quick-noise/evaluations/margins/results.json").read_text()
    )
    assert [row["seed"] for row in evaluated["rows"]] == [*range(10)]
    for measured, row in zip(
        [row for row in rows if row.cell.system == "quick"], evaluated["rows"], strict=True
    ):
        values = {key: measured.numbers[key] for key in ("size", "median", "worst", "mean")}
        its = {"size": row["size_of_weights"], "median": row["median"]}
        its |= {"worst": row["smallest"][0], "mean": np.mean(row["smallest"])}
        assert values == pytest.approx(its, rel=1e-4)
    page = "<!-- verdicts --><!-- end verdicts -->\n<!-- study tiny -->old<!-- end study tiny -->\n"
    (tmp_path / "results.md").write_text(page)
    assert command.run(["write"]) == 0
    written = (tmp_path / "results.md").read_text()
    assert "old" not in written
    assert (
        "| no paper | Quick beats slow | **shown** in 1 of 1: MLP on digits, 40 % wrong (+"
        in written
    )
    assert (
        "| no paper | Quick is smaller | **shown** in 1 of 1: MLP on digits, 40 % wrong (-"
        in written
    )
    assert "| no paper | Slow begins better | **contradicted** in 1 of 1" in written
    assert "| no paper | Medians are larger | **shown** in 1 of 1" in written
    assert "| smallest margin | -" in written
    # Written once more it is the same.
    assert command.page(written, *command._collected()) == written
    assert (tmp_path / "results/tiny.png").read_bytes().startswith(b"\x89PNG")
    # A run that has just begun is none yet, and numbers of other options or steps are not the study's.
    begun = tmp_path / "runs/mlp-slow-clean"
    shutil.copytree(
        tmp_path / "runs/mlp-slow-noise", begun, ignore=shutil.ignore_patterns("evaluations")
    )
    (begun / "metrics.jsonl").write_text("")
    assert command.run(evaluate) == command.run(collect) == 0
    assert not (begun / "evaluations").exists()
    path = tmp_path / "runs/mlp-quick-noise/evaluations/margins/results.json"
    for of, old, new in (
        ("other options", '"sample": 20', '"sample": 10'),
        ("an earlier step", '"step": ', '"step": 1'),
    ):
        text_before = path.read_text()
        assert old in text_before
        path.write_text(text_before.replace(old, new))
        assert command.run(collect) == main.USAGE
        assert f"is of {of} than the study asks for: remove" in capsys.readouterr().err
        path.write_text(text_before)
    assert command.run(collect) == 0
    # Runs of other settings are not the study's.
    config.write_text(
        config.read_text().replace(
            "= STUDY.config",
            """= lambda variant: STUDY.config(variant)
import dataclasses
STUDY = dataclasses.replace(STUDY, fields={**STUDY.fields, "train.batch_size": 16})""",
        )
    )
    assert command.run(collect) == main.USAGE
    assert "holds a run with other settings (train.batch_size: 32 -> 16)" in capsys.readouterr().err


def test_cells_of_other_machines_are_kept_while_their_settings_are_the_studys():
    slow, quick, begun = (Cell("mlp", key, "noise") for key in ("slow", "quick", "on"))

    def rows(cells, accuracy, of=STUDY):
        numbers = {"last": accuracy}
        return [
            results.Row(cell, seed, numbers, "", of.fingerprint(cell))
            for cell in cells
            for seed in (0, 1)
        ]

    kept = rows([slow, quick, begun], 50.0)
    merged = results.merge(STUDY, rows([quick], 60.0), kept)
    assert merged == [*rows([slow], 50.0), *rows([quick], 60.0), *rows([begun], 50.0)]
    assert [*results.scores(STUDY, merged)[ACCURACY]] == [slow, quick, begun]
    # Other settings of a system are those of what starts from its runs too, other places of the data nobody's.
    for fields, left in (
        ({"optimizer.momentum": 0.5}, [slow]),
        ({"data.data_dir": "elsewhere"}, [slow, quick, begun]),
    ):
        system = dataclasses.replace(STUDY.systems["quick"], fields=fields)
        changed = dataclasses.replace(STUDY, systems={**STUDY.systems, "quick": system})
        assert {row.cell for row in results.merge(changed, [], kept)} == {*left}
    with pytest.raises(UsageError, match="mlp-quick-noise is no cell of the study, or has other"):
        results.scores(dataclasses.replace(STUDY, points=15), kept[2:])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["collect", "--config=configs/digits.py", "--workdir=x"], "declares no STUDY"),
        (["collect", "--config=configs/studies/label_noise.py", "--workdir=x"], "no finished run"),
        (["writ"], "invalid choice"),
    ],
)
def test_wrong_input_is_one_line(arguments, says, capsys):
    assert command.run(arguments) == main.USAGE
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_the_page_is_what_the_kept_numbers_say():
    page = command.PAGE.read_text()
    assert command.page(page, *command._collected()) == page


@pytest.mark.slow
def test_a_kept_table_is_trained_again(tmp_path):
    """Plain training, scored by its best weights, on digits: the first seeds of a row of the first table."""
    path, seeds = Path("configs/studies/label_noise.py"), 5
    study, rows = command.load(path), results.read(command.NUMBERS / "label_noise.csv")
    for condition in study.conditions:
        cell = Cell("mlp_digits", "stopped", condition)
        kept = list(results.scores(study, rows)[ACCURACY][cell].values())[:seeds]
        (chosen,) = {row.chosen for row in rows if row.cell == cell}
        options = [f"--config.optimizer.{setting}" for setting in chosen.split()]
        options += ["--config.train.tuned_on=", f"--config.train.seeds={seeds}"]
        options += [f"--config.data.data_dir={tmp_path}"]
        settings = configs.load(f"{path}:{'-'.join(cell)}", options)
        loop.train(settings, tmp_path / condition, experiment.load(settings), devices=1)
        last = metrics.read(tmp_path / condition)[-1]
        again = 100 * np.array(last["test_best/accuracy"])
        # Another processor rounds otherwise; an image is 0.28 points.
        np.testing.assert_allclose(again, kept, atol=4)
        assert again.mean() == pytest.approx(np.mean(kept), abs=1.5)


def test_a_page_without_a_place_is_refused():
    with pytest.raises(UsageError, match="has no place for study tiny"):
        text.replaced("", "study tiny", "")
