"""k-NN probes against scikit-learn, depth on cases made by hand."""

import gc

import jax
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from seal_jax import UsageError
from seal_jax.evaluation import prediction_depth


@pytest.fixture(scope="module")
def points():
    random = np.random.default_rng(0)
    labels = random.choice([2, 5, 9], 230)
    return (random.normal(size=(230, 3, 4)) + labels[:, None, None] * 0.1).astype(
        np.float32
    ), labels


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("byte_budget", [2**14, 2**24])
@pytest.mark.parametrize("k", [1, 5, 30])
def test_equals_scikit_learn(points, metric, byte_budget, k):
    """Also in chunks: 16 KiB hold a tenth of these distances."""
    features, labels = points
    bank, queries = features[:170], features[170:]
    ours = prediction_depth.knn(
        bank, labels[:170], queries, k=k, metric=metric, byte_budget=byte_budget
    )
    theirs = KNeighborsClassifier(k, metric=metric, algorithm="brute")
    theirs.fit(bank.reshape(170, -1).astype(np.float64), labels[:170])
    np.testing.assert_array_equal(ours, theirs.predict(queries.reshape(60, -1)))


def test_a_point_is_no_neighbour_of_itself(points):
    features, labels = points
    flat = features.reshape(230, -1).astype(np.float64)
    distances = ((flat[:, None] - flat) ** 2).sum(-1)
    np.fill_diagonal(distances, np.inf)
    expected = labels[distances.argmin(1)]
    for budget in (2**14, 2**24):
        ours = prediction_depth.knn(
            features, labels, features, k=1, exclude_self=True, byte_budget=budget
        )
        np.testing.assert_array_equal(ours, expected)


def test_ties_go_to_the_lower_row_and_the_lower_class():
    bank = np.array([[1.0], [-1.0], [1.0], [-1.0]])
    labels = np.array([3, 1, 2, 0])
    assert prediction_depth.knn(bank, labels, np.zeros((1, 1)), k=1).tolist() == [3]
    assert prediction_depth.knn(bank, labels, np.zeros((1, 1)), k=2).tolist() == [1]
    assert prediction_depth.knn(bank, labels, np.zeros((1, 1)), k=4).tolist() == [0]


@pytest.mark.parametrize("byte_budget", [2**11, 2**13, 2**20])
def test_neighbours_further_apart_than_rounding_do_not_depend_on_the_budget(byte_budget):
    """Squared distances of pairs differ by some 1e-5 of |q|^2 + |b|^2, the later row's is less."""
    random = np.random.default_rng(0)
    queries = random.normal(size=(40, 16))
    offset = random.normal(size=(40, 16))
    bank = np.concatenate([queries + (1 + 1e-5) * offset, queries + offset])
    labels = np.repeat([0, 1], 40)
    ours = prediction_depth.knn(bank, labels, queries, k=1, byte_budget=byte_budget)
    distances = ((queries[:, None] - bank) ** 2).sum(-1)
    first, second = distances[:, :40].min(1), distances[:, 40:].min(1)
    apart = abs(first - second) > 2e-6 * ((queries**2).sum(1) + (bank**2).sum(1).max())
    assert apart.sum() > 20
    np.testing.assert_array_equal(ours[apart], (second < first)[apart])


def test_chunks_keep_within_the_budget():
    for size, budget in ((12, 2**14), (4096, 2**20), (100, 2**28)):
        rows, columns = prediction_depth._chunks(10**6, 10**6, size, budget)
        # Two chunks of features, and distances with what is made of them.
        assert 4 * ((rows + columns) * size + 2 * rows * columns) <= budget
        assert rows > 0


def test_queries_are_read_once_where_they_fit(points, monkeypatch):
    """And for every chunk of the bank where they do not: 16 KiB hold a tenth of these distances."""
    features, labels = points
    flat, starts = features.reshape(230, -1), []

    def read(start, stop):
        starts.append(start)
        return flat[start:stop]

    def knn():
        queries = prediction_depth.Rows(230, 12, read)
        return prediction_depth.knn(flat, labels, queries, byte_budget=2**14)

    once = knn()
    assert len(starts) == len(set(starts)) > 1
    monkeypatch.setattr(prediction_depth, "available_memory", lambda: 4 * flat.nbytes - 1)
    np.testing.assert_array_equal(knn(), once)
    assert len(starts) > 2 * len(set(starts))


def test_depth_of_cases_made_by_hand():
    probes = np.array([[1, 0, 2, 0], [0, 0, 2, 1], [1, 0, 0, 0], [1, 0, 1, 0]])
    final = np.array([1, 0, 0, 0])
    # Agrees again from the third on; always; only in between; from the third on.
    assert prediction_depth.depth(probes, final).tolist() == [2, 0, 4, 2]


def test_bad_input(points):
    features, labels = points
    for arguments, options, message in [
        ((features, labels, features), {"k": 231}, r"k = 231 must be a whole number in 1\.\.230"),
        ((features, labels, features), {"k": 230, "exclude_self": True}, r"in 1\.\.229"),
        ((features, labels, features[:, :2]), {}, "queries .* differ"),
        (
            (features, labels[1:], features),
            {},
            "bank_labels is .* must be an array of 230 integers",
        ),
        ((features, labels, features[1:]), {"exclude_self": True}, "exclude_self needs the bank"),
        ((features, labels, features), {"metric": "l1"}, "metric = 'l1' must be one of l2, cosine"),
        ((features, labels, features), {"byte_budget": 100}, "byte_budget = 100 is too small"),
        ((features, labels, features), {"byte_budget": -(10**9)}, "is too small"),
        ((features, labels, features * np.nan), {}, "features hold NaN"),
    ]:
        with pytest.raises(UsageError, match=message):
            prediction_depth.knn(*arguments, **options)
    with pytest.raises(UsageError, match=r"must be \[layers, n\]"):
        prediction_depth.depth(np.zeros((2, 3)), np.zeros(4))


@pytest.mark.slow
def test_memory_stays_under_the_budget():
    """Features of 32 times the budget, made when they are read, as a network would make them."""
    count, size, budget = 2000, 64, 2**15
    labels = np.random.default_rng(1).choice(3, count)
    most = 0

    def read(start, stop):
        nonlocal most
        rows = np.random.default_rng(0).normal(size=(count, size)).astype(np.float32)[start:stop]
        live = sum(array.nbytes for array in jax.live_arrays()) - before
        most = max(most, rows.nbytes + live)
        return rows

    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    rows = prediction_depth.Rows(count, size, read)
    queries = prediction_depth.Rows(200, size, read)
    ours = prediction_depth.knn(rows, labels, queries, k=3, byte_budget=budget)
    # What is kept of the nearest so far is 200 x 3 pairs beside.
    assert budget / 4 < most <= budget + 200 * 3 * 8
    assert count * size * 4 > 15 * budget
    bank = read(0, count)
    theirs = KNeighborsClassifier(3, algorithm="brute").fit(bank.astype(np.float64), labels)
    np.testing.assert_array_equal(ours, theirs.predict(bank[:200].astype(np.float64)))
