"""PoF: post-training of the feature extractor (Sato et al. 2022)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from seal_jax import masks, weak_classifiers
from seal_jax.errors import UsageError, check_number
from seal_jax.losses import mean_cross_entropy
from seal_jax.methods.method import (
    Context,
    Gradient,
    Method,
    StepContext,
    gradient_of,
)
from seal_jax.transforms.pof import make_pof_tx

SOURCE = "PoF paper, Algorithm 1"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of PoF; the defaults are the paper's.

    Attributes:
      weak_batch_size: images of the batch that a weak classifier is made of.
      gamma: the expansion factor: "uniform" in [``gamma_low``, ``gamma_high``], "constant" at
        ``gamma_high``, or "linear" from low to high over the training.
      gamma_low: see ``gamma``.
      gamma_high: see ``gamma``.
      resample: how many further weak batches to try where the line search finds no end of the
        valley; then, and with 0, the step takes the classifier as it is.
      weak_statistics: let the weak batch update BatchNorm's running statistics, too.
      classifier_learning_rate: of an SGD step of the classifier, against its drift; 0 for none.
    """

    weak_batch_size: int = 32
    gamma: Literal["uniform", "constant", "linear"] = "uniform"
    gamma_low: float = 0.0
    gamma_high: float = 2.0
    resample: int = 0
    weak_statistics: bool = False
    classifier_learning_rate: float = 0.0


def build(options: Options, context: Context) -> Method:
    """Return PoF: the classifier stays, the features learn to bear its perturbation."""
    if not context.train.pretrained:
        raise UsageError(
            'train.pretrained = "" but PoF starts from a trained network: name the folder of its run'
        )
    for field, least in (("weak_batch_size", 1), ("resample", 0)):
        if getattr(options, field) < least:
            value = getattr(options, field)
            raise UsageError(f"method.{field} = {value} must be at least {least}")
    for field in ("gamma_low", "classifier_learning_rate"):
        value = getattr(options, field)
        check_number(f"method.{field}", value, lambda v: 0 <= v < math.inf, "be 0 or positive")
    low = options.gamma_low
    check_number(
        "method.gamma_high",
        options.gamma_high,
        lambda v: low <= v < math.inf,
        f"be finite, at least method.gamma_low = {low:g}",
    )
    if context.optimizer.name != "sgd":
        raise UsageError(
            f'optimizer.name = {context.optimizer.name!r} does not go with method "pof"; use "sgd"'
        )
    model, head = context.model, context.model.head
    features_only = gradient_of(masks.resolve(masks.invert(head), context.params))

    def gradient(problem: StepContext, params) -> Gradient:
        assert problem.key is not None

        def weak(index):
            images, labels = problem.extra_batch(index)
            features, statistics = problem.extract(params, images)
            return problem.gather((features, labels)), statistics

        def another(key, attempt):
            del key  # the batches are drawn already
            return weak(attempt)[0]

        (features, labels), statistics = weak(0)
        classifier, perturbation, gamma = weak_classifiers.perturb(
            problem.key,
            params[head],
            features,
            labels,
            model.classify,
            mean_cross_entropy,
            gamma=functools.partial(
                weak_classifiers.sample_gamma,
                policy=options.gamma,
                low=options.gamma_low,
                high=options.gamma_high,
                progress=problem.progress,
            ),
            resample=another if options.resample else None,
            attempts=1 + options.resample,
        )
        found = features_only(problem, {**params, head: classifier})
        auxiliary, direction = found.auxiliary, found.gradient
        if options.classifier_learning_rate:
            direction = {**direction, head: _drift(context, problem, params, auxiliary.features)}
        if options.weak_statistics:
            # Both passes entered with the statistics r: r <- 0.9 r + 0.1 b twice is this.
            statistics = jax.tree.map(
                lambda main, first, old: main + 0.9 * (first - old),
                auxiliary.batch_stats,
                statistics,
                problem.weights.batch_stats,
            )
            auxiliary = auxiliary._replace(batch_stats=statistics)
        measures = {
            "rejected": jnp.where(perturbation.accepted, 0.0, 1.0),
            "perturbation": gamma * jnp.where(perturbation.accepted, perturbation.xi, 0.0),
        }
        return Gradient(auxiliary, direction, measures)

    optimizer = context.optimizer
    tx = make_pof_tx(
        head,
        context.schedule(),
        momentum=optimizer.momentum,
        nesterov=optimizer.nesterov,
        weight_decay=optimizer.weight_decay,
        classifier_learning_rate=options.classifier_learning_rate,
        steps_per_epoch=context.steps_per_epoch,
        epochs_per_generation=context.epochs,
    )
    return Method(
        tx=tx,
        loss=context.loss,
        gradient=gradient,
        extra_batch_size=options.weak_batch_size,
        extra_batches=1 + options.resample,
        continues_momentum=True,
        random=True,
        measures=("rejected", "perturbation"),
    )


def _drift(context: Context, problem: StepContext, params, features: jax.Array):
    """Return the gradient of the unperturbed classifier on the batch's features."""

    def objective(classifier):
        logits = context.model.classify(classifier, features)
        return problem.part(context.loss(logits, problem.labels, None))

    return jax.grad(objective)(params[context.model.head])
