"""``evaluate --kind=few_shot`` on a tiny run: against the library, resumed, refused, shown."""

import copy
import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from seal_jax import UsageError, data, models, papers
from seal_jax.cli import main
from seal_jax.evaluation import affines
from seal_jax.evaluation import few_shot as library
from seal_jax.evaluators import few_shot, transfer_data

SMALL = {
    "datasets": ("digits",),
    "shots": (1,),  # one batch of four an epoch
    "ways": 4,
    "queries": 4,
    "episodes": 11,
    "epochs": 3,
    "chunk": 6,
    "affines_chunk": 8,
}


@pytest.fixture(scope="module")
def pictures(loaded_run):
    return transfer_data.episode_data(loaded_run, "digits", 8)


def test_accuracies_are_those_of_the_library(run, loaded_run, evaluated, pictures):
    """Linear from features computed here, in other chunks; every network apart."""
    before = affines.tune._cache_size()
    rows, output = evaluated("few_shot", run, weights=("last",), **SMALL)
    assert len(rows) == 2 * 2  # seeds and heads
    assert affines.tune._cache_size() == before + 1  # for all networks and chunks
    protocol = few_shot.Options(**SMALL).protocol(1)
    outputs = jax.jit(loaded_run.model.features)
    for network in (net for net in loaded_run.networks if net.weights == "last"):
        images = loaded_run.normalise(pictures.images)
        features = np.asarray(outputs(network.variables, images)["features"])
        expected = library.linear(features, pictures.labels, protocol, episodes=11)
        own = [row for row in rows if (row["weights"], row["seed"]) == _name(network)]
        linear = next(row for row in own if row["head"] == "linear")
        np.testing.assert_allclose(linear["accuracies"], expected.accuracies, atol=1e-6)
        assert linear["accuracy"] == pytest.approx(expected.mean)
        assert linear["interval"] == pytest.approx(expected.interval)
        tuned = next(row for row in own if row["head"] == "linear_affines")
        assert tuned["episodes"] == 11
        assert tuned["accuracies"] != linear["accuracies"]
        assert tuned["diverged"] == 0
    written = json.loads((output / "results.json").read_text())
    assert written["rows"] == json.loads(json.dumps(rows))
    assert (output / "few_shot.png").stat().st_size > 10_000


def _name(network):
    return (network.weights, network.seed)


def test_a_killed_evaluation_goes_on(run, evaluated, tmp_path):
    options = {**SMALL, "heads": ("linear",)}
    whole, output = evaluated("few_shot", run, **options)
    ledger = output / "units.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 4 * 2  # four networks in two chunks each
    ledger.write_text("".join(lines[:4]) + lines[4][:30])
    again, _ = evaluated("few_shot", run, output=output, **options)
    assert again == whole
    assert len(ledger.read_text().splitlines()) == 1 + 4 * 2


def test_images_are_resized_then_cropped(loaded_run, pictures):
    """8 is int(1.15 * 8) = 9, then a crop: as the loader does it by hand, all splits in a row."""
    assert pictures.images.shape == (1797, 8, 8, 1)
    by_hand = data.load(
        "digits",
        data_dir=loaded_run.settings.data.data_dir,
        image_size=9,
        crop=8,
        validation_fraction=0.0,
    )
    # The order of the splits is the data set's own.
    parts = [by_hand.train.images, by_hand.test.images]
    assert any(
        np.array_equal(pictures.images, np.concatenate(order)) for order in (parts, parts[::-1])
    )
    labels = transfer_data.episode_data(loaded_run, "digits", 8, images=False).labels
    np.testing.assert_array_equal(labels, pictures.labels)


def test_other_statistics_are_those_of_the_whole_pipeline(loaded_run, pictures):
    """What normalises the run's images anew, and what normalises bytes, agree."""
    for name in ("", "fashion_mnist"):
        normalise, renormalise = transfer_data.normalisation(loaded_run, name)
        images = pictures.images[:5]
        direct = images / 255.0
        mean, std = (0.3053, 0.3762) if not name else (0.2859, 0.3530)
        np.testing.assert_allclose(normalise(images), (direct - mean) / std, atol=1e-5)
        anew = renormalise(loaded_run.normalise(images))
        np.testing.assert_allclose(anew, normalise(images), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ways": 11}, r"--datasets=digits: ways = 11 is more than the 10 classes"),
        ({"shots": (1, 180)}, r"--datasets=digits: shots \+ queries = 184 is more than the 17"),
        ({"datasets": ("fashion_mnist",)}, "fashion_mnist"),
        ({"normalisation": "imagenet"}, "--normalisation=imagenet has 3 channels"),
        ({"normalisation": "imgnet"}, "--normalisation=imgnet: .* is not one of .*imagenet"),
        ({"image_size": 3}, r"--image-size=3: image_shape=\(3, 3, 1\) is too small for resnet8"),
    ],
)
def test_input_that_cannot_be_used_is_refused_at_once(
    loaded_run, monkeypatch, tmp_path, options, says
):
    if "datasets" in options:
        settings = dataclasses.replace(loaded_run.settings.data, data_dir=str(tmp_path))
        settings = dataclasses.replace(loaded_run.settings, data=settings)
        monkeypatch.setattr(loaded_run, "settings", settings)
    chosen = few_shot.Options(**{**SMALL, **options})
    with pytest.raises(UsageError, match=says) as caught:
        few_shot.work_items(loaded_run, chosen)
    assert "\n" not in str(caught.value)


def test_a_network_without_batch_norm_has_no_affines(loaded_run):
    without = copy.copy(loaded_run)
    without.model = models.create("mlp", num_classes=10, image_shape=(8, 8, 1))
    variables = {**without.model.init(jax.random.key(0)), "normalisers": {}}
    without.networks = [dataclasses.replace(loaded_run.networks[0], variables=variables)]
    with pytest.raises(UsageError, match=r"mlp has no BatchNorm .* use --heads=linear"):
        few_shot.work_items(without, few_shot.Options(**SMALL))
    alone = few_shot.Options(**{**SMALL, "heads": ("linear",)})
    assert few_shot.work_items(without, alone)
    other_size = dataclasses.replace(alone, image_size=9)
    with pytest.raises(UsageError, match="mlp was made for images of 8x8x1 and cannot take 9x9x1"):
        few_shot.work_items(without, other_size)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shots=0"], "shots = 0 must be"),
        (["--heads=linear,afines"], "--heads=afines must be one of linear, linear_affines"),
        (["--episodes=0"], "--episodes=0 must be at least 1"),
        (["--datasets=digits,digits"], "--datasets names digits twice"),
    ],
)
def test_command_line(run, capsys, arguments, says):
    code = main.run(["evaluate", "--kind=few_shot", f"--checkpoint={run}", *arguments])
    assert code == main.USAGE
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def _row(**fields):
    return {
        "run": "seal",
        "data": "tiny_imagenet",
        "model": "resnet50",
        "method": "seal",
        "weights": "last",
        "seed": 0,
        "step": 10,
        "generation": 9,
        "dataset": "image_folder/eurosat",
        "head": "linear",
        "ways": 5,
        "shots": 5,
        "first": 0,
        "episodes": 4,
        "diverged": 0,
        "accuracy": 0.5,
        "interval": 0.01,
        **fields,
    }


def test_chunks_become_one_row():
    parts = [
        _row(accuracies=[0.1, 0.2], diverged=1),
        _row(accuracies=[0.6], first=2),
        _row(accuracies=[0.9], seed=1),
    ]
    first, second = few_shot.combine(parts)
    assert first["accuracies"] == [0.1, 0.2, 0.6]
    assert (first["episodes"], first["diverged"], second["seed"]) == (3, 1, 1)
    assert first["accuracy"] == pytest.approx(0.3)
    # 1.96 times the standard deviation, sqrt(0.14 / 3), over sqrt(3).
    assert first["interval"] == pytest.approx(1.96 * np.sqrt(0.14 / 3) / np.sqrt(3))


def test_the_table_has_the_papers_numbers_beside_ours():
    rows = [
        _row(),
        _row(seed=1, accuracy=0.6, diverged=2),
        _row(dataset="chestx", head="linear_affines", shots=50),
        _row(run="plain", method="normal", generation=0, shots=1, dataset="isic2018"),
        _row(run="long", method="normal", shots=20, dataset="image_folder/cropdisease"),
        _row(run="fast", method="fast", dataset="digits"),
    ]
    table = few_shot.table(rows)
    ours = table.header.index("EuroSAT")
    lines = {(line[0], line[3], line[5]): line[ours] for line in table.rows}
    assert lines["seal", "0", "5"] == "50.00 [49.00, 51.00]"
    assert lines["seal", "2 seeds", "5"] == "50.00 to 60.00"
    text = table.as_text()
    # Table 4: SEAL on EuroSAT, Normal on ISIC; Table 5: SEAL with affines on ChestX, Normal (long).
    for number in ("74.61 ± 0.65", "25.70 ± 0.47", "27.13 ± 0.45", "70.20 ± 1.01"):
        assert number in text
    assert "2 episodes diverged" in text
    assert "plain is resnet50 on Tiny-ImageNet in generation 1" in " ".join(text.split())
    assert few_shot.paper(_row(method="fast")) is None
    assert few_shot.paper(_row(ways=10)) is None
    assert few_shot.paper(_row(shots=3)) is None
    assert few_shot.paper(_row(dataset="eurosat")) == (74.61, 0.65)


def test_the_papers_tables_are_whole_and_agree_with_its_text():
    """Eight rows of four shots and four data sets; SEAL leads LLF everywhere, as the text says."""
    table = papers.load("SEAL", "Tables 4, 5")
    assert len({keys[:2] for keys in table.rows}) == 8
    assert [int(shots) for _, _, shots in table.rows] == 8 * [1, 5, 20, 50]
    for (head, method, shots), numbers in table.rows.items():
        assert len(numbers) == 4
        for column, (accuracy, interval) in numbers.items():
            assert 20 <= accuracy <= 98
            assert 0.15 < interval < 3
            if method == "LLF":
                assert table.get(head, "SEAL", shots, column=column).mean > accuracy


def test_the_plot_shows_every_run_and_head():
    rows = [
        _row(run=run, head=head, shots=shots, dataset=name, weights=weights, seed=seed)
        for run in ("a", "b")
        for head in few_shot.HEADS
        for shots in (1, 5)
        for name in ("image_folder/eurosat", "digits")
        for weights in ("last", "best")
        for seed in (0, 1)
    ]
    rows.append(_row(run="a", step=3, shots=99))  # an older step, not drawn
    figure = Figure(figsize=few_shot.size(rows))
    few_shot.draw(figure, rows)
    figure.savefig(io.BytesIO(), format="png")
    assert len(figure.axes) == 4
    assert [axes.get_title() for axes in figure.axes[:2]] == ["EuroSAT", "digits"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0] == "a, Linear"
    assert len(labels) == 5
    assert "paper" in labels[-1]
    assert [tick.get_text() for tick in figure.axes[2].get_xticklabels()] == ["1", "5"]
    for axes in figure.axes:  # every point is at its tick
        places = {tuple(line.get_xdata()) for line in axes.lines if line.get_marker() in ("o", "s")}
        assert places == {(0, 1)}
