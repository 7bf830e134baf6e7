"""A study that is trained in several calls ends like one that is not, where only its few requirements are."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
# Of the trainer's requirements those that `train` does without: any import of them fails.
MISSING = (
    *("ml_collections", "tensorflow_datasets", "array_record", "grain", "tensorboard"),
    *("sklearn", "safetensors", "importlib_resources", "torch"),
)
ALONE = f"""
import sys
sys.modules.update(dict.fromkeys({MISSING}))
from benchmarks import study
sys.exit(study.main(sys.argv[1:]))
"""
OPTIONS = ["train", "--quick", "--minutes=60", "--variants=seal,llf"]
# SEAL is trained; that LLF diverged is read from here.
DIVERGED = {"variant": "llf", "steps": 0, "seconds": 1.0, "diverged": "the loss is not finite"}


@pytest.fixture(autouse=True)
def _import_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def figures(folder):
    return json.loads((folder / "study.json").read_text())


def test_calls_end_like_one_without_the_trainers_requirements(tmp_path, capsys):
    from benchmarks import study

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
        (folder / "calls.jsonl").write_text(json.dumps(DIVERGED) + "\n")
    alone = subprocess.run(
        [sys.executable, "-c", ALONE, *OPTIONS, f"--workdir={whole}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr

    # Which way of running the seeds is the faster one may differ between two measurements, and rounding with it.
    shutil.copy(whole / "plan.json", parts)
    assert study.main([*OPTIONS, f"--workdir={parts}", "--per-call=1e-6"]) == 75
    seal, llf = figures(parts)["trainings"]
    assert (seal["variant"], seal["epochs"], seal["state"]) == ("seal", "1 of 4", "not finished")
    assert (llf["epochs"], llf["state"]) == (None, "diverged: the loss is not finite")
    assert study.main([*OPTIONS, f"--workdir={parts}"]) == 0
    rows = [(folder / "seal" / "metrics.jsonl").read_bytes() for folder in (whole, parts)]
    assert rows[0] == rows[1]
    assert rows[0].count(b"\n") == 4

    # What is reported is what the runs hold, at the ends of SEAL's generations.
    report = figures(parts)
    assert report["accuracy"] == figures(whole)["accuracy"]
    assert [(row["variant"], row["epoch"]) for row in report["accuracy"]] == [
        ("seal", 2),
        ("seal", 4),
    ]
    last = json.loads((parts / "seal" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {key: report["accuracy"][-1][key] for key in study.MEASURED} == {
        key: last[key] for key in study.MEASURED
    }
    diverged, *calls = study.read_calls(parts)
    assert diverged == DIVERGED
    assert [(call["variant"], call["steps"]) for call in calls] == [("seal", 5), ("seal", 15)]
    # 20 steps of two seeds' 32 images, in the seconds of both calls.
    seconds = calls[0]["seconds"] + calls[1]["seconds"]
    assert report["trainings"][0]["images/s"] == pytest.approx(20 * 2 * 32 / seconds)
    assert (parts / "study.png").stat().st_size > 10_000
    text = (parts / "study.md").read_text()
    for part in ("python -m benchmarks.study", "images/s", "wrong labels learnt %", "seal"):
        assert part in text
    # Nothing is left to train, and the run folder without its checkpoints says so.
    shutil.rmtree(parts / "seal" / "checkpoints")
    assert study.main([*OPTIONS, f"--workdir={parts}"]) == 0
    assert len(study.read_calls(parts)) == 3
    assert study.main([*OPTIONS, f"--workdir={parts}", "--minutes=30"]) == 2
    assert "was made for --minutes=60 --variants=seal,llf: give these" in capsys.readouterr().err


def test_differences_are_of_the_same_seeds_and_data():
    from benchmarks import study

    def run(name, noise, accuracies, memorised=None):
        train = {"generations": 1, "epochs_per_generation": 2, "seeds": 3}
        config = {"data": {"name": "digits", "label_noise": noise}, "train": train}
        rows = [
            {"epoch": 0, "generation": 0},
            {"epoch": 1, "generation": 0, "test_last/accuracy": accuracies},
        ]
        if memorised:
            rows[1]["train/memorised"] = memorised
        # One that is not finished has no such row yet.
        return study.Run(Path(name), name, config, rows[: 2 if accuracies else 1])

    found = [
        run("long", 0.4, [0.5, 0.6, 0.7], [0.9, 0.9, 0.9]),
        run("long_clean", 0.0, [0.9, 0.9, 0.9]),
        run("llf", 0.4, [0.6, 0.7, 0.8], [0.4, 0.5, 0.6]),
        run("seal", 0.4, None),
        run("llf_clean", 0.0, [0.9, 0.8, 0.7]),
    ]
    rows = study.difference_rows(found)
    assert [(row["variant"], row["over"]) for row in rows] == [
        ("llf", "long"),
        ("llf_clean", "long_clean"),
    ]
    assert [row["test %"] for row in rows] == ["10.00 ± 0.00", "-10.00 ± 24.84"]
    # Student's t of three values: 4.3027 / sqrt(3) deviations.
    assert [row["wrong labels learnt %"] for row in rows] == ["-40.00 ± 24.84", None]
    assert "llf_clean" in study.common.Report("differences", rows).as_text()


def test_length_fits_the_minutes(monkeypatch):
    """Six variants of which a call of ten minutes trains two: by hand."""
    from benchmarks import gpu, study

    made = study.quick()
    configured = dataclasses.replace(
        made.variants["llf"],
        train=dataclasses.replace(
            made.variants["llf"].train, generations=4, epochs_per_generation=30
        ),
    )
    long = dataclasses.replace(
        configured,
        train=dataclasses.replace(configured.train, generations=1, epochs_per_generation=120),
    )
    variants = {f"{index}": long if index % 3 == 0 else configured for index in range(6)}
    # An epoch of five steps takes ten seconds.
    speeds = [
        {"seeds by": "vmap", "compile s": 40.0, "ms/step": 2000.0, "images/s": 32.0},
        {"seeds by": "map", "note": "failed: out of memory"},
    ]
    monkeypatch.setattr(study, "measure", lambda *arguments: speeds)
    monkeypatch.setattr(study.time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(gpu, "flops", lambda model, variables, batch: 1e9 * batch)
    many = study.Study(variants, made.source)
    plan = study.make_plan(many, list(variants), minutes=30, per_call=10)
    # 480 of the 600 seconds, without those in which two variants start, for eight epochs of each unit.
    assert plan["epochs"] == int((480 - 2 * 60) / (8 * 10)) == 4
    assert plan["seed_batching"] == "vmap"
    assert plan["checkpoint_every_epochs"] == 12
    assert study.planned(long, plan).train.epochs_per_generation == 16
    assert study.planned(configured, plan).train.epochs_per_generation == 4
    # All six in one call, and more minutes than the config has epochs for.
    assert study.make_plan(many, list(variants), 60, 60)["epochs"] == int((2880 - 360) / 240)
    assert study.make_plan(many, list(variants), 1e4, 1e4)["epochs"] == 30
    with pytest.raises(study.UsageError, match=r"takes 12.5 minutes of a call; give more"):
        study.make_plan(many, list(variants), 10, 10)
    plan["peak"] = 1e12
    ours, other = study.speed_rows(plan)
    assert ours["MFU %"] == pytest.approx(100 * 32 * 1e9 / 1e12)
    assert other["note"] == "failed: out of memory"


def test_packed_study_is_that_of_the_config(tmp_path, digits_dir, monkeypatch, capsys):
    from benchmarks import packed, study
    from seal_jax.cli import configs
    from seal_jax.training import experiment

    config, file = str(ROOT / "configs" / "quickstart.py"), tmp_path / "study.npz"
    overrides = [f"--config.data.data_dir={digits_dir}", "--config.data.label_noise=0.25"]
    assert study.main(["pack", f"--config={config}", f"--output={file}", *overrides]) == 0
    assert "1,437 + 360 images of digits" in capsys.readouterr().out
    loaded = packed.load(file)
    assert tuple(loaded.variants) == configs.variants(config)
    for name, settings in loaded.variants.items():
        assert settings == configs.load(f"{config}:{name}", overrides)
    ours = experiment.split_data(settings.data, loaded.source)
    theirs = experiment.load_data(settings.data)
    for split in ("train", "validation", "test"):
        for part in ("images", "labels", "clean_labels"):
            mine, other = (getattr(getattr(found, split), part) for found in (ours, theirs))
            assert (mine is None) == (other is None)
            if mine is not None:
                np.testing.assert_array_equal(mine, other)
    assert ours.class_names == theirs.class_names
    assert ours.origin.fingerprint == theirs.origin.fingerprint

    def error(*arguments):
        assert study.main(arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    # One byte of the images is another.
    broken = tmp_path / "broken.npz"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    broken.write_bytes(content)
    folder = f"--workdir={tmp_path / 'run'}"
    (tmp_path / "empty.npz").touch()
    for bad in (broken, tmp_path / "absent.npz", tmp_path / "empty.npz", ROOT / "README.md"):
        line = error("train", f"--study={bad}", folder, "--minutes=1")
        assert "cannot be read" in line
        assert line.endswith("write it by `pack`")
    assert "--variants=sael must be among" in error(
        "train", f"--study={file}", folder, "--minutes=1", "--variants=sael"
    )
    assert "one of them" in error("train", folder, "--minutes=1")
    assert "--per-call=-1 must be positive" in error(
        "train", "--quick", folder, "--minutes=1", "--per-call=-1"
    )
    assert not (tmp_path / "run").exists()

    monkeypatch.setattr(packed, "MOST_BYTES", 1_000)
    assert "--config.data.train_split=train[:N%]" in error(
        "pack", f"--config={config}", f"--output={tmp_path / 'large.npz'}", *overrides
    )
    two = tmp_path / "two.py"
    two.write_text(
        "from seal_jax.cli.configs import base\n"
        "VARIANTS = ('digits', 'mnist')\n"
        "def get_config(name):\n"
        "    config = base()\n"
        "    config.data.name = name\n"
        "    return config\n"
    )
    assert "data.name differs" in error("pack", f"--config={two}", f"--output={tmp_path / 'two'}")


def test_settings_of_the_gpu_study_fit_fashion_mnist():
    """Whole calls of steps in an epoch, and the same number of epochs for all, of whole generations."""
    from benchmarks import common
    from seal_jax import data
    from seal_jax.cli import configs
    from seal_jax.training import experiment

    config = str(ROOT / "configs" / "studies" / "gpu_label_noise.py")
    labels = np.arange(60_000, dtype=np.int32) % 10
    images = np.broadcast_to(np.uint8(0), (60_000, 28, 28, 1))
    source = data.from_arrays((images, labels), (images[:10], labels[:10]), validation_fraction=0.0)
    epochs = set()
    for name in configs.variants(config):
        settings = configs.load(f"{config}:{name}")
        dataset = experiment.split_data(settings.data, source)
        built = common.build(settings, dataset)
        assert (built.steps_per_call, built.clock.steps_per_epoch) == (20, 400)
        assert (dataset.train.clean_labels is None) == name.endswith("_clean")
        epochs.add(settings.train.generations * settings.train.epochs_per_generation)
    assert epochs == {120}
