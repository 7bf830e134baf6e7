"""Everything that takes a path takes one of a bucket, of a server that speaks Cloud Storage's protocol."""

import gc
import io
import json
import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from gcs_server import Buckets, Object
from PIL import Image
from safetensors.numpy import load as load_safetensors
from trainer_runs import LAST, Runs, assert_same_run, leaves, wait_until

from seal_jax import data
from seal_jax.cli import configs, main
from seal_jax.core import files
from seal_jax.core.settings import Run, Settings
from seal_jax.data import catalogue, preparation
from seal_jax.errors import UsageError
from seal_jax.training import loggers, weight_files
from seal_jax.training.checkpoints import Checkpoints
from seal_jax.training.metrics import MetricsLog, read


@pytest.fixture(scope="session")
def runs(shared_folder):
    return Runs(shared_folder)


# For the whole session: gcsfs and TensorStore look at the environment once.
@pytest.fixture(scope="session")
def server():
    pytest.importorskip("gcsfs")
    with Buckets() as buckets, pytest.MonkeyPatch.context() as patch:
        for name, value in buckets.environment.items():
            patch.setenv(name, value)
        yield buckets


@pytest.fixture
def bucket(server):
    """The server, with no objects and no requests."""
    server.objects.clear()
    server.requests.clear()
    server.refused = ""
    return server


def succeed(capsys, *arguments):
    """Run a command; return what it printed."""
    capsys.readouterr()
    assert main.run(list(arguments)) == main.OK
    return capsys.readouterr().out


def error(capfd, *arguments):
    """Run a command that must fail; return its one line."""
    assert main.run(list(arguments)) == main.USAGE
    text = capfd.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


def upload(folder, url):
    for path in folder.rglob("*"):
        if path.is_file():
            (files.as_path(url) / path.relative_to(folder)).write_bytes(path.read_bytes())


def test_a_run_from_its_start_to_its_report(bucket, runs, tmp_path, capsys):
    reference = runs.reference()
    every = "--config.run.checkpoint_every_epochs=2"
    runs.finish("gs://bucket/runs/seal", every)
    workdir = bucket.download("runs/seal", tmp_path)
    assert_same_run(workdir, reference)
    assert sorted(os.listdir(workdir / "checkpoints")) == ["16", "24", "32"]
    assert (workdir / "curves.png").stat().st_size > 10_000
    # As a kill in the middle of the last save leaves it.
    del bucket.objects[f"runs/seal/checkpoints/{LAST}/commit_success.txt"]
    capsys.readouterr()
    runs.finish("gs://bucket/runs/seal", every)
    printed = capsys.readouterr().out
    assert "resuming at step 24" in printed
    assert "gs://bucket/runs/seal is in a bucket, where nothing can be locked" in printed
    assert_same_run(bucket.download("runs/seal", tmp_path / "resumed"), reference)
    folders = ["gs://bucket/runs/seal", str(reference)]
    compared = succeed(capsys, "compare", *folders, "--output=gs://bucket/report")
    assert "report: gs://bucket/report/report.html" in compared
    assert b"Curves" in bucket.objects["report/report.html"].content
    # A bucket cannot: the server refuses it, and gcsfs would copy after half a minute.
    assert not [request for request in bucket.requests if "moveTo" in request]


@pytest.mark.slow
def test_killed_at_arbitrary_moments(bucket, runs, tmp_path):
    def saved(step):
        return f"run/checkpoints/{step}/commit_success.txt" in bucket.objects

    def saving(step):
        prefix = f"run/checkpoints/{step}/"
        return not saved(step) and any(name.startswith(prefix) for name in list(bucket.objects))

    for condition, step in ((saving, 4), (saved, 12), (saving, 20), (saved, 24)):
        process = runs.start("gs://bucket/run")
        wait_until(lambda condition=condition, step=step: condition(step), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not saved(LAST)
    runs.finish("gs://bucket/run")
    assert_same_run(bucket.download("run", tmp_path), runs.reference())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("refused", "says"),
    [
        (
            "checkpoints/16/state/.*ocdbt",
            "checkpoint 16 was not written to {workdir}/checkpo",
        ),
        ("checkpoints/16/commit_success", "the last good one is step 12"),
        ("metrics.jsonl", "does not have storage.objects.create access"),
    ],
)
def test_a_bucket_that_refuses_from_some_moment_on(bucket, runs, tmp_path, refused, says):
    workdir = "gs://bucket/run"
    if refused == "metrics.jsonl":
        runs.finish(workdir, signalled_at=(12, signal.SIGTERM), code=main.STOPPED)
    bucket.refused = refused
    stderr = runs.finish(workdir, code=main.UNWRITABLE)
    *_, last = stderr.strip().splitlines()
    assert last.startswith("error: ")
    assert says.format(workdir=workdir) in last
    bucket.refused = ""
    runs.finish(workdir)
    assert_same_run(bucket.download("run", tmp_path), runs.reference())


def test_what_was_refused_is_not_sent_later(bucket):
    bucket.refused = "^a$"
    path, errors = files.as_path("gs://bucket/a"), []
    file = path.open("w")
    file.write("a")
    for write in (lambda: path.write_bytes(b"a"), lambda: path.write_text("a"), file.close):
        with pytest.raises(OSError, match="does not have storage") as error:
            write()
        errors.append(error)
    bucket.refused = ""
    del file, write, error
    errors.clear()
    gc.collect()
    assert not bucket.objects


@pytest.mark.slow
def test_evaluating_and_starting_from_what_is_in_a_bucket(bucket, runs, tmp_path, capsys):
    reference = runs.reference()
    upload(reference, "gs://bucket/runs/a")
    # Orbax marks a whole checkpoint by its name on a disk, and by an object in a bucket.
    for step in (24, 28, LAST):
        files.as_path(f"gs://bucket/runs/a/checkpoints/{step}/commit_success.txt").write_bytes(b"")
    evaluate = ["evaluate", "--kind=margins", "--sample=20", "--checkpoint"]
    output = "gs://bucket/runs/a/evaluations/margins/results.json"
    assert f"results: {output}" in succeed(capsys, *evaluate, "gs://bucket/runs/a")
    succeed(capsys, *evaluate, str(reference), f"--output={tmp_path / 'margins'}")
    stored = (files.as_path(output).read_text(), (tmp_path / "margins/results.json").read_text())
    rows = [[{**row, "run": ""} for row in json.loads(text)["rows"]] for text in stored]
    assert rows[0] == rows[1]
    # Nothing is left of the attempt to write there.
    assert not [name for name in bucket.objects if "probe" in name]

    weights = "gs://bucket/weights/a.safetensors"
    succeed(capsys, "export", "--checkpoint=gs://bucket/runs/a", f"--output={weights}")
    exported = load_safetensors(bucket.objects["weights/a.safetensors"].content)
    source = leaves(reference)
    expected = [leaf for name, leaf in source.items() if name.startswith("weights/")]
    assert sum(map(np.size, exported.values())) == sum(map(np.size, expected))

    files.as_path("gs://bucket/own.py").write_bytes(runs.config.read_bytes())
    assert configs.variants("gs://bucket/own.py") == ("normal", "llf", "seal")
    labels = np.arange(1437) % 10
    files.as_path("gs://bucket/labels.npy").write_bytes(_npy(labels))
    train = ["train", "--config=gs://bucket/own.py:normal", "--config.train.generations=1"]
    train += ["--config.train.epochs_per_generation=1", "--config.optimizer.learning_rate=1e-12"]
    train += ["--config.train.seeds=8"]
    for name, run in (("../a", "b"), ("gs://bucket/weights", "c")):
        options = [f"--config.train.pretrained={name}", f"--workdir=gs://bucket/runs/{run}"]
        succeed(capsys, *train, *options, "--config.data.label_file=gs://bucket/labels.npy")
        taken = leaves(bucket.download(f"runs/{run}", tmp_path), 4)
        kernels = [leaf for leaf in source if re.fullmatch("weights/.*/kernel", leaf)]
        assert len(kernels) == 3
        for kernel in kernels:
            np.testing.assert_allclose(taken[kernel], source[kernel].repeat(8, 0), atol=1e-6)
        np.testing.assert_array_equal(np.load(tmp_path / f"runs/{run}/labels.npy"), labels)


def _npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_a_damaged_checkpoint_is_set_aside(bucket):
    state = {"a": jnp.arange(2000.0)}
    with Checkpoints("gs://bucket/x") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {})
    record = bucket.objects["x/2/metadata/metadata"]
    record.content = record.content.replace(b'"checksum": ', b'"checksum": 1')
    with Checkpoints("gs://bucket/x") as checkpoints:
        with pytest.warns(UserWarning, match="checkpoint gs://bucket/x/2 is damaged"):
            assert checkpoints.restore(state).step == 1
        checkpoints.save(3, state, {})
    assert Checkpoints("gs://bucket/x").steps() == [1, 3]
    assert bucket.objects["x/damaged-2/metadata/metadata"].content == record.content
    assert not any(name.startswith("x/2/") for name in bucket.objects)


def test_a_second_training_in_the_folder_is_noticed(bucket):
    with MetricsLog("gs://bucket/run", resume_step=-1) as log:
        log.append({"step": 1})
        with MetricsLog("gs://bucket/run", resume_step=0) as other:
            shown_in = Settings(run=Run(loggers="tensorboard,csv"))
            other.show_in(loggers.start(files.as_path("gs://bucket/run"), shown_in))
            other.append({"step": 2, "loss": 0.5})
            with pytest.raises(
                OSError, match="another process has written to it, stop one of the two"
            ):
                log.append({"step": 2})
    assert read("gs://bucket/run") == [{"step": 2, "loss": 0.5}]
    assert sum("tensorboard" in name for name in bucket.objects) == 1
    assert files.as_path("gs://bucket/run/metrics.csv").read_text().split() == [
        "step,loss",
        "2,0.5",
    ]


def test_prepared_data(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main.run(["prepare", "--dataset=digits", "--data-dir=gs://bucket/data"]) == 0
    assert "digits is prepared in gs://bucket/data/digits/1.0.0" in capsys.readouterr().out
    requests = len(bucket.requests)
    assert main.run(["prepare", "--dataset=digits", "--data-dir=gs://bucket/data"]) == 0
    assert not [request for request in bucket.requests[requests:] if request.startswith("POST")]
    prepared = catalogue.prepared("digits", files.as_path("gs://bucket/data"))
    assert prepared.counts == {"train": 1437, "test": 360}
    assert main.run(["datasets", "--data-dir=gs://bucket/data"]) == 0
    assert "prepared: in gs://bucket/data, as TFDS's array_record" in capsys.readouterr().out
    # The processes of a host, which begin at the same time, copy it once.
    copied, copy = [], preparation._copy
    monkeypatch.setattr(preparation, "_copy", lambda *paths: copied.append(paths) or copy(*paths))
    builder = preparation.find_builder("digits", "gs://bucket/data")
    with ThreadPoolExecutor(3) as pool:
        copies = [*pool.map(preparation._copy_of, [builder] * 3)]
    assert len(copied) == len(set(copies)) == 1
    loaded = [data.load("digits", data_dir=folder) for folder in ("gs://bucket/data", tmp_path)]
    np.testing.assert_array_equal(loaded[0].train.images, loaded[1].train.images)
    # The second time from the copy.
    requests = len(bucket.requests)
    data.load("digits", data_dir="gs://bucket/data")
    shards = [request for request in bucket.requests[requests:] if "array_record" in request]
    assert not [request for request in shards if request.endswith("media")]


def test_a_folder_of_images(bucket):
    for index in range(8):
        path = f"gs://bucket/images/{('train', 'test')[index % 2]}/{'ab'[index // 4]}/{index}.png"
        with io.BytesIO() as file:
            Image.fromarray(np.full((4, 4, 3), index, np.uint8)).save(file, "PNG")
            files.as_path(path).write_bytes(file.getvalue())
    options = {"data_dir": "gs://bucket/images", "validation_fraction": 0.0}
    loaded = data.load("folder/own", **options).train
    pixels = loaded.images.max((1, 2, 3)).tolist()
    assert sorted(zip(pixels, loaded.labels.tolist(), strict=True)) == [
        (0, 0),
        (2, 0),
        (4, 1),
        (6, 1),
    ]
    streamed = data.load("folder/own", **options, placement="stream").train
    assert streamed.labels.tolist() == loaded.labels.tolist()


@pytest.mark.parametrize(
    ("where", "why"),
    [
        (
            "gs://forbidden/x",
            "user@example.com does not have storage.objects access; run `gcloud auth",
        ),
        (
            "gs://private/x",
            "Anonymous caller does not have storage.objects access, 401; run `gcloud auth",
        ),
        ("gs://missing/x", "there is no such object or bucket"),
    ],
)
def test_a_bucket_that_refuses_is_one_line(bucket, runs, capfd, where, why):
    train = ["train", f"--config={runs.config}", "--workdir"]
    assert why in error(capfd, *train, where)
    compared = error(capfd, "compare", where)
    assert why in compared or f"{where} holds no run" in compared
    assert where in error(capfd, "evaluate", "--kind=margins", "--checkpoint", where)
    assert where in error(capfd, *train, "gs://bucket/x", f"--config.data.data_dir={where}")
    assert where in error(capfd, *train, "gs://bucket/x", f"--config.train.pretrained={where}")
    assert why in error(capfd, *train, "gs://bucket/x", f"--config.data.label_file={where}/a.npy")
    assert where in error(capfd, "train", f"--config={where}/a.py", "--workdir=gs://bucket/x")
    assert where in error(capfd, "prepare", "--dataset=digits", f"--data-dir={where}")
    with pytest.raises(UsageError, match=f"--output={where} cannot be written: "):
        files.check_writable(files.as_path(where), "--output")
    assert not bucket.objects


def test_the_path_of_a_url():
    for name in ("s3://bucket/x", "https://example.com/x", Path("gs://bucket/x")):
        with pytest.raises(UsageError, match="cannot be opened: give a folder or a gs:// URL"):
            files.as_path(name)
    with pytest.raises(UsageError, match="names no bucket"):
        files.as_path("gs://")


def test_without_gcsfs_the_fix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        UsageError, match=r'needs gcsfs .*: pip install "seal_jax\[gcs\]", or mount'
    ):
        files.as_path("gs://bucket/run")


def test_paths_are_as_those_of_pathlib(bucket, tmp_path):
    root = files.as_path("gs://bucket/a")
    assert not root.exists()
    assert list(root.iterdir()) == []
    (root / "b/c.txt").write_bytes(b"12345")
    bucket.objects["a/"] = Object(b"", 0)  # as the console marks a folder
    assert root.is_dir()
    assert [str(path) for path in root.iterdir()] == ["gs://bucket/a/b"]
    assert [str(path) for path in root.glob("*/*.txt")] == ["gs://bucket/a/b/c.txt"]
    assert (root / "b/c.txt").stat().st_size == 5
    files.append(root / "b/c.txt", b"67")
    assert (root / "b/c.txt").read_text() == "1234567"
    with (root / "w").open("w", newline="") as file:
        file.write("ä\r\n")
        file.flush()
        assert (root / "w").read_bytes() == "ä\r\n".encode()
    with (root / "w").open("ab") as file:
        file.write(b"b")
    assert (root / "w").read_text(encoding="utf-8").endswith("\nb")
    assert str((root / "../d/./e").resolve()) == "gs://bucket/d/e"
    assert files.short_names([root / "x/r", root / "y/r"]) == ["x/r", "y/r"]
    copy = files.local(root / "b/c.txt")
    assert copy.read_bytes() == b"1234567"
    assert files.local(tmp_path) == tmp_path
    with pytest.raises(OSError, match="no such object or bucket"):
        (root / "missing").read_bytes()
    assert weight_files.find("gs://bucket/a", "it", allow_pickle=False) is None
