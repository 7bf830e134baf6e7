"""Which of the paper's columns stands beside which run."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from seal_jax import papers
from seal_jax.cli import configs


@pytest.mark.parametrize(
    ("model", "method", "table", "heading", "accuracy"),
    [
        ("resnet50", {"name": "normal"}, "Table 2", "Normal", {1: 54.37, 3: 51.16, 10: 49.27}),
        ("resnet50", {"name": "llf"}, "Table 2", "LLF", {1: 54.37, 3: 56.12, 10: 56.92}),
        ("resnet50", {"name": "seal"}, "Table 2", "Ours", {1: 54.37, 3: 58.25, 10: 59.22}),
        ("resnet18", {"name": "normal"}, "Table 8", "Normal", {1: 50.47, 3: 48.32, 10: 46.66}),
        ("resnet18", {"name": "llf"}, "Table 8", "LLF", {1: 50.47, 3: 52.36, 10: 53.64}),
        ("resnet18", {"name": "seal"}, "Table 8", "Ours", {1: 50.47, 3: 53.69, 10: 54.75}),
        (
            "resnet50",
            {"name": "seal", "fit": "freeze"},
            "Table 7",
            "SEAL+Freeze",
            {1: 54.37, 3: 52.45, 10: 51.17},
        ),
        (
            "resnet50",
            {"name": "seal", "fit": "reinit"},
            "Table 7",
            "SEAL+Reinit",
            {1: 54.37, 3: 56.82, 10: 58.87},
        ),
        (
            "resnet50",
            {"name": "seal", "reverse": True},
            "Table 7",
            "SEAL+Reverse",
            {1: 54.37, 3: 50.25, 10: 41.05},
        ),
    ],
)
def test_same_setting(config, model, method, table, heading, accuracy):
    config["model"]["name"] = model
    config["method"] = method
    config["train"]["epochs_per_generation"] = 160
    config["data"]["validation_fraction"] = 0.0
    assert papers.comparable_column(config) == papers.PaperColumn(table, heading, accuracy, ())


def test_the_papers_configs_differ_in_nothing_but_what_they_hold_out():
    for name, heading in (("seal_paper", "Ours"), ("llf_paper", "LLF"), ("normal_paper", "Normal")):
        config = dataclasses.asdict(configs.load(f"configs/seal_tiny_imagenet.py:{name}"))
        config["data"]["name"] += ":1.0.0"
        found = papers.comparable_column(config)
        assert (found.table, found.heading) == ("Table 2", heading)
        assert found.differences == ("data.validation_fraction 0.1 (paper 0)",)


def test_frequency_of_forgetting_is_table_11(config):
    config["train"]["epochs_per_generation"] = 100
    config["data"]["validation_fraction"] = 0.0
    expected = papers.PaperColumn("Table 11", "E=100", {1: 53.84, 3: 57.21, 10: 59.36}, ())
    assert papers.comparable_column(config) == expected


def test_differences_are_named(config):
    config["method"]["ascent_epochs"] = 2.0
    config["train"]["batch_size"] = 64
    found = papers.comparable_column(config)
    assert found is not None
    assert found.differences == (
        "train.epochs_per_generation 4 (paper 160)",
        "method.ascent_epochs 2 (paper 1)",
        "data.validation_fraction 0.1 (paper 0)",
        "train.batch_size 64 (paper 32)",
    )


def test_one_cosine_over_all_is_comparable_at_its_end_only(config):
    config["method"] = {"name": "normal"}
    config["optimizer"]["schedule"] = "single"
    config["train"]["generations"] = 10
    found = papers.comparable_column(config)
    assert found is not None
    assert found.accuracy == {10: 49.27}


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("data", {"name": "digits"}),
        ("model", {"name": "resnet34"}),
        ("model", {"width": 16}),
        ("method", {"name": "seal", "fit": "freeze", "reverse": True}),
        ("method", {"name": "pof"}),
    ],
)
def test_other_settings_have_no_column(config, section, values):
    assert papers.comparable_column(config) is not None
    config[section] |= values
    assert papers.comparable_column(config) is None


@pytest.fixture
def layerwise(config):
    """LW on CIFAR-10 with the simple CNN, as the paper trains it."""
    config["data"] = {
        "name": "cifar10",
        "image_size": 224,
        "flip": True,
        "validation_fraction": 0.1,
    }
    config["model"] = {"name": "scnn", "dropout": None, "norm": None, "initialiser": None}
    config["method"] = {"name": "lw", "rounds": 1}
    config["optimizer"] = {
        "learning_rate": 0.003,
        "momentum": 0.9,
        "weight_decay": 1e-5,
        "label_smoothing": 0.0,
        "plateau_epochs": 20,
    }
    config["train"] = {"generations": 4, "epochs_per_generation": 575, "batch_size": 256}
    return config


@pytest.mark.parametrize(
    ("method", "heading", "accuracy"),
    [
        ({"name": "normal"}, "BL", (82.7, 72.2, 84.6)),
        ({"name": "wels", "redraw": True}, "WELSR", (84.2, 75.1, 86.0)),
        ({"name": "dsd"}, "DSD", (82.5, 74.5, 85.8)),
        ({"name": "wels"}, "WELS", (83.7, 75.9, 85.4)),
        ({"name": "fc"}, "FC", (84.9, 74.8, 85.9)),
        ({"name": "lw"}, "LW", (84.3, 75.9, 85.6)),
    ],
)
def test_layerwise_paper(layerwise, method, heading, accuracy):
    layerwise["method"] = method
    designs = [("Table 2", True, 0.0), ("Table 6", False, None), ("Table 7", True, 0.25)]
    for (table, flip, dropout), value in zip(designs, accuracy, strict=True):
        layerwise["data"]["flip"] = flip
        layerwise["model"]["dropout"] = dropout
        expected = papers.PaperColumn(table, heading, {4: value}, (), "LW paper")
        assert papers.comparable_column(layerwise) == expected


def test_layerwise_differences_and_gaps(layerwise):
    layerwise["model"]["name"] = "resnet50"
    layerwise["optimizer"]["learning_rate"] = 0.01
    found = papers.comparable_column(layerwise)
    assert found is not None
    assert found.accuracy == {4: 89.1}
    assert found.differences == (
        "optimizer.learning_rate 0.01 (paper 0.003)",
        "model.norm None (paper layer)",
        "train.generations 4 (paper 16)",
    )
    layerwise["data"]["name"] = "oxford_iiit_pet"
    assert papers.comparable_column(layerwise) is None  # that number cannot be told
    layerwise["data"] |= {"name": "mnist_corrupted/fog", "flip": False}
    assert papers.comparable_column(layerwise).accuracy == {4: 99.0}
    layerwise["model"]["dropout"] = 0.25  # the paper has no dropout without augmentation
    assert papers.comparable_column(layerwise) is None


def test_layerwise_tables_are_whole():
    models = ("scnn", "vgg16", "mobilenet", "resnet50")
    for name in ("Table 2", "Table 6", "Table 7"):
        table = papers.load("LW", name)
        assert table.columns == ("BL", "WELSR", "DSD", "WELS", "FC", "LW")
        assert [model for _, model in table.rows] == list(models) * 12
        assert len({data for data, _ in table.rows}) == 12
        assert all(0 < number.mean < 100 for row in table.rows.values() for number in row.values())


def test_every_table_can_be_read():
    data = tomllib.loads((Path(papers.__file__).parent / "papers.toml").read_text())
    for paper, record in data.items():
        for name, table in record["tables"].items():
            lines = table["rows"].strip().split("\n")
            found = papers.load(paper, name)
            assert len(found.rows) == len(lines) - 1  # no row twice
            assert all(len(keys) == len(found.keys) for keys in found.rows), (paper, name)
