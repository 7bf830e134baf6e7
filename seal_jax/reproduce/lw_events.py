"""What may happen to a network between two rounds of training; every choice may be traced."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# What an event reinitialises besides whole layers.
NOTHING, SAME_MASK, NEW_MASK, SMALLEST_OF_TENSOR, SMALLEST_OF_ALL = range(5)


class Layer(NamedTuple):
    """A dense layer.

    Attributes:
      kernel: ``[out, in]``.
      bias: ``[out, 1]``.
    """

    kernel: jax.Array
    bias: jax.Array


Params = tuple[Layer, ...]


class Normaliser(NamedTuple):
    """One ``(x - mean) * scale`` for each block; 0 and 1 where none is inserted yet.

    Attributes:
      mean: ``[blocks]``.
      scale: ``[blocks]``.
    """

    mean: jax.Array
    scale: jax.Array


class Events(NamedTuple):
    """What happens before each round, in this order.

    Attributes:
      rescale: layers whose kernels get their initial Frobenius norm back, ``[rounds, layers]`` bool.
      normalise: blocks whose normalisers are measured anew, alike; one in a round at most.
      reinitialise: layers drawn anew, alike.
      part: what of all layers is drawn anew besides (``NOTHING``, ``SAME_MASK``, ...), ``[rounds]``.
    """

    rescale: Any
    normalise: Any
    reinitialise: Any
    part: Any


def identity(like: jax.Array) -> Normaliser:
    """Return the normalisers that change nothing, one for each element of ``like``."""
    return Normaliser(jnp.zeros_like(like), jnp.ones_like(like))


def norms(params: Params) -> jax.Array:
    """Return the Frobenius norms of the kernels."""
    return jnp.stack([jnp.sqrt(jnp.sum(layer.kernel**2)) for layer in params])


def rescale(params: Params, initial_norms: jax.Array, flags: jax.Array) -> Params:
    """Give the flagged kernels their initial norm back.

    >>> layer = Layer(jnp.full((2, 2), 3.0), jnp.ones((2, 1)))
    >>> rescale((layer,), jnp.array([2.0]), jnp.array([True]))[0].kernel.tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    # A kernel that decayed to zero has no direction to keep.
    factors = jnp.where(flags, initial_norms / jnp.maximum(norms(params), 1e-30), 1.0)
    return tuple(
        layer._replace(kernel=layer.kernel * factor)
        for layer, factor in zip(params, factors, strict=True)
    )


def normalise(
    normaliser: Normaliser, outputs: list[jax.Array], flags: jax.Array, epsilon: float
) -> Normaliser:
    """Set the normalisers of the flagged blocks by the scalar mean and deviation of their outputs."""
    mean = jnp.stack([output.mean() for output in outputs])
    scale = jnp.stack([1 / (output.std() + epsilon) for output in outputs])
    return Normaliser(
        jnp.where(flags, mean, normaliser.mean), jnp.where(flags, scale, normaliser.scale)
    )


def selected(
    params: Params, event: Events, mask_key: jax.Array, new_mask_key: jax.Array, share: float
) -> tuple[jax.Array, ...]:
    """Return what the event of one round reinitialises, as masks of the kernels."""
    magnitudes = [jnp.abs(layer.kernel).ravel() for layer in params]
    everything = jnp.concatenate(magnitudes)
    by_part = {
        NOTHING: jnp.zeros_like(everything, bool),
        SAME_MASK: jax.random.bernoulli(mask_key, share, everything.shape),
        NEW_MASK: jax.random.bernoulli(new_mask_key, share, everything.shape),
        SMALLEST_OF_TENSOR: jnp.concatenate([smallest(each, share) for each in magnitudes]),
        SMALLEST_OF_ALL: smallest(everything, share),
    }
    part = jax.lax.select_n(event.part, *(by_part[index] for index in range(len(by_part))))
    ends = list(itertools.accumulate(each.size for each in magnitudes))
    return tuple(
        mask.reshape(layer.kernel.shape) | whole
        for mask, layer, whole in zip(
            jnp.split(part, ends[:-1]), params, event.reinitialise, strict=True
        )
    )


def smallest(magnitudes: jax.Array, share: float) -> jax.Array:
    """Flag the smallest magnitudes, as many as ``share`` says.

    >>> smallest(jnp.array([1.0, 3.0, 0.5, 2.0]), 0.5).tolist()
    [True, False, True, False]
    """
    return magnitudes < jnp.sort(magnitudes)[round(share * magnitudes.size)]


def forget(
    params: Params, fresh: Params, masks: tuple[jax.Array, ...], biases: jax.Array
) -> Params:
    """Replace what the masks of the kernels flag by ``fresh``, and the flagged biases."""
    return tuple(
        Layer(jnp.where(mask, new.kernel, old.kernel), jnp.where(bias, new.bias, old.bias))
        for old, new, mask, bias in zip(params, fresh, masks, biases, strict=True)
    )
