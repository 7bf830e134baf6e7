"""Anytime deployment performance and forgetting of an adaptation (FAST paper, section 6.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def checkpoints(last: int) -> tuple[int, ...]:
    """Return the steps at which a state is deployed: Fibonacci's from 0 on, and ``last``.

    The paper skips "the third number, equal to the second": 0, 1, (1), 2, 3, 5, ... (section 6.2.1).
    The last step, at least 1, is among them whether a Fibonacci number or not: Table 1 is about the end.

    >>> checkpoints(10)
    (0, 1, 2, 3, 5, 8, 10)
    """
    # Step 0 is the source's network under its new head: what is deployed before any training.
    steps, following = [0, 1], 2
    while following < last:
        steps.append(following)
        following = steps[-1] + steps[-2]
    return (*steps, last) if last > steps[-1] else tuple(steps)


def validations(last: int, longest: int = 10) -> tuple[int, ...]:
    """Return the steps after which the validation split is scored, from the start on.

    The paper: the number of steps between two validations "is increased gradually starting from 1
    and saturating at 10", here ``longest`` (section 6.2.1). Increasing it by one every time is our choice.

    >>> validations(30, longest=5)
    (0, 1, 3, 6, 10, 15, 20, 25, 30)
    """
    steps, interval = [0], 1
    while steps[-1] + interval <= last:
        steps.append(steps[-1] + interval)
        interval = min(interval + 1, longest)
    return tuple(steps)


def deployed(
    checkpoints: Sequence[int], validated: Sequence[int], accuracy: np.ndarray
) -> np.ndarray:
    """Return which state is deployed at each checkpoint: the best on validation until then.

    A state is deployed when it is better than all before it, so of equals the earliest; one whose
    accuracy is NaN never is.

    Args:
      checkpoints: ``[t]`` steps.
      validated: ``[v]`` steps in ascending order, the first not after the first checkpoint.
      accuracy: ``[..., v]`` on the validation split.

    Returns:
      int ``[..., t]``, indices into ``validated``.

    >>> deployed([1, 3, 8], [0, 1, 4], np.array([0.1, 0.3, 0.2])).tolist()
    [1, 1, 1]
    """
    # argmax would take a NaN for the largest.
    scores = np.where(np.isnan(accuracy), -np.inf, accuracy)
    # [t], how many validations there have been: one at the checkpoint itself counts
    counts = np.searchsorted(validated, checkpoints, side="right")
    # argmax returns the first of equals, which is the earliest state.
    return np.stack([np.argmax(scores[..., :count], axis=-1) for count in counts], axis=-1)


def sizes(params: PyTree, start: PyTree, head: str) -> tuple[jax.Array, jax.Array]:
    r"""Return :math:`\|W\|_F` and :math:`\|\theta - \theta_s\|_2` (Table 1, Figure 4).

    Args:
      params: of the network; traced or not.
      start: those of the source, ``head`` left out or not.
      head: the classifier's name; W is its kernel, and all other parameters are theta.
    """
    # Theta is the features alone: the new head does not start from the source's.
    squares = jax.tree.map(
        lambda now, then: jnp.sum((now - then).astype(jnp.float32) ** 2),
        {name: leaf for name, leaf in params.items() if name != head},
        {name: leaf for name, leaf in start.items() if name != head},
    )
    total = sum(jax.tree.leaves(squares), start=jnp.zeros((), jnp.float32))
    return jnp.linalg.norm(params[head]["kernel"]), jnp.sqrt(total)
