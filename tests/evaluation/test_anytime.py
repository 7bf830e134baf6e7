"""Checkpoints, validations and ADP against what one can work out by hand."""

import numpy as np
import pytest

from seal_jax.evaluation import anytime


def test_checkpoints_are_fibonaccis_with_start_and_end():
    # Binet's closed form, F_2 = 1, F_3 = 2, ...
    golden = (1 + 5**0.5) / 2
    binet = [round(golden**n / 5**0.5) for n in range(2, 30)]
    for last in (1, 2, 3, 4, 88, 89, 90, 10_000):
        found = anytime.checkpoints(last)
        assert found[0] == 0
        assert found[-1] == last
        assert list(found[1:]) == sorted({*(step for step in binet if step <= last), last})


def test_the_validation_interval_grows_from_one_and_saturates_at_ten():
    found = np.array(anytime.validations(1000))
    assert np.diff(found).tolist() == [*range(1, 10), *[10] * (len(found) - 10)]
    assert found[:4].tolist() == [0, 1, 3, 6]
    assert 990 < found[-1] <= 1000
    assert anytime.validations(1) == (0, 1)


def test_a_trace_worked_out_by_hand():
    """The example of section 6.1: what is saved at t is deployed until something beats it."""
    validated = (0, 1, 3, 6, 10)
    validation = np.array([[0.20, 0.50, 0.40, 0.50, 0.60], [0.30, 0.10, 0.20, np.nan, 0.25]])
    test = np.array([[0.21, 0.51, 0.91, 0.71, 0.61], [0.31, 0.11, 0.99, 0.99, 0.99]])
    taus = (0, 1, 2, 3, 5, 8, 10)
    deployed = anytime.deployed(taus, validated, validation)
    found = np.take_along_axis(test, deployed, axis=-1)
    # Seed 0: step 1 beats the start; 3 is worse and 6 only as good; 10 is better, and worse on test.
    assert found[0].tolist() == [0.21, 0.51, 0.51, 0.51, 0.51, 0.51, 0.61]
    assert found[1].tolist() == [0.31] * 7  # nothing ever beats the start
    steps = np.array(validated)[deployed]
    assert steps[0].tolist() == [0, 1, 1, 1, 1, 1, 10]


@pytest.mark.parametrize("seed", range(3))
def test_deployed_equals_a_loop_that_keeps_the_best(seed):
    random = np.random.default_rng(seed)
    validated = anytime.validations(300)
    accuracy = random.integers(0, 12, len(validated)) / 12  # many ties
    best, kept, expected = -1.0, 0, []
    taus = anytime.checkpoints(300)
    for step in range(301):
        if step in validated and accuracy[validated.index(step)] > best:
            best, kept = accuracy[validated.index(step)], step
        if step in taus:
            expected.append(kept)
    found = np.array(validated)[anytime.deployed(taus, validated, accuracy)]
    assert found.tolist() == expected


def test_sizes_equal_numpy():
    random = np.random.default_rng(0)

    def draw():
        return {
            "conv": {"kernel": random.normal(size=(3, 3, 2, 4))},
            "norm": {"scale": random.normal(size=4)},
            "fc": {"kernel": random.normal(size=(4, 5)), "bias": random.normal(size=5)},
        }

    now, then = draw(), draw()
    flat = [
        np.concatenate([tree["conv"]["kernel"].ravel(), tree["norm"]["scale"]])
        for tree in (now, then)
    ]
    head, distance = anytime.sizes(now, {**then, "fc": None}, "fc")
    np.testing.assert_allclose(head, np.linalg.norm(now["fc"]["kernel"].ravel()), rtol=1e-6)
    np.testing.assert_allclose(distance, np.linalg.norm(flat[0] - flat[1]), rtol=1e-6)
