"""Cross-domain few-shot classification on cached features: all episodes in one program.

The protocol of Guo et al., `A Broader Study of Cross-Domain Few-Shot Learning`, 2020, as the SEAL paper
uses it (Tables 4 and 5, "Linear"): in every episode a linear classifier learns from a few images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What an episode is, and how its classifier learns; the defaults are the public protocol's.

    Attributes:
      ways: classes of an episode.
      shots: images of each class to learn from.
      queries: images of each class to be scored on.
      epochs: passes over the images to learn from.
      batch_size: images a step; the last batch of a pass may be smaller.
      learning_rate: of SGD.
      momentum: its momentum.
      dampening: a gradient enters the momentum with 1 - dampening, but the first with 1.
      weight_decay: coupled L2, on the bias too.
    """

    ways: int = 5
    shots: int = 5
    queries: int = 15
    epochs: int = 100
    batch_size: int = 4
    learning_rate: float = 0.01
    momentum: float = 0.9
    dampening: float = 0.9
    weight_decay: float = 1e-3

    def __post_init__(self):
        for field in ("ways", "shots", "queries", "epochs", "batch_size"):
            value = getattr(self, field)
            least = 2 if field == "ways" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{field} = {value!r} must be a whole number of at least {least}")


class Episode(NamedTuple):
    """One episode, a pure function of the seed and its number.

    Attributes:
      support: rows to learn from, ``[ways * shots]``, class by class.
      query: rows to be scored on, ``[ways * queries]``, class by class.
      kernel: the classifier's initial weights, ``[ways, features]``, as PyTorch draws them.
      bias: its initial bias, ``[ways]``.
      orders: the order of the images in each epoch, ``[epochs, ways * shots]``.
    """

    support: np.ndarray
    query: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray
    orders: np.ndarray


def episode(
    labels: np.ndarray, features: int, protocol: Protocol, *, seed: int, number: int
) -> Episode:
    """Draw an episode: classes without replacement, then images of each without replacement.

    Args:
      labels: ``[n]``, class numbers.
      features: length of a feature vector.
      protocol: see :class:`Protocol`.
      seed: of the evaluation.
      number: of the episode.

    Raises:
      UsageError: too few classes, or too few images in a class.
    """
    classes, counts = np.unique(labels, return_counts=True)
    needed = protocol.shots + protocol.queries
    if len(classes) < protocol.ways:
        raise UsageError(
            f"ways = {protocol.ways} is more than the {len(classes)} classes there are"
        )
    if np.min(counts) < needed:
        rare = classes[np.argmin(counts)]
        raise UsageError(
            f"shots + queries = {needed} is more than the {np.min(counts)} images of class {rare}"
        )
    random = np.random.default_rng([seed, number])
    chosen = random.choice(classes, protocol.ways, replace=False)
    rows = np.stack(
        [random.choice(np.flatnonzero(labels == c), needed, replace=False) for c in chosen]
    )
    bound = 1 / math.sqrt(features)
    kernel = random.uniform(-bound, bound, (protocol.ways, features)).astype(np.float32)
    bias = random.uniform(-bound, bound, protocol.ways).astype(np.float32)
    count = protocol.ways * protocol.shots
    orders = np.stack([random.permutation(count) for _ in range(protocol.epochs)])
    return Episode(
        rows[:, : protocol.shots].ravel(), rows[:, protocol.shots :].ravel(), kernel, bias, orders
    )


class Scores(NamedTuple):
    """Accuracies of all episodes, ``[episodes]`` in [0, 1], with their summary."""

    accuracies: np.ndarray

    @property
    def mean(self) -> float:
        """Mean over the episodes."""
        return float(self.accuracies.mean())

    @property
    def interval(self) -> float:
        """Half the 95 % confidence interval of the mean, 1.96 standard errors."""
        return float(1.96 * self.accuracies.std() / math.sqrt(len(self.accuracies)))


def linear(
    features: np.ndarray,
    labels: np.ndarray,
    protocol: Protocol | None = None,
    *,
    seed: int = 0,
    episodes: int = 600,
    first: int = 0,
    chunk: int = 100,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    r"""Return the accuracy of a linear classifier in every episode.

    The weights never leave the span of their initial value and of the features they learn from,
    :math:`W = c W_0 + A^\top F`, so SGD is done on c and A: a step costs as many products as there
    are images, not features. In exact arithmetic the result is that of SGD on W.

    Args:
      features: float ``[n, d]``, the classifier's input for every image.
      labels: integers ``[n]``.
      protocol: see :class:`Protocol`.
      seed: of the evaluation.
      episodes: how many.
      first: the number of the first, to go on with an evaluation.
      chunk: episodes in one call of the program.
      progress: called with the number of episodes done.

    Raises:
      UsageError: features that are not finite or do not fit the labels, or too few images.
    """
    protocol = Protocol() if protocol is None else protocol
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise UsageError(
            f"features {features.shape} and labels {labels.shape} must be [n, d] and [n]"
        )
    if not np.isfinite(features).all():
        raise UsageError("features hold NaN or infinity: the network or its input is broken")
    if episodes < 1:
        raise UsageError(f"episodes = {episodes} must be at least 1")
    table = jnp.asarray(features, jnp.float32)
    found = []
    for start in range(0, episodes, chunk):
        numbers = range(first + start, first + min(start + chunk, episodes))
        drawn = [
            episode(labels, features.shape[1], protocol, seed=seed, number=number)
            for number in numbers
        ]
        # The last chunk is filled up, so that there is one program.
        drawn += drawn[-1:] * (min(chunk, episodes) - len(drawn))
        whole = Episode(*(np.stack(parts) for parts in zip(*drawn, strict=True)))
        found.append(np.asarray(_solve(table, whole, protocol))[: len(numbers)])
        if progress is not None:
            progress(start + len(numbers))
    return Scores(np.concatenate(found))


@partial(jax.jit, static_argnames=("protocol",))
def _solve(features: jax.Array, drawn: Episode, protocol: Protocol) -> jax.Array:
    return jax.vmap(lambda one: _one(features, one, protocol))(drawn)


def _one(features: jax.Array, drawn: Episode, protocol: Protocol) -> jax.Array:
    """Learn and score one episode."""
    ways, shots = protocol.ways, protocol.shots
    count = ways * shots
    labels = jax.nn.one_hot(jnp.repeat(jnp.arange(ways), shots), ways)
    with jax.default_matmul_precision("highest"):
        support = _with_one(features[drawn.support])
        initial = jnp.concatenate([drawn.kernel, drawn.bias[:, None]], axis=1)
        gram, logits = support @ support.T, support @ initial.T
        query = _with_one(features[drawn.query])
        query_gram, query_logits = query @ support.T, query @ initial.T
    rows, weights = _batches(drawn.orders, protocol.batch_size)

    def step(state, batch):
        c, a, c_momentum, a_momentum, number = state
        rows, weights = batch
        scores = c * logits[rows] + gram[rows] @ a
        error = (jax.nn.softmax(scores) - labels[rows]) * (weights / weights.sum())[:, None]
        # The gradient with respect to W, in the same coordinates.
        c_slope = protocol.weight_decay * c
        a_slope = (protocol.weight_decay * a).at[rows].add(error)
        share = jnp.where(number == 0, 1.0, 1 - protocol.dampening)
        keep = jnp.where(number == 0, 0.0, protocol.momentum)
        c_momentum = keep * c_momentum + share * c_slope
        a_momentum = keep * a_momentum + share * a_slope
        rate = protocol.learning_rate
        new = (c - rate * c_momentum, a - rate * a_momentum, c_momentum, a_momentum, number + 1)
        return new, None

    zero = jnp.zeros((count, ways))
    start = (jnp.ones(()), zero, jnp.zeros(()), zero, jnp.zeros((), jnp.int32))
    (c, a, *_), _ = jax.lax.scan(step, start, (rows, weights))
    predicted = (c * query_logits + query_gram @ a).argmax(-1)
    return (predicted == jnp.repeat(jnp.arange(ways), protocol.queries)).mean()


def _with_one(features: jax.Array) -> jax.Array:
    """Append a feature that is always 1, whose weight is the bias."""
    return jnp.concatenate([features, jnp.ones((len(features), 1))], axis=1)


def _batches(orders: Any, batch: int) -> tuple[jax.Array, jax.Array]:
    """Cut ``orders [epochs, n]`` into steps: rows and weights ``[steps, batch]``, 0 for filling."""
    epochs, count = orders.shape
    steps = -(-count // batch)
    filling = steps * batch - count
    rows = jnp.concatenate([orders, orders[:, :filling]], axis=1)
    weights = jnp.broadcast_to(jnp.arange(steps * batch) < count, rows.shape)
    shape = (epochs * steps, batch)
    return rows.reshape(shape), weights.astype(jnp.float32).reshape(shape)
