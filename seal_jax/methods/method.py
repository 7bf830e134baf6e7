"""What a training method is made of, what it is built from, and what several methods share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from seal_jax import forgetting, masks
from seal_jax.core.settings import Optimizer, Train
from seal_jax.core.state import Weights
from seal_jax.errors import UsageError, check_number
from seal_jax.generations import Clock, Schedule
from seal_jax.losses import cross_entropy
from seal_jax.models import Model
from seal_jax.schedules import cosine, steps
from seal_jax.transforms import make_normal_tx
from seal_jax.transforms.preconditioners import preconditioner

PyTree = Any
Init = Literal["model", "torch_default"]


class HookContext(NamedTuple):
    """The training state between two steps, where a method may change it.

    Attributes:
      key: random key of this hook call alone; a resumed run gets the same.
      generation: the generation that starts, int32, traced.
      weights: parameters, BatchNorm statistics and normalisers.
      opt_state: the optimizer's state; ``None`` before the first step, when it has yet to be made.
      method_state: what the method keeps; ``()`` before the first step.
      images: ``images(n)`` returns n training images without augmentation, sampled for this call.
    """

    key: jax.Array
    generation: jax.Array
    weights: Weights
    opt_state: PyTree
    method_state: PyTree
    images: Callable[[int], jax.Array]

    def with_params(self, params: PyTree) -> HookContext:
        """Return the context with other parameters; statistics and optimizer state stay."""
        return self._replace(weights=self.weights._replace(params=params))


class Auxiliary(NamedTuple):
    """What a forward pass returns beside the loss.

    Attributes:
      batch_stats: BatchNorm's running statistics after the batch.
      sums: weighted loss, hits and weight, summed over this device's examples.
      features: the classifier's input, float32 ``[b, C]``.
    """

    batch_stats: PyTree
    sums: PyTree
    features: jax.Array


@dataclasses.dataclass(frozen=True)
class StepContext:
    """The loss of one step, as a method's gradient function sees it.

    Attributes:
      objective: ``params -> (loss, Auxiliary)``: this device's part of the batch's mean loss.
      part: ``losses [b] -> loss``: what this device's examples add to the batch's mean.
      labels: int32 ``[b]``, of this device's examples.
      weights: as they are at the start of the step.
      method_state: what the method keeps.
      key: of this step, the same on every device; ``None`` unless ``Method.random``.
      progress: fraction of the training that is done, in [0, 1).
      extra_batch: ``extra_batch(i) -> (images, labels)``, this device's part of another batch of
        ``Method.extra_batch_size`` training images, for i below ``Method.extra_batches``.
      extract: ``(params, images) -> (features, batch_stats)``: the classifier's input, float32
        ``[b, C]``, and the statistics after a training pass over a further batch.
      gather: concatenates the devices' parts of a batch along the first axis.
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

    def extra_features(self, params: PyTree, index: Any) -> tuple[PyTree, PyTree]:
        """Return ``(features, labels)`` of a whole extra batch, and the statistics after its pass.

        A weak classifier is made of the batch of all devices, so that it is the same on each.
        """
        images, labels = self.extra_batch(index)
        features, batch_stats = self.extract(params, images)
        return self.gather((features, labels)), batch_stats


class Gradient(NamedTuple):
    """What a method's gradient function returns: this device's part, to be summed over devices.

    Attributes:
      auxiliary: of the pass whose loss and BatchNorm statistics count.
      gradient: like the parameters.
      measures: by the names of ``Method.measures``; the same on every device.
    """

    auxiliary: Auxiliary
    gradient: PyTree
    measures: dict[str, jax.Array]


GradientFunction = Callable[[StepContext, PyTree], Gradient]


def plain_gradient(step: StepContext, params: PyTree) -> Gradient:
    """Return the gradient of the objective at ``params``."""
    (_, auxiliary), gradient = jax.value_and_grad(step.objective, has_aux=True)(params)
    return Gradient(auxiliary, gradient, {})


@dataclasses.dataclass(frozen=True)
class Method:
    """A training method as data; what a field leaves out is plain SGD's.

    Attributes:
      tx: turns gradients into updates; knows its generations by its own clock. Its ``update`` is
        given ``value`` (the batch's loss), ``grad_fn`` (``params -> gradient`` of the same batch
        with the same randomness), ``key`` (of the step) and ``extra_args(method_state)``.
      loss: ``(logits [b, classes], labels [b], targets) -> [b]``.
      targets: ``(method_state, images) -> targets``: what else the loss needs, a teacher's logits;
        computed once a step and not differentiated.
      on_start: ``HookContext -> HookContext``, run under ``jit`` before the first step: it may change
        the weights, and makes the method state.
      on_generation_start: the same before the first step of every generation from 1 on; each has
        its own key. ``None`` where nothing happens.
      on_validation: ``(method_state, accuracy, step) -> method_state``, after each scoring of the
        validation split.
      gradient: how the gradient is computed; see :func:`plain_gradient`.
      extra_args: further arguments of ``tx.update``, from the method state.
      frozen_statistics: ``method_state -> bool``, traced or not: whether training passes use BatchNorm's
        running statistics and leave them as they are; ``train.batch_statistics="frozen"`` means
        always.
      extra_batch_size: images in each further batch that ``gradient`` may ask for; 0 for none.
      extra_batches: how many of them there are per step.
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
    def epochs(self) -> int:
        """Epochs after which a transformation's clock restarts: a generation, or all of them."""
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
        # Of the step within a generation: a transformation's own clock restarts it.
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
                optimizer.name, momentum=optimizer.momentum, nesterov=optimizer.nesterov
            ),
        }

    def init_params(self, key: jax.Array) -> PyTree:
        """Sample parameters from the model's initialisation."""
        return self.model.init(key)["params"]

    def initialiser(self, init: Init) -> forgetting.Initialiser:
        """Return what an option ``init`` names: the model's initialisation, or PyTorch's default."""
        return self.init_params if init == "model" else "torch_default"

    def require_restarts(self, name: str) -> None:
        """Raise if the schedule does not restart: no forgetting method is defined without."""
        if self.optimizer.schedule == "single":
            raise UsageError(
                f'optimizer.schedule = "single" does not go with method {name!r}; use "restart"'
            )

    def at_threshold(self, split: Callable[..., masks.Mask], threshold: str) -> masks.Mask:
        """Return the blocks ``masks.before`` or ``masks.since`` an option ``threshold``."""
        try:
            return split(self.model.blocks, threshold)
        except UsageError as error:
            raise UsageError(f"method.threshold: {error}") from None

    def plain(self, **fields: Any) -> Method:
        """Return plain training, with other ``fields`` of :class:`Method` in place of its own."""
        # Built only where it is used: building it checks settings that other methods interpret.
        if "tx" not in fields:
            fields["tx"] = make_normal_tx(**self.arguments())
        return Method(**{"loss": self.loss, **fields})

    def relearn(
        self, name: str, select: Callable[[HookContext], PyTree], init: Init = "model"
    ) -> Method:
        """Return plain training that reinitialises a selection of the weights between generations.

        Knowledge evolution, DSD and FC differ in the selection alone.

        Args:
          name: of the method, for errors.
          select: maps the hook context to a selection, see :mod:`seal_jax.selections`.
          init: see :meth:`initialiser`.
        """
        self.require_restarts(name)
        init_fn = self.initialiser(init)

        def forget(hook: HookContext) -> HookContext:
            params = hook.weights.params
            return hook.with_params(
                forgetting.reinitialise_selected(hook.key, params, select(hook), init_fn)
            )

        return self.plain(on_generation_start=forget)

    def gradient_of(self, rule: masks.Mask) -> GradientFunction:
        """Return a gradient function for the parameters that a mask chooses.

        The others are constants to the differentiation, so XLA drops what only their gradient would
        need; their gradient is zero.
        """
        mask = masks.resolve(rule, self.params)

        def gradient(step: StepContext, params: PyTree) -> Gradient:
            # Not by differentiating fewer arguments: the gradient keeps the structure of the parameters.
            def objective(params):
                held = jax.tree.map(
                    lambda flag, leaf: leaf if flag else jax.lax.stop_gradient(leaf), mask, params
                )
                return step.objective(held)

            return plain_gradient(dataclasses.replace(step, objective=objective), params)

        return gradient

    def classifier_gradient(self, step: StepContext, params: PyTree, features: jax.Array) -> PyTree:
        """Return the gradient of the batch's loss by the classifier alone, on constant features."""

        def objective(classifier):
            logits = self.model.classify(classifier, features)
            return step.part(self.loss(logits, step.labels, None))

        return jax.grad(objective)(params[self.model.head])


_CONDITIONS: dict[str, Callable[[Any], bool]] = {
    "be positive": lambda value: 0 < value < math.inf,
    "be 0 or positive": lambda value: 0 <= value < math.inf,
    "be at least 0": lambda value: value >= 0,
    "be at least 1": lambda value: value >= 1,
    "lie between 0 and 1": lambda value: 0 < value < 1,
    "lie in [0, 1]": lambda value: 0 <= value <= 1,
    "lie in [0, 1)": lambda value: 0 <= value < 1,
}


def check_options(options: Any, must: str, *fields: str) -> None:
    """Raise unless these options of a method are numbers that do what they ``must``."""
    for field in fields:
        check_number(f"method.{field}", getattr(options, field), _CONDITIONS[must], must)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to use a method that a paper names: a row of ``python -m seal_jax methods``.

    Settings are named as options of the method, or with their section: ``optimizer.nesterov``.

    Attributes:
      name: what the papers call it.
      source: paper and section.
      config: at the size of its paper, ``file.py:variant`` in ``configs/``; of a file alone it is the
        variant of the same name; empty if there is none.
      changes: settings that set it apart from the method's defaults.
      digits: further settings of ``configs/digits.py``, where every variant trains in seconds.
      also: other configs with it, ``file.py`` or ``file.py:variant,variant``.
      method: the name of its method; the registry fills in this and ``key``.
      key: its name in ``configs/digits.py``.
    """

    name: str
    source: str
    config: str = ""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    digits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    also: tuple[str, ...] = ()
    method: str = ""
    key: str = ""

    def of(self, method: str, key: str) -> Variant:
        """Return the variant as one of a method, by its key there."""
        # Most papers' configs call a variant as configs/digits.py does.
        file, _, variant = self.config.partition(":")
        config = f"{file}:{variant or key}" if file else ""
        return dataclasses.replace(self, method=method, key=key, config=config)

    @property
    def options(self) -> str:
        """The changes as text, ``head=normal alpha=0``."""
        return " ".join(
            f"{field}={value:g}" if type(value) is float else f"{field}={value}"
            for field, value in self.changes.items()
        )
