"""Where weights come from: safetensors and shards, PyTorch's pickles, the cache of the Hugging Face hub."""

import dataclasses
import json
import pickle
import shutil

import jax
import numpy as np
import pytest
from ml_dtypes import bfloat16
from programs import mlp
from safetensors.numpy import save_file
from trainer_runs import Runs, leaves

from seal_jax import models, paths
from seal_jax.cli import main
from seal_jax.core.settings import Settings
from seal_jax.data import Statistics
from seal_jax.errors import OK, USAGE, UsageError
from seal_jax.models import torch_weights
from seal_jax.training import pretrained, weight_files

TENSORS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}


def find(path, **options):
    return weight_files.find(str(path), "it", **{"allow_pickle": False, **options})


def assert_same(tensors, expected=TENSORS):
    assert {*tensors} == {*expected}
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value, strict=True)


def sharded(folder):
    """Write a file for each tensor, and the index of them."""
    for name, value in TENSORS.items():
        save_file({name: value}, folder / f"{name}.safetensors")
    index = {"metadata": {}, "weight_map": {name: f"{name}.safetensors" for name in TENSORS}}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    return path


def test_files_shards_and_folders_of_them(tmp_path):
    index = sharded(tmp_path)
    for path in (index, tmp_path):
        assert_same(find(path).tensors())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UsageError, match=r"b\.safetensors cannot be read"):
        find(index).tensors()
    index.unlink()
    assert {*find(tmp_path).tensors()} == {"a.weight"}  # the only file that is left
    save_file(TENSORS, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="it holds 2 files of weights; name one"):
        find(tmp_path)
    assert_same(find(tmp_path / "other.safetensors").tensors())
    (tmp_path / "empty").mkdir()
    assert find(tmp_path / "empty") is None
    with pytest.raises(UsageError, match="it: there is no such file"):
        find(tmp_path / "missing.safetensors")
    (tmp_path / "a.npz").touch()
    with pytest.raises(UsageError, match=r"it is a file, but none of \.safetensors, \.json"):
        find(tmp_path / "a.npz")


@pytest.mark.parametrize("shard", ["../b.safetensors", "/etc/passwd", "b.bin"])
def test_an_index_names_files_beside_it_alone(tmp_path, shard):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": shard}}))
    with pytest.raises(UsageError, match=r"names '.*', no safetensors file beside it"):
        find(index)


def test_a_truncated_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"a\.safetensors cannot be read .*; download it again"):
        find(path).tensors()


def test_bfloat16(tmp_path):
    save_file({"a": np.array([1.5, -3], bfloat16)}, tmp_path / "a.safetensors")
    found = find(tmp_path / "a.safetensors").tensors()["a"]
    assert found.astype(np.float32).tolist() == [1.5, -3]


def test_a_type_that_numpy_lacks(tmp_path):
    header = b'{"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}'
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x38\x38")
    with pytest.raises(UsageError, match=r"^it: a is F8_E4M3, which cannot be read; save it as"):
        find(path).tensors()


def test_what_is_known_of_the_input(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    assert find(path).statistics() is None
    config = tmp_path / "config.json"
    # As timm writes it, shortened.
    config.write_text(
        json.dumps(
            {
                "architecture": "resnet18",
                "num_classes": 1000,
                "pretrained_cfg": {
                    "input_size": [3, 224, 224],
                    "mean": [0.5, 0.5, 0],
                    "std": [1, 1, 1],
                },
            }
        )
    )
    assert find(path).statistics() == Statistics((0.5, 0.5, 0.0), (1.0, 1.0, 1.0))
    # What is in the header counts first.
    path.write_bytes(weight_files.to_bytes(TENSORS, {"mean": [0.25], "std": [2.0], "seed": 3}))
    assert find(path).statistics() == Statistics((0.25,), (2.0,))
    assert find(path).record()["seed"] == 3
    assert_same(find(path).tensors())
    save_file(TENSORS, path, {"seal_jax": '{"mean": 1}'})
    with pytest.raises(UsageError, match=r"the header of .*model.safetensors: mean = 1 must"):
        find(path).statistics()


class TestPickles:
    """Of PyTorch: read where they are allowed, and tensors alone."""

    def test_consent(self, tmp_path):
        path = tmp_path / "a.pth"
        path.touch()
        with pytest.raises(UsageError, match=r"it is a pickle .* set train\.allow_pickle = True"):
            find(path)

    def test_tensors(self, tmp_path):
        torch = pytest.importorskip("torch")
        state = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in TENSORS.items()}
        for index, content in enumerate(
            (state, {"state_dict": state, "epoch": 3}, {"model": state, "optimizer": {"lr": 0.1}})
        ):
            torch.save(content, path := tmp_path / f"{index}.pth")
            assert_same(find(path, allow_pickle=True).tensors())
        torch.save({"weights": state}, path)
        with pytest.raises(UsageError, match="holds no state_dict of tensors alone"):
            find(path, allow_pickle=True).tensors()
        half = {"a": torch.tensor([1.5]).bfloat16(), "num_batches_tracked": torch.tensor(3)}
        torch.save(half, path)
        found = find(path, allow_pickle=True).tensors()
        assert found["a"].tolist() == [1.5]
        assert found["num_batches_tracked"].dtype == np.int64

    def test_code_does_not_run(self, tmp_path):
        pytest.importorskip("torch")

        class Touch:
            def __reduce__(self):
                return open, (str(tmp_path / "ran"), "w")

        path = tmp_path / "a.pth"
        path.write_bytes(pickle.dumps({"a": Touch()}))
        with pytest.raises(UsageError, match=r"torch\.load\(weights_only=True\) refuses it"):
            find(path, allow_pickle=True).tensors()
        assert not (tmp_path / "ran").exists()
        pickle.loads(path.read_bytes())["a"].close()  # it would have run
        assert (tmp_path / "ran").exists()


class TestHub:
    """The cache of ``huggingface_hub``, without a network."""

    @pytest.fixture
    def snapshot(self, tmp_path, monkeypatch):
        """The folder of a repository's only commit in the cache, laid out as the hub does it."""
        constants = pytest.importorskip("huggingface_hub.constants")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        commit = "0123456789abcdef0123456789abcdef01234567"
        repository = tmp_path / "models--timm--resnet18"
        folder = repository / "snapshots" / commit
        folder.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        return folder

    def test_names(self, snapshot):
        save_file(TENSORS, snapshot / "model.safetensors")
        (snapshot / "config.json").write_text('{"pretrained_cfg": {"mean": [0.5], "std": [0.5]}}')
        (snapshot / "part").mkdir()
        save_file({"b": TENSORS["b"]}, snapshot / "part" / "b.safetensors")
        for name in ("", "@main", f"@{snapshot.name}", "/model.safetensors"):
            found = find(f"hf://timm/resnet18{name}")
            assert_same(found.tensors())
            assert found.statistics() == Statistics((0.5,), (0.5,))
        assert {*find("hf://timm/resnet18@main/part/b.safetensors").tensors()} == {"b"}

    def test_shards(self, snapshot):
        sharded(snapshot)
        assert_same(find("hf://timm/resnet18").tensors())
        (snapshot / "b.safetensors").unlink()
        with pytest.raises(
            UsageError, match=r"neither the hub nor its cache has a\.weight\.safetensors or b"
        ):
            find("hf://timm/resnet18")

    def test_pickles(self, snapshot):
        torch = pytest.importorskip("torch")
        torch.save({n: torch.tensor(v) for n, v in TENSORS.items()}, snapshot / "pytorch_model.bin")
        with pytest.raises(UsageError, match="neither the hub nor its cache has"):
            find("hf://timm/resnet18")
        (snapshot / "epoch3.ckpt").symlink_to("pytorch_model.bin")
        for file in ("pytorch_model.bin", "epoch3.ckpt"):
            with pytest.raises(UsageError, match="it is a pickle of PyTorch"):
                find(f"hf://timm/resnet18/{file}")
        assert_same(find("hf://timm/resnet18", allow_pickle=True).tensors())

    @pytest.mark.parametrize("name", ["timm/resnet50", "timm/resnet18@v2", "a/b c"])
    def test_what_is_not_there(self, snapshot, name):
        with pytest.raises(
            UsageError, match=r"neither the hub nor its cache has .*; give the name"
        ):
            find(f"hf://{name}")

    def test_what_is_no_name(self):
        with pytest.raises(UsageError, match="it must be hf://owner/name"):
            find("hf://resnet18")

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
        with pytest.raises(
            UsageError, match=r'needs huggingface_hub: pip install "seal_jax\[hf\]"'
        ):
            find("hf://timm/resnet18")


def test_the_normalisation_of_the_weights_is_taken_where_it_is_left_open(tmp_path):
    path, workdir = tmp_path / "a.safetensors", tmp_path / "run"
    for record, name in (
        ({"mean": [0.5] * 3, "std": [0.5] * 3}, "0.5,0.5,0.5/0.5,0.5,0.5"),
        ({"mean": [0.2859], "std": [0.3530]}, "fashion_mnist"),
        ({}, "imagenet"),
    ):
        path.write_bytes(weight_files.to_bytes(TENSORS, record))
        settings = mlp(data={"normalisation": ""}, train={"pretrained": str(path)})
        completed = pretrained.complete(settings, workdir)
        assert completed.data.normalisation == name
        assert dataclasses.replace(completed, data=settings.data) == settings
        chosen = dataclasses.replace(settings.data, normalisation="cifar10")
        settings = dataclasses.replace(settings, data=chosen)
        assert pretrained.complete(settings, workdir) == settings
    # The run in the folder goes on as it began, even without the file.
    path.unlink()
    workdir.mkdir()
    settings = mlp(data={"normalisation": ""}, train={"pretrained": str(path)})
    started = dataclasses.replace(settings.data, normalisation="svhn")
    record = dataclasses.asdict(dataclasses.replace(settings, data=started))
    (workdir / "config.json").write_text(json.dumps(record))
    assert pretrained.complete(settings, workdir).data == started


def test_a_run_is_exported_and_started_from(shared_folder, tmp_path, capsys):
    runs = Runs(shared_folder)
    run, file = runs.reference(method="normal"), tmp_path / "weights" / "mlp.safetensors"
    export = ["export", f"--checkpoint={run}", f"--output={file}"]
    assert main.run(export) == OK
    assert "12 tensors by the names of seal_jax, of mlp, seed 0, last" in capsys.readouterr().out
    found = find(file)
    record = found.record()
    assert record["model"]["norm"] == "batch"
    assert (record["image_shape"], record["classes"][-1]) == ([8, 8, 1], "9")
    source = leaves(run)
    exported = {
        name.removeprefix("weights/"): leaf[0]
        for name, leaf in source.items()
        if name.startswith("weights/")
    }
    assert_same(found.tensors(), exported)
    # A rate so small that no parameter moves: the training ends with the weights it started from.
    started = tmp_path / "run"
    shutil.copytree(file.parent, tmp_path / "run-weights")
    start = [
        "--config.train.pretrained=../run-weights/mlp.safetensors",
        "--config.train.seeds=2",
        "--config.optimizer.learning_rate=1e-30",
        "--config.train.generations=1",
        "--config.train.epochs_per_generation=1",
    ]
    runs.finish(started, *start, method="normal")
    out = capsys.readouterr().out
    assert (
        "pretrained: 12 tensors by the names of seal_jax; trained on images normalised by digits\n"
        in out
    )
    assert json.loads((started / "config.json").read_text())["data"]["normalisation"] == "digits"
    for name, leaf in leaves(started, 4).items():
        if name.startswith("weights/params/"):
            for seed in range(2):
                np.testing.assert_array_equal(leaf[seed], source[name][0])
    for arguments, says in (
        (export, f"--output={file} exists"),
        ([*export[:2], f"--output={tmp_path / 'a.bin'}"], "must be a file, NAME.safetensors"),
        (
            [*export[:2], f"--output={tmp_path / 'a.safetensors'}", "--seed=3"],
            "--seed=3 is none of",
        ),
        (
            [*export[:2], f"--output={tmp_path / 'a.safetensors'}", "--names=timm"],
            "--names = 'timm' must be one of seal_jax",
        ),
        ([*export[:2], f"--output={tmp_path / 'a.safetensors'}", "--weights=worst"], "worst"),
        (
            ["export", "--checkpoint=.", f"--output={tmp_path / 'a.safetensors'}"],
            "is not the folder of a run",
        ),
    ):
        assert main.run(arguments) == USAGE
        assert says in capsys.readouterr().err
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.slow
def test_fast_adapts_weights_of_torchvision_to_grey_images(shared_folder, tmp_path, capsys):
    model = models.create("resnet18", num_classes=1000, image_shape=(224, 224, 3), width=4)
    tensors = {
        f"module.{name}": value
        for name, value in torch_weights.to_torch(
            model, dict(paths.named_leaves(model.init(jax.random.key(0)))), "torchvision"
        ).items()
    }
    save_file(tensors, tmp_path / "resnet18.safetensors")
    config = tmp_path / "fast.py"
    config.write_text(FAST.format(data_dir=str(Runs(shared_folder).folder / "digits")))
    train = ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    train.append(f"--config.train.pretrained={tmp_path / 'resnet18.safetensors'}")
    assert main.run([*train, "--config.data.channels=0"]) == USAGE
    assert "set data.channels = 3" in capsys.readouterr().err
    assert main.run(train) == OK
    out = capsys.readouterr().out
    assert (
        "by the names of torchvision, with a new classifier; trained on images normalised by" in out
    )
    assert "imagenet (as most are; the file does not say)" in out
    data = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert data["normalisation"] == "imagenet"
    (tmp_path / "resnet18.safetensors").unlink()
    assert main.run(train) == OK  # it is done, and needs the file no more
    evaluate = ["evaluate", "--kind=anytime", f"--checkpoint={tmp_path / 'run'}"]
    save_file(tensors, tmp_path / "resnet18.safetensors")
    assert main.run(evaluate) == USAGE
    assert "is a file of weights: this needs a run" in capsys.readouterr().err


FAST = """\
from seal_jax.cli.configs import base


def get_config():
    config = base("fast")
    config.data.name = "digits"
    config.data.data_dir = {data_dir!r}
    config.data.validation_fraction = 0.9
    config.data.image_size = 32
    config.data.channels = 3
    config.model.name = "resnet18"
    config.model.width = 4
    config.train.batch_size = 40
    config.train.generations = 1
    config.train.epochs_per_generation = 1
    return config
"""


def test_files_that_do_not_serve(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(weight_files.to_bytes(TENSORS, {"model": {"name": "resnet8", "pool": None}}))
    settings = mlp(train={"pretrained": str(path)})
    with pytest.raises(UsageError, match="is a file of weights: this needs a run"):
        pretrained.read(settings, tmp_path)
    model = models.create("mlp", num_classes=3, image_shape=(8, 8, 1))
    with pytest.raises(UsageError, match=r"'mlp' .*; it was exported from model.name = 'resnet8'$"):
        pretrained.read(settings, tmp_path, model)
    settings = mlp(train={"pretrained": str(path), "pretrained_weights": "best"})
    with pytest.raises(UsageError, match=r"train.pretrained_weights = 'best' is for runs"):
        pretrained.read(settings, tmp_path, model)


def test_settings_have_no_file_by_default():
    assert pretrained.complete(Settings(), None) == Settings()
