"""What a training method is made of, and what it is built from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from seal_jax.generations import Clock, Schedule
from seal_jax.models import Model
from seal_jax.schedules import cosine
from seal_jax.training.settings import Optimizer, Train

PyTree = Any

# objective(params) -> (loss, auxiliary): the loss of this device's part of the batch.
Objective = Callable[[PyTree], tuple[jax.Array, PyTree]]


def plain_gradient(objective: Objective, params: PyTree) -> tuple[tuple[jax.Array, PyTree], PyTree]:
    """Return ``((loss, auxiliary), gradient)`` of the objective at ``params``."""
    return jax.value_and_grad(objective, has_aux=True)(params)


def cross_entropy(label_smoothing: float) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return the loss ``(logits [b, classes], labels [b]) -> [b]``, smoothed over all classes.

    >>> loss = cross_entropy(0.1)
    >>> round(float(loss(jnp.zeros((1, 4)), jnp.array([2]))[0]), 4)  # ln 4
    1.3863
    """

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
        return optax.softmax_cross_entropy(logits, targets)

    return loss


@dataclasses.dataclass(frozen=True)
class Method:
    """A training method as data; what a field leaves out is plain SGD's.

    Attributes:
      tx: turns gradients into updates; knows its generations by its own clock.
      loss: ``(logits [b, classes], labels [b]) -> [b]``.
      on_generation_start: ``(key, params, opt_state) -> (params, opt_state)``, run under ``jit``
        before the first step of every generation from 1 on; each generation has its own key.
      gradient: how the gradient of an objective is found; see :func:`plain_gradient`.
      mask: the forget subtree, to be reported before training; ``None`` if there is none.
    """

    tx: optax.GradientTransformationExtraArgs
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    on_generation_start: Callable[[jax.Array, PyTree, PyTree], tuple[PyTree, PyTree]] | None = None
    gradient: Callable[[Objective, PyTree], Any] = plain_gradient
    mask: PyTree | None = None


@dataclasses.dataclass(frozen=True)
class Context:
    """What a method is built from, beside its own options.

    Attributes:
      model: with its declared block order and head.
      params: the parameters' structure, as ``jax.ShapeDtypeStruct``.
      steps_per_epoch: S.
      optimizer: learning rate and its relatives.
      train: generations and epochs.
    """

    model: Model
    params: PyTree
    steps_per_epoch: int
    optimizer: Optimizer
    train: Train

    @property
    def clock(self) -> Clock:
        """The generations of the run."""
        return Clock(self.steps_per_epoch, self.train.epochs_per_generation)

    @property
    def loss(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """Cross entropy with the label smoothing asked for."""
        return cross_entropy(self.optimizer.label_smoothing)

    def schedule(self) -> Schedule:
        """Return the learning rate as a function of the step within a cosine."""
        rate = self.optimizer.learning_rate
        if self.optimizer.schedule == "constant":
            return lambda step: jnp.asarray(rate, jnp.float32)
        single = self.optimizer.schedule == "single"
        epochs = self.train.epochs_per_generation * (self.train.generations if single else 1)
        return cosine(
            rate,
            epochs=epochs,
            steps_per_epoch=self.steps_per_epoch,
            warmup_epochs=self.optimizer.warmup_epochs,
        )

    def init_params(self, key: jax.Array) -> PyTree:
        """Draw parameters as the model does."""
        return self.model.init(key)["params"]
