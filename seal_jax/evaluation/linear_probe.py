"""Linear probe on cached features: a new classifier for every learning rate, in one program."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
from seal_jax.losses import cross_entropy


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The classifiers' training; the defaults are those of the SEAL paper, section 4.2 and Table 1.

    The batch size is not in the paper.

    Attributes:
      learning_rates: one classifier each; constant, without a schedule.
      epochs: passes over the features.
      batch_size: features per step; the last batch of a pass may be smaller.
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
            check_number("learning_rates", rate, positive, "be positive")
        check_number("momentum", self.momentum, lambda v: 0 <= v < 1, "lie in [0, 1)")
        check_number("weight_decay", self.weight_decay, nonnegative, "not be negative")
        for field in ("epochs", "batch_size"):
            check_integer(field, getattr(self, field), 1)


class Probe(NamedTuple):
    """The results of :func:`fit`.

    Attributes:
      accuracies: on the test features, ``[learning rates]``, in [0, 1].
      kernels: ``[learning rates, d, classes]``.
      biases: ``[learning rates, classes]``.
    """

    accuracies: np.ndarray
    kernels: np.ndarray
    biases: np.ndarray

    @property
    def best(self) -> int:
        """Index of the highest test accuracy, which the paper reports."""
        return int(np.argmax(self.accuracies))


def fit(
    train: tuple[np.ndarray | Callable[[int], np.ndarray], np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    num_classes: int,
    protocol: Protocol | None = None,
    *,
    seed: int = 0,
) -> Probe:
    r"""Train linear classifiers on features and score them.

    All learning rates start from the same weights, as torch's ``nn.Linear`` draws them, uniform in
    :math:`\pm 1 / \sqrt d`, and see the same batches, so they differ in nothing else. It is one
    compiled program.

    Args:
      train: features float ``[n, d]`` and labels ``[n]``; instead of features a function of the epoch,
        0, 1, ..., that returns those of its augmented images.
      test: features and labels to be scored on.
      num_classes: number of classes.
      protocol: of their training, by default as in the paper.
      seed: of weights and order.

    Raises:
      UsageError: features that are not finite or do not fit the labels, or labels out of range.
    """
    protocol = Protocol() if protocol is None else protocol
    features, labels = train
    if not callable(features):
        _check("train", (features, labels), num_classes)
    _check("test", test, num_classes, None if callable(features) else features.shape[1])
    check_seed("seed", seed)
    # Passed as an array, and replaced by one value in the static protocol: other rates share the program.
    rates = jnp.asarray(protocol.learning_rates, jnp.float32)
    protocol = dataclasses.replace(protocol, learning_rates=(1.0,))
    width, targets = test[0].shape[1], jnp.asarray(labels)
    state, key = _start(jax.random.key(seed), rates, width, num_classes)
    # Augmented features are new in every epoch, so the program is that of one; with cached ones it is of all.
    if callable(features):
        for number in range(protocol.epochs):
            of_epoch = features(number)
            _check("train", (of_epoch, labels), num_classes, width)
            state = _epoch(state, key, number, rates, jnp.asarray(of_epoch), targets, protocol)
    else:
        state = _train(state, key, rates, jnp.asarray(features), targets, protocol)
    return Probe(*map(np.asarray, _score(state, *map(jnp.asarray, test))))


def _check(
    name: str, split: tuple[np.ndarray, np.ndarray], num_classes: int, width: int | None = None
) -> None:
    features, labels = split
    check_features(f"{name} features", features, width)
    check_labels(f"{name} labels", labels, len(features))
    if not len(labels):
        raise UsageError(f"{name} features and labels are empty: give one or more examples")
    if not np.isfinite(features).all():
        raise UsageError(
            f"{name} features hold NaN or infinity: the network or its input is broken"
        )
    if np.min(labels) < 0 or np.max(labels) >= num_classes:
        raise UsageError(f"{name} labels must lie in 0..{num_classes - 1}")


@partial(jax.jit, static_argnames=("size", "num_classes"))
def _start(key, rates, size, num_classes):
    """Return weights and momentum of all learning rates, and the key of the orders."""
    start_key, order_key = jax.random.split(key)
    bound = 1 / math.sqrt(size)
    # One draw for all rates: they must differ in nothing but the rate.
    drawn = jax.random.uniform(start_key, (size + 1, num_classes), minval=-bound, maxval=bound)
    # kernel [d, classes] and bias [classes]; below with a leading axis of learning rates
    params = (drawn[:-1], drawn[-1])
    params = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*rates.shape, *leaf.shape)), params)
    return (params, jax.tree.map(jnp.zeros_like, params)), order_key


@partial(jax.jit, static_argnames=("protocol",))
def _train(state, key, rates, features, labels, protocol):
    """Train for all epochs on the same features."""

    def epoch(state, number):
        return _epoch(state, key, number, rates, features, labels, protocol), None

    return jax.lax.scan(epoch, state, jnp.arange(protocol.epochs))[0]


@partial(jax.jit, static_argnames=("protocol",))
def _epoch(state, key, number, rates, features, labels, protocol):
    """Train all classifiers for an epoch, the last batch with the images that are left."""
    count = len(labels)
    batch = min(protocol.batch_size, count)
    steps = -(-count // batch)
    # The last batch is padded at weight 0, so all steps have one shape; its mean is over the remaining images.
    weights = (jnp.arange(steps * batch) < count).astype(jnp.float32).reshape(steps, batch)
    # A function of seed and epoch: the order is the same whether epochs run one by one or in one scan.
    order = jax.random.permutation(jax.random.fold_in(key, number), count)
    rows = jnp.concatenate([order, order[: steps * batch - count]]).reshape(steps, batch)

    def loss(params, rows, weights):
        logits = features[rows] @ params[0] + params[1]
        return (weights * cross_entropy(logits, labels[rows])).sum() / weights.sum()

    def one(state, rate, inputs):
        params, momentum = state
        grads = jax.grad(loss)(params, *inputs)
        # Coupled L2 as torch has it: the decay enters the momentum with the gradient, on the bias too.
        momentum = jax.tree.map(
            lambda m, g, p: protocol.momentum * m + g + protocol.weight_decay * p,
            momentum,
            grads,
            params,
        )
        return jax.tree.map(lambda p, m: p - rate * m, params, momentum), momentum

    def step(state, inputs):
        return jax.vmap(one, in_axes=(0, 0, None))(state, rates, inputs), None

    return jax.lax.scan(step, state, (rows, weights))[0]


@jax.jit
def _score(state, features, labels):
    (kernels, biases), _ = state
    # [learning rates, n]; of logits that are NaN argmax takes the first class
    predicted = (features @ kernels + biases[:, None]).argmax(-1)
    return (predicted == labels).mean(-1), kernels, biases
