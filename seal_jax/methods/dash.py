"""DASH: weights shrink where a generation starts, by how far they point down the loss (Shin et al. 2024)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from seal_jax import forgetting
from seal_jax.methods.method import Context, HookContext, Method, Variant, check_options

VARIANTS = {"dash": Variant("DASH", "Shin et al. 2024", "warm_start_cifar10.py")}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of DASH; the defaults are those of the released code.

    Attributes:
      least: λ, the least factor on a neuron's weights; 1 is plain training.
      alpha: α, weight of the newest batch in the moving average of gradients.
      batches: batches of ``train.batch_size`` whose gradients are averaged; 0 for as many as in an epoch.
    """

    least: float = 0.3
    alpha: float = 0.3
    batches: int = 0


def build(options: Options, context: Context) -> Method:
    """Return plain training whose weights shrink by their direction where a generation starts."""
    context.require_restarts("dash")
    check_options(options, "lie in [0, 1]", "least", "alpha")
    check_options(options, "be at least 0", "batches")
    batches = options.batches or context.steps_per_epoch

    def forget(hook: HookContext) -> HookContext:
        weights = hook.weights

        def objective(params, images, labels):
            # In inference mode, as the released code has it: BatchNorm's statistics are those of the training.
            variables = weights._replace(params=params)._asdict()
            logits = context.model.module.apply(variables, images, train=False)
            return context.loss(logits, labels, None).mean()

        def add(average, index):
            batch = hook.examples(context.train.batch_size, index)
            gradient = jax.grad(objective)(weights.params, *batch)
            return optax.incremental_update(gradient, average, options.alpha), None

        # From zeros, without correction: the factor cancels in the cosine.
        average, _ = jax.lax.scan(
            add, jax.tree.map(jnp.zeros_like, weights.params), jnp.arange(batches)
        )
        params = forgetting.shrink_by_direction(weights.params, average, least=options.least)
        return hook.with_params(params)

    return context.plain(on_generation_start=forget)
