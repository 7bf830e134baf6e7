"""Preconditioners, between gradient and learning rate: momentum, damped or not, Adam, RAdam."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from seal_jax.errors import UsageError, check_choice, check_number
from seal_jax.optimizer_state import keep_dtypes

Name = Literal["sgd", "adam", "radam"]


def damped_trace(decay: float, *, nesterov: bool = False) -> optax.GradientTransformationExtraArgs:
    r"""Average the updates: momentum that keeps the size of the gradient.

    From :math:`V = 0`, without a correction of the bias towards it,

    .. math::
        V \leftarrow M V + (1 - M) g, \qquad
        u = V \ \text{or, with Nesterov's step ahead,} \ u = M V + (1 - M) g.

    Both are :math:`1 - M` times what undamped momentum, :math:`b \leftarrow M b + g`, gives; a
    damped learning rate is therefore 10 times an undamped one at M = 0.9.

    Args:
      decay: M, in [0, 1).
      nesterov: whether to step ahead.

    References:
      Varno et al., `Learn Faster and Forget Slower via Fast and Stable Task Adaptation`, Algorithms
      1 and 2; Sutskever et al., `On the importance of initialization and momentum in deep
      learning`, 2013, section 2, for Nesterov's momentum as a step ahead.

    >>> tx = damped_trace(0.9)
    >>> state = tx.init(jnp.zeros(()))
    >>> for _ in range(2):
    ...     update, state = tx.update(jnp.ones(()), state)
    ...     print(round(float(update), 3))
    0.1
    0.19
    """
    _check_momentum(decay)

    def blend(update, trace):
        return decay * trace + (1 - decay) * update

    def init_fn(params):
        return optax.TraceState(trace=optax.tree.zeros_like(params))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        trace = jax.tree.map(blend, updates, state.trace)
        # Blending once more is Nesterov's step ahead: M V + (1 - M) g with the new V.
        return jax.tree.map(blend, updates, trace) if nesterov else trace, optax.TraceState(trace)

    return keep_dtypes(optax.GradientTransformationExtraArgs(init_fn, update_fn))


def _check_momentum(momentum: float) -> None:
    check_number("momentum", momentum, lambda value: 0 <= value < 1, "lie in [0, 1)")


def rectification(count: Any, b2: float) -> tuple[Any, Any]:
    r"""Return the length of RAdam's approximated moving average, and its factor to Adam's step.

    .. math::
        \rho_t = \rho_\infty - \frac{2 t \beta^t}{1 - \beta^t}, \quad
        \rho_\infty = \frac{2}{1 - \beta} - 1, \quad
        r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}
                        {(\rho_\infty - 4)(\rho_\infty - 2) \rho_t}}

    Args:
      count: t, the number of the step from 1.
      b2: :math:`\beta`, a Python number.

    >>> rho, correction = rectification(6, 0.999)
    >>> round(float(rho), 4), round(float(correction), 6)
    (5.9942, 0.025821)
    """
    # The difference of two numbers near 2000, itself near 5 where it matters most, would put the
    # factor off by 0.5 % in float32. While x = -t ln b2 is under 1, use the series of x / (e^x - 1)
    # instead, whose leading terms cancel exactly.
    longest, rate = 2 / (1 - b2) - 1, -math.log(b2)
    steps = jnp.asarray(count, jnp.float32)
    x = steps * rate
    square = jnp.square(jnp.minimum(x, 1.0))
    # x^2 / 12 - x^4 / 720 + x^6 / 30240 - x^8 / 1209600: under 1e-7 of a mistake up to 1.
    series = square / 12 * (1 - square / 60 * (1 - square / 42 * (1 - square / 40)))
    near = (longest - 2 / rate) + steps - 2 / rate * series
    length = jnp.where(x < 1, near, longest - 2 * steps / jnp.expm1(jnp.maximum(x, 1.0)))
    safe = jnp.maximum(length, 5.0)  # no root of a negative number, in a branch not taken either
    square = (safe - 4) * (safe - 2) * longest / ((longest - 4) * (longest - 2) * safe)
    return length, jnp.sqrt(square)


def scale_by_radam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """Scale as RAdam does: Adam's step times :func:`rectification`, at first the first moment alone.

    ``optax.scale_by_radam`` computes the factor as the paper writes it, which is less accurate.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment, a Python number in (0.6, 1): under that RAdam is momentum.
      eps: added to the root of the second moment.

    >>> tx = scale_by_radam(0.9, 0.999, 1e-8)
    >>> update, _ = tx.update(jnp.full((), 0.25), tx.init(jnp.zeros(())))
    >>> round(float(update), 3)  # the first steps have no second moment worth dividing by
    0.25
    """
    check_number("b2", b2, lambda value: 0.6 < value < 1, "lie in (0.6, 1)")
    adam = keep_dtypes(optax.scale_by_adam(b1=b1, b2=b2, eps=eps))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        updates, state = adam.update(updates, state, params)
        length, correction = rectification(state.count, b2)
        plain = optax.tree.bias_correction(state.mu, b1, state.count)

        # 5, as in PyTorch and optax; Algorithm 2 of the paper has 4. Below it: momentum, corrected for its bias.
        def rectify(step, moment):
            return jnp.where(length > 5, (correction * step).astype(step.dtype), moment)

        return jax.tree.map(rectify, updates, plain), state

    return optax.GradientTransformationExtraArgs(adam.init, update_fn)


def preconditioner(
    name: Name,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    damped: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Return the part of an optimizer between weight decay and learning rate, by name.

    Args:
      name: "sgd" (momentum), "adam" or "radam". With coupled decay before it, Adam is PyTorch's
        ``Adam(weight_decay=...)``, not AdamW.
      momentum: of "sgd", or the decay of the first moment of the others; in [0, 1).
      nesterov: of "sgd": whether the momentum is Nesterov's.
      damped: of "sgd": whether the momentum is an average (:func:`damped_trace`) and not a sum.

    References:
      Kingma & Ba, `Adam`, 2015, Algorithm 1; Liu et al., `On the Variance of the Adaptive Learning
      Rate and Beyond`, 2020, Algorithm 2 (RAdam).

    >>> tx = preconditioner("adam")
    >>> update, _ = tx.update(jnp.full((), 0.25), tx.init(jnp.zeros(())))
    >>> round(float(update), 3)
    1.0
    """
    check_choice("optimizer", name, get_args(Name), suggest=True)
    _check_momentum(momentum)
    if name == "sgd":
        if damped:
            return damped_trace(momentum, nesterov=nesterov)
        return keep_dtypes(optax.trace(momentum, nesterov=nesterov))
    for field, value in (("nesterov", nesterov), ("damped", damped)):
        if value:
            raise UsageError(f'{field} = True goes with optimizer "sgd" only, not {name!r}')
    scale = optax.scale_by_adam if name == "adam" else scale_by_radam
    return keep_dtypes(scale(b1=momentum, b2=0.999, eps=1e-8))
