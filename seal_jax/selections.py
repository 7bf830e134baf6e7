"""Selections: masks whose leaves are arrays of bool, for methods that forget parts of a tensor.

A selection is a pytree with the structure of the parameters. Each leaf is an array of bool of the
parameter's shape, or one bool for all of it; True = forget. Unlike the masks of
:mod:`seal_jax.masks` selections may be traced: drawn from a key, or computed from the weights.

``among`` says which parameters a selection may take from: a mask in any form of
:mod:`seal_jax.masks`, which here may also take every parameter; by default the kernels (see
:func:`seal_jax.layers.roles`), so that normalisations and biases stay as they are.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax import layers, masks, paths
from seal_jax.errors import UsageError, check_choice, check_number

PyTree = Any
Scope = Literal["tensor", "global"]


def eligible(params: PyTree, among: masks.Mask | None = None) -> list[bool]:
    """Return for each leaf of ``params`` (hidden ones included) whether ``among`` selects it.

    Raises:
      UsageError: it selects none.

    >>> eligible({"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))})
    [False, True]
    """
    if among is None:
        flags = [role == "kernel" for role in layers.roles(params)]
    else:
        # Not ``resolve``: a selection divides tensors, so it may well be made among all of them.
        flags = masks.flags_of(among, params)
    visible = [not paths.is_placeholder(leaf) for _, leaf in paths.named_leaves(params)]
    flags = [flag and is_visible for flag, is_visible in zip(flags, visible, strict=True)]
    if any(visible) and not any(flags):
        taken = "the default, kernels of two or more dimensions," if among is None else "the mask"
        raise UsageError(f"among: {taken} takes no parameter of {masks.top_levels(params)}")
    return flags


def check(selection: PyTree, params: PyTree) -> None:
    """Raise ``UsageError`` unless ``selection`` is one for ``params``."""
    for path, leaf, param in paths.aligned("selection", selection, params):
        shape = jnp.shape(param)
        if jnp.result_type(leaf) != jnp.bool_ or jnp.shape(leaf) not in ((), shape):
            raise UsageError(
                f"selection at {path!r} is {jnp.result_type(leaf)} of shape {jnp.shape(leaf)}; it "
                f"must be bool of shape {shape}, or one bool"
            )


def random_subset(
    key: jax.Array,
    params: PyTree,
    fraction: float,
    *,
    exact: bool = True,
    among: masks.Mask | None = None,
) -> PyTree:
    """Select a random ``fraction`` of the entries of each tensor (WELS, WELSR).

    The entries chosen in a tensor depend on the key and on the name and shape of that tensor alone:
    a layer added elsewhere, or another order of the tree, changes nothing.

    Args:
      key: a random key.
      params: arrays or ``jax.ShapeDtypeStruct``.
      fraction: in (0, 1); static unless ``exact`` is False. A "split rate" of 0.8 kept is 0.2 here.
      exact: select ``fraction * n`` of n entries, rounded to the nearest whole number, halves up;
        ``False`` selects every entry independently with probability ``fraction`` (Bernoulli).
      among: the parameters to select from; kernels by default.

    References:
      Taha et al., `Knowledge Evolution in Neural Networks`, 2021, section 3 (weight-level splitting);
      Alabdulmohsin et al., `The Impact of Reinitialization ...`, 2022, section 1.

    >>> selection = random_subset(jax.random.key(0), {"kernel": jnp.ones((10, 10))}, 0.2)
    >>> int(selection["kernel"].sum())
    20
    """
    check_fraction("fraction", fraction, traced=not exact)

    def draw(path, leaf, flag):
        if not flag:
            return jnp.zeros(leaf.shape, bool)
        # Not Python's hash(), which differs between processes.
        leaf_key = jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))
        if not exact:
            return jax.random.bernoulli(leaf_key, fraction, leaf.shape)
        # The lowest of random integers: a random subset of exact size, without a permutation.
        bits = jax.random.bits(leaf_key, (math.prod(leaf.shape),))
        return _lowest(bits, lambda values: portion(fraction, values.size)).reshape(leaf.shape)

    return paths.map_named(draw, params, eligible(params, among))


def smallest(
    params: PyTree,
    fraction: float,
    *,
    scope: Scope = "tensor",
    among: masks.Mask | None = None,
) -> PyTree:
    """Select the ``fraction`` of entries with the smallest magnitudes (DSD).

    Of n entries ``fraction * n`` are taken, rounded to the nearest whole number, halves up; among
    equal magnitudes those that come first in the tensor (for "global": in the tree's leaf order).

    Args:
      params: pytree of arrays.
      fraction: in (0, 1), static.
      scope: "tensor" takes the fraction of each tensor, "global" of all of them together.
      among: the parameters to select from; kernels by default.

    References:
      Han et al., `DSD: Dense-Sparse-Dense Training for Deep Neural Networks`, 2017, section 2;
      Alabdulmohsin et al., `The Impact of Reinitialization ...`, 2022, section 1, for many rounds.

    >>> smallest({"kernel": jnp.array([[3.0, -1.0, 2.0, 5.0]])}, 0.5)["kernel"].tolist()
    [[False, True, True, False]]
    """
    check_fraction("fraction", fraction)
    flags = eligible(params, among)
    magnitudes = [
        jnp.abs(leaf) if flag else None
        for flag, (_, leaf) in zip(flags, paths.named_leaves(params), strict=True)
    ]
    chosen = lowest(magnitudes, lambda values: portion(fraction, values.size), scope)

    def marks(path, leaf, lowest_entries):
        return jnp.zeros(leaf.shape, bool) if lowest_entries is None else lowest_entries

    return paths.map_named(marks, params, chosen)


def lowest(
    magnitudes: list[jax.Array | None], count_of: Callable[[jax.Array], Any], scope: Scope
) -> list[jax.Array | None]:
    """Mark the lowest values of each array, or of all together, for :func:`smallest` and pruning.

    Args:
      magnitudes: arrays; ``None`` stands for one to leave out and gives ``None``.
      count_of: maps a flat array of values to how many of them to mark, an int or traced.
      scope: "tensor" or "global".
    """
    check_choice("scope", scope, get_args(Scope))
    present = [array for array in magnitudes if array is not None]
    marked = [array.ravel() for array in present]
    # One ranking of all values, cut into the tensors again.
    if scope == "global" and marked:
        ends = np.cumsum([array.size for array in marked])[:-1]
        marked = jnp.split(_lowest(jnp.concatenate(marked), count_of), ends)
    else:
        marked = [_lowest(array, count_of) for array in marked]
    shaped = (flat.reshape(array.shape) for flat, array in zip(marked, present, strict=True))
    return [None if array is None else next(shaped) for array in magnitudes]


def _lowest(values: jax.Array, count_of: Callable[[jax.Array], Any]) -> jax.Array:
    if values.size == 0:
        return jnp.zeros(values.shape, bool)
    count = count_of(values)
    # The value of that rank and all below it; equal ones are filled up from the front. This takes
    # one sort, where ranks would take a second one or a scatter.
    edge = jnp.sort(values)[jnp.maximum(count - 1, 0)]
    below, level = values < edge, values == edge
    wanted = count - jnp.sum(below, dtype=jnp.int32)
    return (below | (level & (jnp.cumsum(level, dtype=jnp.int32) <= wanted))) & (count > 0)


def portion(fraction: float, count: Any) -> Any:
    """Return ``fraction * count`` rounded to the nearest whole number, halves up.

    Exact where floats are not: 0.29 of 100 is 29. A traced ``count`` gives the same up to fractions
    that need a denominator above 30,000, which would overflow 32 bits.

    >>> portion(0.29, 100), portion(0.5, 5)
    (29, 3)
    """
    # A traced count is int32, into which 2 * 30,000^2 still fits.
    limit = 10**9 if isinstance(count, int) else 30_000
    # The simple fraction that the decimal stood for: the float 0.29 is a hair below 29/100.
    ratio = Fraction(float(fraction)).limit_denominator(limit)
    top, bottom = ratio.numerator, ratio.denominator
    # In two parts, so that no product is larger than the count or twice the denominator's square.
    return count // bottom * top + (2 * (count % bottom) * top + bottom) // (2 * bottom)


def check_fraction(field: str, value: float, *, traced: bool = False) -> None:
    """Raise unless ``value`` is a number in (0, 1), known at trace time or allowed to be ``traced``."""
    if hasattr(value, "aval") and not traced:
        raise UsageError(f"{field} must be a number of Python, not an array: it fixes counts")
    check_number(field, value, lambda number: 0 < number < 1, "lie between 0 and 1, both excluded")
