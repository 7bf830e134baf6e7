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
from seal_jax.methods.method import Context, Gradient, Method, StepContext, Variant, check_options
from seal_jax.transforms.pof import make_pof_tx

ORDER = 31
VARIANTS = {
    "pof": Variant(
        "PoF",
        "PoF paper, Algorithm 1",
        "pof_cifar10.py",
        digits={
            "train.pretrained": "../sam",
            "train.generations": 1,
            "optimizer.nesterov": True,
            "optimizer.learning_rate": 0.003,
            "optimizer.schedule": "constant",
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of PoF; the defaults are the paper's.

    Attributes:
      weak_batch_size: images of the batch from which a weak classifier is made.
      gamma: γ, the expansion factor: "uniform" in [``gamma_low``, ``gamma_high``], "constant" at
        ``gamma_high``, or "linear" from low to high over the training.
      gamma_low: see ``gamma``.
      gamma_high: see ``gamma``.
      resample: how many further weak batches to try where the line search finds no end of the
        valley; then, and with 0, the step takes the classifier as it is.
      weak_statistics: let the weak batch update BatchNorm's running statistics, too.
      classifier_learning_rate: of an SGD step of the classifier, against its drift; 0 leaves it as it
        is.
    """

    weak_batch_size: int = 32
    gamma: Literal["uniform", "constant", "linear"] = "uniform"
    gamma_low: float = 0.0
    gamma_high: float = 2.0
    resample: int = 0
    weak_statistics: bool = False
    classifier_learning_rate: float = 0.0


def build(options: Options, context: Context) -> Method:
    """Return PoF: the classifier stays fixed, the features learn to tolerate its perturbation."""
    if not context.train.pretrained:
        raise UsageError(
            'train.pretrained = "" but PoF starts from a trained network: name the folder of its run'
        )
    check_options(options, "be at least 1", "weak_batch_size")
    check_options(options, "be at least 0", "resample")
    check_options(options, "be 0 or positive", "gamma_low", "classifier_learning_rate")
    low, high = options.gamma_low, options.gamma_high
    must = f"be finite, at least method.gamma_low = {low:g}"
    check_number("method.gamma_high", high, lambda v: low <= v < math.inf, must)
    # It continues the momentum of the training before, which Adam's moments are not.
    if context.optimizer.name != "sgd":
        raise UsageError(
            f'optimizer.name = {context.optimizer.name!r} does not go with method "pof"; use "sgd"'
        )
    model, head = context.model, context.model.head
    features_only = context.gradient_of(masks.invert(head))

    def gradient(step: StepContext, params) -> Gradient:
        assert step.key is not None
        # Of the weak batch of all devices, so that one ξ* and one γ serve them all.
        (features, labels), statistics = step.extra_features(params, 0)
        classifier, perturbation, gamma = weak_classifiers.perturb(
            step.key,
            params[head],
            features,
            labels,
            model.classify,
            mean_cross_entropy,
            gamma=functools.partial(
                weak_classifiers.sample_gamma,
                policy=options.gamma,
                low=low,
                high=high,
                progress=step.progress,
            ),
            # The key is not used: all weak batches of a step are sampled before it.
            resample=(lambda key, attempt: step.extra_features(params, attempt)[0])
            if options.resample
            else None,
            attempts=1 + options.resample,
        )
        # The features alone: the classifier's gradient would be that of the perturbed classifier.
        auxiliary, direction, _ = features_only(step, {**params, head: classifier})
        if options.classifier_learning_rate:
            # At θ0, not at the weak classifier: the main batch's features are computed once and serve both.
            drift = context.classifier_gradient(step, params, auxiliary.features)
            direction = {**direction, head: drift}
        if options.weak_statistics:
            # Both passes started from the statistics r: r <- 0.9 r + 0.1 b twice is this.
            statistics = jax.tree.map(
                lambda main, first, old: main + 0.9 * (first - old),
                auxiliary.batch_stats,
                statistics,
                step.weights.batch_stats,
            )
            auxiliary = auxiliary._replace(batch_stats=statistics)
        measures = {
            # Its mean over an epoch is the share of steps without perturbation.
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
    return context.plain(
        tx=tx,
        gradient=gradient,
        extra_batch_size=options.weak_batch_size,
        extra_batches=1 + options.resample,
        continues_momentum=True,
        random=True,
        measures=("rejected", "perturbation"),
    )
