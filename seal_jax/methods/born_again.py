"""Born-again networks: every generation learns from the one before (Furlanello et al. 2018)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seal_jax import losses
from seal_jax.core.state import Weights
from seal_jax.errors import UsageError
from seal_jax.methods.method import Context, HookContext, Method, Variant, check_options

VARIANTS = {
    "born_again": Variant(
        "Born-again",
        "Furlanello et al. 2018; SEAL paper, Tables 9 and 10",
        "born_again_cifar100.py",
        digits={"temperature": 4.0},
        also=("born_again_cifar100.py:labels_only",),
    ),
    "tolerant_teacher": Variant(
        "Tolerant teacher",
        "Yang et al. 2019; SEAL paper, Tables 9 and 10",
        "born_again_cifar100.py",
        {"tolerance": 0.2},
    ),
    "smoothed_teacher": Variant(
        "Label-smoothed teacher",
        "SEAL paper, Tables 9 and 10",
        "born_again_cifar100.py",
        {"optimizer.label_smoothing": 0.1},
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of self-distillation.

    Attributes:
      weight: λ, of the teacher in a student's loss; 0 trains on the labels alone.
      temperature: T, of both softmaxes.
      tolerance: η, in the first generation's loss, of the gap between the top score and the mean of
        the next ``tolerant_classes`` - 1 (a tolerant teacher); 0 for an ordinary teacher.
      tolerant_classes: K.
    """

    weight: float = 0.5
    temperature: float = 1.0
    tolerance: float = 0.0
    tolerant_classes: int = 5


class Teacher(NamedTuple):
    """What a student learns from."""

    weights: Weights  # of the last generation
    present: jax.Array  # whether there is one: False in generation 0


def build(options: Options, context: Context) -> Method:
    """Return born-again training: a generation ends as the teacher of a new student."""
    context.require_restarts("born_again")
    check_options(options, "lie in [0, 1]", "weight", "tolerance")
    check_options(options, "be positive", "temperature")
    classes = context.model.num_classes
    if options.tolerance and not 2 <= options.tolerant_classes <= classes:
        raise UsageError(
            f"method.tolerant_classes = {options.tolerant_classes} must lie in 2..{classes}"
        )
    smoothing = context.optimizer.label_smoothing

    def start(hook: HookContext) -> HookContext:
        # Of the teacher's shapes from the first step on, so that one program serves all generations.
        return hook._replace(method_state=Teacher(hook.weights, jnp.zeros((), bool)))

    def graduate(hook: HookContext) -> HookContext:
        fresh = context.model.init(hook.key)
        # Normalisers that LW inserted into the starting network are the teacher's: a student starts without.
        normalisers = context.model.empty_normalisers() if hook.weights.normalisers else {}
        student = Weights(fresh["params"], fresh["batch_stats"], normalisers)
        # The last weights, not the best: every method's next generation starts from those. The momentum is
        # reset by the clock of `tx`.
        teacher = Teacher(hook.weights, jnp.ones((), bool))
        return hook._replace(weights=student, method_state=teacher)

    def targets(method_state: Teacher, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = context.model.module.apply(method_state.weights._asdict(), images, train=False)
        return logits, method_state.present

    def loss(logits: jax.Array, labels: jax.Array, targets: Any) -> jax.Array:
        teacher_logits, present = targets
        student = losses.born_again(
            logits,
            teacher_logits,
            labels,
            weight=options.weight,
            temperature=options.temperature,
            label_smoothing=smoothing,
        )
        first = context.loss(logits, labels, None)
        # Generation 0 has no teacher; a tolerant teacher is trained there, by its own loss.
        if options.tolerance:
            first = losses.tolerant(
                logits,
                labels,
                weight=options.tolerance,
                k=options.tolerant_classes,
                label_smoothing=smoothing,
            )
        # Whether there is a teacher is traced: one program serves all generations.
        return jnp.where(present, student, first)

    return context.plain(loss=loss, targets=targets, on_start=start, on_generation_start=graduate)
