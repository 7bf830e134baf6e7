"""Zapping: the classifier is resampled again and again in the course of the training (Frati et al. 2024)."""

from __future__ import annotations

import dataclasses

from seal_jax import masks
from seal_jax.errors import UsageError
from seal_jax.methods.method import Context, Init, Method, Variant, check_options
from seal_jax.transforms.relearn import make_zapping_tx

ORDER = 26
VARIANTS = {
    # A cosine would leave the last classifiers no learning rate to relearn by.
    "zapping": Variant(
        "Zapping",
        "Frati et al. 2024",
        "fine_tuning_source.py",
        digits={
            "every": 4,
            "optimizer.schedule": "constant",
            "optimizer.learning_rate": 0.05,
        },
    )
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of zapping.

    Attributes:
      every: epochs from one event to the next; this and the next are ours.
      classes: random classes whose weights and biases are resampled at a time; 0 for all.
      init: from the model's own initialisation, or PyTorch's default ("torch_default").
    """

    every: int = 1
    classes: int = 0
    init: Init = "model"


def build(options: Options, context: Context) -> Method:
    """Return plain training with events within its generations."""
    check_options(options, "be at least 1", "every")
    check_options(options, "be at least 0", "classes")
    if options.classes >= context.model.num_classes:
        raise UsageError(
            f"method.classes = {options.classes} must be below the {context.model.num_classes} "
            "classes; 0 resamples all"
        )
    head = context.model.head
    tx = make_zapping_tx(
        head,
        init_fn=context.initialiser(options.init),
        every=options.every,
        classes=options.classes or None,
        **context.arguments(),
    )
    # The key of the step, so that every seed and every event samples anew.
    return context.plain(tx=tx, random=True, mask=masks.resolve(head, context.params))
