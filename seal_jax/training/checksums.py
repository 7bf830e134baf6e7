"""Checksums of arrays, computed on the device and the same on any sharding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def checksums(leaves: Mapping[str, jax.Array]) -> dict[str, int]:
    """Return a checksum of each leaf, computed where it lies: one small array leaves the device."""
    # Two programs with collectives at once, the last training step and this, hang host devices.
    jax.block_until_ready(list(leaves.values()))
    groups: dict[frozenset[Any], list[str]] = {}
    for name, leaf in leaves.items():
        # One program cannot take arrays of different device sets; usually there is one set.
        groups.setdefault(frozenset(leaf.sharding.device_set), []).append(name)
    result: dict[str, int] = {}
    for names in groups.values():
        sums = _checksum_program([leaves[name] for name in names])
        if not sums.is_fully_addressable:
            sums = multihost_utils.process_allgather(sums, tiled=True)
        result.update(zip(names, np.asarray(sums).tolist(), strict=True))
    return {name: result[name] for name in leaves}


@jax.jit
def _checksum_program(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_checksum(leaf) for leaf in leaves])


def _checksum(leaf: jax.Array) -> jax.Array:
    """Return the uint32 sum, mod 2³², of every word scrambled with its position.

    Integer sums do not depend on their order, so the value is the same on any sharding and device
    count. Scrambling (the finaliser of MurmurHash3, a bijection) and not a plain weighted sum:
    there two flipped sign bits, 2³¹(w₁ + w₂) with odd weights, would cancel.
    """
    word = _words(leaf)
    position, stride = jnp.uint32(0), 1
    for axis in reversed(range(word.ndim)):
        # One iota an axis, not a flat index: reshaping would gather a sharded array.
        index = jax.lax.broadcasted_iota(jnp.uint32, word.shape, axis)
        position = position + index * jnp.uint32(stride % 2**32)
        stride *= word.shape[axis]
    word = word ^ (position * jnp.uint32(0x9E3779B1))
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(word ^ (word >> 16), dtype=jnp.uint32)


def _words(leaf: jax.Array) -> jax.Array:
    """Return the bits of the leaf as uint32, with a trailing axis where an element needs two."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
    if leaf.dtype.itemsize <= 4 and not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
