"""Cross-domain few-shot classification: episodes, and a linear classifier that learns from each.

The protocol of Guo et al., `A Broader Study of Cross-Domain Few-Shot Learning`, 2020, as the SEAL paper
uses it (section 4.1, Tables 4 and 5, "Linear"). Features are cached, and all episodes are learnt in one
compiled program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seal_jax.core import mesh as meshes
from seal_jax.errors import (
    UsageError,
    check_features,
    check_integer,
    check_labels,
    check_number,
    check_seed,
    nonnegative,
    positive,
)

EPISODES = "episodes"


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The definition of an episode and of its classifier's training; the defaults are the public protocol's.

    Attributes:
      ways: classes of an episode.
      shots: images of each class to learn from.
      queries: images of each class to be scored on.
      epochs: passes over the images to learn from.
      batch_size: images per step; the last batch of a pass may be smaller.
      learning_rate: of SGD.
      momentum: its momentum.
      dampening: a gradient enters the momentum with weight 1 - dampening, the first with 1.
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
        check_number("learning_rate", self.learning_rate, positive, "be positive")
        # A momentum of 1 never forgets: SGD runs away.
        check_number("momentum", self.momentum, lambda v: 0 <= v < 1, "lie in [0, 1)")
        check_number("dampening", self.dampening, lambda v: 0 <= v <= 1, "lie in [0, 1]")
        check_number("weight_decay", self.weight_decay, nonnegative, "not be negative")


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


def check(labels: np.ndarray, protocol: Protocol) -> list[np.ndarray]:
    """Return the rows of each class of ``labels [n]``; raise if they are too few for an episode."""
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
    # A stable sort keeps the rows of each class in the order of the data: episodes depend on it.
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.cumsum(counts)[:-1])


def draw(
    images_of_class: Sequence[np.ndarray],
    features: int,
    protocol: Protocol,
    *,
    seed: int,
    number: int,
) -> Episode:
    """Draw an episode: classes without replacement, then images of each without replacement.

    Args:
      images_of_class: the rows of each class, see :func:`check`.
      features: length of a feature vector.
      protocol: what an episode is.
      seed: of the evaluation.
      number: of the episode.
    """
    needed = protocol.shots + protocol.queries
    # All that is random in an episode comes from this generator, in this order: to draw in another order, or another
    # amount, changes every episode and ends the comparison with earlier results.
    random = np.random.default_rng([seed, number])
    classes = random.choice(len(images_of_class), protocol.ways, replace=False)
    rows = np.stack([random.choice(images_of_class[c], needed, replace=False) for c in classes])
    # torch's nn.Linear draws kernel and bias uniformly within 1 / sqrt(d).
    bound = 1 / math.sqrt(features)
    kernel = random.uniform(-bound, bound, (protocol.ways, features)).astype(np.float32)
    bias = random.uniform(-bound, bound, protocol.ways).astype(np.float32)
    count = protocol.ways * protocol.shots
    orders = random.permuted(
        np.tile(np.arange(count, dtype=np.int32), (protocol.epochs, 1)), axis=1
    )
    # rows [ways, shots + queries]: support and query of a class share no image
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
        # The public protocol divides the variance by n, not n - 1.
        return float(1.96 * self.accuracies.std() / math.sqrt(len(self.accuracies)))


def over_chunks(
    function: Callable[[Episode], Any],
    draw_episode: Callable[..., Episode],
    mesh: Mesh,
    first: int,
    episodes: int,
    chunk: int,
) -> Any:
    """Return ``function(stacked episodes)`` of the episodes from ``first`` on, ``chunk`` of them per call.

    All calls have one shape, a multiple of the devices; the last is padded with its last episode.
    """
    check_integer("episodes", episodes, 1)
    check_integer("chunk", chunk, 1)
    # Rounded up to whole devices. A shorter last call would be another shape, and compile again.
    size = -(-min(chunk, episodes) // mesh.size) * mesh.size
    results = []
    for start in range(0, episodes, size):
        numbers = range(start, min(start + size, episodes))
        drawn = [draw_episode(number=first + number) for number in numbers]
        drawn += drawn[-1:] * (size - len(drawn))
        stacked = Episode(*(np.stack(parts) for parts in zip(*drawn, strict=True)))
        results.append(jax.device_get(function(stacked)))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:episodes], *results)


def linear(
    features: np.ndarray,
    labels: np.ndarray,
    protocol: Protocol | None = None,
    *,
    seed: int = 0,
    episodes: int = 600,
    first: int = 0,
    chunk: int | None = None,
    devices: Sequence[Any] | None = None,
) -> Scores:
    r"""Return the accuracy of a linear classifier in every episode.

    The weights never leave the span of their initial value and of the features they learn from,
    :math:`W = c W_0 + A^\top F`, so SGD is done on c and A: a step costs as many products as there
    are images, not features. In exact arithmetic the result is that of SGD on W.

    Args:
      features: float ``[n, d]``, the classifier's input for every image.
      labels: integers ``[n]``.
      protocol: the definition of an episode and of its training.
      seed: of the evaluation.
      episodes: how many.
      first: the number of the first, to continue an evaluation.
      chunk: episodes in one call of the program, rounded up to a multiple of the devices; by
        default all, as far as a device then holds no more than 1 GiB of them.
      devices: over which the episodes of a call are divided; by default all of this process.

    Raises:
      UsageError: features that are not finite or do not fit the labels, or too few images.
    """
    protocol = Protocol() if protocol is None else protocol
    check_features("features", features)
    check_labels("labels", labels, len(features))
    check_seed("seed", seed)
    if not np.isfinite(features).all():
        raise UsageError("features hold NaN or infinity: the network or its input is broken")
    mesh = meshes.along(EPISODES, devices)
    if chunk is None:
        chunk = mesh.size * max(1, 2**30 // _bytes(protocol, features.shape[1]))
    # Features [n, d] are on every device: which rows an episode needs is data of the program.
    whole = jax.device_put(np.asarray(features, np.float32), NamedSharding(mesh, PartitionSpec()))
    draw_episode = partial(draw, check(labels, protocol), features.shape[1], protocol, seed=seed)

    def solve(drawn: Episode) -> jax.Array:
        return _solve(whole, drawn, protocol, mesh)

    correct = over_chunks(solve, draw_episode, mesh, first, episodes, chunk)
    return Scores(correct / (protocol.ways * protocol.queries))


def _bytes(protocol: Protocol, features: int) -> int:
    """Return an estimate of the bytes that an episode takes on its device."""
    # Images with their features and their products with the support, then rows and weights of all steps.
    support, query = protocol.ways * protocol.shots, protocol.ways * protocol.queries
    vectors = (support + query) * (features + 1 + support)
    return 4 * (vectors + protocol.epochs * (support + protocol.batch_size) * 2)


@partial(jax.jit, static_argnames=("protocol", "mesh"))
def _solve(features: jax.Array, drawn: Episode, protocol: Protocol, mesh: Mesh) -> jax.Array:
    return of_each(partial(_solve_one, protocol), mesh, features, drawn)


def of_each(function: Callable[..., Any], mesh: Mesh, shared: Any, *episodes: Any) -> Any:
    """Return ``function(shared, *episode)`` of each of the stacked episodes, divided over the devices."""
    split = PartitionSpec(EPISODES)

    def on_device(shared: Any, *episodes: Any) -> Any:
        return jax.vmap(partial(function, shared))(*episodes)

    # Episodes are independent, so a device's program is that of its own part. The replication check is
    # off: it refuses the scans over steps, which start from constants that are the same everywhere.
    in_specs = (PartitionSpec(), *[split] * len(episodes))
    return jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=split, check_vma=False)(
        shared, *episodes
    )


def _solve_one(protocol: Protocol, features: jax.Array, drawn: Episode) -> jax.Array:
    """Learn and score one episode; return the number of correct queries."""
    ways, shots = protocol.ways, protocol.shots
    count = ways * shots
    # [count, ways], and below support [count, d + 1], gram [count, count], logits [count, ways]
    labels = jax.nn.one_hot(jnp.repeat(jnp.arange(ways), shots), ways)
    with jax.default_matmul_precision("highest"):
        support = _with_one(features[drawn.support])
        initial = jnp.concatenate([drawn.kernel, drawn.bias[:, None]], axis=1)
        # All that a step needs of the features: their products with each other and with the initial weights.
        gram, logits = support @ support.T, support @ initial.T
        query = _with_one(features[drawn.query])
        query_gram, query_logits = query @ support.T, query @ initial.T
    rows, weights = _batches(drawn.orders, protocol.batch_size)

    def step(state, batch):
        c, a, c_momentum, a_momentum, number = state
        rows, weights = batch
        scores = c * logits[rows] + gram[rows] @ a
        error = (jax.nn.softmax(scores) - labels[rows]) * (weights / weights.sum())[:, None]
        # The gradient with respect to W, in the coordinates of c and A.
        c_grad = protocol.weight_decay * c
        # Added, not set: the filling of the last batch may name a row twice, at weight 0.
        a_grad = (protocol.weight_decay * a).at[rows].add(error)
        # As torch: the first gradient enters the momentum undamped.
        undamped = jnp.where(number == 0, 1.0, 1 - protocol.dampening)
        # Momentum is zero before the first step, so its factor does not matter there.
        c_momentum = protocol.momentum * c_momentum + undamped * c_grad
        a_momentum = protocol.momentum * a_momentum + undamped * a_grad
        rate = protocol.learning_rate
        new = (c - rate * c_momentum, a - rate * a_momentum, c_momentum, a_momentum, number + 1)
        return new, None

    # At the start W = W_0: c is 1, and A is 0.
    zero = jnp.zeros((count, ways))
    start = (jnp.ones(()), zero, jnp.zeros(()), zero, jnp.zeros((), jnp.int32))
    (c, a, *_), _ = jax.lax.scan(step, start, (rows, weights))
    # The weights are never formed: the query's logits are the same combination of its own products.
    predicted = (c * query_logits + query_gram @ a).argmax(-1)
    return (predicted == jnp.repeat(jnp.arange(ways), protocol.queries)).sum()


def _with_one(features: jax.Array) -> jax.Array:
    """Append a feature that is always 1, whose weight is the bias."""
    return jnp.pad(features, ((0, 0), (0, 1)), constant_values=1)


def _batches(orders: Any, batch: int) -> tuple[jax.Array, jax.Array]:
    """Cut ``orders [epochs, n]`` into steps: rows and weights ``[steps, batch]``, 0 for filling."""
    count = orders.shape[1]
    # Filling at weight 0 gives all steps one shape; here, unlike with BatchNorm, it changes nothing.
    filling = -count % batch
    rows = jnp.concatenate([orders, orders[:, :filling]], axis=1)
    weights = jnp.broadcast_to(jnp.arange(count + filling) < count, rows.shape)
    return rows.reshape(-1, batch), weights.astype(jnp.float32).reshape(-1, batch)
