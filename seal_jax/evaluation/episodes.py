"""Few-shot episodes: what one is, how it is drawn, and how many are divided over devices.

The protocol of Guo et al., `A Broader Study of Cross-Domain Few-Shot Learning`, 2020, as the SEAL paper
uses it (section 4.1, Tables 4 and 5).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from seal_jax.errors import UsageError, check_integer, check_labels, check_number

EPISODES = "episodes"


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
            check_integer(field, getattr(self, field), 2 if field == "ways" else 1)
        check_number("learning_rate", self.learning_rate, lambda v: 0 < v < math.inf, "be positive")
        # A momentum of 1 never forgets: SGD runs away.
        check_number("momentum", self.momentum, lambda v: 0 <= v < 1, "lie in [0, 1)")
        check_number("dampening", self.dampening, lambda v: 0 <= v <= 1, "lie in [0, 1]")
        check_number(
            "weight_decay", self.weight_decay, lambda v: 0 <= v < math.inf, "not be negative"
        )


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
    return draw(check(labels, protocol), features, protocol, seed=seed, number=number)


def check(labels: np.ndarray, protocol: Protocol) -> list[np.ndarray]:
    """Return the rows of each class, if there are enough classes and images for an episode.

    Args:
      labels: ``[n]``, class numbers.
      protocol: see :class:`Protocol`.

    Raises:
      UsageError: too few classes, or too few images in a class.
    """
    check_labels("labels", labels, np.size(labels))
    classes, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
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
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.cumsum(counts)[:-1])


def draw(
    groups: Sequence[np.ndarray], features: int, protocol: Protocol, *, seed: int, number: int
) -> Episode:
    """Draw an episode from the rows of each class; see :func:`episode` and :func:`check`."""
    needed = protocol.shots + protocol.queries
    random = np.random.default_rng([seed, number])
    chosen = random.choice(len(groups), protocol.ways, replace=False)
    rows = np.stack([random.choice(groups[c], needed, replace=False) for c in chosen])
    bound = 1 / math.sqrt(features)
    kernel = random.uniform(-bound, bound, (protocol.ways, features)).astype(np.float32)
    bias = random.uniform(-bound, bound, protocol.ways).astype(np.float32)
    count = protocol.ways * protocol.shots
    orders = random.permuted(
        np.tile(np.arange(count, dtype=np.int32), (protocol.epochs, 1)), axis=1
    )
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


def mesh_of(devices: Sequence[Any] | None) -> Mesh:
    """Return the mesh along which episodes are divided; None means all devices of this process."""
    devices = jax.local_devices() if devices is None else list(devices)
    return jax.make_mesh((len(devices),), (EPISODES,), (AxisType.Auto,), devices=devices)


def chunks(
    groups: Sequence[np.ndarray],
    features: int,
    protocol: Protocol,
    mesh: Mesh,
    *,
    seed: int,
    span: tuple[int, int],
    chunk: int,
) -> Iterator[tuple[int, int, Episode]]:
    """Yield calls of one program: episodes done before, episodes in it, and these, stacked.

    All calls have one shape, a multiple of the devices; the last is filled up with its last episode.

    Args:
      groups: rows of each class, see :func:`check`.
      features: length of a feature vector.
      protocol: see :class:`Protocol`.
      mesh: see :func:`mesh_of`.
      seed: of the evaluation.
      span: number of the first episode, and how many.
      chunk: episodes in a call.

    Raises:
      UsageError: a number below 1.
    """
    first, episodes = span
    for field, value in (("episodes", episodes), ("chunk", chunk)):
        if value < 1:
            raise UsageError(f"{field} = {value} must be at least 1")
    size = -(-min(chunk, episodes) // mesh.size) * mesh.size
    for start in range(0, episodes, size):
        count = min(size, episodes - start)
        drawn = [
            draw(groups, features, protocol, seed=seed, number=first + start + index)
            for index in range(count)
        ]
        drawn += drawn[-1:] * (size - count)
        yield start, count, Episode(*(np.stack(parts) for parts in zip(*drawn, strict=True)))
