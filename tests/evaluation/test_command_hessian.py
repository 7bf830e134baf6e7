"""``evaluate --kind=hessian`` on a tiny run: against dense Hessians, refused, shown."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from seal_jax import UsageError, data, evaluators, models
from seal_jax.evaluators import hessian
from seal_jax.evaluators.loaded_run import LoadedRun
from seal_jax.hessian import Streamed
from seal_jax.training.batches import epoch_order

# The classifier of 330 parameters, which a dense Hessian is made of in no time.
SMALL = {
    "mask": ("fc",),
    "eigenvalues": 3,
    "tolerance": 1e-4,
    "max_products": 200,
    "probes": 2,
    "density_steps": 24,
    "trace_products": 30,
    "batch_size": 40,
    "batches": 3,
    "batch_eigenvalues": 4,
    "chunk": 2,
    "data_batch_size": 64,
    "weight_decay": 0.01,
    "label_smoothing": 0.1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits_dir):
    """A network that is quick to compile, trained on 187 digits; 2 seeds."""
    from seal_jax.core import settings as settings_lib
    from seal_jax.training import experiment, loop

    chosen = settings_lib.Settings(
        data=settings_lib.Data(
            name="digits", data_dir=str(digits_dir), validation_fraction=0.87, crop_padding=1
        ),
        model=settings_lib.Model(name="mlp"),
        method={"name": "normal"},
        train=settings_lib.Train(generations=1, epochs_per_generation=1, seeds=2, batch_size=30),
        run=settings_lib.Run(checkpoint_every_epochs=1),
    )
    folder = tmp_path_factory.mktemp("runs") / "normal"
    loop.train(chosen, folder, experiment.load_data(chosen.data), devices=1)
    return folder


@pytest.fixture(scope="module")
def loaded_run(run):
    return LoadedRun(run)


def dense(loaded_run, network, images, labels, smoothing=0.1, decay=0.01):
    """The Hessian of the mean loss of the classifier's parameters, by jax.hessian."""
    variables = network.variables
    kernel, bias = variables["params"]["fc"]["kernel"], variables["params"]["fc"]["bias"]
    targets = (1 - smoothing) * np.eye(10)[labels] + smoothing / 10

    def loss(flat):
        head = {"kernel": flat[bias.size :].reshape(kernel.shape), "bias": flat[: bias.size]}
        whole = {**variables, "params": {**variables["params"], "fc": head}}
        logits = loaded_run.model.module.apply(whole, images, train=False)
        return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()

    flat = jnp.concatenate([jnp.ravel(bias), jnp.ravel(kernel)])
    matrix = jax.jit(jax.hessian(loss))(flat)
    return np.asarray(matrix, np.float64) + decay * np.eye(flat.size)


@pytest.fixture(scope="module")
def measured(run, tmp_path_factory):
    from seal_jax.evaluators import command

    output = tmp_path_factory.mktemp("hessian")
    chosen = dataclasses.replace(hessian.Options(), **SMALL)
    rows = command.evaluate(evaluators.load("hessian"), run, chosen, output, weights=("last",))
    return rows, output


def test_whole_data_is_that_of_the_dense_hessian(loaded_run, measured):
    """The last batch of 64 is filled up."""
    rows, _ = measured
    train = loaded_run.dataset.train
    assert len(train) % 64
    for row, network in zip(rows, loaded_run.networks[:2], strict=True):
        assert row["seed"] == network.seed
        matrix = dense(loaded_run, network, loaded_run.normalise(train.images), train.labels)
        exact = np.linalg.eigvalsh(matrix)
        np.testing.assert_allclose(row["largest"], exact[:-4:-1], rtol=1e-4)
        # Most eigenvalues are the decay; Lanczos finds one of them, and two others.
        assert row["smallest"][0] == pytest.approx(0.01, abs=1e-5)
        distances = abs(np.array(row["smallest"])[:, None] - exact).min(1)
        assert (distances <= row["smallest_residuals"]).all()
        assert abs(row["trace"] - np.trace(matrix)) < 5 * row["trace_error"] + 1e-3
        # A convex problem, and every eigenvalue at least the decay.
        assert row["negative_mass_bounds"][0] == row["clearly_negative_mass_bounds"][0] == 0
        assert row["clearly_negative_mass_bounds"][1] < 0.1
        assert row["negative_mass_error"] <= np.sqrt(0.5 / 332 / 2)
        # Those beside it take more products than there are, which is not hidden.
        assert row["converged"] or max(row["smallest_residuals"]) > 1e-4 * row["smallest"][-1]
        assert max(row["largest_residuals"]) < 1e-4 * row["largest"][0]
        assert row["parameters"] == len(matrix)


def test_mini_batches_are_those_of_an_epoch_augmented(loaded_run, measured):
    """Every mini-batch's largest eigenvalues by magnitude, over all chunks, pooled."""
    rows, _ = measured
    train, spec = loaded_run.dataset.train, loaded_run.augmentation
    order, _ = epoch_order(jax.random.key(0), len(train), 40)
    drawn = hessian.Measurement(loaded_run, hessian.Options(**SMALL)).mini_batches.draws
    pool = []
    for batch in range(3):
        chosen = np.asarray(order[batch])
        parameters = jax.tree.map(lambda leaf, batch=batch: leaf[batch], drawn)
        images = data.apply(jnp.asarray(train.images[chosen]), parameters, spec)
        matrix = dense(loaded_run, loaded_run.networks[0], images, train.labels[chosen])
        pool.append(np.linalg.eigvalsh(matrix)[:-5:-1])
    values = np.reshape(rows[0]["batch_values"], (3, 4))
    np.testing.assert_allclose(values, pool, rtol=1e-3)
    assert rows[0]["batch_max"] == np.max(values)
    assert (rows[0]["batch_negative"], rows[0]["batch_converged"]) == (0, 1)
    assert rows[0]["batches"] == 3


def test_mini_batches_are_those_that_training_sees(loaded_run):
    """187 images in batches of 40: the 27 that are left over are dropped, as in training."""
    assert len(loaded_run.dataset.train) == 187
    measurement = hessian.Measurement(loaded_run, hessian.Options(batch_size=40))
    assert measurement.mini_batches.weights.tolist() == np.ones((4, 40)).tolist()
    train = dataclasses.replace(loaded_run.settings.train, drop_last=False)
    kept = copy.copy(loaded_run)
    kept.settings = dataclasses.replace(loaded_run.settings, train=train)
    rows = hessian.Measurement(kept, hessian.Options(batch_size=40)).mini_batches.weights
    assert rows.sum(1).tolist() == [40, 40, 40, 40, 27]


def test_other_options_reach_the_loss(loaded_run, run, evaluated):
    network, train = loaded_run.networks[0], loaded_run.dataset.train
    options = {**SMALL, "parts": ("batches",), "augment": "none", "chunk": 32}
    options |= {"batches": 1, "label_smoothing": 0.0, "weight_decay": None, "seed": 3}
    rows, _ = evaluated("hessian", run, weights=("last",), **options)
    order, _ = epoch_order(jax.random.key(3), len(train), 40, False)
    chosen = np.asarray(order[0])
    images = loaded_run.normalise(train.images[chosen])
    decay = loaded_run.settings.optimizer.weight_decay
    matrix = dense(loaded_run, network, images, train.labels[chosen], 0.0, decay)
    expected = np.linalg.eigvalsh(matrix)[:-5:-1]
    np.testing.assert_allclose(rows[0]["batch_values"], expected, rtol=1e-3)
    assert "trace" not in rows[0]
    header = hessian.EVALUATOR.table(rows).header
    assert "trace" not in header
    assert "max (batches)" in header


@pytest.mark.parametrize("train", [pytest.param(False, marks=pytest.mark.slow), True])
def test_loss_of_a_network_with_batch_norm(train):
    """Running statistics or the batch's own; filling counts for nothing in the mean."""
    model = models.create("resnet8", num_classes=10, image_shape=(8, 8, 1), width=4)
    variables = model.init(jax.random.key(0))
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (4, 8, 8, 1)).astype(np.uint8)
    labels, weights = np.array([3, 1, 4, 1]), np.array([1.0, 1, 1, 0], np.float32)
    spec = data.Augmentation(mean=(0.4,), std=(0.3,))
    loss = hessian.make_loss(model.module, spec, 0.1, train)
    batch = {"images": images, "labels": labels, "weights": weights, "draws": None}
    mean = jax.jit(loss)(variables, batch)
    normalised = ((images / 255.0 - 0.4) / 0.3).astype(np.float32)
    logits = model.module.apply(
        variables, normalised, train=train, mutable=["batch_stats"] if train else False
    )
    logits = np.asarray(logits[0] if train else logits, np.float64)
    chances = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    targets = 0.9 * np.eye(10)[labels] + 0.01
    expected = -(targets * chances).sum(1)[:3].mean()
    np.testing.assert_allclose(mean, expected, rtol=1e-4)


def test_training_mode_leaves_out_what_fills_no_batch(loaded_run):
    train = loaded_run.dataset.train
    options = hessian.Options(batch_size=40, data_batch_size=64, train_mode=True)
    measurement = hessian.Measurement(loaded_run, options)
    for batches, size in ((measurement.whole, 64), (measurement.mini_batches, 40)):
        assert batches.rows.shape == (len(train) // size, size)
        assert batches.weights.min() == 1


def test_a_budget_that_the_data_does_not_fit_in(loaded_run, run, evaluated):
    """The classifier's bias, so that vectors are small beside the images."""
    options = {**SMALL, "parts": ("eigenvalues",), "mask": ("fc/bias",), "eigenvalues": 2}
    options |= {"byte_budget": 8000, "basis": "host", "data_batch_size": 16}
    train = loaded_run.dataset.train
    network = loaded_run.networks[0]
    measurement = hessian.Measurement(loaded_run, hessian.Options(**options))
    assert isinstance(measurement.operator(network), Streamed)
    rows, _ = evaluated("hessian", run, weights=("last",), **options)
    matrix = dense(loaded_run, network, loaded_run.normalise(train.images), train.labels)[:10, :10]
    exact = np.linalg.eigvalsh(matrix)
    np.testing.assert_allclose(rows[0]["largest"], exact[:-3:-1], rtol=1e-4)
    np.testing.assert_allclose(rows[0]["smallest"], exact[:2], rtol=1e-4)
    with pytest.raises(UsageError, match=r"byte_budget = 200 must be at least"):
        evaluated("hessian", run, **{**options, "byte_budget": 400})


def test_images_that_are_streamed(loaded_run, run, evaluated, tmp_path, as_streamed):
    """Their products decode batch after batch; a budget of all of them is as without."""
    options = {**SMALL, "parts": ("eigenvalues", "trace", "batches"), "mask": ("fc/bias",)}
    options |= {"eigenvalues": 2, "data_batch_size": 16, "trace_products": 12}
    small = {**options, "byte_budget": 8000, "basis": "host"}
    expected, _ = evaluated("hessian", run, weights=("last",), **options)
    folder = as_streamed(run)
    streamed = LoadedRun(folder)
    assert streamed.dataset.train.streamed
    operator = hessian.Measurement(streamed, hessian.Options(**small)).operator(
        streamed.networks[0]
    )
    assert isinstance(operator, Streamed)
    assert isinstance(operator.data["images"], data.StoredImages)
    for name, chosen in (("small", small), ("whole", options)):
        rows, _ = evaluated("hessian", folder, weights=("last",), output=tmp_path / name, **chosen)
        for key in ("largest", "smallest", "trace"):
            found, wanted = ([row[key] for row in of] for of in (rows, expected))
            np.testing.assert_allclose(found, wanted, rtol=1e-4, err_msg=key)


def test_table_and_plot(measured):
    rows, output = measured
    table = hessian.table(rows)
    line = dict(zip(table.header, table.rows[0], strict=True))
    assert (line["paper max"], line["paper negative %"]) == ("889.06", "4.25")
    assert line["seeds"] == "2"
    low, high = sorted(row["batch_max"] for row in rows)
    assert line["max (batches)"] == f"{low:.2f} to {high:.2f}"
    assert float(line["residual of smallest"]) <= 1e-4 * rows[0]["smallest"][-1] + 2e-4
    lower, upper = map(float, line["negative mass %"].split(".."))
    mean = 100 * np.mean([row["negative_mass_bounds"] for row in rows], axis=0)
    assert lower - 0.05 <= mean[0] < mean[1] <= upper + 0.05
    others = [{**row, "run": "other", "method": "seal"} for row in rows]
    both = hessian.table([*rows, *others]).rows
    assert [line[5] for line in both] == ["889.06", "847.89"]
    long = [{**row, "generation": 2} for row in rows]
    assert hessian.table(long).rows[0][5] == "2353.74"
    figure = Figure()
    hessian.draw(figure, [*rows, *others])
    density, pool = figure.axes
    assert density.get_yscale() == pool.get_yscale() == "log"
    grid, values = density.lines[0].get_data()
    assert np.trapezoid(values, grid) == pytest.approx(1, abs=0.01)
    assert len(density.lines) == 2
    # Values far from all eigenvalues underflow; the axis has room for the density alone.
    assert np.max(values) < density.get_ylim()[1] < 10 * np.max(values)
    assert (output / "hessian.png").stat().st_size > 5_000
    written = json.loads((output / "results.json").read_text())
    assert written["rows"] == json.loads(json.dumps(rows))


@pytest.mark.parametrize("part", ["trace", "eigenvalues"])
def test_single_parts_are_drawn(measured, part):
    fields = {"trace": ("trace", "trace_error"), "eigenvalues": ("largest", "smallest")}[part]
    fields += tuple(f"{end}_residuals" for end in fields if part == "eigenvalues")
    names = ("run", "weights", "seed", "step", "generation", "method", "converged", *fields)
    rows = [{name: row[name] for name in names} for row in measured[0]]
    figure = Figure()
    hessian.draw(figure, rows)
    assert len(figure.axes) == 1
    assert len(hessian.table(rows).rows) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"parts": ("spectrum",)}, "--parts=spectrum must be one of"),
        ({"mask": ("head",)}, "matches no parameter path"),
        ({"batch_size": 5000}, "--batch-size=5000 is more than the"),
        ({"batches": 100}, "--batches=100 is more than the"),
        ({"eigenvalues": 200}, "--eigenvalues=200 is too many for 330 parameters"),
        ({"trace_products": 5}, "--trace-products=5 must be at least 6"),
        ({"tolerance": 0.0}, "--tolerance=0 must be positive"),
        ({"label_smoothing": 1.0}, "--label-smoothing=1 must lie in"),
    ],
)
def test_what_cannot_be_is_one_line(loaded_run, options, says):
    with pytest.raises(UsageError, match=says) as caught:
        hessian.work_items(loaded_run, hessian.Options(**{**SMALL, **options}))
    assert "\n" not in str(caught.value)


def test_the_operator_in_shapes_is_that_of_the_network(loaded_run):
    measurement = hessian.Measurement(loaded_run, hessian.Options(**SMALL))
    network = loaded_run.networks[0]
    operator, abstract = measurement.operator(network), measurement.abstract_operator(network)
    assert jax.tree.structure(operator) == jax.tree.structure(abstract)
    for name in ("params", "data", "weights", "weight_decay"):
        for leaf, shape in zip(
            *(jax.tree.leaves(getattr(op, name)) for op in (operator, abstract)), strict=True
        ):
            assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
            if name in ("params", "data"):
                assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
