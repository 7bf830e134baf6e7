"""The cross entropy, of every training and evaluation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from seal_jax.errors import UsageError, check_number


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
    logits = jnp.asarray(logits, jnp.float32)
    smooth = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, smooth)


def mean_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean :func:`cross_entropy` of a batch without smoothing."""
    return cross_entropy(logits, labels).mean()
