"""Weak classifiers on fixed features: PoF's perturbation of a trained one, FOCA's random ones.

In all functions

* ``head`` is the pytree of the classifier's parameters;
* ``features`` [b, ...] are the features of a small batch, the weak batch (32 examples in the PoF
  paper), and ``labels`` [b, ...] are its labels;
* ``classify(head, features) -> logits`` is the classifier;
* ``loss(logits, labels) -> scalar`` is the plain loss, a mean over the batch, and over all devices
  (``jax.lax.pmean``) if one perturbation is to serve them all.

No derivative flows through a weak classifier: the papers set that of the perturbation by the
features to zero.

References:
  Sato et al., `PoF: Post-Training of Feature Extractor for Improving Generalization`, 2022; Sato et
  al., `Breaking Inter-Layer Co-Adaptation by Classifier Anonymization`, 2019 (FOCA).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from seal_jax import layers, paths
from seal_jax.errors import UsageError, check_choice, check_integer, check_number, nonnegative
from seal_jax.line_search import minimise

PyTree = Any
Classify = Callable[[PyTree, jax.Array], jax.Array]
Loss = Callable[[jax.Array, jax.Array], jax.Array]
Policy = Literal["uniform", "constant", "linear"]

_EPSILON = 1e-12  # a zero gradient then has direction 0, not NaN


class Perturbation(NamedTuple):
    """Step from a classifier to the minimum of the loss on a weak batch."""

    direction: PyTree  # like the head: the gradient at the head over its global norm
    xi: jax.Array  # float32, the distance of the minimum against `direction`; 0 where there is none
    accepted: jax.Array  # bool, whether there is a minimum with an upper bracket
    loss: jax.Array  # float32, of the weak batch at the unperturbed head


def direction(
    head: PyTree, features: jax.Array, labels: jax.Array, classify: Classify, loss: Loss
) -> tuple[jax.Array, PyTree]:
    r"""Return the loss, float32, and :math:`g / (\lVert g \rVert_2 + 10^{-12})`, g its gradient.

    The norm is global, over all of the head's parameters; a zero gradient gives zeros (PoF, eq. 3).

    >>> dot = lambda head, features: features @ head
    >>> loss, unit = direction(
    ...     jnp.zeros(2), jnp.array([[3.0, 4.0]]), None, dot, lambda logits, labels: logits.mean()
    ... )
    >>> [round(float(entry), 2) for entry in unit]
    [0.6, 0.8]
    """

    def objective(head):
        value = loss(classify(head, features), labels)
        if jnp.shape(value) != ():
            raise UsageError(
                f"loss returns shape {jnp.shape(value)}; it must return the mean over the batch"
            )
        return value

    head, features = jax.lax.stop_gradient((head, features))
    value, gradient = jax.value_and_grad(objective)(head)
    # The norm is summed in float32, whatever the head's dtype.
    gradient = jax.tree.map(lambda g: g.astype(jnp.float32), gradient)
    norm = optax.tree.norm(gradient) + _EPSILON
    return jnp.float32(value), jax.tree.map(
        lambda g, h: (g / norm).astype(jnp.result_type(h)), gradient, head
    )


def perturbation(
    head: PyTree,
    features: jax.Array,
    labels: jax.Array,
    classify: Classify,
    loss: Loss,
    *,
    linear: bool | None = None,
    **search: Any,
) -> Perturbation:
    r"""Return the direction of the gradient at ``head`` and the distance of the minimum against it.

    One gradient, then :math:`\xi^* = \arg\min_{\xi > 0} L_B(\theta_0 - \xi \hat g)` (PoF, eq. 2) by
    :func:`seal_jax.line_search.minimise` on the same features. Where there is no such minimum (an
    asymmetric landscape, a zero gradient, a loss that is not finite) the result is not accepted.

    Args:
      head, features, labels, classify, loss: :math:`\theta_0` and the weak batch B, see above.
      linear: whether the logits are affine in the head, as those of a dense layer are; they are
        then computed twice, not once for every point of the search. ``None`` takes a head of one
        matrix, with or without one vector, for affine: say False if it is not (a cosine
        classifier).
      **search: ``start``, ``cap`` and ``floor`` of the line search.

    >>> head = {"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(2)}
    >>> features, labels = jnp.array([[1.0], [1.0], [1.0], [-1.0]]), jnp.array([0, 0, 1, 1])
    >>> classify = lambda head, features: features @ head["kernel"] + head["bias"]
    >>> loss = lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z, y).mean()
    >>> step = perturbation(head, features, labels, classify, loss)
    >>> # The distance is ln 3 / sqrt 2.
    >>> bool(step.accepted), round(float(step.xi), 2), round(float(step.loss), 2)
    (True, 0.78, 0.69)
    """
    # Below eq. 5 PoF sets the derivative of the perturbation by the features to 0.
    head, features = jax.lax.stop_gradient((head, features))
    value, unit = direction(head, features, labels, classify, loss)
    if linear is None:
        # A matrix, or a matrix and a vector: kernel and bias.
        linear = sorted(map(jnp.ndim, jax.tree.leaves(head))) in ([2], [1, 2])
    # Logits along the line are then at_head - xi * slopes exactly: the search never calls ``classify`` again.
    if linear:
        at_head, slopes = jax.jvp(lambda h: classify(h, features), (head,), (unit,))

    def along(xi):
        if linear:
            logits = at_head.astype(jnp.float32) - xi * slopes
        else:
            logits = classify(_moved(head, unit, xi), features)
        return loss(logits, labels)

    minimum = minimise(along, **search)
    return Perturbation(unit, minimum.xi, minimum.accepted, value)


def shifted(head: PyTree, perturbation: Perturbation, gamma: Any = 1.0) -> PyTree:
    r"""Return the weak classifier :math:`\theta_0 - \gamma \xi^* \hat g` (PoF, eq. 4).

    It is ``head`` bit for bit where the perturbation was not accepted and where ``gamma`` is 0.

    >>> step = Perturbation(jnp.array([0.6, 0.8]), jnp.float32(5), jnp.array(True), jnp.float32(1))
    >>> [round(float(entry), 2) for entry in shifted(jnp.zeros(2), step, gamma=2.0)]
    [-6.0, -8.0]
    """
    step = jnp.where(perturbation.accepted, gamma * perturbation.xi, 0.0)
    moved = _moved(head, perturbation.direction, step)
    # Not by the arithmetic alone: 0 times an overflowed direction is NaN, and -0 - (-0) is +0.
    return jax.tree.map(lambda new, old: jnp.where(step == 0, old, new), moved, head)


def sample_gamma(
    key: jax.Array,
    policy: Policy = "uniform",
    low: float = 0.0,
    high: float = 2.0,
    *,
    progress: Any = None,
) -> jax.Array:
    r"""Return the expansion factor :math:`\gamma` of a step, a float32 scalar.

    At 1 the weak classifier is the best one for its batch along the line; at 2 it is on the other
    side of a quadratic basin, where the batch's loss is that at the start.

    Args:
      key: a random key; a new one for every step.
      policy: "uniform" draws from [low, high] (the paper), "constant" returns ``high``, "linear"
        grows from ``low`` to ``high`` with ``progress``.
      low, high: the bounds, at least 0.
      progress: the fraction of the training that is over, in [0, 1]; may be traced.

    >>> float(sample_gamma(jax.random.key(0), "linear", progress=0.25))
    0.5
    """
    check_choice("policy", policy, get_args(Policy))
    check_number("low", low, nonnegative, "be 0 or positive")
    # A traced bound cannot be compared here.
    least = 0.0 if hasattr(low, "aval") else low
    check_number(
        "high", high, lambda value: least <= value < float("inf"), "be finite, at least low"
    )
    if policy == "uniform":
        return jax.random.uniform(key, (), jnp.float32, low, high)
    if policy == "constant":
        return jnp.float32(high)
    if progress is None:
        raise UsageError('progress = None must be the share of the training done for "linear"')
    return jnp.float32(low + (high - low) * jnp.clip(progress, 0.0, 1.0))


def perturb(
    key: jax.Array,
    head: PyTree,
    features: jax.Array,
    labels: jax.Array,
    classify: Classify,
    loss: Loss,
    *,
    gamma: Callable[[jax.Array], Any] = sample_gamma,
    resample: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None,
    attempts: int = 1,
    linear: bool | None = None,
    **search: Any,
) -> tuple[PyTree, Perturbation, jax.Array]:
    """Return a weak classifier of PoF: :func:`perturbation`, :func:`sample_gamma`, :func:`shifted`.

    Args:
      key: a random key; a new one for every step.
      head, features, labels, classify, loss, linear: as in :func:`perturbation`.
      gamma: maps a key to the expansion factor, e.g. :func:`sample_gamma` with arguments of
        ``functools.partial``.
      resample: maps a key and the number of the attempt, from 1, to the features and labels of
        another weak batch, for when the perturbation of the first is not accepted. ``None`` takes
        the unperturbed head then.
      attempts: how many weak batches to try in all, the first included.
      **search: as in :func:`perturbation`.

    Returns:
      The weak classifier, the perturbation it comes from and the expansion factor. The fraction of
      steps whose perturbation is not ``accepted`` is worth logging.

    >>> head, features, labels = jnp.zeros((1, 2)), jnp.array([[1.0], [1.0], [1.0]]), jnp.array([0, 0, 1])
    >>> classify = lambda head, features: features @ head
    >>> loss = lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z, y).mean()
    >>> weak, step, gamma = perturb(jax.random.key(0), head, features, labels, classify, loss)
    >>> bool(step.accepted), bool(0 <= gamma <= 2), bool(weak[0, 0] >= head[0, 0])
    (True, True, True)
    """
    check_integer("attempts", attempts, 1)
    if (attempts > 1) != (resample is not None):
        raise UsageError(f"attempts = {attempts} must go with resample: above 1 with it, 1 without")
    # Split before any attempt: the factor does not depend on how many there are.
    gamma_key, batch_key = jax.random.split(key)

    def attempt(features, labels):
        return perturbation(head, features, labels, classify, loss, linear=linear, **search)

    step = attempt(features, labels)
    if resample is not None:

        def again(carry):
            index, _ = carry
            return index + 1, attempt(*resample(jax.random.fold_in(batch_key, index), index))

        index = jnp.where(step.accepted, 1, 1)  # varies over a mesh just as the result does
        _, step = jax.lax.while_loop(
            lambda carry: ~carry[1].accepted & (carry[0] < attempts), again, (index, step)
        )
    factor = gamma(gamma_key)
    return shifted(head, step, factor), step, factor


def foca(
    key: jax.Array,
    head: PyTree,
    features: jax.Array,
    labels: jax.Array,
    classify: Classify,
    loss: Loss,
    *,
    steps: int,
    learning_rate: float,
    sigma: float = 0.1,
) -> PyTree:
    r"""Return a weak classifier of FOCA: a few steps of gradient descent from a random start.

    Kernels start at :math:`N(0, \sigma^2)`, biases at 0 (see :func:`seal_jax.layers.roles`). The PoF paper
    describes it at the end of section 3.1.

    Args:
      key: a random key; a new one for every step of the feature extractor.
      head: a classifier, for its structure, shapes and dtypes only.
      features, labels, classify, loss: of the weak batch; every step sees all of it.
      steps: how many; 0 gives a random classifier.
      learning_rate: of plain gradient descent.
      sigma: of the start.

    >>> head, features, labels = jnp.zeros((1, 2)), jnp.array([[1.0], [-1.0]]), jnp.array([0, 1])
    >>> classify = lambda head, features: features @ head
    >>> loss = lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z, y).mean()
    >>> weak = foca(
    ...     jax.random.key(0), head, features, labels, classify, loss, steps=9, learning_rate=1.0
    ... )
    >>> bool(weak[0, 0] > weak[0, 1])
    True
    """
    check_integer("steps", steps, 0)
    for field, value in (("learning_rate", learning_rate), ("sigma", sigma)):
        check_number(field, value, nonnegative, "be 0 or positive")
    features = jax.lax.stop_gradient(features)

    # The values of the head are not used: FOCA's classifiers start at random for every batch.
    def draw(path, leaf, index, role):
        noise = jax.random.normal(jax.random.fold_in(key, index), leaf.shape)
        # Zeros, too, are derived from the key, to vary over a mesh just as it does.
        return ((sigma if role == "kernel" else 0.0) * noise).astype(leaf.dtype)

    roles = layers.roles(head)
    start = paths.map_named(draw, head, range(len(roles)), roles)
    descend = jax.grad(lambda head: loss(classify(head, features), labels))

    # A scan, so that one step is compiled, however many there are.
    def step(weak, _):
        return _moved(weak, descend(weak), learning_rate), None

    weak, _ = jax.lax.scan(step, start, length=steps)
    return jax.lax.stop_gradient(weak)


def _moved(head: PyTree, unit: PyTree, step: Any) -> PyTree:
    return jax.tree.map(lambda h, d: (h - step * d).astype(h.dtype), head, unit)
