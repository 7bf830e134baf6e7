"""FAST: fast and stable task adaptation (Varno et al. 2020), and the baselines it is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seal_jax import heads, masks
from seal_jax.core.settings import Settings
from seal_jax.errors import UsageError, known_zero
from seal_jax.methods.method import (
    Context,
    GradientFunction,
    HookContext,
    Method,
    Variant,
    check_options,
    plain_gradient,
)
from seal_jax.transforms.fast import make_fast_tx

ORDER = 40
# configs/digits.py adapts the run of `normal` under a new head, with balanced batches, constant rates
# and no decay (section 6.2.1).
_ADAPTATION: dict[str, Any] = {
    "train.pretrained": "../normal",
    "train.generations": 1,
    "train.sampling": "balanced",
    "train.batch_size": 10,
    "optimizer.schedule": "constant",
    "optimizer.weight_decay": 0.0,
}


def _system(name: str, section: str, changes: dict[str, Any], **digits: Any) -> Variant:
    source = f"FAST paper, section {section}"
    return Variant(name, source, "fast_cifar100.py", changes, {**_ADAPTATION, **digits})


_ADAM = {"alpha": 0.01, "beta": 0.001}
VARIANTS = {
    "fast": Variant(
        "FAST", "FAST paper, Algorithm 2", "fast_cifar100.py", digits={**_ADAPTATION, "beta": 0.02}
    ),
    "fast_nesterov": _system("FAST, Nesterov", "6.6", {"optimizer.nesterov": True}, beta=0.02),
    "fast_adam": _system("FAST, Adam", "6.6", {"optimizer.name": "adam"}, **_ADAM),
    "fast_radam": _system("FAST, RAdam", "6.6", {"optimizer.name": "radam"}, **_ADAM),
    "kaiming_fan_in": _system("Kaiming fan-in", "6.6", {"head": "kaiming_fan_in"}),
    "kaiming_fan_out": _system("Kaiming fan-out", "6.4", {"head": "kaiming_fan_out"}),
    "xavier": _system("Xavier", "5.1", {"head": "xavier"}),
    "gaussian": _system("N(0, s^2)", "6.2", {"head": "normal", "sigma": 0.01}, sigma=0.1),
    "feature_extraction": _system("Feature extraction", "3", {"beta": 0.0}),
    "frozen_head": _system(
        "Frozen head", "6.3", {"head": "normal", "sigma": 0.01, "alpha": 0.0}, sigma=0.1
    ),
    "warmup": _system(
        "Classifier warm-up",
        "6.4",
        {"head": "kaiming_fan_in", "warmup": True},
        # In steps; the paper's rule counts ten.
        **{"train.validate_every": 5},
    ),
    "warmup_statistics": _system(
        "Warm-up, updated statistics",
        "6.4, Figure 7",
        {"head": "kaiming_fan_in", "warmup": True, "warmup_statistics": True},
        **{"train.validate_every": 5},
    ),
    "lp_ft": Variant(
        "LP-FT",
        "Kumar et al. 2022",
        "fast_cifar100.py",
        {"head": "kaiming_fan_in", "probe_share": 0.5},
        _ADAPTATION,
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of FAST; the baselines are other heads with ``alpha`` = ``beta``.

    Attributes:
      head: how the new classifier starts: "zero" (FAST), "tiny" (deviation 1e-8), "normal" (deviation
        ``sigma``), "kaiming_fan_in", "kaiming_fan_out" or "xavier".
      sigma: deviation of "normal".
      alpha: α, learning rate of the classifier; ``None`` for ``optimizer.learning_rate``; 0 freezes it
        (section 6.3).
      beta: β, learning rate of the features; ``None`` likewise; 0 is feature extraction (section 3).
      damped_momentum: a gradient enters the momentum of SGD with weight 1 - M, so that rates are ten
        times those of undamped momentum.
      warmup: train the classifier alone until the validation accuracy has not risen by
        ``warmup_gain`` for ``warmup_steps`` steps, then everything, the features with a fresh
        optimizer (section 6.4); needs a validation split.
      warmup_gain: of the accuracy, 0.01 for one percent.
      warmup_steps: see ``warmup``; scored as often as ``train.validate_every`` says.
      warmup_statistics: normalise with the statistics of the batch during the warm-up, and update the
        running ones (the blue and red curves of Figure 7); otherwise BatchNorm is in inference mode
        until it ends.
      probe_share: share of the training's steps in which the classifier alone is trained, before everything is, the
        features with a fresh optimizer: linear probing, then fine-tuning (LP-FT). 0.5 is ours; see ``warmup`` for
        a rule instead of a length.
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
    probe_share: float = 0.0


class Warmup(NamedTuple):
    """The state of the classifier's warm-up, of one seed."""

    warming: jax.Array  # whether it goes on, bool
    best: jax.Array  # the validation accuracy that the next must beat by the gain, float32
    since: jax.Array  # the step at which it was reached, int32


def defaults(options: Options) -> dict[str, dict[str, Any]]:
    """Return the paper's choices: a head without bias, and a feature extractor in inference mode."""
    # Section 5.3.3. Figure 7 has curves with updated statistics, to tell their influence apart.
    statistics = "batch" if options.warmup_statistics else "frozen"
    return {"model": {"head_bias": False}, "train": {"batch_statistics": statistics}}


def momentum_weight(settings: Settings, options: Options) -> float:
    """Return the weight with which a gradient enters the momentum of SGD."""
    damped = options.damped_momentum and settings.optimizer.name == "sgd"
    return 1 - settings.optimizer.momentum if damped else 1.0


def build(options: Options, context: Context) -> Method:
    """Return FAST around the optimizer asked for."""
    optimizer, head = context.optimizer, context.model.head
    try:
        heads.check(options.head, options.sigma)
    except UsageError as error:
        raise UsageError(f"method.{error}") from None
    alpha = optimizer.learning_rate if options.alpha is None else options.alpha
    beta = optimizer.learning_rate if options.beta is None else options.beta
    check_options(
        dataclasses.replace(options, alpha=alpha, beta=beta), "be 0 or positive", "alpha", "beta"
    )
    # A rate of 0 freezes its part, so both would freeze everything. Traced rates are not 0.
    frozen_head, frozen_features = known_zero(alpha), known_zero(beta)
    if frozen_head and frozen_features:
        raise UsageError("method.alpha = 0 and method.beta = 0 leave nothing to train")
    check_options(options, "lie in [0, 1)", "probe_share")
    probes = not known_zero(options.probe_share)
    if probes and options.warmup:
        raise UsageError(
            "method.probe_share does not go with method.warmup = True: set one of them"
        )
    # Both end by training everything: neither part may be frozen for good.
    if (options.warmup or probes) and (frozen_head or frozen_features):
        field = "probe_share" if probes else "warmup = True"
        raise UsageError(f"method.{field} needs method.alpha and method.beta above 0")
    if options.warmup_statistics and context.train.batch_statistics == "frozen":
        raise UsageError(
            'method.warmup_statistics = True does not go with train.batch_statistics = "frozen"; use '
            '"batch"'
        )
    if optimizer.of_optax:
        descent: dict[str, Any] = {"optimizer": context.optax_optimizer}
    else:
        # The library names Nesterov's momentum as an optimizer; Adam and RAdam have none.
        nesterov = optimizer.name == "sgd" and optimizer.nesterov
        descent = {
            "optimizer": "nesterov" if nesterov else optimizer.name,
            "momentum": optimizer.momentum,
            "damped_momentum": options.damped_momentum,
            "weight_decay": optimizer.weight_decay,
        }
    tx = make_fast_tx(
        head,
        # What is frozen has the number 0 as its rate: a schedule must be positive.
        0.0 if frozen_head else context.schedule(alpha),
        0.0 if frozen_features else context.schedule(beta),
        steps_per_epoch=context.steps_per_epoch,
        epochs_per_generation=context.epochs,
        reset_momentum=optimizer.reset_momentum,
        **descent,
    )
    # What does not learn needs no backward pass.
    gradient: GradientFunction = plain_gradient
    if frozen_features:
        gradient = context.gradient_of(head)
    elif frozen_head:
        gradient = context.gradient_of(masks.invert(head))

    def start(hook: HookContext) -> HookContext:
        params = hook.weights.params
        classifier = heads.initialise(hook.key, params[head], options.head, options.sigma)
        return hook.with_params({**params, head: classifier})

    # The learning rate in the log is that of the features, where these learn.
    method = context.plain(
        tx=tx,
        on_start=start,
        gradient=gradient,
        rate=context.schedule(alpha if frozen_features else beta),
        replaces_head=True,
    )
    if probes:
        return _with_probing(method, options.probe_share * context.total_steps)
    return _with_warmup(method, start, options) if options.warmup else method


def _with_probing(method: Method, steps: Any) -> Method:
    """Return the method with the features as they are for so many steps, in inference mode."""

    def probing(method_state: tuple[()], step: jax.Array) -> jax.Array:
        del method_state
        return step < steps

    return dataclasses.replace(
        method,
        extra_args=lambda method_state, step: {"warming": probing(method_state, step)},
        frozen_statistics=probing,
    )


def _with_warmup(
    method: Method, start: Callable[[HookContext], HookContext], options: Options
) -> Method:
    check_options(options, "lie in [0, 1)", "warmup_gain")
    check_options(options, "be at least 1", "warmup_steps")

    def start_warmup(hook: HookContext) -> HookContext:
        # Minus infinity: whatever the first accuracy is, it is a gain.
        state = Warmup(
            jnp.ones((), bool), jnp.full((), -jnp.inf, jnp.float32), jnp.zeros((), jnp.int32)
        )
        return start(hook)._replace(method_state=state)

    def on_validation(method_state: Warmup, accuracy: jax.Array, step: jax.Array) -> Warmup:
        better = accuracy >= method_state.best + options.warmup_gain
        best = jnp.where(better, accuracy, method_state.best)
        since = jnp.where(better, step, method_state.since)
        # Once over, the warm-up does not come back, whatever the accuracy does later.
        warming = method_state.warming & (step - since < options.warmup_steps)
        return Warmup(warming, best, since)

    def frozen(method_state: Warmup, step: jax.Array) -> Any:
        del step
        # Section 5.3.3: in this phase "the feature extractor works in its inference mode".
        return False if options.warmup_statistics else method_state.warming

    return dataclasses.replace(
        method,
        on_start=start_warmup,
        on_validation=on_validation,
        extra_args=lambda method_state, step: {"warming": method_state.warming},
        frozen_statistics=frozen,
    )
