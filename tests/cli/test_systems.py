"""Every system of the papers trains, in seconds; the table of them is right; KELS's slim network."""

import fcntl
import functools
import json
import os
import shutil

import numpy as np
import pytest
from sklearn.datasets import load_digits

from seal_jax import methods
from seal_jax.cli import configs, main
from seal_jax.training import loop

DIGITS = "configs/digits.py"
EPOCHS = 4
SYSTEMS = tuple(methods.VARIANTS.values())
STARTS = {
    system.key: system.digits["train.pretrained"].removeprefix("../")
    for system in SYSTEMS
    if "train.pretrained" in system.digits
}
SMALLER = {"lw": ["--config.method.rounds=1"], "kels": ["--config.train.seeds=2"]}


class Systems:
    """Trains variants of the config in one folder, which the processes of a session share."""

    def __init__(self, folder, digits_dir):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.data = f"--config.data.data_dir={digits_dir}"

    def once(self, name, action):
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (self.folder / f"{name}.done").exists():
                action()
                (self.folder / f"{name}.done").touch()

    def arguments(self, variant):
        workdir = self.folder / variant
        arguments = ["train", f"--config={DIGITS}:{variant}", f"--workdir={workdir}", self.data]
        fields = ["data.train_split=train[:200]", "data.validation_fraction=0.5"]
        fields += ["train.seeds=1", f"train.epochs_per_generation={EPOCHS}"]
        fields += [f"train.generations={generations(variant)}"]
        return arguments + [f"--config.{each}" for each in fields] + SMALLER.get(variant, [])

    def trained(self, variant):
        """Return the folder of a finished run, to look at and not to change."""
        if variant in STARTS:
            self.trained(STARTS[variant])
        workdir = self.folder / variant
        arguments = self.arguments(variant)
        self.once(variant, lambda: assert_equal(main.run(arguments), main.OK))
        return workdir


def assert_equal(found, expected):
    assert found == expected


def generations(variant):
    return 1 if variant in STARTS else 2


@pytest.fixture
def systems(shared_folder, digits_dir, monkeypatch):
    # Batches of ten images do not divide among the eight devices of the tests.
    monkeypatch.setattr(loop, "train", functools.partial(loop.train, devices=1))
    return Systems(shared_folder / "systems", digits_dir)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("variant", list(methods.VARIANTS))
def test_every_system_trains(systems, variant):
    found = rows(systems.trained(variant))
    assert [row["epoch"] for row in found] == list(range(generations(variant) * EPOCHS))
    for row in found:
        assert all(np.isfinite(value).all() for value in row.values())
    assert np.mean(found[-1]["test_last/accuracy"]) > 0.2  # chance is 0.1
    assert (systems.folder / variant / "curves.png").stat().st_size


def test_the_table_has_everything():
    assert len({system.name for system in SYSTEMS}) == len(SYSTEMS)
    assert {system.method for system in SYSTEMS} == set(methods.NAMES)
    assert all(system.source for system in SYSTEMS)
    order = configs.variants(DIGITS)
    for variant, start in STARTS.items():  # as a sweep goes through them
        assert order.index(start) < order.index(variant)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.key)
def test_the_configs_are_what_the_table_says(system):
    for config in system.also:
        file, _, variants = config.partition(":")
        assert {*filter(None, variants.split(","))} <= {*configs.variants(f"configs/{file}")}
    plain = methods.VARIANTS[system.method]
    assert not plain.changes
    cases = [
        (f"{DIGITS}:{system.key}", f"{DIGITS}:{plain.key}", {**system.changes, **system.digits})
    ]
    if system.config:
        cases.append((f"configs/{system.config}", f"configs/{plain.config}", system.changes))
    for config, without, values in cases:
        settings, others = configs.load(config), configs.load(without)
        assert settings.method["name"] == others.method["name"] == system.method
        for field in system.changes:
            assert setting(settings, field) == values[field]
            assert setting(settings, field) != setting(others, field), f"{config}: {field}"


def setting(settings, field):
    section, _, name = field.rpartition(".")
    return getattr(getattr(settings, section), name) if section else settings.method[field]


def test_the_command_lists_them(capfd):
    assert main.run(["methods"]) == main.OK
    captured = capfd.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == ""
    for system in SYSTEMS:
        (line,) = [line for line in lines if line.startswith(f"{system.name}  ")]
        cells = [cell.strip() for cell in line.split("  ") if cell]
        method = f"{system.method} {system.options}".strip()
        assert cells == [*filter(None, [system.name, method, system.config, system.source])]
    for name in methods.NAMES:
        assert any(line.split()[:1] == [name] and line.startswith("  ") for line in lines)


def held_out():
    """The 360 test images and labels, from scikit-learn itself."""
    digits = load_digits()
    images = np.round(digits.images[::5] * (255 / 16)).reshape(-1, 64)
    return (images / 255 - 0.3053) / 0.3762, digits.target[::5]


def forward(weights, images):
    hidden = images
    for layer in ("dense1/linear", "dense2/linear"):
        kernel, bias = weights[f"params/{layer}/kernel"], weights[f"params/{layer}/bias"]
        hidden = np.maximum(hidden @ kernel + bias, 0)
    return hidden @ weights["params/fc/kernel"] + weights["params/fc/bias"]


def test_slim(systems, tmp_path, capfd):
    run, output = systems.trained("kels"), tmp_path / "slim"
    capfd.readouterr()
    assert main.run(["slim", str(run), f"--output={output}"]) == main.OK
    whole, slim, where = capfd.readouterr().out.splitlines()
    assert where == f"weights: {output / 'slim.npz'}"
    with np.load(output / "slim.npz", allow_pickle=False) as file:
        arrays = {name: file[name].astype(np.float64) for name in file.files}
    shapes = {name: array.shape for name, array in arrays.items()}
    assert shapes == {  # of 32 units 26 are kept; two seeds
        "params/dense1/linear/kernel": (2, 64, 26),
        "params/dense1/linear/bias": (2, 26),
        "params/dense2/linear/kernel": (2, 26, 26),
        "params/dense2/linear/bias": (2, 26),
        "params/fc/kernel": (2, 26, 10),
        "params/fc/bias": (2, 10),
    }
    count = sum(array[0].size for array in arrays.values())
    assert slim.startswith(f"slim   {count:>12,} parameters  test accuracy ")
    assert f" {64 * 32 + 32 + 32 * 32 + 32 + 32 * 10 + 10:,} parameters" in whole
    images, labels = held_out()
    accuracies = []
    for seed in (0, 1):
        weights = {name: array[seed] for name, array in arrays.items()}
        hits = forward(weights, images).argmax(1) == labels
        accuracies.append(hits.mean())
    assert slim.endswith("  ".join(f"{100 * value:.2f} %" for value in accuracies))
    record = json.loads((output / "slim.json").read_text())
    np.testing.assert_allclose(record["slim"]["test_accuracy"], accuracies, rtol=1e-6)
    last = rows(run)[-1]["test_last/accuracy"]
    assert whole.endswith("  ".join(f"{100 * value:.2f} %" for value in last))
    assert record["whole"]["test_accuracy"] == last
    assert sorted(os.listdir(output)) == ["slim.json", "slim.npz"]


@pytest.mark.slow
def test_slim_says_what_layer_norm_changes(systems, tmp_path, capfd):
    systems.trained("kels")  # its data
    run = tmp_path / "run"
    arguments = systems.arguments("kels")
    arguments[2] = f"--workdir={run}"
    layer = ["model.norm=layer", "train.generations=1", "train.epochs_per_generation=1"]
    assert main.run(arguments + [f"--config.{field}" for field in layer]) == main.OK
    capfd.readouterr()
    assert main.run(["slim", str(run), f"--output={tmp_path / 'slim'}"]) == main.OK
    note = "model.norm=layer: the slim network normalises over its own channels, "
    assert capfd.readouterr().out.splitlines()[2].startswith(note)


def test_slim_that_cannot_be(systems, tmp_path, capfd):
    def error(run, output=tmp_path / "out"):
        capfd.readouterr()
        assert main.run(["slim", str(run), f"--output={output}"]) == main.USAGE
        captured = capfd.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return captured.err.removesuffix("\n")

    normal, kels = systems.trained("normal"), systems.trained("kels")
    assert error(normal) == (
        f"error: {normal} was trained by 'normal'; only KELS has a slim network"
    )
    assert error(tmp_path / "none") == f"error: {tmp_path / 'none'} is not the folder of a run"
    started = tmp_path / "started"
    started.mkdir()
    shutil.copy(kels / "config.json", started)
    assert error(started) == f"error: {started} holds no checkpoint yet"
    other = shutil.copytree(kels, tmp_path / "other")
    config = json.loads((kels / "config.json").read_text())
    for section, field, value, says in [
        ("train", "seeds", 3, "is [2, "),
        ("model", "name", "resnet8", "here; give the run's own folder"),
        ("method", "keep", "x", "method.keep = 'x' must be of type float"),
        ("method", "rates", 0.5, "method.rates is not a setting"),
        ("model", "name", ["a"], "config.json cannot be read: model.name = ['a'] must be of type"),
    ]:
        changed = {**config, section: {**config[section], field: value}}
        (other / "config.json").write_text(json.dumps(changed))
        assert says in error(other)
    (other / "config.json").write_text(json.dumps(config))
    for text in ("[" * 100_000, '{"digest": 3, "leaves": {}}', "[]"):
        for metadata in other.glob("checkpoints/*/metadata/metadata"):
            metadata.write_text(text)
        assert "no checkpoint in" in error(other)
    (tmp_path / "file").write_text("")
    taken = tmp_path / "file"
    assert error(kels, taken) == f"error: {taken} cannot be written: File exists"
