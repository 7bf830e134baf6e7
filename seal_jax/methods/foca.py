"""FOCA: features learn under many weak classifiers (Sato et al. 2019; the PoF paper's relative)."""

from __future__ import annotations

import dataclasses
import math

import jax

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
from seal_jax.transforms import make_normal_tx

SOURCE = "Sato et al. 2019; PoF paper, section 3.1"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of FOCA.

    Attributes:
      weak_batch_size: images of the batch that a weak classifier learns from.
      weak_steps: its gradient steps, from a random initialisation.
      weak_learning_rate: of these steps.
      weak_sigma: standard deviation of that initialisation.
    """

    weak_batch_size: int = 32
    weak_steps: int = 4
    weak_learning_rate: float = 0.1
    weak_sigma: float = 0.1


def build(options: Options, context: Context) -> Method:
    """Return FOCA; the network's own classifier learns on the same features without shaping them."""
    for field, least in (("weak_batch_size", 1), ("weak_steps", 1)):
        if getattr(options, field) < least:
            value = getattr(options, field)
            raise UsageError(f"method.{field} = {value} must be at least {least}")
    for field in ("weak_learning_rate", "weak_sigma"):
        value = getattr(options, field)
        check_number(f"method.{field}", value, lambda v: 0 < v < math.inf, "be positive")
    model, head = context.model, context.model.head
    features_only = gradient_of(masks.resolve(masks.invert(head), context.params))

    def gradient(problem: StepContext, params) -> Gradient:
        assert problem.key is not None
        images, labels = problem.extra_batch(0)
        features, _ = problem.extract(params, images)
        features, labels = problem.gather((features, labels))
        classifier = weak_classifiers.foca(
            problem.key,
            params[head],
            features,
            labels,
            model.classify,
            mean_cross_entropy,
            steps=options.weak_steps,
            learning_rate=options.weak_learning_rate,
            sigma=options.weak_sigma,
        )
        found = features_only(problem, {**params, head: classifier})

        def own(classifier):
            logits = model.classify(classifier, found.auxiliary.features)
            return problem.part(context.loss(logits, problem.labels, None))

        return found._replace(gradient={**found.gradient, head: jax.grad(own)(params[head])})

    return Method(
        tx=make_normal_tx(**context.arguments()),
        loss=context.loss,
        gradient=gradient,
        extra_batch_size=options.weak_batch_size,
        random=True,
    )
