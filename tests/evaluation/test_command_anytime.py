"""ADP and forgetting by the command, against runs of the trainer and a loop written out."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from seal_jax import UsageError, data, methods
from seal_jax.core import mesh as meshes
from seal_jax.core import settings as settings_lib
from seal_jax.evaluators import adaptation, anytime
from seal_jax.evaluators.adaptation import SYSTEMS, settings_of, system_of
from seal_jax.evaluators.loaded_run import LoadedRun
from seal_jax.training import experiment as experiments
from seal_jax.training import loop, metrics, pretrained
from seal_jax.training.batches import place
from seal_jax.training.checkpoints import read_leaves


def settings(digits_dir, method=None, **train):
    """An MLP with BatchNorm on 140 digits, two seeds, one generation."""
    train = {"generations": 1, "epochs_per_generation": 2, "batch_size": 20, "seeds": 2, **train}
    return settings_lib.Settings(
        data=settings_lib.Data(name="digits", data_dir=str(digits_dir), validation_fraction=0.9),
        model=settings_lib.Model(name="mlp", norm="batch"),
        method=method or {"name": "normal"},
        optimizer=settings_lib.Optimizer(
            learning_rate=0.1, schedule="constant", weight_decay=0.0, label_smoothing=0.0
        ),
        train=settings_lib.Train(**train),
    )


def warmup(digits_dir, **train):
    """The baseline with most of a memory: its warm-up ends by the run's own validations."""
    method = {"name": "fast", "head": "kaiming_fan_in", "warmup": True, "warmup_steps": 2}
    method |= {"warmup_gain": 0.1}
    train = {"pretrained": "../source", "sampling": "balanced", "validate_every": 1, **train}
    return methods.complete(settings(digits_dir, method, **train))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits_dir):
    """The runs "source" and "warmup", which starts from it."""
    root = tmp_path_factory.mktemp("adaptations")
    dataset = experiments.load_data(settings(digits_dir).data)
    loop.train(settings(digits_dir, epochs_per_generation=4), root / "source", dataset, devices=2)
    loop.train(warmup(digits_dir), root / "warmup", dataset, devices=2)
    return root


def series(rows, name, seed):
    return [row[name] for row in rows if row["seed"] == seed]


def accuracy(model, spec, split, weights):
    """Accuracy and top-5 accuracy of one seed's weights, by sorting."""
    images = (split.images / 255 - np.array(spec.mean)) / np.array(spec.std)
    logits = np.asarray(
        model.module.apply(weights._asdict(), images.astype(np.float32), train=False)
    )
    order = np.argsort(-logits, axis=1, kind="stable")
    hits = order == split.labels[:, None]
    return hits[:, 0].mean(), hits[:, :5].any(1).mean()


def test_a_run_gone_through_again_equals_a_loop_written_out(folder, digits_dir, evaluated):
    run = folder / "warmup"
    rows, output = evaluated("anytime", run)
    assert series(rows, "tau", 0) == series(rows, "tau", 1) == [0, 1, 2, 3, 5, 8, 13, 14]
    assert {row["system"] for row in rows} == {"warmup"}

    # The same training, by its programs and without the engine: after every step its weights.
    config = warmup(digits_dir)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, steps_per_call=1))
    dataset = experiments.load_data(config.data)
    mesh = meshes.make(config, jax.devices()[:2])
    experiment = experiments.build(config, experiments.data_shape(dataset), mesh)
    source = pretrained.read(config, run)
    assert source.run == folder / "source"  # whose labels are those that it trained on
    init_from = pretrained.take(config, source, experiment.abstract_state(2), momentum=False)
    train, validation = place(mesh, dataset.train), place(mesh, dataset.validation)
    state = experiment.init(experiment.starts(np.arange(2, dtype=np.uint32), init_from), train)
    states = [jax.device_get(state.weights)]
    warming = []
    for _ in range(14):
        warming.append(np.array(state.method_state.warming))
        state, _ = experiment.train(state, train)
        states.append(jax.device_get(state.weights))
        state, _ = experiment.validate(state, validation)
    assert 0 < np.sum(warming) < 28  # the rule has ended the warm-up on the way

    source = read_leaves(folder / "source" / "checkpoints")
    model, spec = experiment.model, experiment.batches.augmentation
    biased = dataclasses.replace(model, module=model.module.clone(head_bias=True))  # the source's
    for seed in (0, 1):
        own = [jax.tree.map(lambda leaf, seed=seed: leaf[seed], weights) for weights in states]
        test = [accuracy(model, spec, dataset.test, weights) for weights in own]
        best, kept, due, expected = -1.0, 0, [0, 1, 3, 6, 10], []
        for step in range(15):
            if step in due:
                found = accuracy(model, spec, dataset.validation, own[step])[0]
                best, kept = max((best, -kept), (found, -step))[0], kept if found <= best else step
            if step in (0, 1, 2, 3, 5, 8, 13, 14):
                expected.append((kept, *test[kept], *test[step]))
        names = ("deployed", "adp", "adp_top5", "test", "test_top5")
        for name, values in zip(names, zip(*expected, strict=True), strict=True):
            np.testing.assert_allclose(series(rows, name, seed), values, atol=1e-6, err_msg=name)
        head = {name: source[f"weights/params/fc/{name}"][seed] for name in ("bias", "kernel")}
        for row in (row for row in rows if row["seed"] == seed):
            norm = np.linalg.norm(own[row["tau"]].params["fc"]["kernel"])
            assert row["head_norm"] == pytest.approx(norm, rel=1e-4)
            # Figure 3: both tasks by the deployed state; and by the one that training is in.
            for prefix, weights in (("adp_", own[row["deployed"]]), ("", own[row["tau"]])):
                old = weights._replace(params={**weights.params, "fc": head})
                found = accuracy(biased, spec, dataset.test, old)[0]
                assert row[f"{prefix}source"] == pytest.approx(found, abs=1e-6)
                squares = 0.0
                for layer in ("dense1", "dense2"):
                    for path, leaf in jax.tree_util.tree_leaves_with_path(weights.params[layer]):
                        name = jax.tree_util.keystr(path, simple=True, separator="/")
                        start = source[f"weights/params/{layer}/{name}"][seed]
                        squares += ((leaf - start) ** 2).sum()
                expected = pytest.approx(np.sqrt(squares), rel=1e-3, abs=1e-6)
                assert row[f"{prefix}distance"] == expected
        assert any(row["deployed"] != row["tau"] for row in rows)

    # And what the run itself has recorded.
    recorded = metrics.read(run)[-1]
    for seed in (0, 1):
        last = [row for row in rows if row["seed"] == seed][-1]
        assert last["test"] == pytest.approx(recorded["test_last/accuracy"][seed], abs=1e-6)
        assert last["test_top5"] == pytest.approx(
            recorded["test_last/top5_accuracy"][seed], abs=1e-6
        )
    assert 0 <= rows[-1]["deviation"] < 1e-5
    assert "test_top5,source,distance,head_norm,deployed" in (output / "results.csv").read_text()


def test_two_systems_adapted_in_memory(folder, evaluated):
    rows, _ = evaluated(
        "anytime",
        folder / "source",
        weights=("last",),
        systems=("fast", "feature_extraction"),
        flip=False,
        max_steps=3,
    )
    by_system = {name: [row for row in rows if row["system"] == name] for name in SYSTEMS}
    for seed in (0, 1):
        fast = [row for row in by_system["fast"] if row["seed"] == seed]
        assert fast[0]["head_norm"] == 0 < fast[1]["head_norm"]
        # A zero head sends nothing back: after one step only it has moved.
        assert fast[0]["distance"] == fast[1]["distance"] == 0 < fast[-1]["distance"]
    assert all(row["distance"] == 0 for row in by_system["feature_extraction"])
    assert {row["tau"] for row in rows} == {0, 1, 2, 3}


@pytest.mark.slow
def test_a_run_adapted_in_memory_equals_a_run_of_the_trainer(
    folder, digits_dir, evaluated, monkeypatch
):
    source, built, traces = folder / "source", [], []
    build, run = experiments.build, adaptation.Replay.run
    monkeypatch.setattr(experiments, "build", lambda *given: built.append(0) or build(*given))
    monkeypatch.setattr(adaptation.Replay, "run", lambda it: traces.append(run(it)) or traces[-1])
    before = sorted(source.rglob("*"))
    rows, output = evaluated(
        "anytime",
        source,
        weights=("last",),
        systems=("fast", "feature_extraction"),
        alpha=0.2,
        beta=0.05,
        flip=False,
        max_steps=14,
    )
    assert sorted(source.rglob("*")) == before
    # One training for each system, and one scoring of the source's task for both. Traces are kept for
    # the records of all seeds: they hold nothing on the device.
    assert (len(built), len(traces)) == (3, 2)
    for trace in traces:
        held = [value for name, value in vars(trace).items() if name != "_replay"]
        assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(held))
    fast = [row for row in rows if row["system"] == "fast"]
    test = experiments.load_data(settings(digits_dir).data).test
    learnt = metrics.read(source)[-1]["test_last/accuracy"]
    for seed in (0, 1):
        start, first = [row for row in fast if row["seed"] == seed][:2]
        assert start["head_norm"] == start["distance"] == 0
        assert start["adp"] == pytest.approx((test.labels == 0).mean(), abs=1e-6)  # all equal
        assert start["source"] == pytest.approx(learnt[seed], abs=1e-6)
        # A zero head sends nothing back: after one step only it has moved.
        assert first["head_norm"] > 0
        assert first["distance"] == 0
    moved = {row["system"]: row["distance"] for row in rows if row["tau"] == 14}
    assert moved["fast"] > 0
    assert moved["feature_extraction"] == 0

    loaded_run = LoadedRun(source, weights=("last",))
    config = settings_of(
        "fast",
        loaded_run.settings,
        loaded_run.dataset,
        alpha=0.2,
        beta=0.05,
        sigma=0.01,
        batch_size=10,
        steps=14,
        seeds=2,
        flip=False,
    )
    train = dataclasses.replace(config.train, pretrained=str(source))
    run = output.parent / "fast"
    loop.train(dataclasses.replace(config, train=train), run, loaded_run.dataset, devices=1)
    recorded = metrics.read(run)[-1]
    assert recorded["step"] == 14
    assert [row["test"] for row in fast if row["tau"] == 14] == pytest.approx(
        recorded["test_last/accuracy"], abs=1e-6
    )


@pytest.mark.slow
def test_a_generation_that_ends_early(folder, digits_dir, evaluated, tmp_path):
    """All rest after the first of three epochs: what follows has the state of its end."""
    shutil.copytree(folder / "source", tmp_path / "source")
    config = warmup(digits_dir, epochs_per_generation=3, until_accuracy=0.01, seeds=1)
    dataset = experiments.load_data(config.data)
    loop.train(config, tmp_path / "early", dataset, devices=1)
    recorded = metrics.read(tmp_path / "early")
    assert [row["step"] for row in recorded] == [7]
    rows, _ = evaluated("anytime", tmp_path / "early")
    assert series(rows, "tau", 0) == [0, 1, 2, 3, 5, 8, 13, 21]
    assert [row["test"] for row in rows[-3:]] == pytest.approx(
        recorded[0]["test_last/accuracy"] * 3, abs=1e-6
    )


@pytest.fixture
def rows():
    """Two systems, two seeds, three checkpoints, made up."""
    base = {"run": "r", "step": 9, "weights": "last", "target": "digits", "alpha": 0.01}
    return [
        {**base, "system": system, "beta": beta, "seed": seed, "tau": tau}
        | {"adp": 0.5 + 0.1 * tau + 0.02 * seed, "adp_top5": None, "test": 0.5, "source": 0.8}
        | {"adp_source": 0.9, "adp_distance": 0.125}
        | {"head_norm": float(tau), "distance": 0.25, "deviation": None}
        for system, beta in (("fast", 0.001), ("kaiming_fan_in", 0.01))
        for seed in (0, 1)
        for tau in (0, 1, 2)
    ]


def test_table(rows):
    found = anytime.table(rows)
    cells = dict(zip(found.header, found.rows[1], strict=True))
    assert cells["run"] == "kaiming_fan_in"
    assert cells["ADP 1"] == "60.0 to 62.0"
    assert (cells["top-1 err."], cells["top-5 err."]) == ("28.00 to 30.00", "-")
    assert (cells["ADP source"], cells["source"]) == ("90.0 to 90.0", "80.0 to 80.0")
    assert "paper" not in cells
    # Runs that ended at different steps are told apart by their names alone.
    other = [*rows, *({**row, "run": "s", "step": 5} for row in rows)]
    labels = [line[0] for line in anytime.table(other).rows]
    assert labels == ["r fast", "r kaiming_fan_in", "s fast", "s kaiming_fan_in"]
    assert anytime.table([*rows, *({**row, "step": 5} for row in rows)]).rows[2][0] == "step 5 fast"
    paper = anytime.table([{**row, "target": "cifar100"} for row in rows])
    assert [line[-1] for line in paper.rows] == ["12.63 / 1.62 / 7.19", "16.8 / 3.46 / 34.58"]


def test_draw(rows):
    figure = Figure()
    anytime.draw(figure, rows)
    adp, source, norm = figure.axes
    assert [line.get_label() for line in adp.lines[::2]] == ["fast", "kaiming_fan_in"]
    assert adp.lines[0].get_xdata().tolist() == [0, 1, 2]
    np.testing.assert_allclose(adp.lines[0].get_ydata(), [51, 61, 71])
    np.testing.assert_allclose(source.lines[2].get_ydata(), [90, 90, 90])
    np.testing.assert_allclose(source.lines[3].get_ydata(), [80, 80, 80])  # dotted, current
    assert norm.get_yscale() == "log"
    figure.draw_without_rendering()


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_are_known_by_their_settings(name, digits_dir):
    target = experiments.load_data(settings(digits_dir).data)
    config = settings_of(
        name,
        settings(digits_dir),
        target,
        alpha=0.1,
        beta=0.01,
        sigma=0.1,
        batch_size=10,
        steps=5,
        seeds=1,
        flip=True,
    )
    assert system_of(config) == name
    slow = 0.1 if name.endswith("adam") else 1.0
    alpha, beta = config.method["alpha"], config.method["beta"]
    assert alpha == pytest.approx(0 if name == "frozen_head" else slow * 0.1)
    expected = {"feature_extraction": 0.0}.get(name, 0.01 if name.startswith("fast") else 0.1)
    assert beta == pytest.approx(slow * expected)


@pytest.mark.parametrize(
    ("run", "given", "says"),
    [
        ("source", {"batch_size": 15}, "--batch-size=15 must be a multiple of the 10 classes"),
        ("source", {"seeds": 3}, "--seeds=3 is more than the 2"),
        ("source", {"image_size": 16}, "nothing there fits params/dense1|source task cannot be"),
        ("warmup", {"alpha": 0.5}, "--alpha goes with a run to adapt"),
        ("warmup", {"seeds": 3}, "--seeds=3 is more than the 2"),
    ],
)
def test_bad_input(folder, run, given, says):
    with pytest.raises(UsageError, match=says) as caught:
        anytime.work_items(LoadedRun(folder / run), anytime.Options(**given))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"systems": ("fst",)}, "--systems=fst must be one of .*nearest: fast"),
        ({"alpha": float("nan")}, "--alpha = nan must be positive"),
        ({"beta": 0.0}, "--beta = 0 must be positive"),
        ({"max_steps": -1}, "--max-steps = -1 must be 0 or more"),
        ({"validation_fraction": 1.0}, "--validation-fraction = 1 must lie in"),
    ],
)
def test_bad_options(given, says):
    with pytest.raises(UsageError, match=says):
        anytime.Options(**given)


def test_what_cannot_be_gone_through(folder, digits_dir, tmp_path):
    gone = tmp_path / "gone"
    shutil.copytree(folder / "warmup", gone)
    with pytest.raises(
        UsageError, match=r"train\.pretrained = '.*source' is not the folder of a run"
    ):
        anytime.work_items(LoadedRun(gone), anytime.Options())

    dataset = experiments.load_data(settings(digits_dir).data)
    config = warmup(digits_dir)
    source = pretrained.read(config, folder / "warmup")
    images, labels = np.zeros((8, 8, 8, 1), np.uint8), np.arange(8) % 4
    four = data.from_arrays((images, labels), (images, labels), name="four")
    with pytest.raises(UsageError, match=r"fc/bias is .*10.*, and its data, four of 4 classes"):
        adaptation.Replay(config, dataset, source, four)
    nothing = dataclasses.replace(
        dataset, validation=data.Split(images[:0], labels[:0].astype("i4"))
    )
    with pytest.raises(UsageError, match="leaves no validation split of digits"):
        adaptation.Replay(config, nothing, source, dataset)
    by_test = dataclasses.replace(config.data, selection="test_best", validation_fraction=0.0)
    with pytest.raises(UsageError, match="chooses by the test split"):
        adaptation.Replay(dataclasses.replace(config, data=by_test), dataset, source, dataset)


def test_a_training_that_diverges(folder):
    options = anytime.Options(systems=("fast",), alpha=1e30, max_steps=3, flip=False)
    unit = anytime.work_items(LoadedRun(folder / "source", weights=("last",)), options)[0]
    with pytest.raises(UsageError, match=r"fast on digits, seed 0: .* is not finite.*; lower the"):
        unit.run()


def test_a_config_that_was_changed(folder, tmp_path):
    """The source's data is no longer what it was trained on."""
    for name in ("source", "warmup"):
        shutil.copytree(folder / name, tmp_path / name)
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    config["data"]["image_size"] = 16
    path.write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"dense1/linear/kernel is \[64, 32\], and its data.*256"):
        anytime.work_items(LoadedRun(tmp_path / "warmup"), anytime.Options())
