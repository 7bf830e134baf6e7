"""The loss of one step as a method sees it when it looks for a gradient."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

import jax

from seal_jax import models
from seal_jax.core import mesh as meshes
from seal_jax.core.state import MetricSums, State, Weights
from seal_jax.methods.method import Auxiliary, StepContext
from seal_jax.training.batches import Arrays, Step

if TYPE_CHECKING:
    from seal_jax.training.step import CompiledSteps


class Use(enum.IntEnum):
    """The independent uses of a step's random key."""

    DROPOUT = 0
    GRADIENT = 1
    UPDATE = 2
    EXTRA_DROPOUT = 3


def key(step: Step, use: Use) -> jax.Array | None:
    """Return the step's key for one use; ``None`` where nothing in the step is random."""
    return None if step.key is None else jax.random.fold_in(step.key, int(use))


def problem(
    programs: CompiledSteps, state: State, weights: Weights, data: Arrays, step: Step
) -> StepContext:
    """Return the loss of this device's part of the step's batch, and what goes with it.

    Every call of its objective sees the same images and the same dropout.
    """
    batches, method, model = programs.batches, programs.method, programs.model
    total = step.batch.weights.sum()
    rows, example_weights, draws = batches.part(step.batch, batches.batch_size)
    images, labels = batches.images(data, rows, draws)
    targets = None if method.targets is None else method.targets(state.method_state, images)
    rngs, extra_rngs = (
        _dropout(step, use) if model.module.dropout else {}
        for use in (Use.DROPOUT, Use.EXTRA_DROPOUT)
    )

    def part(losses: jax.Array) -> jax.Array:
        return (example_weights * losses).sum() / total

    # Images that only fill the batch up must not enter BatchNorm either.
    example_mask = example_weights if batches.fills else None
    frozen = method.frozen_statistics(state.method_state)

    def forward(params: Any, images: Any, rngs: Any, example_mask: Any) -> tuple[Any, Any, Any]:
        """Return logits, features and the statistics after a pass in training mode."""
        with models.batch_statistics(frozen=frozen, example_mask=example_mask):
            logits, changed = model.module.apply(
                weights._replace(params=params)._asdict(),
                images,
                train=True,
                mutable=["batch_stats", "intermediates"],
                rngs=rngs,
            )
        features = changed["intermediates"]["features"][0]
        return logits, features, changed.get("batch_stats", {})

    def objective(params: Any) -> tuple[jax.Array, Auxiliary]:
        logits, features, statistics = forward(params, images, rngs, example_mask)
        losses = example_weights * method.loss(logits, labels, targets)
        correct = example_weights * (logits.argmax(-1) == labels)
        sums = MetricSums(losses.sum(), correct.sum(), example_weights.sum(), {})
        return losses.sum() / total, Auxiliary(statistics, sums, features)

    def extract(params: Any, images: Any) -> tuple[jax.Array, Any]:
        return forward(params, images, extra_rngs, None)[1:]

    def extra_batch(index: Any) -> tuple[jax.Array, jax.Array]:
        one = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), step.extra
        )
        rows, _, draws = batches.part(one, batches.extra_batch_size)
        return batches.images(data, rows, draws)

    step_key = key(step, Use.GRADIENT)
    if step_key is not None:
        # Like the weights: what is drawn from it and then differentiated is this device's own, or
        # differentiation would sum over the devices.
        step_key = jax.lax.pcast(step_key, meshes.DATA, to="varying")

    def gather(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, meshes.DATA, tiled=True), tree)

    return StepContext(
        objective=objective,
        part=part,
        labels=labels,
        weights=weights,
        method_state=jax.lax.pcast(state.method_state, meshes.DATA, to="varying"),
        key=step_key,
        progress=state.step / programs.total_steps,
        extra_batch=extra_batch,
        extract=extract,
        gather=gather,
    )


def _dropout(step: Step, use: Use) -> dict[str, jax.Array]:
    """Return keys for the model: each device drops units of its own part of the batch."""
    step_key = key(step, use)
    assert step_key is not None
    return {"dropout": jax.random.fold_in(step_key, jax.lax.axis_index(meshes.DATA))}
