"""Starting from a run of LW, whose inserted normalisers come along; and top-5 accuracy."""

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import numpy_mlp as oracle
import pytest
from programs import STRIPES, Trainer, assert_same, host, mlp, normalised, seed_of
from trainer_runs import leaves

from seal_jax import data, paths
from seal_jax.errors import UsageError
from seal_jax.training import loop, metrics, pretrained
from seal_jax.training.step import rank


@pytest.fixture(scope="module")
def lw(tmp_path_factory):
    """Two rounds of LW, one for each block, two seeds."""
    workdir = tmp_path_factory.mktemp("lw")
    train = {"generations": 2, "epochs_per_generation": 2, "seeds": 2}
    config = mlp({"name": "lw"}, train=train, optimizer={"ema": 0.9})
    assert loop.train(config, workdir, STRIPES, devices=1).finished
    return workdir


def numpy_logits(params, normalisers, images):
    x = images.reshape(len(images), -1)
    for name in oracle.HIDDEN:
        layer = params[name]["linear"]
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
        x = (x - normalisers[name]["mean"]) * normalisers[name]["scale"]
    return x @ params["fc"]["kernel"] + params["fc"]["bias"]


@pytest.mark.parametrize("weights", ["last", "best", "ema"])
def test_a_training_from_a_run_of_lw_starts_as_its_network(lw, weights, tmp_path):
    train = {"pretrained": str(lw), "pretrained_weights": weights, "seeds": 2}
    train |= {"generations": 1, "epochs_per_generation": 1}
    source = leaves(lw, 20)
    prefix = {"last": "weights", "best": "best/weights", "ema": "ema"}[weights]

    def of_source(seed):
        found = {}
        for name, leaf in source.items():
            if name.startswith(f"{prefix}/"):
                node = found
                *parents, last = name.removeprefix(f"{prefix}/").split("/")
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = leaf[seed].astype(np.float64)
        return found

    config = mlp(train=train)

    def init_from(experiment):
        run = pretrained.read(config, tmp_path)
        return pretrained.take(config, run, experiment.abstract_state(2), momentum=False)

    trainer = Trainer(STRIPES, config, init_from=init_from)
    images = normalised(STRIPES.test.images)
    for seed in range(2):
        own, theirs = seed_of(host(trainer).weights, seed), of_source(seed)
        assert_same(own.normalisers, theirs["normalisers"])
        assert theirs["normalisers"]["dense2"]["mean"] != 0
        logits = trainer.experiment.model.module.apply(
            own._asdict(), jnp.asarray(images, jnp.float32), train=False
        )
        expected = numpy_logits(theirs["params"], theirs["normalisers"], images)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
        without = numpy_logits(
            theirs["params"], trainer.experiment.model.empty_normalisers(), images
        )
        assert np.abs(without - expected).max() > 0.01


def test_an_optimizer_in_two_parts_starts_from_another_run(lw, tmp_path):
    """FAST holds an Adam for the head and one for the features; momentum comes from either."""
    train = {"pretrained": str(lw), "generations": 1, "seeds": 2}
    config = mlp({"name": "fast"}, optimizer={"name": "adam"}, train=train)
    wanted = Trainer(STRIPES, config).experiment.abstract_state(2)
    run = pretrained.read(config, tmp_path)
    first = pretrained.take(config, run, wanted, momentum=False)
    kernels = ("dense1/linear/kernel", "fc/kernel")
    assert set(first) >= {f"weights/params/{name}" for name in kernels}
    arrays = [(name, leaf) for name, leaf in paths.named_leaves(wanted) if hasattr(leaf, "shape")]
    zeros = {name: np.zeros((2, *leaf.shape[1:])) for name, leaf in arrays}
    run = pretrained.Source(config, zeros, "it")
    taken = pretrained.take(config, run, wanted, momentum=True)
    moments = {name.partition("/mu/")[2] for name in taken if "/mu/" in name}
    assert moments >= set(kernels)


@pytest.mark.slow
def test_a_run_from_lw_is_resumed_without_the_folder_it_started_from(lw, tmp_path):
    train = {"pretrained": "../lw", "generations": 1, "epochs_per_generation": 2, "seeds": 2}
    config, here = mlp(train=train), tmp_path / "run"
    shutil.copytree(lw, tmp_path / "lw")
    done = loop.train(config, here, STRIPES, devices=1)
    for name, leaf in leaves(lw, 20).items():
        if name.startswith("weights/normalisers/"):
            *_, block, value = name.split("/")
            np.testing.assert_array_equal(done.state.weights.normalisers[block][value], leaf)
    assert "test_last/accuracy" in metrics.read(here)[-1]
    assert "test_last/top5_accuracy" not in metrics.read(here)[-1]  # of four classes
    shutil.rmtree(tmp_path / "lw")
    shutil.rmtree(here / "checkpoints" / "10")
    assert_same(loop.train(config, here, STRIPES, devices=1).state, done.state)


def test_methods_that_would_lose_the_normalisers(lw, tmp_path):
    train = {"pretrained": str(lw), "generations": 2, "epochs_per_generation": 1, "seeds": 2}
    with pytest.raises(UsageError, match="normalisers method 'lw' would lose"):
        loop.train(mlp({"name": "lw"}, train=train), tmp_path / "run", STRIPES, devices=1)
    assert not (tmp_path / "run").exists()


def test_only_the_classifier_may_be_missing(lw, tmp_path):
    config = mlp(train={"pretrained": str(lw), "seeds": 2})
    run = pretrained.read(config, tmp_path)
    abstract = Trainer(STRIPES, config).experiment.abstract_state(2)
    new_head = dataclasses.replace(
        config, train=dataclasses.replace(config.train, pretrained_head="replace")
    )
    whole, without = (
        pretrained.take(settings, run, abstract, momentum=False) for settings in (config, new_head)
    )
    assert {*whole} - {*without} == {"weights/params/fc/kernel", "weights/params/fc/bias"}
    for layer, allowed in (("fc", True), ("dense2/linear", False)):
        kernel = f"weights/params/{layer}/kernel"
        partial = {name: leaf for name, leaf in run.leaves.items() if name != kernel}
        source = run._replace(leaves=partial)
        if allowed:
            assert kernel not in pretrained.take(config, source, abstract, momentum=False)
            continue
        with pytest.raises(UsageError, match="another network: nothing there fits params/dense2"):
            pretrained.take(config, source, abstract, momentum=False)


def test_rank_equals_a_stable_sort():
    random = np.random.default_rng(0)
    logits = random.integers(0, 4, (200, 9)).astype(np.float32)  # many ties
    labels = random.integers(0, 9, 200)
    order = np.argsort(-logits, axis=1, kind="stable")
    expected = [list(row).index(label) for row, label in zip(order, labels, strict=True)]
    assert rank(jnp.asarray(logits), jnp.asarray(labels)).tolist() == expected
    top = logits.argmax(1) == labels
    np.testing.assert_array_equal(np.array(expected) == 0, top)
    nothing = rank(jnp.full((1, 9), jnp.nan), jnp.array([0]))
    assert nothing.tolist() == [9]


@pytest.mark.slow
def test_top5_accuracy_where_there_are_more_than_five_classes(tmp_path):
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (100, 4, 4, 1)).astype(np.uint8)
    labels = np.arange(100, dtype=np.int32) % 7
    splits = [slice(0, 50), slice(70, 100), slice(50, 70)]
    dataset = data.from_arrays(*((images[part], labels[part]) for part in splits), num_classes=7)
    config = mlp(train={"generations": 1, "epochs_per_generation": 1, "seeds": 2})
    done = loop.train(config, tmp_path, dataset, devices=1)
    (row,) = metrics.read(tmp_path)
    for key, weights in (("test_last", done.state.weights), ("test_best", done.state.best.weights)):
        for seed in range(2):
            own = seed_of(weights, seed)
            logits = oracle.forward(oracle.wide(own.params), normalised(dataset.test.images))[1]
            first = np.argsort(-logits, axis=1)[:, :5]
            expected = (first == dataset.test.labels[:, None]).any(1).mean()
            np.testing.assert_allclose(row[f"{key}/top5_accuracy"][seed], expected, rtol=1e-6)
    assert "validation/top5_accuracy" not in row
