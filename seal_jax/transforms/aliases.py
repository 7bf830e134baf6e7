"""optax's own optimizers by name, with their arguments: what ``optimizer.name`` takes beside ours."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from seal_jax import records
from seal_jax.errors import UsageError, check_number, nearest, nonnegative
from seal_jax.generations import Schedule

Alias = Callable[..., optax.GradientTransformation]

# What the step does not give them, or what their weights are not.
_REFUSED = {
    "dpsgd": "it needs the gradient of every example",
    "lbfgs": "it searches along a line, with the loss as a function",
    "noisy_sgd": "its noise would be the same for all seeds",
    "optimistic_adam": "optax deprecates it; use optimistic_adam_v2",
    "polyak_sgd": "it has no learning rate that a schedule could restart",
    "rprop": "its learning rate takes no schedule",
    "sam": 'it is the method: method.name = "sam"',
    "schedule_free": "its average would not be the weights that are evaluated; use optimizer.ema",
    "schedule_free_adamw": "its average would not be the weights that are evaluated; use optimizer.ema",
    "schedule_free_sgd": "its average would not be the weights that are evaluated; use optimizer.ema",
    "sm3": "its learning rate takes no schedule",
    "sophia": "it estimates the Hessian, with the loss as a function",
}
# Their steps depend on where the parameters are: on the way from the start, or along the gradient. In ascent an
# optimizer is given negated parameters, so that its decay shrinks them, and these would measure nonsense.
MEASURES_PARAMS = frozenset(
    ("cocob", "dadapt_adamw", "dog", "dowg", "madgrad", "momo", "momo_adam", "prodigy")
)
# They take their rate from a schedule by the count of their moments, which starts again whenever these do.
_SHARE_A_COUNT = frozenset(("dadapt_adamw", "madgrad", "momo", "momo_adam", "prodigy"))
# Their steps are as long as norms of the parameters say, which must be seen, negated or not.
SCALES_BY_NORM = frozenset(("adafactor", "fromage", "lamb", "lars"))

# Their momentum is one of finished steps, which go downhill, and not of gradients.
SUMS_STEPS = frozenset(("lars",))


def names() -> tuple[str, ...]:
    """Return the names that :func:`make` takes, sorted.

    >>> "adamw" in names(), "muon" in names(), "lbfgs" in names()
    (True, True, False)
    """
    return tuple(sorted(_aliases()))


def check(name: str, args: Mapping[str, Any]) -> None:
    """Raise unless ``name`` is an optimizer of optax that takes these arguments.

    >>> check("adamw", {"beta2": 0.99})
    Traceback (most recent call last):
    ...
    seal_jax.errors.UsageError: optimizer.args.beta2 is not an argument of adamw; nearest: b2, weight_decay, nesterov
    """
    aliases = _aliases()
    if name in _REFUSED:
        raise UsageError(
            f"optimizer.name = {name!r} cannot be used: {_REFUSED[name]}. These can: "
            f"{', '.join(sorted(aliases))}"
        )
    if name not in aliases:
        raise UsageError(
            f"optimizer.name = {name!r} is neither sgd, adam or radam nor an optimizer of optax"
            f"{nearest(name, aliases)}"
        )
    defaults = _defaults(aliases[name])
    for argument, value in args.items():
        if argument not in defaults:
            raise UsageError(
                f"optimizer.args.{argument} is not an argument of {name}{nearest(argument, defaults)}"
            )
        default = defaults[argument]
        # None stands for a number, a bool or the name of a dtype; the trial below finds what does not fit.
        optional = (str if argument.endswith("dtype") else bool | int | float) | None
        kind = optional if default is None else type(default)
        records.check(kind, value, f"optimizer.args.{argument}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            check_number(f"optimizer.args.{argument}", value, math.isfinite, "be finite")
            if "weight_decay" in argument:  # a negative one would grow the weights
                check_number(f"optimizer.args.{argument}", value, nonnegative, "be 0 or positive")

    def trial(params):
        tx = make(name, lambda step: jnp.full((), 0.1, jnp.float32), args)
        # The loss is what our step gives to every optimizer.
        return tx.update(params, tx.init(params), params, value=jnp.zeros(()))[0]

    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    try:
        jax.eval_shape(trial, params)
    except Exception as error:
        given = ", ".join(f"{argument} = {value!r}" for argument, value in args.items())
        reason = str(error).partition("\n")[0]
        raise UsageError(f"optimizer.args of {name}: {given}: {reason}") from None


def make(
    name: str, learning_rate: Schedule, args: Mapping[str, Any]
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer of optax, with arguments that passed :func:`check`.

    Args:
      name: of a function of ``optax`` or ``optax.contrib``.
      learning_rate: the schedule, of the number of its updates.
      args: its other arguments by name; those left out have optax's defaults.

    >>> tx = make("lion", lambda step: 0.5, {"weight_decay": 0.0})
    >>> updates, _ = tx.update(jnp.full((), 3.0), tx.init(jnp.ones(())), jnp.ones(()))
    >>> float(updates)
    -0.5
    """
    alias = functools.partial(_aliases()[name], **args)
    if name in _SHARE_A_COUNT:
        return _with_clock(alias, learning_rate)
    return optax.with_extra_args_support(alias(learning_rate=learning_rate))


class ScheduleState(NamedTuple):
    """State of an optimizer whose schedule has a clock of its own: updates so far, int32, and its state."""

    count: jax.Array
    inner: optax.OptState


def _with_clock(alias: Alias, learning_rate: Schedule) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer whose rate goes on while its moments start again."""

    def at(count: Any) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(alias(learning_rate=learning_rate(count)))

    def init_fn(params):
        count = jnp.zeros((), jnp.int32)
        return ScheduleState(count, at(count).init(params))

    def update_fn(updates, state, params=None, **extra_args):
        updates, inner = at(state.count).update(updates, state.inner, params, **extra_args)
        return updates, ScheduleState(optax.safe_increment(state.count), inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _aliases() -> dict[str, Alias]:
    """Return the functions of optax that make whole optimizers, but those refused."""
    # Not with this module: what trains with our own optimizers does not need it.
    from optax import contrib

    found: dict[str, Alias] = {}
    for namespace in (contrib, optax):
        for name, function in inspect.getmembers(namespace, inspect.isfunction):
            # A whole optimizer has a learning rate; its parts are called scale_by_...
            if name.startswith(("_", "scale_by_")) or name in _REFUSED:
                continue
            if "learning_rate" in inspect.signature(function).parameters:
                found[name] = function
    return found


def _defaults(alias: Alias) -> dict[str, Any]:
    """Return the arguments that a setting can hold, with their defaults."""
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(alias).parameters.values()
        if parameter.name != "learning_rate"
        and (parameter.default is None or isinstance(parameter.default, bool | int | float | str))
    }
