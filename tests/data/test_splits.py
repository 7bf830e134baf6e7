from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_jax.data import stratified_split
from seal_jax.errors import UsageError

labellings = st.lists(st.integers(20, 60), min_size=1, max_size=6).flatmap(
    lambda counts: st.permutations([c for c, count in enumerate(counts) for _ in range(count)])
)


@settings(max_examples=40, deadline=None)
@given(labellings, st.floats(0.05, 0.9), st.integers(0, 2**31))
def test_split_is_a_stratified_partition(labels, fraction, seed):
    labels = np.array(labels)
    train, validation = stratified_split(labels, fraction, seed)

    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), range(len(labels)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()
    assert abs(len(validation) - fraction * len(labels)) <= 0.5 + 1e-9
    for label in np.unique(labels):
        held_out = (labels[validation] == label).sum()
        assert abs(held_out - fraction * (labels == label).sum()) < 1
        assert held_out < (labels == label).sum()


def test_equal_classes_give_equal_parts():
    labels = np.arange(100) % 10
    for fraction in (0.1, 0.3, 0.7):  # not exact in binary
        _, validation = stratified_split(labels, fraction, seed=1)
        counts = np.bincount(labels[validation])
        np.testing.assert_array_equal(counts, np.full(10, round(fraction * 10)))


def test_seed_decides():
    labels = np.arange(200) % 4
    first = stratified_split(labels, 0.25, seed=0)[1]
    np.testing.assert_array_equal(first, stratified_split(labels, 0.25, seed=0)[1])
    assert set(first) != set(stratified_split(labels, 0.25, seed=1)[1])


def test_zero_holds_out_nothing():
    train, validation = stratified_split(np.array([1, 0, 1]), 0.0)
    assert train.tolist() == [0, 1, 2]
    assert validation.tolist() == []


@pytest.mark.parametrize(
    ("labels", "fraction", "seed", "message"),
    [
        ([0, 1], 1.0, 0, r"validation_fraction=1.0 must lie in \[0, 1\)"),
        ([0, 1], -0.1, 0, "validation_fraction=-0.1 must lie"),
        ([0, 1], float("nan"), 0, "must lie"),
        ([0] * 4, 0.1, 0, "holds out no example of 4"),
        ([0] * 10 + [3], 0.6, 0, r"class 3 \(1 examples\) without a training example"),
        ([0] * 10, 0.5, -1, "validation_seed = -1"),
        ([0.5] * 10, 0.5, 0, "dtype float64"),
        ([[0, 1]], 0.5, 0, r"shape \(1, 2\)"),
    ],
)
def test_unusable_input(labels, fraction, seed, message):
    with pytest.raises(UsageError, match=message) as caught:
        stratified_split(np.array(labels), fraction, seed)
    assert "\n" not in str(caught.value)
