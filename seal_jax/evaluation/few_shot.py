"""Cross-domain few-shot classification on cached features: all episodes in one program.

The protocol of Guo et al., `A Broader Study of Cross-Domain Few-Shot Learning`, 2020, as the SEAL paper
uses it (Tables 4 and 5, "Linear"): in every episode a linear classifier learns from a few images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seal_jax.errors import UsageError, check_features, check_labels, check_seed
from seal_jax.evaluation.episodes import (
    EPISODES,
    Episode,
    Protocol,
    Scores,
    check,
    chunks,
    draw,
    episode,
    mesh_of,
)

__all__ = ["Episode", "Protocol", "Scores", "check", "draw", "episode", "linear"]


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
      chunk: episodes in one call of the program, rounded up to a multiple of the devices; by
        default all, as far as a device then holds no more than 1 GiB of them.
      devices: over which the episodes of a call are divided; by default all of this process.
      progress: called with the number of episodes done.

    Raises:
      UsageError: features that are not finite or do not fit the labels, or too few images.
    """
    protocol = Protocol() if protocol is None else protocol
    check_features("features", features)
    check_labels("labels", labels, len(features))
    check_seed("seed", seed)
    if not np.isfinite(features).all():
        raise UsageError("features hold NaN or infinity: the network or its input is broken")
    mesh = mesh_of(devices)
    if chunk is None:
        chunk = mesh.size * max(1, 2**30 // _bytes(protocol, features.shape[1]))
    groups = check(labels, protocol)
    table = jax.device_put(np.asarray(features, np.float32), NamedSharding(mesh, PartitionSpec()))
    found = []
    for start, count, whole in chunks(
        groups, features.shape[1], protocol, mesh, seed=seed, span=(first, episodes), chunk=chunk
    ):
        found.append(np.asarray(_solve(table, whole, protocol, mesh))[:count])
        if progress is not None:
            progress(start + count)
    return Scores(np.concatenate(found) / (protocol.ways * protocol.queries))


def _bytes(protocol: Protocol, features: int) -> int:
    """Return about how many bytes an episode takes on its device."""
    support, query = protocol.ways * protocol.shots, protocol.ways * protocol.queries
    vectors = (support + query) * (features + 1 + support)
    return 4 * (vectors + protocol.epochs * (support + protocol.batch_size) * 2)


@partial(jax.jit, static_argnames=("protocol", "mesh"))
def _solve(features: jax.Array, drawn: Episode, protocol: Protocol, mesh: Mesh) -> jax.Array:
    def here(features: jax.Array, drawn: Episode) -> jax.Array:
        return jax.vmap(lambda one: _one(features, one, protocol))(drawn)

    split = PartitionSpec(EPISODES)
    # Episodes need nothing of each other: a device's program is that of its own part.
    divided = jax.shard_map(
        here, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split, check_vma=False
    )
    return divided(features, drawn)


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
    return (predicted == jnp.repeat(jnp.arange(ways), protocol.queries)).sum()


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
