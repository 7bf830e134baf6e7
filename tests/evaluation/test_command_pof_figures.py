"""The evaluations of the PoF paper's figures on runs of an MLP, against NumPy on the same weights."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from softmax_oracle import derivatives, inputs_of, loss, losses_along, matrix_of

from seal_jax import UsageError, evaluators, weak_classifiers
from seal_jax.core import plots
from seal_jax.core import settings as settings_lib
from seal_jax.evaluation.gradients import mini_batches
from seal_jax.evaluators import batching, gradients, landscape, perturbations
from seal_jax.evaluators.loaded_run import LoadedRun
from seal_jax.hessian import krylov
from seal_jax.training import experiment, loop

SMOOTHING = 0.2  # of the run's loss, which is that of all evaluations unless they are told another


@pytest.fixture(scope="module")
def mlp(tmp_path_factory, digits_dir):
    """Two seeds of the default MLP with BatchNorm, trained for two epochs by SAM of radius 0.1."""
    folder = tmp_path_factory.mktemp("mlp") / "sam_run"
    settings = settings_lib.Settings(
        data=settings_lib.Data(name="digits", data_dir=str(digits_dir), validation_fraction=0.87),
        model=settings_lib.Model(name="mlp", norm="batch"),
        method={"name": "sam", "rho": 0.1},
        optimizer=settings_lib.Optimizer(learning_rate=0.1, label_smoothing=SMOOTHING),
        train=settings_lib.Train(
            generations=1, epochs_per_generation=2, seeds=2, batch_size=30, seed=5
        ),
    )
    loop.train(settings, folder, experiment.load_data(settings.data), devices=1)
    return folder


@pytest.fixture(scope="module")
def loaded_run(mlp):
    return LoadedRun(mlp, weights=("last",))


def head_of(loaded_run, index, split):
    """Features and labels of a split, and the classifier as a matrix."""
    network = loaded_run.networks[index]
    features = loaded_run.features(network, split.images)
    return features, split.labels, matrix_of(network.variables["params"]["fc"])


def drawn(rows, evaluator, runs=1):
    """Rows of several runs as a table and a plot."""
    rows = [
        {**row, "run": f"run{index}", "method": ("sam", "pof", "seal")[index]}
        for index in range(runs)
        for row in rows
    ]
    figure = Figure(figsize=evaluator.size(rows))
    evaluator.draw(figure, rows)
    table = evaluator.table(rows)
    assert {len(row) for row in table.rows} == {len(table.header)}
    return table, figure


def smoothed(logits, labels):
    targets = (1 - SMOOTHING) * jax.nn.one_hot(labels, 10) + SMOOTHING / 10
    return -(targets * jax.nn.log_softmax(logits)).sum(1).mean()


def minima(features, labels, matrix, batches):
    """Distances to the minimum against each mini-batch's gradient, by a dense scan up to 12."""
    grid, distances = np.linspace(0, 12, 2401), []
    for rows in batches:
        x, y = features[rows], labels[rows]
        slope = derivatives(x, y, matrix, SMOOTHING)[0].reshape(matrix.shape)
        unit = slope / np.linalg.norm(slope)
        along = losses_along(x, y, matrix, unit, grid, SMOOTHING)
        distances += [grid[np.argmin(along)]] if np.argmin(along) < 2400 else []
    return distances


def test_landscape_of_the_classifier_equals_numpy(loaded_run):
    """Eigenvalue, slices and loss increment by the dense Hessian and a dense scan."""
    options = landscape.Options(examples=90, batch_size=31, points=5, tolerance=1e-5)
    items = landscape.work_items(loaded_run, options)
    assert [item.key for item in items] == [
        f"step12/last/seed{seed}/{part}/1"
        for seed in (5, 6)
        for part in ("dense1", "dense2", "fc", "all")
    ]
    layers = landscape.work_items(loaded_run, landscape.Options(per="layers", eigenvectors=2))
    assert len(layers) == 2 * 4 * 2
    assert layers[0].key == "step12/last/seed5/dense1/linear/1"
    chosen = [item for item in items if item.key.split("/")[-2] in ("fc", "all")]
    rows = [chosen[0].run()]
    programs = krylov.applied._cache_size()
    rows += [item.run() for item in chosen[1:]]
    assert krylov.applied._cache_size() == programs  # one for all parts and seeds
    data = loaded_run.dataset
    train, test = (batching.subset(split, 90, 0) for split in (data.train, data.test))
    for index, seed in enumerate((5, 6)):
        by_part = {row["part"]: row for row in rows if row["seed"] == seed}
        row = by_part["fc"]
        features, labels, matrix = head_of(loaded_run, index, train)
        values, basis = np.linalg.eigh(derivatives(features, labels, matrix, SMOOTHING)[1])
        np.testing.assert_allclose(row["eigenvalue"], values[-1], rtol=1e-4)
        assert row["converged"]
        assert row["parameters"] == matrix.size == 330
        # A block's largest eigenvalue is at most that of the whole matrix.
        assert by_part["all"]["eigenvalue"] >= row["eigenvalue"]

        test_features, targets, _ = head_of(loaded_run, index, test)
        slope, whole = derivatives(test_features, targets, matrix, SMOOTHING)
        vector = basis[:, -1] * (-1 if slope @ basis[:, -1] > 0 else 1)  # the test loss falls
        np.testing.assert_allclose(row["test_curvature"], vector @ whole @ vector, rtol=1e-3)
        unit = vector.reshape(matrix.shape)
        for name, x, y in (("train", features, labels), ("test", test_features, targets)):
            expected = [loss(x, y, matrix + t * unit, SMOOTHING) for t in row["distances"]]
            np.testing.assert_allclose(row[f"{name}_slice"], expected, rtol=2e-4)
            np.testing.assert_allclose(
                row[f"{name}_loss"], loss(x, y, matrix, SMOOTHING), rtol=1e-5
            )
        grid = np.linspace(0, 4 * row["shift"], 401)
        losses = [loss(test_features, targets, matrix + t * unit, SMOOTHING) for t in grid]
        assert grid[np.argmin(losses)] == pytest.approx(row["shift"], rel=0.02)
        gained = losses[0] - min(losses)
        assert row["increment"] == pytest.approx(gained, rel=0.01, abs=2e-6)
    table, figure = drawn(rows, landscape.EVALUATOR, runs=2)
    assert len(table.rows) == 4
    assert len(figure.axes) == 3


def test_landscape_of_splits_that_different_numbers_of_devices_divide(loaded_run):
    sizes = [len(getattr(loaded_run.dataset, name)) for name in ("train", "test")]
    assert math.gcd(8, sizes[0]) != math.gcd(8, sizes[1])
    options = landscape.Options(examples=0, batch_size=max(sizes), points=3, max_products=2)
    item = next(i for i in landscape.work_items(loaded_run, options) if "/fc/" in i.key)
    assert item.run()["examples"] == sizes[0]


def test_gradients_equal_numpy(mlp, loaded_run, evaluated):
    options = {"batches": 13, "batch_size": 26, "weak_batch_size": 15, "eigenvectors": 5}
    options["examples"] = 150  # of both splits: one set of programs
    rows, _ = evaluated("gradients", mlp, weights=("last",), tolerance=1e-5, **options)
    assert [(row["seed"], row["split"]) for row in rows] == [
        (seed, split) for seed in (5, 6) for split in ("train", "test")
    ]
    for row in rows:
        split = batching.subset(getattr(loaded_run.dataset, row["split"]), 150, 0)
        features, labels, matrix = head_of(loaded_run, row["seed"] - 5, split)
        whole = derivatives(features, labels, matrix, SMOOTHING)[1]
        values, basis = np.linalg.eigh(whole)
        np.testing.assert_allclose(row["eigenvalues"], values[::-1][:5], rtol=1e-4)
        best = []
        for b, chosen in enumerate(mini_batches(len(split), 26, 13)):
            gradient, batch_hessian = derivatives(
                features[chosen], labels[chosen], matrix, SMOOTHING
            )
            unit = gradient / np.linalg.norm(gradient)
            np.testing.assert_allclose(row["norms"][b], np.linalg.norm(gradient), rtol=1e-3)
            np.testing.assert_allclose(row["curvatures"][b], unit @ whole @ unit, rtol=1e-3)
            np.testing.assert_allclose(
                row["own_curvatures"][b], unit @ batch_hessian @ unit, rtol=1e-3
            )
            best.append(np.argmax(np.abs(unit @ basis[:, ::-1][:, :5])))
        assert row["counts"] == np.bincount(best, minlength=5).tolist()
        assert row["principal"] == row["counts"][0] / 13
        assert len(row["distances"]) == round(13 * (1 - row["rejected"]))
        expected = minima(features, labels, matrix, mini_batches(len(split), 15, 13))
        np.testing.assert_allclose(row["distances"], expected, atol=6e-3)
        assert row["curvature"] == pytest.approx(np.median(row["curvatures"]))
        assert max(row["curvatures"]) <= row["eigenvalue"] * 1.001
    table, figure = drawn(rows, gradients.EVALUATOR, runs=2)
    assert [cells[-1] for cells in table.rows] == ["-", "2"] * 2
    assert len(figure.axes) == 4


def test_perturbations_equal_single_steps(mlp, loaded_run, evaluated, monkeypatch):
    """In two work items, of four batches and of two; SAM's radius is the run's own."""
    monkeypatch.setattr(perturbations, "CHUNK", 4)
    options = {"batches": 6, "batch_size": 26, "weak_batch_size": 15, "learning_rate": 0.5}
    rows, _ = evaluated("perturbations", mlp, weights=("last",), gamma=1.5, **options)
    assert [(row["seed"], row["measure"], row["setting"]) for row in rows] == [
        (seed, *measure)
        for seed in (5, 6)
        for measure in (("sgd", 0.5), ("sam", 0.1), ("pof", 1.5))
    ]
    assert {row["batches"] for row in rows} == {6}
    model, train = loaded_run.model, loaded_run.dataset.train
    network = loaded_run.networks[1]
    params, rest = network.variables["params"], network.variables["batch_stats"]

    @jax.jit
    @jax.grad
    def gradient(params, images, labels):
        images = loaded_run.normalise(images)
        logits = model.module.apply({"params": params, "batch_stats": rest}, images, train=False)
        return smoothed(logits, labels)

    def norm(tree):
        return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))

    sizes = {row["measure"]: row["sizes"] for row in rows if row["seed"] == 6}
    for b, chosen in enumerate(mini_batches(len(train), 26, 6)):
        slopes = gradient(params, train.images[chosen], train.labels[chosen])
        np.testing.assert_allclose(sizes["sgd"][b], 0.5 * norm(slopes["fc"]), rtol=1e-3)
        expected = 0.1 * norm(slopes["fc"]) / norm(slopes)
        np.testing.assert_allclose(sizes["sam"][b], expected, rtol=1e-3)
    head = head_of(loaded_run, 1, train)
    expected = [1.5 * xi for xi in minima(*head, mini_batches(len(train), 15, 6))]
    np.testing.assert_allclose(sizes["pof"], expected, atol=1.5 * 6e-3)

    one, figure = drawn(rows, perturbations.EVALUATOR)
    assert [cells[4] for cells in one.rows] == ["SGD", "SAM*", "PoF"]
    assert len(figure.axes[0].get_legend().get_texts()) == 3
    several, figure = drawn(rows, perturbations.EVALUATOR, runs=3)
    marks = [cells[4] for cells in several.rows if cells[4].endswith("*")]
    assert marks == ["SAM*", "PoF*", "SGD*"]
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["run0: SAM", "run1: PoF", "run2: SGD"]


def test_statistics_of_the_batch_make_another_network(mlp, loaded_run):
    """Features of a weak batch are those of the training pass, by the model's own extract."""
    options = {"batches": 4, "batch_size": 26, "weak_batch_size": 15}
    sizes = {}
    for mode in ("running", "batch"):
        chosen = perturbations.Options(batch_norm=mode, **options)
        items = perturbations.work_items(loaded_run, chosen)
        sizes[mode] = next(item for item in items if item.key.endswith("searches/0")).run()["pof"]
    assert sizes["running"] != sizes["batch"]
    model, train = loaded_run.model, loaded_run.dataset.train
    network = loaded_run.networks[0]
    head = network.variables["params"]["fc"]
    expected = []
    for rows in mini_batches(len(train), 15, 4):
        images = loaded_run.normalise(train.images[rows])
        features, _ = model.extract(network.variables, images, True)
        search = functools.partial(weak_classifiers.perturbation, loss=smoothed)
        one = search(head, features, train.labels[rows], model.classify)
        if bool(one.accepted):
            expected.append(2 * float(one.xi))
    np.testing.assert_allclose(sizes["batch"], expected, rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("landscape", {"eigenvectors": 331}, "--eigenvectors=331 is more than the 330 parameters"),
        ("gradients", {"batch_size": 1000}, "--batch-size=1000 is more than the 187 train images"),
        ("gradients", {"eigenvectors": 331}, "--eigenvectors=331 is more than the 330 parameters"),
        ("perturbations", {"weak_batch_size": 200}, "--weak-batch-size=200 is more than the 187"),
    ],
)
def test_what_does_not_fit_is_found_before_any_work(loaded_run, name, options, says):
    evaluator = evaluators.load(name)
    options = {"batch_size": 16, **options}
    with pytest.raises(UsageError, match=says) as caught:
        evaluator.work_items(loaded_run, evaluator.options(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("evaluator", "options", "says"),
    [
        (landscape, {"points": 2}, "--points=2 must be at least 3"),
        (landscape, {"label_smoothing": 1.0}, "--label-smoothing=1 must lie"),
        (landscape, {"tolerance": float("nan")}, "--tolerance=nan must be positive"),
        (landscape, {"tolerance": np.inf}, "--tolerance=inf must be positive and finite"),
        (gradients, {"weak_batch_size": 0}, "--weak-batch-size=0 must be at least 1"),
        (perturbations, {"rho": -0.1}, "--rho=-0.1 must be at least 0"),
        (perturbations, {"gamma": float("inf")}, "--gamma=inf must be at least 0"),
    ],
)
def test_options_out_of_range(evaluator, options, says):
    with pytest.raises(UsageError, match=says):
        evaluator.Options(**options)


def test_plots_say_what_they_show():
    """Titles name the measures shown, and the last bin says that it holds all above."""
    row = {"run": "a", "weights": "last", "step": 1, "index": 3, "measure": "sgd", "method": "seal"}
    figure = Figure()
    perturbations.EVALUATOR.draw(figure, [{**row, "run": run, "sizes": [0.1, 0.2]} for run in "ab"])
    assert figure.axes[0].get_title() == "SGD, last weights"
    assert figure.axes[0].patches[0].get_facecolor()[:3] == to_rgb(plots.COLOURS[3])

    curved = {**row, "counts": [3, 1], "distances": [1.0], "curvatures": [*np.ones(999), 50.0]}
    figure = Figure()
    gradients.EVALUATOR.draw(figure, [{**curved, "split": split} for split in ("train", "test")])
    for axes in figure.axes[2:]:
        assert axes.get_xlabel().endswith("(last bin: all from 0.975 up)")
        assert axes.get_xlim()[1] < 2


def test_options_of_the_method_stand_in(loaded_run):
    def option(method, *rest):
        other_run = type("Run", (), {"settings": dataclasses.replace(settings, method=method)})
        return batching.method_option(other_run, "pof", *rest)

    settings = loaded_run.settings
    assert option({"name": "pof", "gamma_high": 1.25}, "gamma_high", 9.0) == 1.25
    assert option({"name": "pof"}, "weak_batch_size", 9) == 32
    assert option({"name": "seal"}, "gamma_high", 9.0) == 9.0


def test_batches_are_the_runs_as_far_as_there_are_images(loaded_run):
    train = loaded_run.dataset.train
    few = batching.subset(train, 20, 0)
    options = gradients.Options()
    assert batching.batch_sizes(loaded_run, options, {"train": train}) == (30, 32)
    assert batching.batch_sizes(loaded_run, options, {"train": train, "test": few}) == (20, 20)
    asked = gradients.Options(batch_size=40, weak_batch_size=8)
    assert batching.batch_sizes(loaded_run, asked, {"train": train}) == (40, 8)
    assert batching.label_smoothing(loaded_run, options) == SMOOTHING
    assert batching.label_smoothing(loaded_run, gradients.Options(label_smoothing=0.0)) == 0


def test_weights_make_the_mean_over_padded_batches_that_over_all():
    values = np.random.default_rng(0).normal(size=11)
    rows, weights = batching.weighted_rows(11, 4)
    assert rows.shape == (3, 4)
    assert (weights * values[rows]).mean() == pytest.approx(values.mean())


def test_batches_are_divided_over_the_devices_that_divide_them():
    weights, (images, labels) = batching.place({"w": np.ones(3)}, (np.ones((5, 12, 2)), np.ones(5)))
    assert len(images.sharding.device_set) == 4  # of 8
    assert images.addressable_shards[0].data.shape == (5, 3, 2)
    assert weights["w"].sharding.device_set == images.sharding.device_set
    assert labels.is_fully_replicated
    assert inputs_of(np.zeros((2, 1))).tolist() == [[1, 0], [1, 0]]
