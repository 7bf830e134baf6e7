"""Losses per example: cross entropy, and those of self-distillation between generations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from seal_jax.errors import UsageError, check_integer, check_number, known_zero, positive


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Return the cross entropy of each example, in float32.

    Args:
      logits: ``[..., classes]``.
      labels: class numbers, ``[...]``.
      label_smoothing: probability that is spread evenly over all classes, in [0, 1).

    Returns:
      Losses ``[...]``.

    Raises:
      UsageError: shapes that do not fit each other, or ``label_smoothing`` outside of [0, 1).

    >>> round(float(cross_entropy(jnp.zeros((1, 4)), jnp.array([2]), 0.1)[0]), 4)  # ln 4
    1.3863
    """
    check_number("label_smoothing", label_smoothing, lambda value: 0 <= value < 1, "lie in [0, 1)")
    if jnp.shape(labels) != jnp.shape(logits)[:-1]:
        raise UsageError(
            f"labels has shape {jnp.shape(labels)}; it must be {jnp.shape(logits)[:-1]}, one "
            "class number an example"
        )
    # In float32 whatever the network computes in: a sum over classes loses digits in bfloat16.
    logits = jnp.asarray(logits, jnp.float32)
    smooth = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, smooth)


def mean_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean :func:`cross_entropy` of a batch without smoothing."""
    return cross_entropy(logits, labels).mean()


def born_again(
    logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    weight: Any,
    temperature: Any,
    label_smoothing: float = 0.0,
) -> jax.Array:
    r"""Return the loss of a student with a teacher, for each example.

    .. math::
      (1 - \lambda)\, \mathrm{CE} + \lambda\, T^2\, \mathrm{KL}(p_T \,\|\, q_T), \qquad
      p_T = \mathrm{softmax}(z_{\text{teacher}} / T),\; q_T = \mathrm{softmax}(z / T)

    With :math:`T^2` the teacher's part of the gradient keeps its size as T grows. At
    :math:`\lambda = 0` the result is exactly the cross entropy, and where 0 is a Python number the
    teacher is not evaluated.

    Args:
      logits: [..., classes], of the student.
      teacher_logits: of the same shape; no derivative flows into them.
      labels: integers [...].
      weight: :math:`\lambda`, in [0, 1]; may be traced.
      temperature: T, positive; may be traced.
      label_smoothing: of the cross entropy, spread over all classes.

    Returns:
      float32 [...]; the mean over the batch is the caller's.

    >>> logits, labels = jnp.zeros((1, 4)), jnp.array([2])
    >>> teacher = jnp.log(jnp.array([[0.1, 0.1, 0.7, 0.1]]))
    >>> loss = born_again(logits, teacher, labels, weight=1.0, temperature=1.0)
    >>> round(float(loss[0]), 4)  # ln 4 minus the entropy of the teacher
    0.4458

    References:
      Furlanello et al. (2018), `Born Again Neural Networks`; Hinton et al. (2015), `Distilling the
      Knowledge in a Neural Network`, section 2.
    """
    _check_weight(weight)
    check_number("temperature", temperature, positive, "be positive")
    if jnp.shape(teacher_logits) != jnp.shape(logits):
        raise UsageError(
            f"teacher_logits has shape {jnp.shape(teacher_logits)}; it must be that of logits, "
            f"{jnp.shape(logits)}"
        )
    plain = cross_entropy(logits, labels, label_smoothing)
    # Decided when the program is traced: the teacher's forward pass is then not part of it.
    if known_zero(weight):
        return plain
    teacher = jax.lax.stop_gradient(jnp.asarray(teacher_logits, jnp.float32))
    log_p = jax.nn.log_softmax(teacher / temperature)
    log_q = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32) / temperature)
    # From log-probabilities: p log p is 0, not NaN, where the teacher's probability underflows.
    divergence = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    return (1 - weight) * plain + weight * temperature**2 * divergence


def tolerant(
    logits: jax.Array,
    labels: jax.Array,
    *,
    weight: Any,
    k: int,
    label_smoothing: float = 0.0,
) -> jax.Array:
    r"""Return the loss of a tolerant first teacher, for each example.

    .. math:: \mathrm{CE} + \eta \Bigl( f_{(1)} - \frac{1}{K - 1} \sum_{j=2}^{K} f_{(j)} \Bigr)

    with the softmax scores f in descending order. The second term limits the gap between the first
    score and the next K - 1, so that the students learn from the teacher which classes are similar.
    Train the first generation with it, the others with :func:`born_again`.

    Args:
      logits, labels, label_smoothing: as in :func:`born_again`; so is the result.
      weight: :math:`\eta`, in [0, 1]; may be traced. At 0 the result is the cross entropy.
      k: K, from 2 to the number of classes.

    >>> logits = jnp.log(jnp.array([[0.1, 0.2, 0.7]]))
    >>> loss = tolerant(logits, jnp.array([2]), weight=1.0, k=2)
    >>> round(float(loss[0]), 4)  # -ln 0.7 + (0.7 - 0.2)
    0.8567

    References:
      Yang et al. (2019), `Training Deep Neural Networks in Generations: A More Tolerant Teacher
      Educates Better Students`.
    """
    _check_weight(weight)
    classes = jnp.shape(logits)[-1]
    k = check_integer("k", k, 2, classes, bounds=f"from 2 to the {classes} classes")
    plain = cross_entropy(logits, labels, label_smoothing)
    if known_zero(weight):
        return plain
    # Scores are probabilities, as in the paper, not logits. [..., k], falling.
    scores, _ = jax.lax.top_k(jax.nn.softmax(jnp.asarray(logits, jnp.float32)), k)
    return plain + weight * (scores[..., 0] - scores[..., 1:].mean(-1))


def _check_weight(weight: Any) -> None:
    check_number("weight", weight, lambda value: 0 <= value <= 1, "lie in [0, 1]")
