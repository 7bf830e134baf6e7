"""FOCA: features learn under many weak classifiers (Sato et al. 2019; the PoF paper's relative)."""

from __future__ import annotations

import dataclasses

from seal_jax import masks, weak_classifiers
from seal_jax.losses import mean_cross_entropy
from seal_jax.methods.method import Context, Gradient, Method, StepContext, Variant, check_options

ORDER = 32
VARIANTS = {"foca": Variant("FOCA", "Sato et al. 2019; PoF paper, section 3.1", "pof_cifar10.py")}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of FOCA.

    Attributes:
      weak_batch_size: images of the batch that a weak classifier learns from.
      weak_steps: its gradient steps, from a random initialisation; this and the next two are ours.
      weak_learning_rate: of these steps.
      weak_sigma: standard deviation of that initialisation.
    """

    weak_batch_size: int = 32
    weak_steps: int = 4
    weak_learning_rate: float = 0.1
    weak_sigma: float = 0.1


def build(options: Options, context: Context) -> Method:
    """Return FOCA; the network's own classifier learns on the same features without shaping them."""
    check_options(options, "be at least 1", "weak_batch_size", "weak_steps")
    check_options(options, "be positive", "weak_learning_rate", "weak_sigma")
    model, head = context.model, context.model.head
    features_only = context.gradient_of(masks.invert(head))

    def gradient(step: StepContext, params) -> Gradient:
        assert step.key is not None
        # The weak batch's statistics are dropped: only the main batch updates BatchNorm. No derivative flows back
        # through the classifier that is made of these features.
        (features, labels), _ = step.extra_features(params, 0)
        weak_classifier = weak_classifiers.foca(
            step.key,
            params[head],
            features,
            labels,
            model.classify,
            mean_cross_entropy,
            steps=options.weak_steps,
            learning_rate=options.weak_learning_rate,
            sigma=options.weak_sigma,
        )
        auxiliary, direction, _ = features_only(step, {**params, head: weak_classifier})
        # On the features of the same pass, held constant: the network's own classifier shapes none.
        head_gradient = context.classifier_gradient(step, params, auxiliary.features)
        return Gradient(auxiliary, {**direction, head: head_gradient}, {})

    return context.plain(
        gradient=gradient,
        extra_batch_size=options.weak_batch_size,
        random=True,
    )
