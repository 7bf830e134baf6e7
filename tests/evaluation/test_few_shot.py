"""Few-shot classification against the protocol written out on the weights themselves."""

import jax
import numpy as np
import pytest

from seal_jax import UsageError
from seal_jax.core import mesh as meshes
from seal_jax.evaluation import few_shot
from seal_jax.evaluation.few_shot import EPISODES, Protocol


def episode(labels, protocol, seed, number):
    return few_shot.draw(few_shot.check(labels, protocol), 40, protocol, seed=seed, number=number)


@pytest.fixture(scope="module")
def images():
    """Features of 12 classes, so near each other that few images do not suffice to tell them apart."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 30)
    centres = random.normal(size=(12, 40))
    features = centres[labels] * 0.4 + random.normal(size=(360, 40))
    return features.astype(np.float32), labels


def by_the_book(features, drawn, protocol):
    """SGD on weights and bias in float64, one batch after the other; returns the query's scores."""
    support = features[drawn.support].astype(np.float64)
    labels = np.repeat(np.arange(protocol.ways), protocol.shots)
    params = [drawn.kernel.astype(np.float64), drawn.bias.astype(np.float64)]
    buffers = [None, None]
    for order in drawn.orders:
        for start in range(0, len(order), protocol.batch_size):
            rows = order[start : start + protocol.batch_size]
            scores = support[rows] @ params[0].T + params[1]
            scores -= scores.max(1, keepdims=True)
            chances = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
            chances[np.arange(len(rows)), labels[rows]] -= 1
            error = chances / len(rows)
            for i, gradient in enumerate([error.T @ support[rows], error.sum(0)]):
                gradient = gradient + protocol.weight_decay * params[i]
                if buffers[i] is None:
                    buffers[i] = gradient
                else:
                    fresh = (1 - protocol.dampening) * gradient
                    buffers[i] = protocol.momentum * buffers[i] + fresh
                params[i] = params[i] - protocol.learning_rate * buffers[i]
    return features[drawn.query] @ params[0].T + params[1]


@pytest.mark.parametrize(
    "protocol",
    [
        Protocol(epochs=20),  # 25 images in batches of 4: the last has one
        Protocol(ways=3, shots=2, queries=7, epochs=10, batch_size=3, dampening=0.0),
        Protocol(shots=10, epochs=5, weight_decay=0.3, learning_rate=0.1),
    ],
)
def test_every_episode_has_the_accuracy_of_sgd_on_the_weights(images, protocol):
    features, labels = images
    ours = few_shot.linear(features, labels, protocol, episodes=12, chunk=5, seed=3)
    truth = np.repeat(np.arange(protocol.ways), protocol.queries)
    for number, accuracy in enumerate(ours.accuracies):
        drawn = episode(labels, protocol, 3, number)
        scores = by_the_book(features, drawn, protocol)
        assert accuracy == pytest.approx((scores.argmax(1) == truth).mean(), abs=1e-6)
    assert 1.2 / protocol.ways < ours.mean < 1
    expected = 1.96 * np.std(ours.accuracies) / np.sqrt(12)
    assert ours.interval == pytest.approx(expected)


def test_torch_agrees(images):
    torch = pytest.importorskip("torch")
    features, labels = images
    protocol = Protocol(epochs=10)
    ours = few_shot.linear(features, labels, protocol, episodes=3)
    for number in range(3):
        drawn = episode(labels, protocol, 0, number)
        head = torch.nn.Linear(40, 5)
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(drawn.kernel))
            head.bias.copy_(torch.from_numpy(drawn.bias))
        optimizer = torch.optim.SGD(
            head.parameters(), lr=0.01, momentum=0.9, dampening=0.9, weight_decay=1e-3
        )
        support = torch.from_numpy(features[drawn.support])
        targets = torch.arange(5).repeat_interleave(5)
        for order in drawn.orders:
            for start in range(0, 25, 4):
                rows = torch.from_numpy(order[start : start + 4])
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(head(support[rows]), targets[rows]).backward()
                optimizer.step()
        predicted = head(torch.from_numpy(features[drawn.query])).argmax(1).numpy()
        accuracy = (predicted == np.repeat(np.arange(5), 15)).mean()
        assert ours.accuracies[number] == pytest.approx(accuracy, abs=1e-6)


def test_episodes_are_drawn_without_replacement_and_depend_on_seed_and_number_alone(images):
    _, labels = images
    protocol = Protocol()
    one = episode(labels, protocol, 1, 7)
    for a, b in zip(one, episode(labels, protocol, 1, 7), strict=True):
        np.testing.assert_array_equal(a, b)
    other = episode(labels, protocol, 1, 8)
    assert not np.array_equal(one.support, other.support)
    rows = np.concatenate([one.support, one.query])
    assert len(set(rows.tolist())) == 5 * 20
    groups = labels[one.support].reshape(5, 5)
    assert (groups == groups[:, :1]).all()
    assert len(set(groups[:, 0].tolist())) == 5
    np.testing.assert_array_equal(labels[one.query].reshape(5, 15)[:, 0], groups[:, 0])
    np.testing.assert_array_equal(np.sort(one.orders, axis=1), np.tile(np.arange(25), (100, 1)))
    assert np.abs(one.kernel).max() <= 1 / np.sqrt(40)


def test_an_evaluation_can_be_taken_up(images):
    features, labels = images
    protocol = Protocol(epochs=2)
    whole = few_shot.linear(features, labels, protocol, episodes=6).accuracies
    rest = few_shot.linear(features, labels, protocol, episodes=2, first=4).accuracies
    np.testing.assert_array_equal(whole[4:], rest)


def test_devices_share_the_episodes_and_change_none(images):
    features, labels = images
    protocol = Protocol(epochs=5)
    alone = few_shot.linear(features, labels, protocol, episodes=21, devices=jax.devices()[:1])
    # 21 are no multiple of 8: the program is filled up, once or in three calls.
    for chunk in (None, 5):
        spread = few_shot.linear(features, labels, protocol, episodes=21, chunk=chunk)
        np.testing.assert_array_equal(spread.accuracies, alone.accuracies)
    assert len(jax.devices()) == 8
    mesh = meshes.along(EPISODES)

    def solve(drawn):
        solved = few_shot._solve(features, drawn, protocol, mesh)
        assert [shard.data.shape for shard in solved.addressable_shards] == [(3,)] * 8
        return solved

    def draw(number):
        return episode(labels, protocol, 0, number)

    assert len(few_shot.over_chunks(solve, draw, mesh, first=0, episodes=21, chunk=21)) == 21


def test_bad_input(images):
    features, labels = images
    for arguments, options, message in [
        ((features, labels, Protocol(ways=13)), {}, "ways = 13 is more than the 12 classes"),
        ((features, labels, Protocol(shots=16)), {}, "shots .* = 31 is more than the 30 images"),
        ((features * np.nan, labels), {}, "features hold NaN"),
        ((features, labels[1:]), {}, "labels is .* must be an array of"),
        ((features, labels), {"episodes": 0}, "episodes = 0 must be a whole number of at least 1"),
    ]:
        with pytest.raises(UsageError, match=message):
            few_shot.linear(*arguments, **options)
    with pytest.raises(UsageError, match="shots = 0 must be a whole number of at least 1"):
        Protocol(shots=0)
