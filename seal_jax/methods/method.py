"""What a training method is made of, and what it is built from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from seal_jax.core.settings import Optimizer, Train
from seal_jax.core.state import Weights
from seal_jax.errors import UsageError, check_number
from seal_jax.generations import Clock, Schedule
from seal_jax.losses import cross_entropy
from seal_jax.models import Model
from seal_jax.schedules import cosine, steps
from seal_jax.transforms.preconditioners import preconditioner

PyTree = Any


class HookContext(NamedTuple):
    """A moment between two steps at which a method may change what is trained.

    Attributes:
      key: of this event and no other.
      generation: that starts, int32, traced.
      weights: parameters, BatchNorm statistics and normalisers.
      opt_state: the optimizer's; ``None`` before the first step, when it has yet to be made.
      method_state: what the method keeps; ``()`` before the first step.
      images: ``images(n)`` are n training images, not augmented, drawn anew for this event.
    """

    key: jax.Array
    generation: jax.Array
    weights: Weights
    opt_state: PyTree
    method_state: PyTree
    images: Callable[[int], jax.Array]


class Auxiliary(NamedTuple):
    """What an objective finds beside the loss.

    Attributes:
      batch_stats: BatchNorm's running statistics after the batch.
      sums: weighted loss, hits and weight of this device's examples.
      features: the classifier's input, float32 ``[b, C]``.
    """

    batch_stats: PyTree
    sums: PyTree
    features: jax.Array


@dataclasses.dataclass(frozen=True)
class StepContext:
    """The loss of one step, as a method sees it when it looks for a gradient.

    Attributes:
      objective: ``params -> (loss, Auxiliary)``, this device's share of the batch's loss.
      part: ``losses [b] -> share``: what this device's examples add to the batch's mean.
      labels: int32 ``[b]``, of this device's examples.
      weights: with the parameters at which the step was entered.
      method_state: what the method keeps.
      key: of this step, the same on every device; ``None`` unless ``Method.random``.
      progress: share of the training that is over, in [0, 1).
      extra_batch: ``extra_batch(i) -> (images, labels)``, this device's part of another batch of
        ``Method.extra_batch_size`` training images, for i below ``Method.extra_batches``.
      extract: ``(params, images) -> (features, batch_stats)``: the classifier's input, float32
        ``[b, C]``, and the statistics after a training pass over a further batch.
      gather: puts the devices' parts of a batch together, along the first axis.
    """

    objective: Callable[[PyTree], tuple[jax.Array, Auxiliary]]
    part: Callable[[jax.Array], jax.Array]
    labels: jax.Array
    weights: Weights
    method_state: PyTree
    key: jax.Array | None
    progress: jax.Array
    extra_batch: Callable[[Any], tuple[jax.Array, jax.Array]]
    extract: Callable[[PyTree, jax.Array], tuple[jax.Array, PyTree]]
    gather: Callable[[PyTree], PyTree]


class Gradient(NamedTuple):
    """What a method's gradient function returns, all of it this device's share.

    Attributes:
      auxiliary: of the pass whose loss and BatchNorm statistics count.
      gradient: like the parameters.
      measures: by the names of ``Method.measures``; the same on every device.
    """

    auxiliary: Auxiliary
    gradient: PyTree
    measures: dict[str, jax.Array]


GradientFunction = Callable[[StepContext, PyTree], Gradient]


def plain_gradient(problem: StepContext, params: PyTree) -> Gradient:
    """Return the gradient of the objective at ``params``."""
    (_, auxiliary), gradient = jax.value_and_grad(problem.objective, has_aux=True)(params)
    return Gradient(auxiliary, gradient, {})


def gradient_of(mask: PyTree) -> GradientFunction:
    """Return a gradient function for the parameters where ``mask`` (static) is True.

    The others are constants to the differentiation, so what only their gradient would need is not
    computed; theirs comes out as zeros.
    """

    def gradient(problem: StepContext, params: PyTree) -> Gradient:
        def objective(params):
            held = jax.tree.map(
                lambda flag, leaf: leaf if flag else jax.lax.stop_gradient(leaf), mask, params
            )
            return problem.objective(held)

        return plain_gradient(dataclasses.replace(problem, objective=objective), params)

    return gradient


@dataclasses.dataclass(frozen=True)
class Method:
    """A training method as data; what a field leaves out is plain SGD's.

    Attributes:
      tx: turns gradients into updates; knows its generations by its own clock. Its ``update`` is
        given ``value`` (the batch's loss), ``grad_fn`` (``params -> gradient`` of the same batch
        with the same randomness), ``key`` (of the step) and ``extra_args(method_state)``.
      loss: ``(logits [b, classes], labels [b], targets) -> [b]``.
      targets: ``(method_state, images) -> targets``: what the loss needs beside, a teacher's logits, found
        once a step and not differentiated.
      on_start: ``HookContext -> HookContext``, run under ``jit`` before the first step: it may change the
        weights, and makes the method_state.
      on_generation_start: the same before the first step of every generation from 1 on; each has
        its own key. ``None`` where nothing happens.
      on_validation: ``(method_state, accuracy, step) -> method_state``, after each scoring of the validation
        split.
      gradient: how the gradient is found; see :func:`plain_gradient`.
      extra_args: further arguments of ``tx.update``, from the method_state.
      frozen_statistics: ``method_state -> bool``, traced or not: whether training passes use BatchNorm's
        running statistics and leave them as they are; ``train.batch_statistics="frozen"`` means
        always.
      extra_batch_size: images in each further batch that ``gradient`` may ask for; 0 for none.
      extra_batches: how many of them there are a step.
      continues_momentum: whether a training that starts from another run takes over the momentum.
      random: whether ``tx`` or ``gradient`` need a key in every step.
      rate: the learning rate to be logged, of the step within the schedule; ``None`` for that of
        ``optimizer.learning_rate``.
      measures: names of what ``gradient`` measures in every step; the log has their means.
      mask: the forget subtree, to be reported before training; ``None`` if there is none.
      note: a line to be printed before training, if any.
    """

    tx: optax.GradientTransformationExtraArgs
    loss: Callable[[jax.Array, jax.Array, Any], jax.Array]
    targets: Callable[[PyTree, jax.Array], PyTree] | None = None
    on_start: Callable[[HookContext], HookContext] | None = None
    on_generation_start: Callable[[HookContext], HookContext] | None = None
    on_validation: Callable[[PyTree, jax.Array, jax.Array], PyTree] | None = None
    gradient: GradientFunction = plain_gradient
    extra_args: Callable[[PyTree], Mapping[str, Any]] = lambda method_state: {}
    frozen_statistics: Callable[[PyTree], Any] = lambda method_state: False
    extra_batch_size: int = 0
    extra_batches: int = 1
    continues_momentum: bool = False
    random: bool = False
    rate: Schedule | None = None
    measures: tuple[str, ...] = ()
    mask: PyTree | None = None
    note: str = ""


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
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return self.clock.steps_per_generation * self.train.generations

    @property
    def loss(self) -> Callable[[jax.Array, jax.Array, Any], jax.Array]:
        """Cross entropy with the label smoothing asked for."""
        return lambda logits, labels, targets: cross_entropy(
            logits, labels, self.optimizer.label_smoothing
        )

    @property
    def head(self) -> str:
        """Path rule for the classifier's parameters, a mask."""
        return self.model.head

    @property
    def epochs(self) -> int:
        """Epochs after which a transformation's clock starts anew: a generation, or all of them."""
        single = self.optimizer.schedule == "single"
        return self.train.epochs_per_generation * (self.train.generations if single else 1)

    def schedule(self, learning_rate: float | None = None) -> Schedule:
        """Return the learning rate as a function of the step within a cosine.

        ``learning_rate`` stands in for ``optimizer.learning_rate``, for a method with several.
        """
        rate = self.optimizer.learning_rate if learning_rate is None else learning_rate
        check_number(
            "optimizer.learning_rate", rate, lambda v: 0 < v < math.inf, "be positive and finite"
        )
        if self.optimizer.schedule == "constant":
            return lambda step: jnp.asarray(rate, jnp.float32)
        if self.optimizer.schedule == "steps":
            return steps(
                rate,
                self.optimizer.decay_epochs,
                factor=self.optimizer.decay_factor,
                steps_per_epoch=self.steps_per_epoch,
            )
        return cosine(
            rate,
            epochs=self.epochs,
            steps_per_epoch=self.steps_per_epoch,
            warmup_epochs=self.optimizer.warmup_epochs,
        )

    def arguments(self) -> dict[str, Any]:
        """Return what the ``make_..._tx`` of most methods take, by name."""
        optimizer = self.optimizer
        return {
            "learning_rate": self.schedule(),
            "steps_per_epoch": self.steps_per_epoch,
            "epochs_per_generation": self.epochs,
            "weight_decay": optimizer.weight_decay,
            "reset_momentum": optimizer.reset_momentum,
            "preconditioner": preconditioner(
                optimizer.name,
                momentum=optimizer.momentum,
                nesterov=optimizer.nesterov,
            ),
        }

    def init_params(self, key: jax.Array) -> PyTree:
        """Draw parameters as the model does."""
        return self.model.init(key)["params"]

    def require_restarts(self, name: str) -> None:
        """Raise if the schedule does not restart: no forgetting method is defined without."""
        if self.optimizer.schedule == "single":
            raise UsageError(
                f'optimizer.schedule = "single" does not go with method {name!r}; use "restart"'
            )
