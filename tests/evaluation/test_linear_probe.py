"""The linear probe against SGD written out in NumPy, and against itself one rate at a time."""

import math

import jax
import numpy as np
import pytest

from seal_jax import UsageError
from seal_jax.evaluation import linear_probe
from seal_jax.evaluation.linear_probe import Protocol


@pytest.fixture(scope="module")
def splits():
    random = np.random.default_rng(0)
    centres = random.normal(size=(3, 6))
    labels = np.arange(70) % 3
    features = (centres[labels] + random.normal(size=(70, 6))).astype(np.float32)
    return (features[:50], labels[:50]), (features[50:], labels[50:])


def by_the_book(epoch_features, labels, protocol, seed):
    """Return the weights and biases of each learning rate, by SGD in float64."""
    start_key, order_key = jax.random.split(jax.random.key(seed))
    bound = 1 / math.sqrt(6)
    initial = np.asarray(jax.random.uniform(start_key, (7, 3), minval=-bound, maxval=bound))
    initial = initial.astype(np.float64)
    for rate in protocol.learning_rates:
        params = [initial[:6].copy(), initial[6].copy()]
        momentum = [np.zeros((6, 3)), np.zeros(3)]
        for epoch in range(protocol.epochs):
            features = epoch_features(epoch).astype(np.float64)
            order = np.asarray(jax.random.permutation(jax.random.fold_in(order_key, epoch), 50))
            for start in range(0, 50, protocol.batch_size):
                rows = order[start : start + protocol.batch_size]
                scores = features[rows] @ params[0] + params[1]
                error = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
                error[np.arange(len(rows)), labels[rows]] -= 1
                error /= len(rows)
                for i, slope in enumerate([features[rows].T @ error, error.sum(0)]):
                    momentum[i] = 0.9 * momentum[i] + slope + protocol.weight_decay * params[i]
                    params[i] = params[i] - rate * momentum[i]
        yield params


@pytest.mark.parametrize("augmented", [False, True])
def test_equals_sgd_written_out(splits, augmented):
    (features, labels), (test_features, test_labels) = splits
    protocol = Protocol(learning_rates=(0.1, 0.01), epochs=3, batch_size=16, weight_decay=0.01)
    asked = []

    def epoch_features(epoch):
        asked.append(epoch)
        return features + np.float32(augmented * 0.3 * epoch)

    if augmented:
        test = (test_features, test_labels)
        found = linear_probe.fit((epoch_features, labels), test, 3, protocol, seed=4)
        assert asked == [0, 1, 2]
    else:
        found = linear_probe.fit(*splits, 3, protocol, seed=4)
    for index, params in enumerate(by_the_book(epoch_features, labels, protocol, 4)):
        np.testing.assert_allclose(found.kernels[index], params[0], atol=1e-5)
        np.testing.assert_allclose(found.biases[index], params[1], atol=1e-5)
        predicted = (test_features @ params[0] + params[1]).argmax(1)
        assert found.accuracies[index] == pytest.approx((predicted == test_labels).mean())
    assert found.best == found.accuracies.argmax()


def test_starts_as_a_linear_layer_of_torch():
    """Deciles of 8,000 weights and 80 biases, against torch's own draws."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    features, labels = np.zeros((80, 100), np.float32), np.arange(80)
    still = Protocol((1e-12,), epochs=1)
    ours = linear_probe.fit((features, labels), (features, labels), 80, still, seed=3)
    layer = torch.nn.Linear(100, 80)
    deciles = np.linspace(0, 1, 11)
    for found, expected, rough in (
        (ours.kernels[0], layer.weight, 5e-3),
        (ours.biases[0], layer.bias, 5e-2),
    ):
        np.testing.assert_allclose(
            np.quantile(found, deciles),
            np.quantile(expected.detach().numpy(), deciles),
            atol=rough,
        )
        assert np.abs(found).max() <= 0.1
    again = linear_probe.fit((features, labels), (features, labels), 80, still, seed=4)
    assert np.abs(again.kernels - ours.kernels).max() > 0.1


def test_three_rates_at_once_equal_three_runs_and_share_one_program(splits):
    rates = (0.1, 0.01, 0.001)
    together = linear_probe.fit(*splits, 3, Protocol(rates, epochs=4))
    before = linear_probe._train._cache_size()
    for index, rate in enumerate(rates):
        alone = linear_probe.fit(*splits, 3, Protocol((rate,), epochs=4))
        np.testing.assert_allclose(together.kernels[index], alone.kernels[0], atol=1e-6)
        assert together.accuracies[index] == alone.accuracies[0]
    assert linear_probe._train._cache_size() == before + 1


def test_bad_input(splits):
    (features, labels), test = splits
    for train, message in [
        ((features * np.inf, labels), "train features hold NaN"),
        ((features, labels[1:]), "train labels is .* must be an array of"),
        ((features, labels + 1), r"train labels must lie in 0\.\.2"),
    ]:
        with pytest.raises(UsageError, match=message):
            linear_probe.fit(train, test, 3)
    with pytest.raises(UsageError, match="train features hold NaN"):
        linear_probe.fit((lambda _: features * np.nan, labels), test, 3)
    with pytest.raises(UsageError, match="learning_rates is empty"):
        Protocol(())
    with pytest.raises(UsageError, match="learning_rates = 0 must be positive"):
        Protocol((0.0,))
    with pytest.raises(UsageError, match="epochs = 0 must be"):
        Protocol(epochs=0)
