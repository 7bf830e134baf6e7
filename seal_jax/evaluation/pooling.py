"""How a layer's output, an image, becomes the vector that a probe is given."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.errors import UsageError

Pooling = Literal["flatten", "gap", "adaptive"]


def pool(outputs: jax.Array, pooling: Pooling = "flatten", side: int = 4) -> jax.Array:
    """Return ``[n, numbers]`` of a layer's output ``[n, ...]``.

    Args:
      outputs: ``[n, height, width, channels]``, or ``[n, units]``, which stays as it is.
      pooling: "flatten" keeps everything, "gap" averages over the image, "adaptive" averages it to
        ``side`` by ``side`` windows, which overlap where ``side`` does not divide the image.
      side: of "adaptive"; a smaller image keeps its own.

    >>> image = jnp.arange(9.0).reshape(1, 3, 3, 1)
    >>> pool(image, "gap").tolist(), pool(image, "adaptive", 2).tolist()
    ([[4.0]], [[2.0, 3.0, 5.0, 6.0]])
    """
    if pooling not in get_args(Pooling):
        raise UsageError(f"pooling = {pooling!r} must be one of {', '.join(get_args(Pooling))}")
    if outputs.ndim == 4 and pooling == "gap":
        return outputs.mean((1, 2))
    if outputs.ndim == 4 and pooling == "adaptive":
        rows, columns = (_windows(length, side) for length in outputs.shape[1:3])
        outputs = jnp.einsum("nhwc,ih,jw->nijc", outputs, rows, columns, precision="highest")
    return outputs.reshape(outputs.shape[0], -1)


def _windows(length: int, side: int) -> np.ndarray:
    """Return the matrix ``[side, length]`` that averages a line to ``side`` windows."""
    side = min(side, length)
    index = np.arange(side)
    first = index * length // side
    last = -(-(index + 1) * length // side)
    position = np.arange(length)
    inside = (position >= first[:, None]) & (position < last[:, None])
    return (inside / (last - first)[:, None]).astype(np.float32)
