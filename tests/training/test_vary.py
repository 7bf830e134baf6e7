"""Several values of a setting in one program equal runs of their own."""

import dataclasses
import functools
import inspect
import json
import shutil
import signal
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import STRIPES, Trainer, host, mlp
from trainer_runs import EPOCHS, LAST, Runs, leaves, row_count

from seal_jax import data
from seal_jax.cli import configs, main
from seal_jax.core import vary
from seal_jax.core.settings import Data, Settings, Train
from seal_jax.errors import UsageError
from seal_jax.evaluators import loaded_run
from seal_jax.training import experiment, loop, metrics, points, workdir
from seal_jax.training.progress import Progress

SEAL = {"name": "seal", "threshold": "dense2"}


@pytest.fixture(scope="module")
def runs(shared_folder):
    return Runs(shared_folder)


def config(values, method=SEAL, **sections):
    train = {"generations": 2, "epochs_per_generation": 2, "batch_size": 30, "seeds": 2}
    sections["train"] = (
        train | {"vary": json.dumps(values) if values else ""} | sections.get("train", {})
    )
    return mlp(method, run={"steps_per_call": 3} | sections.pop("run", {}), **sections)


@pytest.mark.parametrize(("batching", "devices"), [("map", 1), ("vmap", 1), ("map", 3), ("map", 2)])
def test_points_equal_single_trainings(batching, devices):
    values = [
        {
            "optimizer.learning_rate": 0.05,
            "method.ascent_scale": 0.2,
            "optimizer.weight_decay": 0.0,
        },
        {
            "optimizer.learning_rate": 0.1,
            "method.ascent_scale": 0.2,
            "optimizer.weight_decay": 0.01,
        },
        {
            "optimizer.learning_rate": 0.05,
            "method.ascent_scale": 0.4,
            "optimizer.weight_decay": 0.01,
        },
    ]
    joint = config(values, run={"seed_batching": batching})
    together = Trainer(STRIPES, joint, devices).calls(4)
    losses = np.concatenate(together.losses, 1)
    assert losses.shape == (6, 12)
    # The rates are those of the log, too: one for each training where points differ.
    assert together.experiment.learning_rate(0) == pytest.approx([0.05, 0.05, 0.1, 0.1, 0.05, 0.05])
    for index, point in enumerate(values):
        alone = Trainer(STRIPES, vary.at(joint, point)).calls(4)
        own = slice(2 * index, 2 * index + 2)
        rtol = 0 if (batching, devices) == ("map", 1) else 1e-4
        np.testing.assert_allclose(losses[own], np.concatenate(alone.losses, 1), rtol=rtol)
        part = jax.tree.map(lambda leaf, own=own: leaf[own], host(together).weights)
        for ours, theirs in zip(*map(jax.tree.leaves, (part, host(alone).weights)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=0 if not rtol else 1e-5)
    assert together.experiment.train._cache_size() == 1


def test_run_folders_of_points(runs, tmp_path, capsys):
    """With draws of the data; one point diverges, and the run is stopped and resumed."""
    values = {"optimizer.learning_rate": [0.1, 1e30], "data.label_noise": [0.2, 0.4]}
    options = [
        "--config.data.draws=per_seed",
        "--config.train.seeds=2",
        "--config.train.generations=1",
        "--config.data.validation_fraction=0.5",
        "--config.train.batch_size=128",
    ]
    together = [f"--config.train.vary={json.dumps(values)}", *options]
    runs.finish(tmp_path / "run", *together, signalled_at=(10, signal.SIGTERM), code=main.STOPPED)
    runs.finish(tmp_path / "run", *together)
    printed = capsys.readouterr().out
    assert "4 points of optimizer.learning_rate, data.label_noise with 2 seed(s)" in printed
    assert "resuming at step" in printed
    point, single = tmp_path / "run/points/learning_rate=0.1_label_noise=0.4", tmp_path / "single"
    alone = [*options, "--config.optimizer.learning_rate=0.1", "--config.data.label_noise=0.4"]
    runs.finish(single, *alone)
    assert (point / "config.json").read_bytes() == (single / "config.json").read_bytes()
    assert metrics.read(point) == metrics.read(single)
    ours, theirs = leaves(point, 20), leaves(single, 20)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[name], err_msg=name)
    # Trained alone it is already finished.
    runs.finish(point, *alone)
    assert "epochs" in capsys.readouterr().out
    for noise in (0.2, 0.4):
        last = metrics.read(tmp_path / f"run/points/learning_rate=1e+30_label_noise={noise}")[-1]
        assert np.isnan(last["test_last/accuracy"]).all()
    # Each seed has labels of its own, which an evaluation of its network sees.
    one, two = loaded_run.load(point, weights=("last",))
    assert [network.seed for part in (one, two) for network in part.networks] == [0, 1]
    whole = data.load("digits", data_dir=str(runs.folder / "digits"), validation_fraction=0.0)
    for seed, part in enumerate((one, two)):
        drawn = data.study(whole, validation_fraction=0.5, label_noise=0.4, label_noise_seed=seed)
        np.testing.assert_array_equal(part.dataset.train.labels, drawn.train.labels)
        np.testing.assert_array_equal(
            part.networks[0].variables["params"]["fc"]["bias"],
            leaves(point, 20)["weights/params/fc/bias"][seed],
        )
    assert (one.dataset.train.labels != two.dataset.train.labels).mean() > 0.3
    with pytest.raises(UsageError, match=r"trains several points .*: give their folders"):
        loaded_run.load(tmp_path / "run")


def test_every_training_sees_its_own_draw():
    """Which images and labels a training sees, against the host's own choice."""
    fields = Data(
        train_count=9,
        draws="per_seed",
        normalisation="digits",
        label_noise=0.5,
        validation_fraction=0.0,
    )
    settings = Settings(
        data=fields,
        method={"name": "normal"},
        train=Train(vary='{"data.label_noise": [0.2, 0.5]}', seeds=2),
    )
    distinct, index = vary.draws(settings)
    assert [(draw.label_noise, draw.subset_seed) for draw in distinct] == [
        (0.2, 0),
        (0.2, 1),
        (0.5, 0),
        (0.5, 1),
    ]
    assert index.tolist() == [0, 1, 2, 3]
    draws = [{field: getattr(draw, field) for field in vary.DRAWN} for draw in distinct]
    shared = data.study(STRIPES, train_count=9, draws=draws)
    for draw, *drawn in zip(draws, *shared.draws, strict=True):
        alone = data.study(STRIPES, train_count=9, **draw).train
        labels, clean, rows = drawn
        np.testing.assert_array_equal(labels, alone.labels)
        np.testing.assert_array_equal(clean, alone.clean_labels)
        np.testing.assert_array_equal(shared.train.images[rows], alone.images)


def test_sweep_ends_where_a_variant_cannot_vary(runs, tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text(
        runs.config.read_text().replace("def get_config(", "def _config(")
        + """

VARIANTS = ("ema",)


def get_config(variant="ema"):
    config = _config("normal")
    config.train.vary = '{"optimizer.ema": [0.9, 0.99]}'
    return config
"""
    )
    sweep = ["sweep", f"--config={own}", f"--workdir={tmp_path / 'runs'}"]
    assert main.run(sweep) == main.USAGE
    assert "optimizer.ema cannot take several values" in capsys.readouterr().err
    # What is in the way of a point is found before anything is trained, and left as it is.
    thesis = tmp_path / "runs/ema/points/learning_rate=0.1/thesis.tex"
    thesis.parent.mkdir(parents=True)
    thesis.touch()
    own.write_text(
        own.read_text().replace('"optimizer.ema": [0.9', '"optimizer.learning_rate": [0.1')
    )
    assert main.run(sweep) == main.USAGE
    assert "learning_rate=0.1 is not empty and holds no run" in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [own, thesis]


@pytest.mark.parametrize(("together", "rest"), [(1, ",normal"), (64, "")])
def test_a_variant_that_diverges_ends_no_sweep(runs, tmp_path, capsys, together, rest):
    written = tmp_path / "lost.py"
    written.write_text(
        runs.config.read_text().replace("def get_config(", "def _config(")
        + """

VARIANTS = ("lost", "worse", "on", "normal")


def get_config(variant="normal"):
    config = _config("normal")
    config.train.generations, config.train.epochs_per_generation = 1, 2
    config.optimizer.learning_rate = {"lost": 1e30, "worse": 1e31}.get(variant, 0.1)
    config.train.pretrained = "../lost" * (variant == "on")
    return config
"""
    )
    arguments = [f"--workdir={tmp_path / 'runs'}", f"--together={together}"]
    arguments += [f"--only=lost,worse,on{rest}", f"--config={written}"]
    assert main.run(["sweep", *arguments]) == main.USAGE
    said = capsys.readouterr().err
    assert f"3 of {3 + bool(rest)} variants did not end: lost: the loss is not finite at" in said
    assert "on: it starts from ../lost" in said
    assert (row_count(tmp_path / "runs/normal") == 2) if rest else "worse: the loss is not" in said


def test_a_sweep_stops_at_a_signal_in_the_last_step_of_a_variant(
    runs, tmp_path, capsys, monkeypatch
):
    update, command = Progress.update, ["sweep", f"--config={runs.config}", "--only=normal,llf"]

    def signal_at_the_end(self, step, **latest):
        update(self, step, **latest)
        if step == LAST:
            signal.raise_signal(signal.SIGTERM)

    device = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: device)
    monkeypatch.setattr(Progress, "update", signal_at_the_end)
    assert main.run([*command, f"--workdir={tmp_path}"]) == main.STOPPED
    assert f"stopped after {tmp_path / 'normal'}" in capsys.readouterr().out
    assert row_count(tmp_path / "normal") == EPOCHS
    assert not (tmp_path / "llf").exists()
    # A run alone has nothing left to stop.
    assert main.run(["train", f"--config={runs.config}:llf", f"--workdir={tmp_path / 'llf'}"]) == 0


@pytest.mark.slow
def test_sweep_trains_variants_together(runs, tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text(
        runs.config.read_text().replace("def get_config(", "def _config(")
        + """

VARIANTS = ("normal", "fast", "short", "longer")


def get_config(variant="normal"):
    config = _config("seal" if variant in ("short", "longer") else "normal")
    config.train.generations = 2 if variant in ("short", "longer") else 1
    config.train.epochs_per_generation = 2
    config.optimizer.learning_rate = {"fast": 0.2}.get(variant, 0.1)
    if variant in ("short", "longer"):
        config.method.ascent_epochs = {"short": 0.5, "longer": 1.0}[variant]
    return config
"""
    )
    sweep = ["sweep", f"--config={own}"]
    assert main.run([*sweep, f"--workdir={tmp_path / 'a'}"]) == 0
    printed = capsys.readouterr().out
    assert "2 points of optimizer.learning_rate" in printed
    # How long the ascent is changes the program: these two are trained one after the other.
    assert printed.count("seal on digits") == 2
    assert main.run([*sweep, f"--workdir={tmp_path / 'b'}", "--together=1"]) == 0
    assert "points" not in capsys.readouterr().out
    for variant in configs.variants(str(own)):
        a, b = tmp_path / "a" / variant, tmp_path / "b" / variant
        assert (a / "config.json").read_bytes() == (b / "config.json").read_bytes()
        for row, other in zip(*map(metrics.read, (a, b)), strict=True):
            assert row == {name: pytest.approx(value, rel=1e-4) for name, value in other.items()}
    # What was begun alone goes on alone, and what is finished is left.
    assert main.run([*sweep, f"--workdir={tmp_path / 'b'}"]) == 0
    assert not (tmp_path / "b/together").exists()
    # Of those that were trained together a part is left alone, and one that is gone is written again.
    capsys.readouterr()
    assert main.run([*sweep, f"--workdir={tmp_path / 'a'}", "--only=fast,short"]) == 0
    assert "points" not in capsys.readouterr().out
    rows = metrics.read(tmp_path / "a/fast")
    shutil.rmtree(tmp_path / "a/fast")
    assert main.run([*sweep, f"--workdir={tmp_path / 'a'}", "--only=normal,fast"]) == 0
    assert metrics.read(tmp_path / "a/fast") == rows
    # Before they are, a part would be trained twice.
    shutil.rmtree(tmp_path / "a/normal")
    shutil.rmtree(tmp_path / "a/fast")
    own.write_text(own.read_text().replace('"fast": 0.2', '"fast": 0.3'))
    assert main.run([*sweep, f"--workdir={tmp_path / 'a'}", "--only=normal,fast"]) == main.USAGE
    assert "holds a run of other points than normal, fast" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ("{", "cannot be read: it is not JSON"),
        ("[]", "must set the same fields in each point"),
        ('[{"optimizer.momentum": 0.1}, {"optimizer.weight_decay": 0.1}]', "must set the same fields"),
        ('{"optimizer.momentum": ["high"]}', r"optimizer.momentum\[0\] = 'high' must be of type int or float"),
        ('[{"optimizer.momentum": 0.1}, {"optimizer.momentum": 0.1}]', "has a point twice"),
        ('{"optimizer.momemtum": [0.1]}', "optimizer.momemtum is not a setting; nearest: momentum"),
        ('{"train.batch_size": [10, 20]}', "train.batch_size cannot take several values in one program"),
        ('{"data.label_noise": [0.1, 1.5]}', r"data.label_noise = 1.5 must lie in \[0, 1\)"),
        ('{"method.ascent_scale": [0.1, -1]}', "ascent_scale = -1 must be positive"),
        ('{"method.ascent_epochs": [1, 2]}', "method.ascent_epochs cannot take several .*changes the program"),
        ('{"optimizer.ema": [0.9, 0.99]}', "optimizer.ema cannot take several values"),
        ('{"data.label_noise": [0, 0.2]}', r"data.label_noise cannot take several .*\(0 is another program"),
        ('[{"optimizer.momentum": 0.1, "optimizer.weight_decay": 0.2},'
         ' {"optimizer.weight_decay": 0.2, "optimizer.momentum": 0.1}]', "has a point twice"),
        ('{"data.label_noise_seed": [0, 1]}', r"label_noise_seed .*\(it draws nothing without data.label_noise\)"),
        ('{"data.subset_seed": [0, 1]}', r"subset_seed .*\(it draws nothing without data.train_count\)"),
        ('{"optimizer.learning_rate.x": [1]}', "optimizer.learning_rate.x is not a setting"),
        ('{"optimizer.arg.b1": [0.9]}', "optimizer.arg.b1 is not a setting"),
        ('{"method.a.b": [1]}', "method.a.b is not a setting"),
    ],
)  # fmt: skip
def test_what_cannot_be_varied_is_one_line(values, says):
    with pytest.raises(UsageError, match=says):
        Trainer.build(STRIPES, config(None, train={"vary": values}))


def test_a_rate_of_0_is_another_program():
    """FAST has no optimizer for what does not learn, where it is one of optax."""
    method = {"name": "fast", "alpha": 0.1, "beta": 0.1}
    other = {
        "train": {"generations": 1},
        "optimizer": {"name": "adamw", "momentum": 0.0, "weight_decay": 0.0},
    }
    Trainer.build(STRIPES, config({"method.beta": [0.1, 0.2]}, method, **other))
    with pytest.raises(vary.CannotVary, match=r"method\.beta .*\(0 is another program\)"):
        Trainer.build(STRIPES, config({"method.beta": [0.1, 0]}, method, **other))


def test_points_are_told_apart_in_any_order_and_to_the_last_digit():
    """Folders, and types: an integer for a field of numbers is one of these."""
    fields = ("optimizer.learning_rate", "data.label_noise_seed")
    values = [(1, 1_000_001), (2, 1_000_002), (2, 1_000_001)]
    written = [dict(zip(fields, point, strict=True)) for point in values]
    written[1] = dict(reversed(written[1].items()))
    settings = config(written, data={"label_noise": 0.2})
    assert [tuple(point.values()) for point in vary.points(settings)] == values
    assert len({vary.label(point) for point in vary.points(settings)}) == 3
    rate = jax.numpy.int32(2)
    assert vary.replaced(settings, {fields[0]: rate}).optimizer.learning_rate.dtype == "float32"
    with pytest.raises(vary.CannotVary, match="32 bits"):
        vary.values(config({"method.threshold": [2**31, 1]}))


def test_tuned_on(tmp_path):
    """The best point by validation among those with this run's data, and what it cannot be."""
    run = config(None, data={"label_noise": 0.4, "validation_fraction": 0.5})

    def tuned(folder="run", **train):
        changed = dataclasses.replace(run.train, tuned_on="../tuning", **train)
        return points.tuned(dataclasses.replace(run, train=changed), tmp_path / folder)

    def tuning(rows=(), train=MappingProxyType({}), **data):
        shutil.rmtree(tmp_path / "tuning", ignore_errors=True)
        values = {"optimizer.learning_rate": [0.1, 0.2, 0.3], "data.label_noise": [0.2, 0.4]}
        settings = config(values, data={"validation_fraction": 0.5} | data)
        (tmp_path / "tuning").mkdir()
        workdir.write(tmp_path / "tuning", settings)
        for folder, row in zip(points.folders(tmp_path / "tuning", settings), rows, strict=False):
            with metrics.MetricsLog(folder, resume_step=-1) as log:
                log.append({"step": 3, "generation": 0, "validation/accuracy": [1.0, 1.0]})
                log.append({"step": 6, "generation": 1, **row})
            workdir.write(folder, settings)
        return tuned(**train)

    accuracies = [[0.1, 0.9], [0.6, 0.6], [1.0, 1.0], [0.7, 0.6], [1.0, 1.0], [1.0, np.nan]]
    rows = [{"validation/accuracy": accuracy} for accuracy in accuracies]
    # The second of each pair has this run's noise; of these the third diverged in a seed.
    chosen = tuning(rows)
    assert chosen.optimizer.learning_rate == 0.2
    assert (chosen.data, chosen.train.tuned_on, chosen.train.vary) == (run.data, "", "")
    # Of equal ones that with the lower loss is the best.
    equal = [
        {"validation/accuracy": [0.9, 0.9], "validation/loss": [1.0, of]}
        for of in (0, 3, 0, 1, 0, 2)
    ]
    assert tuning(equal).optimizer.learning_rate == 0.2
    # Several of them become the points of this run, the best one first.
    several = tuning(rows, {"tuned_points": 2}).train
    assert json.loads(several.vary) == [{"optimizer.learning_rate": rate} for rate in (0.2, 0.1)]
    assert (several.tuned_on, several.tuned_points) == ("", 1)
    # By the average of the weights the first of those with this noise is the best.
    by_average = [
        row | {"validation_ema/accuracy": [value] * 2}
        for row, value in zip(rows, (0.9, 0.8, 0.9, 0.7, 0.9, 0.7), strict=True)
    ]
    assert tuning(by_average, {"tuned_weights": "ema"}).optimizer.learning_rate == 0.1
    with pytest.raises(UsageError, match=r"and validation_ema/accuracy .*, and optimizer\.ema$"):
        tuning(rows, {"tuned_weights": "ema"})
    for arguments, says in (
        ({"rows": rows, "name": "other"}, "has data.name = 'other' and this run 'digits'"),
        ({"rows": rows[:3]}, r"has not ended, there is no .*learning_rate=0\.2_label_noise=0\.4"),
        ({"rows": [{}] * 6}, "has no point with this run's data and validation/accuracy in"),
        ({"rows": rows, "selection": "test_best", "validation_fraction": 0.0}, "by the test split"),
    ):
        with pytest.raises(UsageError, match=says):
            tuning(**arguments)
    with pytest.raises(UsageError, match="is not the folder of a run"):
        tuned("run/deeper")


def test_a_seed_that_diverges_ends_no_run_that_keeps_it(tmp_path, monkeypatch):
    init = inspect.getattr_static(experiment.Experiment, "init").func

    def second_is_lost(self, *arguments):
        state = init(self)(*arguments)
        params = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), state.weights.params)
        return state._replace(weights=state.weights._replace(params=params))

    alone = loop.train(config(None, train={"seeds": 1}), tmp_path / "alone", STRIPES, devices=1)
    lost = property(lambda self: functools.partial(second_is_lost, self))
    monkeypatch.setattr(experiment.Experiment, "init", lost)
    with pytest.raises(loop.NonFiniteError):
        loop.train(config(None), tmp_path / "ends", STRIPES, devices=1)
    kept = config(None, run={"keep_diverged": True})
    assert loop.train(kept, tmp_path / "kept", STRIPES, devices=1).finished
    for row, its in zip(*map(metrics.read, (tmp_path / "kept", tmp_path / "alone")), strict=True):
        assert row["train/accuracy"][0] == pytest.approx(its["train/accuracy"][0])
        assert np.isnan(row["train/loss"][1])
    assert alone.finished


def test_a_file_of_labels_is_kept_beside_draws(tmp_path):
    np.savetxt(tmp_path / "labels.txt", STRIPES.train.labels[::-1], fmt="%d")
    draws = [{**dict.fromkeys(vary.DRAWN, 0), "subset_seed": seed} for seed in range(2)]
    file = str(tmp_path / "labels.txt")
    drawn = data.study(STRIPES, train_count=9, label_file=file, draws=draws)
    np.testing.assert_array_equal(drawn.label_record, STRIPES.train.labels[::-1])
    clean = data.study(STRIPES, train_count=9, draws=draws)
    assert clean.label_record is clean.draws.clean_labels is None


def test_settings_that_do_not_fit_otherwise_keep_their_message():
    method = {"name": "lw", "sample_size": 1000}
    with pytest.raises(
        UsageError, match=r"method\.sample_size = 1000 is larger than the training split"
    ):
        Trainer.build(
            STRIPES,
            config(
                {"optimizer.learning_rate": [0.1, 0.2]},
                method,
                train={"generations": 2, "epochs_per_generation": 1},
            ),
        )


def test_streamed_images_have_one_draw():
    dataset = data.study(STRIPES, train_count=9, draws=[dict.fromkeys(vary.DRAWN, 0)] * 2)

    class Streamed:
        train = type("Split", (), {"streamed": True})
        draws = dataset.draws

    with pytest.raises(UsageError, match=r"data\.placement: trainings with draws of their own"):
        experiment.check_data(Settings(), Streamed)
    # By which a sweep knows that its variants are to be trained one by one.
    with pytest.raises(vary.CannotVary, match=r"data\.label_noise .*\(images are streamed\)"):
        experiment.check_data(Settings(train=Train(vary='{"data.label_noise": [0.1]}')), Streamed)
