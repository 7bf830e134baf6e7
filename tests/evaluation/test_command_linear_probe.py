"""``evaluate --kind=linear_probe`` on a tiny run: against the library, refused, shown."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from seal_jax import UsageError, data, papers
from seal_jax.cli import main
from seal_jax.evaluation import linear_probe as library
from seal_jax.evaluators import linear_probe, transfer_data

SMALL = {"datasets": ("digits",), "learning_rates": (0.1, 0.01), "epochs": 2}


@pytest.fixture(scope="module")
def digits(loaded_run):
    return data.load("digits", data_dir=loaded_run.settings.data.data_dir, validation_fraction=0.0)


def test_accuracies_are_those_of_the_library(run, loaded_run, digits, evaluated):
    """From features of a residual block, computed here; two networks."""
    options = {**SMALL, "features": "layer2/block0", "epochs": 20}
    rows, output = evaluated("linear_probe", run, weights=("last",), **options)
    outputs = jax.jit(loaded_run.model.features)
    assert len(digits.train) == 1437  # nothing is held out of it
    for row, network in zip(rows, loaded_run.networks[:2], strict=True):

        def features(split, network=network):
            images = loaded_run.normalise(split.images)
            return outputs(network.variables, images)["layer2/block0"].mean((1, 2))

        found = library.fit(
            (np.asarray(features(digits.train)), digits.train.labels),
            (np.asarray(features(digits.test)), digits.test.labels),
            10,
            library.Protocol((0.1, 0.01), epochs=20),
        )
        # Features differ in their last digits, and with them the least certain image or two.
        np.testing.assert_allclose(row["accuracies"], found.accuracies, atol=2.1 / 360)
        assert row["accuracy"] == max(row["accuracies"])
        assert row["learning_rate"] == (0.1, 0.01)[int(np.argmax(row["accuracies"]))]
        assert (row["train_images"], row["test_images"], row["classes"]) == (1437, 360, 10)
        assert row["seed"] == network.seed
    assert rows[0]["accuracy"] > 0.2
    written = json.loads((output / "results.json").read_text())
    assert written["rows"] == json.loads(json.dumps(rows))
    assert (output / "linear_probe.png").stat().st_size > 5_000


def test_a_folder_without_a_test_split(run, digits_dir, tmp_path, capfd):
    """A fifth of each class is held out, the same for every network; the rest is trained on."""
    random = np.random.default_rng(0)
    for label, count in (("cat", 10), ("dog", 15)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(256, size=(8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.png")
    name = "image_folder/probed"
    data.prepare(name, data_dir=digits_dir, manual_dir=tmp_path / "images")
    arguments = ["evaluate", "--kind=linear_probe", f"--checkpoint={run}", "--epochs=1"]
    arguments += [f"--datasets={name}", "--weights=last", f"--output={tmp_path / 'probe'}"]
    assert main.run(arguments) == main.OK, capfd.readouterr().err
    printed = " ".join(capfd.readouterr().out.split())
    assert f"stratified by class: {name} (5 of 25)." in printed
    rows = json.loads((tmp_path / "probe" / "results.json").read_text())["rows"]
    assert [(row["train_images"], row["test_images"]) for row in rows] == [(20, 5)] * 2

    first, second = (
        data.load(name, data_dir=digits_dir, test_fraction=0.2, validation_fraction=fraction)
        for fraction in (0.0, 0.3)
    )
    assert np.bincount(first.test.labels).tolist() == [2, 3]
    np.testing.assert_array_equal(first.test.images, second.test.images)
    images = {image.tobytes() for split in (first.train, first.test) for image in split.images}
    assert len(images) == 25
    assert main.run([*arguments, "--test-fraction=1"]) == main.USAGE
    assert "--test-fraction = 1 must be between 0 and 1" in capfd.readouterr().err


def test_augmented_images(digits):
    """Each is its image, moved by at most the padding and perhaps mirrored; every epoch is new."""
    options = linear_probe.Options(
        augmentation="crop_flip", crop_padding=1, feature_batch_size=20, seed=3
    )
    augmentation = linear_probe._augmentation(options, (8, 8, 1))
    split = digits.train.rows(np.arange(50))

    def epoch(number):
        return linear_probe._augmented(split, augmentation, options, number)

    first = epoch(0)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, epoch(0))
    assert not np.array_equal(first, epoch(1))
    seen = set()
    for image, found in zip(split.images, first, strict=True):
        padded = np.pad(image, [(1, 1), (1, 1), (0, 0)])
        windows = {
            (row, column, flip): padded[row : row + 8, column : column + 8][:, ::flip]
            for row in range(3)
            for column in range(3)
            for flip in (1, -1)
        }
        places = [place for place, window in windows.items() if np.array_equal(window, found)]
        assert places
        seen.add(places[0])
    assert len(seen) > 10
    # Beyond the first batch too.
    assert not np.array_equal(first[40:], split.images[40:])


def test_augmentation_trains_on_other_images_in_every_epoch(loaded_run, digits, monkeypatch):
    """The features that the classifier learns from are those of the augmented images."""
    options = linear_probe.Options(**{**SMALL, "augmentation": "flip"})
    (unit, *_) = linear_probe.work_items(loaded_run, options)
    network = loaded_run.networks[0]
    learnt = []
    fit = library.fit

    def watched(train, test, *rest, **options):
        epoch_features, labels = train

        def watch(epoch):
            learnt.append(epoch_features(epoch))
            return learnt[-1]

        return fit((watch, labels), test, *rest, **options)

    monkeypatch.setattr(library, "fit", watched)
    row = unit.run()
    assert unit.key == f"{network.key}/digits"
    assert row["accuracy"] > 0.2
    augmentation = linear_probe._augmentation(options, (8, 8, 1))
    for epoch, found in enumerate(learnt):
        images = linear_probe._augmented(digits.train, augmentation, options, epoch)
        either = images[:9], digits.train.images[:9]
        assert not np.array_equal(*either)
        expected = loaded_run.features(network, images[:9])
        np.testing.assert_allclose(found[:9], expected, rtol=1e-4, atol=1e-5)
    assert len(learnt) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"features": "layer9/block0"}, "--features=layer9/block0 must be one of features, layer1"),
        ({"image_size": 2}, "too small for resnet8"),
        ({"normalisation": "cifar10"}, "--normalisation=cifar10 has 3 channels"),
        ({"augmentation": "crop_flip", "crop_padding": 8}, "--crop-padding=8 must be smaller"),
        ({"datasets": ("digitz",)}, "'digitz' is not a data set"),
    ],
)
def test_input_that_cannot_be_used_is_refused_at_once(loaded_run, options, says):
    with pytest.raises(UsageError, match=says) as caught:
        linear_probe.work_items(loaded_run, linear_probe.Options(**{**SMALL, **options}))
    assert "\n" not in str(caught.value)


def test_a_broken_network_is_refused(loaded_run):
    network = loaded_run.networks[0]
    images = loaded_run.dataset.test.images[:3]

    def infinite(variables, images):
        return images.mean((1, 2)) + jnp.inf

    with pytest.raises(UsageError, match=f"{network.key}: features hold NaN or infinity"):
        transfer_data.features(loaded_run, network, images, infinite, 8)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--learning-rates=0.1,0"], "learning_rates = 0 must be positive"),
        (["--learning-rates=0.1,0.1"], "--learning-rates names 0.1 twice"),
        (["--epochs=0"], "epochs = 0 must be"),
        (["--augmentation=rotate"], "--augmentation=rotate must be one of none, flip, crop_flip"),
    ],
)
def test_command_line(run, capsys, arguments, says):
    code = main.run(["evaluate", "--kind=linear_probe", f"--checkpoint={run}", *arguments])
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
        "dataset": "oxford_flowers102",
        "accuracy": 0.5,
        "learning_rate": 0.1,
        "learning_rates": [0.1, 0.01],
        "accuracies": [0.5, 0.3],
        **fields,
    }


def test_the_table_has_the_papers_numbers_beside_ours():
    rows = [
        _row(),
        _row(seed=1, accuracy=0.6, accuracies=[0.4, 0.6], learning_rate=0.01),
        _row(run="small", model="resnet18", method="llf", dataset="stanford_dogs"),
        _row(run="plain", method="normal", generation=0, dataset="mit_indoor67"),
        _row(run="long", method="normal", dataset="fgvc_aircraft"),
        _row(run="other", method="sam", dataset="caltech_birds2011"),
    ]
    table = linear_probe.table(rows)
    lines = {line[0]: dict(zip(table.header, line, strict=True)) for line in table.rows}
    assert lines["seal"]["best"] == "50.00 to 60.00"
    assert lines["seal"]["best rate"] == "0.1, 0.01"
    assert lines["seal"]["rate 0.01"] == "30.00 to 60.00"
    # Table 1: Flower, MIT and Aircraft; Table 12: Dogs.
    shown = {run: line["paper"] for run, line in lines.items()}
    assert shown == {
        "seal": "45.68",
        "small": "11.64",
        "plain": "25.67",
        "long": "6.30",
        "other": "-",
    }
    assert "paper" not in linear_probe.table([_row(dataset="digits")]).header


def test_the_papers_text_agrees_with_its_tables():
    """SEAL surpasses LLF and both normal trainings on all target data sets (section 4.2)."""
    rows = papers.load("SEAL", "Tables 1, 12").rows
    for model in ("resnet50", "resnet18"):
        assert len([keys for keys in rows if keys[0] == model]) == 4
        for column, best in rows[model, "SEAL"].items():
            others = [rows[model, name][column] for name in ("Normal", "Normal (long)", "LLF")]
            assert all(number.mean < best.mean for number in others)


def test_the_plot_has_a_bar_for_every_run_and_data_set():
    rows = [
        _row(run=run, dataset=name, weights=weights, seed=seed)
        for run in ("a", "b")
        for name in ("oxford_flowers102", "digits")
        for weights in ("last", "best")
        for seed in (0, 1)
    ]
    figure = Figure(figsize=linear_probe.size(rows))
    linear_probe.draw(figure, [*rows, _row(run="a", step=3, dataset="digits", accuracy=1.0)])
    figure.savefig(io.BytesIO(), format="png")
    assert len(figure.axes) == 2
    for axes in figure.axes:
        bars = [patch for patch in axes.patches if patch.get_height() > 0]
        assert [bar.get_height() for bar in bars] == [50.0] * 4
    ticks = [tick.get_text() for tick in figure.axes[1].get_xticklabels()]
    assert ticks == ["Flower", "digits"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["a", "b", "SEAL paper, the same method"]


def test_options_are_the_papers():
    chosen = linear_probe.Options()
    protocol = chosen.protocol()
    assert dataclasses.astuple(protocol) == ((0.1, 0.01, 0.001), 120, 128, 0.9, 1e-4)
    assert [transfer_data.paper_name(name) for name in chosen.datasets] == list(
        papers.load("SEAL", "Tables 1, 12").columns
    )
