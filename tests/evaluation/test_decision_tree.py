"""The tree against planted rules and an exhaustive search for the best division."""

from __future__ import annotations

import numpy as np
import pytest

from seal_jax.errors import UsageError
from seal_jax.evaluation import decision_tree
from seal_jax.evaluation.decision_tree import Node

MODELS = ("scnn", "vgg16", "mobilenet", "resnet50")


@pytest.fixture
def design():
    """All of 4 models, 6 sizes, with and without augmentation, twice: 96 settings."""
    grid = [
        (model, size, augmented)
        for model in MODELS
        for size in (3_000, 5_000, 12_000, 20_000, 50_000, 60_000)
        for augmented in (False, True)
        for _ in range(2)
    ]
    models, sizes, augmented = zip(*grid, strict=True)
    return {"model": models, "training images": sizes, "augmentation": augmented}


def test_a_planted_rule_is_found(design):
    best = [
        "normal" if model == "resnet50" and size > 30_000 else "fc" if model == "vgg16" else "lw"
        for model, size in zip(design["model"], design["training images"], strict=True)
    ]
    root = decision_tree.fit(design, best)
    leaves = list(root.leaves())
    assert [leaf.gini for leaf in leaves] == [0.0] * len(leaves)
    assert sum(leaf.samples for leaf in leaves) == root.samples == 96
    assert root.counts == {"lw": 64, "fc": 24, "normal": 8}
    text = root.as_text()
    assert "model = vgg16?" in text
    assert "training images <= 35,000?" in text  # half way between 20,000 and 50,000
    assert "augmentation" not in text  # it plays no part
    settings = [dict(zip(design, row, strict=True)) for row in zip(*design.values(), strict=True)]
    assert [follow(root, setting) for setting in settings] == [(name,) for name in best]


def follow(node, setting):
    """Answer the questions as they are printed."""
    while node.question:
        name, _, wanted = node.question.replace(" <= ", "|<=").replace(" = ", "|=").partition("|")
        value = setting[name]
        if wanted.startswith("<="):
            yes = value <= float(wanted[2:].replace(",", ""))
        else:
            yes = value == wanted[1:] if wanted else value
        node = node.yes if yes else node.no
    return node.top


def gini(names):
    _, counts = np.unique(names, return_counts=True)
    return 1 - ((counts / counts.sum()) ** 2).sum()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_root_is_the_best_of_all_divisions(design, seed):
    rng = np.random.default_rng(seed)
    best = rng.choice(["normal", "lw", "fc"], 96, p=[0.2, 0.5, 0.3])
    divisions = [np.asarray(design["model"]) == model for model in MODELS]
    divisions += [
        np.asarray(design["training images"]) <= size for size in (3e3, 5e3, 12e3, 2e4, 5e4)
    ]
    divisions += [np.asarray(design["augmentation"])]
    left = [
        (mask.sum() * gini(best[mask]) + (~mask).sum() * gini(best[~mask])) / 96
        for mask in divisions
        if min(mask.sum(), (~mask).sum()) >= decision_tree.MIN_LEAF
    ]
    root = decision_tree.fit(design, best.tolist())
    assert root.yes is not None
    assert root.no is not None
    found = (root.yes.samples * root.yes.gini + root.no.samples * root.no.gini) / 96
    assert found == pytest.approx(min(left), abs=1e-12)
    assert root.depth <= decision_tree.MAX_DEPTH
    assert all(leaf.samples >= decision_tree.MIN_LEAF for leaf in root.leaves())


def test_yes_and_no_are_not_exchanged():
    rows = 10
    names = ["a"] * rows + ["b"] * rows
    for feature, question in (
        ([True] * rows + [False] * rows, "x"),
        (["p"] * rows + ["q"] * rows, "x = p"),
        ([1.0] * rows + [2.0] * rows, "x <= 1.5"),
    ):
        root = decision_tree.fit({"x": feature}, names)
        if root.question == "x = q":  # the same division, asked the other way
            root = root._replace(question="x = p", yes=root.no, no=root.yes)
        assert root.question == question
        assert root.yes == Node({"a": rows})
        assert root.no == Node({"b": rows})


def test_too_few_for_two_leaves_is_one_leaf():
    root = decision_tree.fit({"x": list(range(13))}, ["a"] * 6 + ["b"] * 7)
    assert root == Node({"a": 6, "b": 7})
    assert root.top == ("b",)  # Gini 0.497
    assert root.as_text() == "b  (Gini 0.50; b 7, a 6)"


def test_impure_leaves_name_several():
    assert Node({"a": 5, "b": 5}).top == ("a",)  # 0.5 is not over 0.5
    assert Node({"a": 5, "b": 5, "c": 1}).top == ("a", "b")  # ties with the last one named
    assert Node({"a": 6, "b": 1, "c": 1, "d": 1, "e": 1}).top == ("a",)  # more than half by itself
    assert Node({"a": 1, "b": 2, "c": 3}).top == ("c",)
    assert Node({"a": 2, "b": 2, "c": 3}).top == ("c", "a", "b")


def test_same_tree_every_time(design):
    best = np.random.default_rng(3).choice(["a", "b"], 96).tolist()
    assert decision_tree.fit(design, best) == decision_tree.fit(design, best)


def test_errors():
    with pytest.raises(UsageError, match="feature x has 1 values for 2 settings"):
        decision_tree.fit({"x": [1]}, ["a", "b"])
    with pytest.raises(UsageError, match="needs settings"):
        decision_tree.fit({}, ["a"])
    with pytest.raises(UsageError, match="needs settings"):
        decision_tree.fit({"x": []}, [])
    with pytest.raises(UsageError, match="min_leaf = 0 must be a whole number of at least 1"):
        decision_tree.fit({"x": [1]}, ["a"], min_leaf=0)
