"""Linear probe on cached features: a new classifier for every learning rate, in one program."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.errors import UsageError, check_number


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How the classifiers learn; the defaults are those of the SEAL paper, Table 1.

    Attributes:
      learning_rates: one classifier each, flat.
      epochs: passes over the features.
      batch_size: features a step; the last of a pass may be fewer.
      momentum: of SGD.
      weight_decay: coupled L2.
    """

    learning_rates: tuple[float, ...] = (1e-1, 1e-2, 1e-3)
    epochs: int = 120
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self):
        if not self.learning_rates:
            raise UsageError("learning_rates is empty: name at least one")
        for rate in self.learning_rates:
            check_number("learning_rates", rate, lambda v: 0 < v < math.inf, "be positive")
        for field in ("epochs", "batch_size"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{field} = {value!r} must be a whole number of at least 1")


class Probe(NamedTuple):
    """What :func:`fit` found.

    Attributes:
      accuracies: on the test features, ``[learning rates]``, in [0, 1].
      kernels: ``[learning rates, d, classes]``.
      biases: ``[learning rates, classes]``.
      best: index of the highest accuracy, which the paper reports.
    """

    accuracies: np.ndarray
    kernels: np.ndarray
    biases: np.ndarray

    @property
    def best(self) -> int:
        """Index of the highest accuracy."""
        return int(np.argmax(self.accuracies))


def fit(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    num_classes: int,
    protocol: Protocol | None = None,
    *,
    seed: int = 0,
) -> Probe:
    """Train linear classifiers on fixed features and score them.

    All learning rates start from the same weights, He-normal with zero bias, and see the same
    batches, so they differ in nothing else.

    Args:
      train: features float ``[n, d]`` and labels ``[n]``.
      test: the same to be scored on.
      num_classes: number of classes.
      protocol: see :class:`Protocol`.
      seed: of weights and order.

    Raises:
      UsageError: features that are not finite or do not fit the labels, or labels out of range.
    """
    protocol = Protocol() if protocol is None else protocol
    for name, (features, labels) in (("train", train), ("test", test)):
        if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
            raise UsageError(
                f"{name} features {features.shape} and labels {labels.shape} must be [n, d] and [n]"
            )
        if not np.isfinite(features).all():
            raise UsageError(
                f"{name} features hold NaN or infinity: the network or its input is broken"
            )
        if labels.min() < 0 or labels.max() >= num_classes:
            raise UsageError(f"{name} labels must lie in 0..{num_classes - 1}")
    rates = jnp.asarray(protocol.learning_rates, jnp.float32)
    arrays = [jnp.asarray(part) for part in (*train, *test)]
    # Not part of the program's identity: other rates must not compile anew.
    fixed = dataclasses.replace(protocol, learning_rates=(1.0,))
    found = _fit(jax.random.key(seed), rates, *arrays, num_classes, fixed)
    return Probe(*map(np.asarray, found))


@partial(jax.jit, static_argnames=("num_classes", "protocol"))
def _fit(key, rates, features, labels, test_features, test_labels, num_classes, protocol):
    start_key, order_key = jax.random.split(key)
    count, size = features.shape
    kernel = jax.random.normal(start_key, (size, num_classes)) * math.sqrt(2 / size)
    start = (kernel, jnp.zeros(num_classes))
    batch = min(protocol.batch_size, count)
    steps = -(-count // batch)
    weights = (jnp.arange(steps * batch) < count).astype(jnp.float32).reshape(steps, batch)

    def one(rate):
        def loss(params, rows, weights):
            logits = features[rows] @ params[0] + params[1]
            chances = jax.nn.log_softmax(logits)
            picked = jnp.take_along_axis(chances, labels[rows][:, None], axis=1)[:, 0]
            return -(weights * picked).sum() / weights.sum()

        def step(state, inputs):
            params, momentum = state
            slope = jax.grad(loss)(params, *inputs)
            momentum = jax.tree.map(
                lambda m, g, p: protocol.momentum * m + g + protocol.weight_decay * p,
                momentum,
                slope,
                params,
            )
            return (jax.tree.map(lambda p, m: p - rate * m, params, momentum), momentum), None

        def epoch(state, number):
            order = jax.random.permutation(jax.random.fold_in(order_key, number), count)
            rows = jnp.concatenate([order, order[: steps * batch - count]]).reshape(steps, batch)
            return jax.lax.scan(step, state, (rows, weights))[0], None

        zero = jax.tree.map(jnp.zeros_like, start)
        (params, _), _ = jax.lax.scan(epoch, (start, zero), jnp.arange(protocol.epochs))
        predicted = (test_features @ params[0] + params[1]).argmax(-1)
        return (predicted == test_labels).mean(), *params

    return jax.vmap(one)(rates)
