"""Margins, flatness under noise and size of the weights: LW paper, section 4 and appendix D."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.errors import (
    UsageError,
    check_features,
    check_integer,
    check_key,
    check_labels,
    check_number,
    nonnegative,
)

PyTree = Any


def margins(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the margin of every example in the softmax, in [-1, 1], ascending, ``[n]``.

    It is the probability of the true class less the largest of the others, of ``logits [n, classes]``;
    the paper draws the 400 smallest of the training examples (Figure 6).

    >>> margins(np.log([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1]]), np.array([0, 0])).round(6).tolist()
    [-0.3, 0.5]
    """
    check_features("logits", logits)
    check_labels("labels", labels, len(logits))
    if not np.isfinite(logits).all():
        raise UsageError("logits hold NaN or infinity: the network or its input is broken")
    # In float64: margins of confident networks differ from 1 by less than float32 can tell.
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    probabilities = np.exp(shifted)
    probabilities /= probabilities.sum(1, keepdims=True)
    rows = np.arange(len(labels))
    of_true_class = probabilities[rows, labels]
    # So that the largest that is left is that of another class.
    probabilities[rows, labels] = -np.inf
    return np.sort(of_true_class - probabilities.max(1))


def flatness(
    accuracy: Callable[..., jax.Array],
    params: PyTree,
    sigmas: Sequence[float],
    *,
    rest: tuple[Any, ...] = (),
    draws: int = 10,
    key: jax.Array | None = None,
) -> np.ndarray:
    r"""Return the accuracy at :math:`w + \sigma \epsilon`, for each deviation and draw of noise.

    All deviations share the draws, so that they differ in size alone; one program goes over all.

    Args:
      accuracy: ``accuracy(params, *rest)``, traced; calls with the same object share a program.
      params: pytree of arrays.
      sigmas: deviations of the noise, at least 0.
      rest: further arguments of ``accuracy``, such as data and BatchNorm's statistics.
      draws: of noise.
      key: of the noise; a fixed one by default.

    Returns:
      ``[sigmas, draws]``.

    References:
      Alabdulmohsin et al. 2022, Figure 5.

    >>> found = flatness(lambda w: jnp.abs(w).max(), jnp.zeros(2), [0.0, 1.0, 2.0], draws=1)
    >>> bool(found[0, 0] == 0), bool(found[2, 0] == 2 * found[1, 0])
    (True, True)
    """
    for sigma in sigmas:
        check_number("sigmas", sigma, nonnegative, "be 0 or positive")
    check_integer("draws", draws, 1)
    keys = jax.random.split(check_key("key", key, optional=True), draws)
    # Both [sigmas * draws]: each deviation with every key.
    grid = (jnp.repeat(jnp.asarray(sigmas, jnp.float32), draws), jnp.tile(keys, len(sigmas)))
    return np.asarray(_at_noise(accuracy, params, rest, grid)).reshape(len(sigmas), draws)


@partial(jax.jit, static_argnums=0)
def _at_noise(accuracy, params, rest, grid):
    leaves, structure = jax.tree.flatten(params)

    def one(sigma_and_key: tuple[jax.Array, jax.Array]) -> jax.Array:
        sigma, key = sigma_and_key
        noisy = [
            leaf + (sigma * jax.random.normal(leaf_key, leaf.shape)).astype(leaf.dtype)
            for leaf_key, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
        ]
        return accuracy(jax.tree.unflatten(structure, noisy), *rest)

    # One noisy network at a time: side by side they would take as many copies of the weights.
    return jax.lax.map(one, grid)


def size_of_weights(features: np.ndarray, kernel: np.ndarray) -> float:
    """Return the norm of the classifier's inputs times that of its weights (appendix D).

    Of ``features [n, d]`` the paper takes a random sample of 256 training examples; ``kernel`` is the
    classifier's, ``[d, classes]``.

    >>> size_of_weights(np.array([[3.0, 4.0]]), np.array([[2.0], [0.0]]))
    10.0
    """
    check_features("features", features)
    check_features("kernel", kernel)
    return float(np.linalg.norm(features) * np.linalg.norm(kernel))
