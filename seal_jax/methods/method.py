"""What a training method is made of, what it is built from, and what several methods share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from seal_jax import forgetting, masks
from seal_jax.core.settings import Optimizer, Train, check_fields
from seal_jax.core.state import MetricSums, Weights
from seal_jax.errors import UsageError, check_number, positive
from seal_jax.generations import Clock, Schedule
from seal_jax.losses import cross_entropy
from seal_jax.models import Model
from seal_jax.schedules import cosine, steps
from seal_jax.transforms import aliases, make_normal_tx
from seal_jax.transforms.preconditioners import Name, preconditioner

PyTree = Any
Init = Literal["model", "torch_default"]


class HookContext(NamedTuple):
    """The training state between two steps, where a method may change it."""

    key: jax.Array  # of this hook call alone; a resumed run gets the same
    generation: jax.Array  # the generation that starts, int32, traced
    weights: Weights
    opt_state: PyTree  # None before the first step, when there is none yet
    method_state: PyTree  # what the method keeps; () before the first step
    images: Callable[[int], jax.Array]  # n training images, not augmented, sampled for this call
    # (n, i) -> (images, labels): batch i, which may be traced, of n of them in one random order.
    examples: Any = None

    def with_params(self, params: PyTree) -> HookContext:
        """Return the context with other parameters; statistics and optimizer state stay."""
        return self._replace(weights=self.weights._replace(params=params))


class Auxiliary(NamedTuple):
    """What a forward pass returns besides the loss."""

    batch_stats: PyTree  # BatchNorm's running statistics after the batch
    sums: MetricSums  # over this device's examples
    features: jax.Array  # the classifier's input, float32 [b, C]
    # Mean magnitudes of hidden units by layer, [n] each: this part's share of the whole batch's mean.
    activations: dict[str, jax.Array]  # empty unless Method.uses_activations


@dataclasses.dataclass(frozen=True)
class StepContext:
    """The loss of one step, as a method's gradient function sees it."""

    # params -> (loss, Auxiliary): this device's part of the batch's mean loss.
    objective: Callable[[PyTree], tuple[jax.Array, Auxiliary]]
    # logits [b, classes] -> loss: this device's part of the batch's mean, as the objective has it.
    loss: Callable[[jax.Array], jax.Array]
    weights: Weights  # at the start of the step
    method_state: PyTree  # what the method keeps
    key: jax.Array | None  # of this step, the same on every device; None unless Method.random
    progress: jax.Array  # fraction of the training that is done, in [0, 1)
    # (params, i) -> (features, labels), batch_stats: the classifier's input, float32 [n, C], of the
    # whole of another batch of Method.extra_batch_size training images, and the statistics after a
    # training pass over this device's part of it; for i below Method.extra_batches.
    # A weak classifier is made of the batch of all devices, so that it is the same on each.
    extra_features: Callable[[PyTree, Any], tuple[PyTree, PyTree]]


class Gradient(NamedTuple):
    """What a method's gradient function returns: this device's part, to be summed over devices."""

    auxiliary: Auxiliary  # of the pass whose loss and BatchNorm statistics count
    gradient: PyTree
    measures: dict[str, jax.Array]  # those of ``Method.measures``, the same on every device


GradientFunction = Callable[[StepContext, PyTree], Gradient]


def plain_gradient(step: StepContext, params: PyTree) -> Gradient:
    """Return the gradient of the objective at ``params``."""
    (_, auxiliary), gradient = jax.value_and_grad(step.objective, has_aux=True)(params)
    return Gradient(auxiliary, gradient, {})


@dataclasses.dataclass(frozen=True)
class Method:
    """A training method as data; a field that is left out is that of plain SGD.

    Hooks map a :class:`HookContext` to another under ``jit``; each call has its own key.
    """

    # Turns gradients into updates; knows its generations by its own clock. Its ``update`` is given
    # ``value`` (the batch's loss), ``grad_fn`` (params -> gradient of the same batch with the same
    # randomness), ``key`` (of the step), ``activations`` and ``extra_args(method_state, step)``.
    tx: optax.GradientTransformationExtraArgs
    # (logits [b, classes], labels [b], targets) -> [b].
    loss: Callable[[jax.Array, jax.Array, Any], jax.Array]
    # (method_state, images) -> what else the loss needs, a teacher's logits; computed once a step and
    # not differentiated.
    targets: Callable[[PyTree, jax.Array], PyTree] | None = None
    # Before the first step: it may change the weights, and makes the method state.
    on_start: Callable[[HookContext], HookContext] | None = None
    # Before the first step of every generation from 1 on.
    on_generation_start: Callable[[HookContext], HookContext] | None = None
    # (method_state, accuracy, step) -> method_state, after each scoring of the validation split.
    on_validation: Callable[[PyTree, jax.Array, jax.Array], PyTree] | None = None
    gradient: GradientFunction = plain_gradient
    # Further arguments of ``tx.update``, from the method state and the step.
    extra_args: Callable[[PyTree, Any], Mapping[str, Any]] = lambda method_state, step: {}
    # Whether training passes use BatchNorm's running statistics and leave them as they are, traced or
    # not; ``train.batch_statistics="frozen"`` means always.
    frozen_statistics: Callable[[PyTree, Any], Any] = lambda method_state, step: False
    extra_batch_size: int = 0  # images in each further batch that ``gradient`` may ask for
    extra_batches: int = 1  # how many of them there are per step
    continues_momentum: bool = False  # of the run that the training starts from
    replaces_head: bool = False  # ``on_start`` gives a new classifier; the source's is not taken
    random: bool = False  # whether ``tx`` or ``gradient`` need a key in every step
    # To be logged, of the step within the schedule; None for that of ``optimizer.learning_rate``.
    rate: Schedule | None = None
    # What ``gradient`` measures in every step; the log has the means.
    measures: tuple[str, ...] = ()
    mask: PyTree | None = None  # the forget subtree, to be reported before training
    note: str = ""  # a line to be printed before training
    # Decay of the average of the weights, where it is the method's and not that of ``optimizer.ema``.
    ema: Any = None
    # step -> whether the weights go back to their average before it. The average outlives generations then.
    returns_to_ema: Callable[[Any], Any] | None = None
    # (params, opt_state, step) -> where ``gradient`` is taken, of whole parameters; ``tx`` is given these themselves.
    point: Callable[[PyTree, PyTree, Any], PyTree] = lambda params, opt_state, step: params
    # Whether ``tx`` needs the mean magnitude over the batch of every hidden unit of ``Model.units``.
    uses_activations: bool = False


@dataclasses.dataclass(frozen=True)
class Context:
    """What a method is built from, besides its options."""

    model: Model  # with its declared block order and head
    params: PyTree  # of jax.ShapeDtypeStruct
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

    @property
    def schedule_clock(self) -> Clock:
        """The clock of transformations and learning rate, whose generation is all of them where nothing restarts."""
        return Clock(self.steps_per_epoch, self.epochs)

    def schedule(self, learning_rate: float | None = None) -> Schedule:
        """Return the learning rate as a function of the step within a cosine.

        ``learning_rate`` stands in for ``optimizer.learning_rate``, for a method with several.
        """
        rate = self.optimizer.learning_rate if learning_rate is None else learning_rate
        check_number("optimizer.learning_rate", rate, positive, "be positive and finite")
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
        shared = {
            "steps_per_epoch": self.steps_per_epoch,
            "epochs_per_generation": self.epochs,
            "reset_momentum": optimizer.reset_momentum,
        }
        if optimizer.of_optax:
            # Of its own updates, as many as steps unless its state is reset: it restarts in either case.
            schedule = self.schedule_clock.restart(self.schedule())
            return {**shared, "optimizer": self.optax_optimizer(schedule)}
        return {
            **shared,
            "learning_rate": self.schedule(),
            "weight_decay": optimizer.weight_decay,
            "preconditioner": preconditioner(
                cast(Name, optimizer.name), momentum=optimizer.momentum, nesterov=optimizer.nesterov
            ),
        }

    def optax_optimizer(self, learning_rate: Schedule) -> optax.GradientTransformationExtraArgs:
        """Return the optimizer of optax that ``optimizer.name`` and ``optimizer.args`` describe."""
        return aliases.make(self.optimizer.name, learning_rate, self.optimizer.args)

    def require_ascent(self, name: str) -> None:
        """Raise if method ``name`` cannot negate the updates of the optimizer."""
        if self.optimizer.name in aliases.MEASURES_PARAMS:
            raise UsageError(
                f"optimizer.name = {self.optimizer.name!r} does not go with method {name!r}: its steps depend "
                "on where the weights are, not on the gradient alone; use another, such as adamw"
            )

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

    def require_unscaled(self, name: str) -> None:
        """Raise if something scales the updates of method ``name``, which have to reach given values."""
        if epochs := self.optimizer.plateau_epochs:
            raise UsageError(
                f"optimizer.plateau_epochs = {epochs} does not go with method {name!r}; set it to 0"
            )

    def at_threshold(self, split: Callable[..., masks.Mask], threshold: str) -> masks.Mask:
        """Return the blocks ``masks.before`` or ``masks.since`` an option ``threshold``."""
        try:
            return split(self.model.blocks, threshold)
        except UsageError as error:
            raise UsageError(f"method.threshold: {error}") from None

    def plain(self, **fields: Any) -> Method:
        """Return plain training, with these ``fields`` of :class:`Method` replaced."""
        # Built only where it is used: building it checks settings that other methods interpret.
        if "tx" not in fields:
            fields["tx"] = make_normal_tx(**self.arguments())
        return Method(**{"loss": self.loss, **fields})

    def relearn(
        self, name: str, select: Callable[[HookContext], PyTree], init: Init = "model"
    ) -> Method:
        """Return plain training that reinitialises a selection of the weights between generations.

        Knowledge evolution, DSD and FC differ in the selection only, which ``select`` makes of the
        hook context; see :mod:`seal_jax.selections`.
        """
        self.require_restarts(name)
        init_fn = self.initialiser(init)

        def forget(hook: HookContext) -> HookContext:
            params, chosen = hook.weights.params, select(hook)
            return hook.with_params(
                forgetting.reinitialise_selected(hook.key, params, chosen, init_fn)
            )

        return self.plain(on_generation_start=forget)

    def gradient_of(self, rule: masks.Mask) -> GradientFunction:
        """Return a gradient function for the parameters that a mask chooses.

        The others are constants to the differentiation, so XLA drops what only their gradient would
        need; their gradient is zero.
        """
        mask = masks.resolve(rule, self.params)

        # Not by differentiating fewer arguments: the gradient keeps the structure of the parameters.
        def hold(params: PyTree) -> PyTree:
            return jax.tree.map(
                lambda flag, leaf: leaf if flag else jax.lax.stop_gradient(leaf), mask, params
            )

        def gradient(step: StepContext, params: PyTree) -> Gradient:
            held = dataclasses.replace(step, objective=lambda params: step.objective(hold(params)))
            return plain_gradient(held, params)

        return gradient

    def classifier_gradient(self, step: StepContext, params: PyTree, features: jax.Array) -> PyTree:
        """Return the gradient of the batch's loss with respect to the classifier only, on constant features."""

        def objective(classifier):
            return step.loss(self.model.classify(classifier, features))

        return jax.grad(objective)(params[self.model.head])


# ``check_options(options, "be positive", "rho")``: of a method's options.
check_options = functools.partial(check_fields, "method")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to use a method that a paper names: a row of ``python -m seal_jax methods``.

    Settings are named as options of the method, or with their section: ``optimizer.nesterov``.
    """

    name: str  # what the papers call it
    source: str  # paper and section
    # At the size of its paper, ``file.py:variant`` in configs/; of a file alone it is the variant of
    # the same name; empty if there is none.
    config: str = ""
    # Settings that set it apart from the method's defaults.
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Further settings of configs/digits.py, where every variant trains in seconds.
    digits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    also: tuple[str, ...] = ()  # other configs with it, ``file.py`` or ``file.py:variant,variant``
    method: str = ""  # the registry fills in the name of its method,
    key: str = ""  # and its own name in configs/digits.py

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
