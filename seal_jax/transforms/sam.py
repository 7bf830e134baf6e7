"""SAM and ASAM: descend along the gradient of the worst point nearby."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from seal_jax import optimizer_state
from seal_jax.errors import UsageError, check_number, known_zero, nonnegative, require_params
from seal_jax.generations import Clock, Schedule, branch
from seal_jax.transforms.sgd import descent, make_normal_tx, takes_options_of

PyTree = Any


def perturb(
    params: PyTree,
    gradient: PyTree,
    rho: Any,
    *,
    adaptive: bool = False,
    eta: float = 0.0,
    weight_decay: float = 0.0,
) -> PyTree:
    r"""Return the parameters moved uphill by a distance of about :math:`\rho`.

    .. math::
        \epsilon = \rho \frac{g}{\|g\| + 10^{-12}} \ \text{(SAM)}, \qquad
        \epsilon = \rho \frac{T_w^2 g}{\|T_w g\| + 10^{-12}}, \ T_w = |w| + \eta \ \text{(ASAM)},

    with one norm over the whole tree, in float32. :math:`\rho = 0` leaves the parameters bit for
    bit; so does a zero gradient, except for the sign of zeros. Both can be differentiated.

    Args:
      params: w.
      gradient: g, a tree like ``params``.
      rho: :math:`\rho`, at least 0; may be traced. SAM's is about 0.05, ASAM's ten times that.
      adaptive: whether a parameter moves in proportion to its own size (ASAM).
      eta: of ASAM, at least 0: lets parameters at 0 move too; 0.01 in Kwon et al.
      weight_decay: :math:`\lambda`; ``g + weight_decay * w`` takes the place of g.

    References:
      Foret et al., `Sharpness-Aware Minimization`, 2021, eq. 2; Kwon et al., `ASAM`, 2021, eq. 8.

    >>> perturb({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 4.0])}, 0.5)["w"].tolist()
    [1.2999999523162842, 2.4000000953674316]
    """
    check_radius(rho, eta)
    slopes, norm = uphill(params, gradient, adaptive, eta, weight_decay)
    length = rho / (norm + 1e-12)

    def move(param, slope):
        # Chosen, not added: -0.0 + 0.0 has another sign than -0.0, and 0 times infinity is NaN.
        return jnp.where(rho == 0, param, param + (length * slope).astype(param.dtype))

    return jax.tree.map(move, params, slopes)


def uphill(
    params: PyTree, gradient: PyTree, adaptive: bool, eta: Any, weight_decay: Any
) -> tuple[PyTree, jax.Array]:
    """Return the direction of :func:`perturb` and the norm that it is divided by, in float32."""

    def slope_of(param, slope):
        # Squares of narrow gradients would overflow or vanish in their own dtype.
        slope = slope.astype(jnp.float32)
        return slope if known_zero(weight_decay) else slope + weight_decay * param

    slopes = jax.tree.map(slope_of, params, gradient)

    def scaled(slopes):
        if not adaptive:
            return slopes
        return jax.tree.map(lambda param, slope: (jnp.abs(param) + eta) * slope, params, slopes)

    slopes = scaled(slopes)
    square = sum(jnp.sum(jnp.square(slope)) for slope in jax.tree.leaves(slopes))
    # The root has no derivative at 0: take it elsewhere, so that no NaN comes back from there.
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    # T_w a second time for ASAM: its step has T_w squared, its norm T_w once.
    return scaled(slopes), norm


def check_radius(rho: Any, eta: float) -> None:
    """Raise unless both are finite and not negative."""
    for field, value in (("rho", rho), ("eta", eta)):
        check_number(field, value, nonnegative, "be 0 or positive")


class SharpnessState(NamedTuple):
    """State of :func:`sharpness_aware` with ``when``: updates so far, int32, and the state of the wrapped optimizer."""

    count: jax.Array
    inner: optax.OptState


@takes_options_of(perturb)
def sharpness_aware(
    inner: optax.GradientTransformation,
    rho: Any = 0.05,
    *,
    when: Callable[[Any], Any] | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap ``inner`` so that it gets the gradient at the perturbed point; the state is that of ``inner``.

    The second gradient comes from the extra argument ``grad_fn``: it maps parameters to the
    gradient of the same batch, with the same randomness, and leaves BatchNorm's statistics alone.
    Where the gradients are reduced over devices, so is the perturbation (for one of each device's
    own see :func:`sharpness_aware_gradient`). :math:`\rho = 0` gives ``inner``, bit for bit; known
    when the program is traced, it also saves the second gradient.

    Args:
      inner: any optax optimizer; it updates the parameters themselves, not the perturbed point.
      rho: the radius.
      when: maps the (traced) count of updates to a bool: the steps that are SAM's, such as those late in the training;
        the others are ``inner``'s and compute no second gradient. ``None`` for all. With it the state also counts.
      **options: see :func:`perturb`; the weight decay of ``inner`` is independent of it.

    Raises:
      ValueError: ``update`` was called without ``grad_fn``.

    >>> loss = lambda params: 0.5 * params**2
    >>> tx, params = sharpness_aware(optax.sgd(1.0), rho=0.5), jnp.array(1.0)
    >>> gradient = jax.grad(loss)
    >>> updates, _ = tx.update(gradient(params), tx.init(params), params, grad_fn=gradient)
    >>> float(updates)  # minus the gradient at 1.5
    -1.5
    """
    check_radius(rho, options.get("eta", 0.0))
    wrapped = optimizer_state.keep_dtypes(inner)

    def init_fn(params):
        state = wrapped.init(params)
        return state if when is None else SharpnessState(jnp.zeros((), jnp.int32), state)

    def update_fn(updates, state, params=None, *, grad_fn=None, **extra_args):
        count, inner_state = (None, state) if when is None else state
        # Decided at trace time: a program for radius 0 has no second pass.
        if not known_zero(rho):
            require_params(params)
            require_gradient(grad_fn)

            def second():
                return grad_fn(perturb(params, updates, rho, **options))

            gradient = second() if when is None else branch(when(count), second, updates)
            updates = _unless_zero(rho, gradient, updates)
        updates, inner_state = wrapped.update(
            updates, inner_state, params, grad_fn=grad_fn, **extra_args
        )
        if when is None:
            return updates, inner_state
        return updates, SharpnessState(optax.safe_increment(count), inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def require_gradient(grad_fn: Any) -> None:
    """Raise unless an optax ``update`` was given the gradient as a function."""
    if grad_fn is None:
        raise ValueError("update needs grad_fn: call update(..., grad_fn=...)")


def _unless_zero(rho: Any, second: PyTree, first: PyTree) -> PyTree:
    """Return the second gradient; where ``rho`` is 0 the first, which may round differently."""
    return jax.tree.map(lambda new, old: jnp.where(rho == 0, old, new), second, first)


@takes_options_of(perturb)
def sharpness_aware_gradient(
    value_and_grad_fn: Callable[[PyTree], tuple[Any, PyTree]],
    params: PyTree,
    rho: Any = 0.05,
    **options: Any,
) -> tuple[Any, PyTree]:
    """Return the value of the first pass and the gradient of the second.

    For the perturbation of each device's own ("m-sharpness", Foret et al., 2021, section 3): call
    it inside ``shard_map`` on the device's part of the batch, then reduce the gradient. The
    parameters must be varying there (``jax.lax.pcast(params, axis, to="varying")``), or
    differentiation itself sums over devices.

    Args:
      value_and_grad_fn: such as ``jax.value_and_grad(objective, has_aux=True)``; its value, with
        BatchNorm's statistics in it, is that of the first pass.
      params: where to take the gradient.
      rho: the radius.
      **options: see :func:`perturb`.

    >>> value, gradient = sharpness_aware_gradient(
    ...     jax.value_and_grad(lambda w: 0.5 * w**2), jnp.array(1.0), rho=0.5
    ... )
    >>> float(value), float(gradient)
    (0.5, 1.5)
    """
    check_radius(rho, options.get("eta", 0.0))
    value, first = value_and_grad_fn(params)
    # The same here: a static 0 leaves the second pass out.
    if known_zero(rho):
        return value, first
    _, second = value_and_grad_fn(perturb(params, first, rho, **options))
    return value, _unless_zero(rho, second, first)


@takes_options_of(make_normal_tx)
def make_sam_tx(
    learning_rate: float | Schedule = 0.1,
    *,
    rho: Any = 0.05,
    adaptive: bool = False,
    eta: float = 0.0,
    steps_per_epoch: int,
    epochs_per_generation: int,
    weight_decay: float = 5e-4,
    nesterov: bool = True,
    decay_in_perturbation: bool = False,
    last_epochs: int | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Return SAM (or ASAM) over momentum SGD as one optax transformation.

    ``update`` also needs the gradient of the batch as a function: see :func:`sharpness_aware`. The
    defaults are those of the SAM that PoF starts from.

    Args:
      learning_rate: a float, or a schedule of the step within the generation.
      rho, adaptive, eta: the radius, 0.05 (0.01 on SVHN), and ASAM; see :func:`perturb`.
      steps_per_epoch: S.
      epochs_per_generation: E; the whole training where nothing is to restart.
      weight_decay: coupled L2, at the parameters themselves.
      nesterov: whether the momentum is Nesterov's; without effect together with ``preconditioner``
        or ``optimizer``.
      decay_in_perturbation: whether the perturbation follows the decay as well as the loss.
      last_epochs: the epochs at the end of a generation that are SAM's; those before them are plain training, at its
        cost. ``None`` for all.
      **options: of momentum SGD, see :func:`make_normal_tx`.

    References:
      Foret et al., 2021, Algorithm 1; the PoF paper, section 4.1, for the defaults; Zhou et al., `Sharpness-Aware
      Minimization Efficiently Selects Flatter Minima Late in Training`, 2024, for the last epochs.

    >>> gradient = jax.grad(lambda params: 0.5 * params**2)
    >>> tx = make_sam_tx(1.0, rho=0.5, momentum=0.0, weight_decay=0.0, steps_per_epoch=1,
    ...                  epochs_per_generation=250)
    >>> params = jnp.array(1.0)
    >>> updates, _ = tx.update(gradient(params), tx.init(params), params, grad_fn=gradient)
    >>> float(updates)
    -1.5
    """
    # The decay inside a whole optimizer is not known here.
    if decay_in_perturbation and options.get("optimizer") is not None:
        raise UsageError(
            "decay_in_perturbation = True has no effect beside optimizer=: "
            "use sharpness_aware(optimizer, rho, weight_decay=...)"
        )
    clock = Clock(steps_per_epoch, epochs_per_generation)
    return sharpness_aware(
        descent(
            clock,
            learning_rate,
            weight_decay=weight_decay,
            # True is this function's default, not a choice of the caller's: it gives way to what replaces momentum.
            nesterov=nesterov
            and options.get("preconditioner") is None
            and options.get("optimizer") is None,
            default_rate=0.1,
            **options,
        ),
        rho,
        when=None if last_epochs is None else clock.last(last_epochs),
        adaptive=adaptive,
        eta=eta,
        weight_decay=weight_decay if decay_in_perturbation else 0.0,
    )
