"""Which of the paper's columns stands beside which run."""

from __future__ import annotations

import pytest

from seal_jax.reports import paper


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
    config["model"] = {"name": model}
    config["method"] = method
    config["train"]["epochs_per_generation"] = 160
    config["data"]["validation_fraction"] = 0.0
    assert paper.beside(config) == paper.PaperColumn(table, heading, accuracy, ())


def test_frequency_of_forgetting_is_table_11(config):
    config["train"]["epochs_per_generation"] = 100
    config["data"]["validation_fraction"] = 0.0
    expected = paper.PaperColumn("Table 11", "E=100", {1: 53.84, 3: 57.21, 10: 59.36}, ())
    assert paper.beside(config) == expected


def test_differences_are_named(config):
    config["method"]["ascent_epochs"] = 2.0
    config["train"]["batch_size"] = 64
    found = paper.beside(config)
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
    found = paper.beside(config)
    assert found is not None
    assert found.accuracy == {10: 49.27}


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("data", {"name": "digits"}),
        ("model", {"name": "resnet34"}),
        ("model", {"name": "resnet50", "width": 16}),
        ("method", {"name": "seal", "fit": "freeze", "reverse": True}),
        ("method", {"name": "pof"}),
    ],
)
def test_other_settings_have_no_column(config, section, values):
    assert paper.beside(config) is not None
    config[section] = values
    assert paper.beside(config) is None
