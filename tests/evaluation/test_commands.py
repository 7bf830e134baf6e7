"""The command layer: loaded_run, cache, options, files; margins, flatness and depth through it."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from typing import Literal

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from sklearn.neighbors import KNeighborsClassifier

from seal_jax import UsageError, evaluators
from seal_jax.cli import main
from seal_jax.evaluation.prediction_depth import pool
from seal_jax.evaluators import batching, command, options, prediction_depth
from seal_jax.evaluators.loaded_run import LoadedRun
from seal_jax.training import workdir as workdirs
from seal_jax.training.metrics import read as read_metrics


def test_networks_are_those_that_were_trained(run):
    """Their test accuracies, computed here, are those that the training wrote."""
    loaded_run = LoadedRun(run, steps="all")
    assert [network.key for network in loaded_run.networks] == [
        f"step{step}/{weights}/seed{seed}"
        for step in (6, 12)
        for weights in ("last", "best")
        for seed in (0, 1)
    ]
    last = read_metrics(run)[-1]
    test = loaded_run.dataset.test
    for network in loaded_run.networks:
        if network.step == 12:
            found = (loaded_run.logits(network, test.images).argmax(-1) == test.labels).mean()
            wrote = last[f"test_{network.weights}/accuracy"][network.seed]
            assert found == pytest.approx(wrote, abs=1e-6)


def test_apply_is_the_same_in_any_batches(loaded_run):
    network, images = loaded_run.networks[0], loaded_run.dataset.test.images[:37]
    whole = loaded_run.features(network, images, 64)
    assert whole.shape == (37, 16)
    np.testing.assert_allclose(loaded_run.features(network, images, 8), whole, rtol=1e-5, atol=1e-6)
    direct = loaded_run.model.features(network.variables, loaded_run.normalise(images))["features"]
    np.testing.assert_allclose(whole, direct, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"weights": ("newest",)}, "--weights=newest"),
        ({"weights": ("ema",)}, "--weights=ema needs an average of the weights"),
        # Every seed would count twice in means and intervals.
        ({"weights": ("last", "last")}, "--weights=last,last names one twice"),
        ({"steps": "6,12,6"}, "--steps=6,12,6 names a checkpoint twice"),
        ({"steps": "5"}, "--steps=5"),
        ({"steps": "five"}, "--steps=five"),
    ],
)
def test_what_is_not_there_is_one_line(run, given, says):
    with pytest.raises(UsageError, match=says) as caught:
        LoadedRun(run, **given)
    assert "\n" not in str(caught.value)


def _changed(run, folder, **model):
    shutil.copytree(run, folder)
    config = json.loads((folder / workdirs.CONFIG).read_text())
    config["model"].update(model)
    (folder / workdirs.CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("model", [{"width": 8}, {"name": "resnet14"}, {"norm": "layer"}])
def test_a_checkpoint_of_another_model_is_refused(run, tmp_path, model):
    with pytest.raises(UsageError, match=r"is of another network than config\.json says"):
        LoadedRun(_changed(run, tmp_path / "other", **model))


@pytest.mark.parametrize(
    ("section", "value", "says"),
    [
        ("train", {"seeds": 3}, "has 2 seeds, and config.json has train.seeds = 3"),
        ("train", {"seeds": None}, "train.seeds = None must be of type int"),
        ("train", {"generations": "x"}, "train.generations = 'x' must be of type int"),
        ("data", {"name": {"a": 1}}, "data.name = {'a': 1} must be of type str"),
        ("method", None, "method = None must be a mapping"),
        ("model", "[" * 100_000, "it is nested more than 32 levels deep"),
    ],
)
def test_a_damaged_config_is_one_line(run, tmp_path, capfd, section, value, says):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / workdirs.CONFIG
    config = json.loads(path.read_text())
    if isinstance(value, str):
        path.write_text(value)
    else:
        config[section] = value and {**config[section], **value}
        path.write_text(json.dumps(config))
    assert main.run(["evaluate", "--kind=margins", f"--checkpoint={folder}"]) == main.USAGE
    error = capfd.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (folder / command.EVALUATIONS).exists()


def test_no_run_no_checkpoint(run, tmp_path):
    with pytest.raises(UsageError, match="is not the folder of a run"):
        LoadedRun(tmp_path)
    shutil.copy(run / workdirs.CONFIG, tmp_path)
    with pytest.raises(UsageError, match="holds no checkpoint yet"):
        LoadedRun(tmp_path)


def test_nan_in_the_network_is_found(trained, run, tmp_path, monkeypatch):
    from seal_jax.evaluators import loaded_run as module

    def with_nan(seeds):
        def changed(*arguments, **options):
            leaves = dict(read(*arguments, **options))
            leaves["weights/params/fc/bias"] = bias = leaves["weights/params/fc/bias"].copy()
            bias[seeds] = np.nan
            return leaves

        return changed

    read, every = module.read_leaves, LoadedRun(run, weights=["last"]).networks
    monkeypatch.setattr(module, "read_leaves", with_nan(slice(None)))
    with pytest.raises(module.DivergedError, match="holds NaN or infinity in params/fc/bias"):
        LoadedRun(run, weights=["last"])
    # The others' networks are there.
    monkeypatch.setattr(module, "read_leaves", with_nan(slice(1)))
    with pytest.warns(UserWarning, match=f"left out: .* of seed {every[0].seed}: the training"):
        left = LoadedRun(run, weights=["last"]).networks
    assert [network.key for network in left] == [network.key for network in every[1:]] != []


@dataclasses.dataclass(frozen=True)
class _Options:
    """Options.

    Attributes:
      shots: how many,
        of each.
      rate: a rate.
      metric: one of two.
      layers: names.
    """

    shots: tuple[int, ...] = (1, 5)
    rate: float | None = None
    metric: Literal["a", "b"] = "a"
    layers: tuple[str, ...] | None = None


def test_options_come_from_the_dataclass():
    assert options.descriptions(_Options)["shots"] == "how many, of each."
    parser = main.Parser()
    options.add_arguments(_Options, parser)
    read = options.read(
        _Options, parser.parse_args(["--shots=20", "--rate", "0.5", "--layers=x,y"])
    )
    assert read == _Options((20,), 0.5, "a", ("x", "y"))
    assert options.read(_Options, parser.parse_args([])) == _Options()
    assert "how many, of each (default: 1,5)" in " ".join(parser.format_help().split())
    for bad, says in (
        ("--shots=a", "--shots=a must be of type int"),
        ("--shots=", "--shots= is empty"),
        ("--shots=1,5,1", "--shots names 1 twice"),
        ("--metric=c", "--metric=c must be one of a, b"),
    ):
        with pytest.raises(UsageError, match=says):
            options.read(_Options, parser.parse_args([bad]))


def test_every_option_of_every_evaluator_is_described():
    for name, evaluator in evaluators.registry().items():
        assert evaluator.name == name
        fields = {field.name for field in dataclasses.fields(evaluator.options)}
        assert fields == set(options.descriptions(evaluator.options)), name


def test_a_result_cache_is_resumed_where_it_was_cut_off(tmp_path, monkeypatch):
    path = tmp_path / "units.jsonl"
    cache = command.ResultCache(path, {"options": {"k": 1}})
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *given: (calls.append("fsync"), fsync(*given)))
    monkeypatch.setattr(os, "replace", lambda *given: (calls.append("replace"), replace(*given)))
    cache.keep("a", {"x": 1})
    cache.keep("b", {"x": 2})
    # The content is on the disk before the file has its name, or a crash could leave an empty one.
    assert calls == ["fsync", "replace", "fsync"]
    monkeypatch.undo()
    path.write_text(path.read_text()[:-4])
    cache = command.ResultCache(path, {"options": {"k": 1}})
    assert cache.records == {"a": {"x": 1}}
    cache.keep("b", {"x": 3})
    assert command.ResultCache(path, {"options": {"k": 1}}).records == {
        "a": {"x": 1},
        "b": {"x": 3},
    }
    with pytest.raises(UsageError, match=r"holds another evaluation \(options.k: 1 -> 2\)"):
        command.ResultCache(path, {"options": {"k": 2}})
    assert command.ResultCache(path, {"options": {"k": 2}}, overwrite=True).records == {}
    for garbage in ("", "5\n", "[]\n", "[" * 10_000):
        path.write_text(garbage)
        with pytest.raises(UsageError, match="cannot be read"):
            command.ResultCache(path, {})
    deep = '{"key": "a", "record": {"x": ' + "[" * 10_000 + "]" * 10_000 + "}}"
    entries = ('{"key": "a", "record": 5}', '{"key": "a", "record": {}}', "7", deep)
    for entry in (*entries, '{"key": 1, "record": {"x": 1}}', '{"key": ["a"], "record": {"x": 1}}'):
        path.write_text(f"{{}}\n{entry}\n")
        assert command.ResultCache(path, {}).records == {}


def test_margins_on_the_command_line(run, tmp_path, capfd):
    """Against NumPy on the same logits; a second call does nothing anew."""
    arguments = ["evaluate", "--kind=margins", f"--checkpoint={run}", "--count=20"]
    arguments += ["--sample=50", f"--output={tmp_path}"]
    assert main.run(arguments) == main.OK
    first = capfd.readouterr().out
    assert "Margins in the softmax" in first
    record = command.read(tmp_path / command.RESULTS)
    loaded_run = LoadedRun(run)
    train = loaded_run.dataset.train
    for row, network in zip(record["rows"], loaded_run.networks, strict=True):
        logits = loaded_run.logits(network, train.images).astype(np.float64)
        chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        own = chances[np.arange(len(train)), train.labels]
        chances[np.arange(len(train)), train.labels] = 0
        expected = np.sort(own - np.max(chances, axis=1))
        np.testing.assert_allclose(row["smallest"], expected[:20], rtol=1e-9)
        assert row["train_accuracy"] == (logits.argmax(1) == train.labels).mean()
    header = (tmp_path / "results.csv").read_text().splitlines()[0]
    assert header.startswith("run,data,model,method,weights,seed,step")
    assert "smallest" not in header
    assert (tmp_path / "margins.png").stat().st_size > 10_000
    units = (tmp_path / command.UNITS).stat().st_mtime_ns
    assert main.run(arguments) == main.OK
    assert capfd.readouterr().out == first
    assert (tmp_path / command.UNITS).stat().st_mtime_ns == units
    written = (tmp_path / command.UNITS).read_text()
    header_line, _, records = written.partition("\n")
    for old, new in (('"run": ', '"ran": '), ('"smallest": [', '"smallest": ["x", ')):
        (tmp_path / command.UNITS).write_text(f"{header_line}\n{records.replace(old, new)}")
        assert main.run(arguments) == main.USAGE
        assert "units.jsonl holds records that do not fit" in capfd.readouterr().err
    (tmp_path / command.UNITS).write_text(written)
    assert main.run([*arguments[:-2], "--sample=51", arguments[-1]]) == main.USAGE
    assert "options.sample: 50 -> 51" in capfd.readouterr().err
    assert main.run([*arguments, "--sample=1000"]) == main.USAGE
    assert "--sample=1000 is more than" in capfd.readouterr().err


def test_a_folder_that_another_process_writes_to_is_refused(run, tmp_path, capfd):
    arguments = ["evaluate", "--kind=margins", f"--checkpoint={run}", "--sample=50"]
    arguments += [f"--output={tmp_path}"]
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print(1); input()"
    holder = [sys.executable, "-uc", code, str(tmp_path / command.LOCK)]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"1\n"
        assert main.run(arguments) == main.USAGE
        error = capfd.readouterr().err
        assert f"--output={tmp_path} is in use by another process; wait until it ends" in error
        assert error.count("\n") == 1
        assert not (tmp_path / command.UNITS).exists()
        process.kill()  # which leaves no lock behind
    assert main.run(arguments) == main.OK


def test_what_is_wrong_is_found_before_the_work(run, tmp_path, capfd):
    afile = tmp_path / "file"
    afile.write_text("mine")
    start = ["evaluate", "--kind=margins", f"--checkpoint={run}"]
    for more, says in (
        ([f"--output={afile}"], f"--output={afile}: {afile} is a file; name a folder"),
        ([f"--output={afile}/x/y"], f"--output={afile}/x/y: {afile} is a file"),
        ([f"--checkpoint={run / '..' / run.name}"], "--checkpoint names a run twice"),
        (["--seed=-1"], "--seed=-1 must lie in 0..4294967295"),
        ([f"--seed={2**32}"], "--seed=4294967296 must lie in"),
        (["--cout=3"], "--cout=3 is not an option of evaluate --kind=margins; see"),
    ):
        assert main.run([*start, *more]) == main.USAGE
        error = capfd.readouterr().err
        assert says in error
        assert error.count("\n") == 1
    assert afile.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [afile]


def test_a_damaged_checkpoint_is_named_with_the_others(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / workdirs.CHECKPOINTS / "12" / "metadata")
    with pytest.raises(UsageError, match=r"of step 12 in .* cannot be read .* take another: 6"):
        LoadedRun(folder)


@pytest.mark.filterwarnings("error")
def test_names_that_would_be_mathematics_are_drawn(tmp_path):
    identity = {"data": "d", "model": "m", "method": "seal", "weights": "last", "seed": 0}
    row = {**identity, "step": 1, "generation": 0, "run": r"_a $\b$ <&>"}
    row |= {"layers": ["stem"], "accuracies": [0.5], "network_accuracy": 0.5, "mean_depth": 0.5}
    command.write(prediction_depth.EVALUATOR, {}, [row], tmp_path)
    assert (tmp_path / "prediction_depth.png").stat().st_size > 5_000
    assert json.loads((tmp_path / command.RESULTS).read_text())["rows"] == [row]


def test_several_runs_in_one_table(run, tmp_path, capsys):
    """Runs whose folders have one name keep their own results, under names that tell them apart."""
    folders = [shutil.copytree(run, tmp_path / name / "normal") for name in ("a", "b")]
    arguments = ["evaluate", "--kind=margins", "--weights=last", "--sample=50"]
    arguments += ["--checkpoint", *map(str, folders)]
    assert main.run(arguments) == main.OK
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "normal  " in line] == ["a/normal", "b/normal"]
    for folder in folders:
        found = command.read(folder / command.EVALUATIONS / "margins" / command.RESULTS)
        assert len(found["rows"]) == 2
    assert main.run([*arguments, f"--output={tmp_path}"]) == main.USAGE
    assert "is for one run, and --checkpoint names 2" in capsys.readouterr().err


def test_flatness_without_noise_is_the_accuracy(run, loaded_run, evaluated):
    rows, _ = evaluated("flatness", run, sigmas=(0.0, 10.0), draws=3, batch_size=64)
    train = loaded_run.dataset.train
    for row, network in zip(rows, loaded_run.networks, strict=True):
        hits = loaded_run.logits(network, train.images).argmax(1) == train.labels
        assert row["train_accuracy"] == pytest.approx(hits.mean(), abs=1e-6)
        assert row["accuracies"][0] == pytest.approx(hits.mean(), abs=1e-6)
        assert row["accuracies"][1] < 0.4  # such noise leaves nothing of the network


def test_prediction_depth_equals_scikit_learn(run, loaded_run, evaluated, monkeypatch):
    """Under a budget of half the stem's features; depth from the definition."""
    rows, output = evaluated(
        "prediction_depth", run, images=120, byte_budget=2**17, weights=("last",)
    )
    train, test = (
        batching.subset(split, 120, 0)
        for split in (loaded_run.dataset.train, loaded_run.dataset.test)
    )
    network = loaded_run.networks[0]
    features = jax.jit(loaded_run.model.features)
    layers = features(network.variables, loaded_run.normalise(train.images))
    there = features(network.variables, loaded_run.normalise(test.images))
    row = rows[0]
    assert (row["step"], row["seed"]) == (12, 0)
    assert row["layers"] == ["stem", *loaded_run.model.round_blocks]
    final = there["logits"].argmax(-1)
    depths = np.zeros(120, int)
    for layer, accuracy in zip(row["layers"], row["accuracies"], strict=True):
        theirs = KNeighborsClassifier(5, algorithm="brute")
        theirs.fit(np.asarray(layers[layer], np.float64).reshape(120, -1), train.labels)
        predicted = theirs.predict(np.asarray(there[layer], np.float64).reshape(120, -1))
        assert accuracy == (predicted == test.labels).mean()
        # Whoever disagrees here has its depth above.
        depths = np.where(predicted == final, depths, row["layers"].index(layer) + 1)
    assert row["depths"] == np.bincount(depths, minlength=5).tolist()
    assert row["mean_depth"] == pytest.approx(depths.mean())
    assert (output / "prediction_depth.png").stat().st_size > 10_000
    # Points of another network stand over its own blocks.
    figure = Figure()
    other = {**row, "run": "other", "layers": ["stem", "layer9"], "accuracies": [0.1, 0.2]}
    prediction_depth.draw(figure, [row, other])
    axes = figure.axes[0]
    assert [line.get_xdata().tolist() for line in axes.lines] == [[0, 1, 2, 3], [0, 4]]
    assert axes.lines[1].get_ydata().tolist() == [10, 20]
    assert not axes.patches  # bars would have to start at 0
    assert [each.get_text() for each in axes.get_xticklabels()] == [*row["layers"], "layer9"]
    # With an earlier checkpoint the plot is of the course over training.
    figure = Figure()
    prediction_depth.draw(figure, [*rows, *({**row, "step": 6} for row in rows)])
    assert [line.get_xdata().tolist() for line in figure.axes[0].lines] == [[6, 12]] * 4
    # A run that was evaluated at its best weights alone is not left out beside it.
    figure, best = Figure(), {**row, "run": "other", "weights": "best"}
    prediction_depth.draw(figure, [*rows, *({**row, "step": 6} for row in rows), best])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [f"{row['run']}, last weights", "other, best weights"]
    assert figure.axes[1].lines[0].get_xdata().tolist() == [12]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("prediction_depth", {"images": 60, "byte_budget": 2**17}),
        ("margins", {"sample": 50}),
        pytest.param("plasticity", {"examples": 50}, marks=pytest.mark.slow),
        pytest.param(
            "linear_probe", {"datasets": ("digits",), "epochs": 2}, marks=pytest.mark.slow
        ),
        pytest.param(
            "flatness", {"sigmas": (0.1,), "draws": 2, "batch_size": 64}, marks=pytest.mark.slow
        ),
    ],
)
def test_images_that_are_streamed(kind, options, run, evaluated, as_streamed, tmp_path):
    expected, _ = evaluated(kind, run, weights=("last",), **options)
    rows, _ = evaluated(
        kind, as_streamed(run), weights=("last",), output=tmp_path / "theirs", **options
    )
    assert rows == expected


def test_prediction_depth_before_the_relu(loaded_run):
    """The output is the ReLU of what comes before it."""
    network = loaded_run.networks[0]
    images = loaded_run.normalise(loaded_run.dataset.test.images[:4])
    before = loaded_run.model.before_relu(network.variables, images)
    after = loaded_run.model.features(network.variables, images)
    for block in loaded_run.model.round_blocks:
        np.testing.assert_array_equal(np.maximum(before[block], 0), after[block])
        assert np.min(before[block]) < 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"layers": ("layer9",)}, "--layers=layer9 must be one of stem, layer1"),
        ({"k": 10_000}, "--k=10000 is more than"),
        ({"byte_budget": 100}, "byte_budget = 100 is too small .* give at least"),
    ],
)
def test_prediction_depth_bad_input(loaded_run, given, says):
    chosen = dataclasses.replace(prediction_depth.Options(), **given)
    with pytest.raises(UsageError, match=says):
        prediction_depth.work_items(loaded_run, chosen)[0].run()


@pytest.mark.parametrize(("height", "width", "side"), [(6, 4, 2), (7, 5, 3), (2, 3, 4)])
def test_adaptive_pooling_by_its_definition(height, width, side):
    images = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
    rows, columns = min(side, height), min(side, width)
    expected = np.zeros((2, rows, columns, 3))
    for i in range(rows):
        for j in range(columns):
            window = images[
                :,
                i * height // rows : -(-(i + 1) * height // rows),
                j * width // columns : -(-(j + 1) * width // columns),
            ]
            expected[:, i, j] = window.mean((1, 2))
    found = pool(jax.numpy.asarray(images), "adaptive", side)
    np.testing.assert_allclose(found, expected.reshape(2, -1), rtol=1e-5, atol=1e-6)
