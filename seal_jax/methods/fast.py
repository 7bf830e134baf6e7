"""FAST: fast and stable task adaptation (Varno et al. 2020), and the baselines it is compared with."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seal_jax import heads, masks
from seal_jax.core.settings import Settings
from seal_jax.errors import UsageError, check_number
from seal_jax.methods.method import (
    Context,
    GradientFunction,
    HookContext,
    Method,
    gradient_of,
    plain_gradient,
)
from seal_jax.transforms.fast import make_fast_tx

SOURCE = "FAST paper, Algorithm 2"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of FAST; the baselines are other heads with ``alpha`` = ``beta``.

    Attributes:
      head: how the new classifier starts: "zero" (FAST), "tiny" (deviation 1e-8), "normal" (deviation
        ``sigma``), "kaiming_fan_in", "kaiming_fan_out" or "xavier".
      sigma: of "normal".
      alpha: learning rate of the classifier; ``None`` for ``optimizer.learning_rate``; 0 freezes it.
      beta: learning rate of the features; ``None`` likewise; 0 is feature extraction.
      damped_momentum: a gradient enters the momentum of SGD with weight 1 - momentum, so that rates
        are ten times those of undamped momentum.
      warmup: train the classifier alone until the validation accuracy has not risen by
        ``warmup_gain`` for ``warmup_steps`` steps, then everything.
      warmup_gain: of the accuracy, 0.01 for one percent.
      warmup_steps: see ``warmup``; scored as often as ``train.validate_every`` says.
      warmup_statistics: normalise with the statistics of the batch during the warm-up, and let the
        running ones move; otherwise BatchNorm is in inference mode until it ends.
    """

    head: heads.Name = "zero"
    sigma: float | None = None
    alpha: float | None = None
    beta: float | None = None
    damped_momentum: bool = True
    warmup: bool = False
    warmup_gain: float = 0.01
    warmup_steps: int = 10
    warmup_statistics: bool = False


class Warmup(NamedTuple):
    """How the warm-up of the classifier goes.

    Attributes:
      warming: whether it goes on.
      best: the validation accuracy that the next must beat by the gain.
      since: the step at which it was reached.
    """

    warming: jax.Array
    best: jax.Array
    since: jax.Array


def defaults(options: Options) -> dict[str, dict[str, Any]]:
    """Return the paper's network: a head without bias on features that change only if they learn."""
    # Section 3: in feature extraction theta stays what it was; the statistics are part of that.
    statistics = "frozen" if options.beta == 0 else "batch"
    return {"model": {"head_bias": False}, "train": {"batch_statistics": statistics}}


def momentum_weight(settings: Settings, options: Options) -> float:
    """Return the weight with which a gradient enters the momentum of SGD."""
    damped = options.damped_momentum and settings.optimizer.name == "sgd"
    return 1 - settings.optimizer.momentum if damped else 1.0


def build(options: Options, context: Context) -> Method:
    """Return FAST around the optimizer asked for."""
    optimizer, head = context.optimizer, context.head
    try:
        heads.check(options.head, options.sigma)
    except UsageError as error:
        raise UsageError(f"method.{error}") from None
    alpha = optimizer.learning_rate if options.alpha is None else options.alpha
    beta = optimizer.learning_rate if options.beta is None else options.beta
    for field, rate in (("alpha", alpha), ("beta", beta)):
        check_number(f"method.{field}", rate, lambda v: 0 <= v < float("inf"), "be 0 or positive")
    if not alpha and not beta:
        raise UsageError("method.alpha = 0 and method.beta = 0 leave nothing to train")
    if options.warmup and not (alpha and beta):
        raise UsageError("method.warmup = True needs method.alpha and method.beta above 0")
    if options.warmup_statistics and context.train.batch_statistics == "frozen":
        raise UsageError(
            'method.warmup_statistics = True does not go with train.batch_statistics = "frozen"; use '
            '"batch"'
        )
    nesterov = optimizer.name == "sgd" and optimizer.nesterov
    tx = make_fast_tx(
        head,
        context.schedule(alpha) if alpha else 0.0,
        context.schedule(beta) if beta else 0.0,
        optimizer="nesterov" if nesterov else optimizer.name,
        momentum=optimizer.momentum,
        damped_momentum=options.damped_momentum,
        weight_decay=optimizer.weight_decay,
        steps_per_epoch=context.steps_per_epoch,
        epochs_per_generation=context.epochs,
        reset_momentum=optimizer.reset_momentum,
    )
    features = masks.invert(head)
    gradient: GradientFunction = plain_gradient
    if not beta:
        gradient = gradient_of(masks.resolve(head, context.params))
    elif not alpha:
        gradient = gradient_of(masks.resolve(features, context.params))

    def start(event: HookContext) -> HookContext:
        params = event.weights.params
        name = context.model.head
        fresh = heads.initialise(event.key, params[name], options.head, options.sigma)
        weights = event.weights._replace(params={**params, name: fresh})
        method_state = _warmup() if options.warmup else ()
        return event._replace(weights=weights, method_state=method_state)

    method = Method(
        tx=tx,
        loss=context.loss,
        on_start=start,
        gradient=gradient,
        rate=context.schedule(beta or alpha),
    )
    return _with_warmup(method, options) if options.warmup else method


def _warmup() -> Warmup:
    return Warmup(jnp.ones((), bool), jnp.full((), -jnp.inf, jnp.float32), jnp.zeros((), jnp.int32))


def _with_warmup(method: Method, options: Options) -> Method:
    check_number("method.warmup_gain", options.warmup_gain, lambda v: 0 <= v < 1, "lie in [0, 1)")
    check_number("method.warmup_steps", options.warmup_steps, lambda v: v >= 1, "be at least 1")

    def on_validation(method_state: Warmup, accuracy: jax.Array, step: jax.Array) -> Warmup:
        better = accuracy >= method_state.best + options.warmup_gain
        best = jnp.where(better, accuracy, method_state.best)
        since = jnp.where(better, step, method_state.since)
        warming = method_state.warming & (step - since < options.warmup_steps)
        return Warmup(warming, best, since)

    def frozen(method_state: Warmup) -> Any:
        # Section 5.3.3: in this phase "the feature extractor works in its inference mode".
        return False if options.warmup_statistics else method_state.warming

    return dataclasses.replace(
        method,
        on_validation=on_validation,
        extra_args=lambda method_state: {"warming": method_state.warming},
        frozen_statistics=frozen,
    )
