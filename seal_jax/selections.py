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
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax import layers, masks, paths
from seal_jax.errors import UsageError, check_number
from seal_jax.slimming import channels_of, check_flattened, find_layers

PyTree = Any
Scope = Literal["tensor", "global"]


def eligible(params: PyTree, among: masks.Mask | None = None) -> list[bool]:
    """Return for each leaf of ``params`` (hidden ones included) whether ``among`` takes it.

    Raises:
      UsageError: it takes none.

    >>> eligible({"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))})
    [False, True]
    """
    leaves = paths.named_leaves(params)
    if among is None:
        flags = [role == "kernel" for role in layers.roles(params)]
    else:
        # Not ``resolve``: a selection divides tensors, so it may well be made among all of them.
        flags = masks._flags(among, params)
    visible = [not paths.is_placeholder(leaf) for _, leaf in leaves]
    flags = [flag and seen for flag, seen in zip(flags, visible, strict=True)]
    if any(visible) and not any(flags):
        taken = "the default, kernels of two or more dimensions," if among is None else "the mask"
        raise UsageError(f"among: {taken} takes no parameter of {masks._sketch(params)}")
    return flags


def _names(params: PyTree) -> list[str]:
    return [path for path, _ in paths.named_leaves(params)]


def map_named(function: Callable[..., Any], params: PyTree, *values: list) -> PyTree:
    """Return a tree like ``params`` of ``function(path, leaf, *values)``; hidden leaves stay hidden."""
    leaves = [
        leaf if paths.is_placeholder(leaf) else function(path, leaf, *own)
        for (path, leaf), *own in zip(paths.named_leaves(params), *values, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=paths.is_placeholder), leaves)


def check(selection: PyTree, params: PyTree) -> None:
    """Raise ``UsageError`` unless ``selection`` is one for ``params``."""
    expected: Any = jax.tree.structure(params)
    if expected != jax.tree.structure(selection):
        raise UsageError(
            f"selection must be a tree like the parameters: got leaves {_names(selection)[:4]}, "
            f"expected {_names(params)[:4]}"
        )
    pairs = zip(paths.named_leaves(selection), paths.named_leaves(params), strict=True)
    for (path, leaf), (_, param) in pairs:
        if paths.is_placeholder(leaf):
            continue
        shape = jnp.shape(param)
        if jnp.result_type(leaf) != jnp.bool_ or jnp.shape(leaf) not in ((), shape):
            raise UsageError(
                f"selection at {path!r} is {jnp.result_type(leaf)} of shape {jnp.shape(leaf)}; it "
                f"must be bool of shape {shape}, or one bool"
            )


def by_rule(mask: masks.Mask) -> Callable[[PyTree], PyTree]:
    """Return the function that gives a static mask as a selection of whole tensors.

    >>> by_rule("fc")({"conv": jnp.ones(2), "fc": jnp.ones(2)})
    {'conv': False, 'fc': True}
    """
    return lambda params: masks.resolve(mask, params)


def random_subset(
    key: jax.Array,
    params: PyTree,
    fraction: float,
    *,
    exact: bool = True,
    among: masks.Mask | None = None,
) -> PyTree:
    """Select a random ``fraction`` of the entries of each tensor (WELS, WELSR).

    A tensor's draw follows from the key and the tensor's own name and shape, so that a layer added
    elsewhere, or another order of the tree, changes nothing.

    Args:
      key: a random key.
      params: arrays or ``jax.ShapeDtypeStruct``.
      fraction: in (0, 1); static, but for ``exact=False``. A "split rate" of 0.8 kept is 0.2 here.
      exact: select ``fraction * n`` of n entries, rounded to the nearest whole number, halves up;
        ``False`` selects every entry by itself with probability ``fraction`` (Bernoulli).
      among: the parameters to select from; kernels by default.

    References:
      Taha et al., `Knowledge Evolution in Neural Networks`, 2021, section 3 (weight-level splitting);
      Alabdulmohsin et al., `The Impact of Reinitialization ...`, 2022, section 1 ("a random subset of
      the parameters of a fixed size").

    >>> selection = random_subset(jax.random.key(0), {"kernel": jnp.ones((10, 10))}, 0.2)
    >>> int(selection["kernel"].sum())
    20
    """
    (check_static if exact else check_inside)("fraction", fraction)

    def draw(path, leaf, flag):
        if not flag:
            return jnp.zeros(leaf.shape, bool)
        leaf_key = jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))
        if not exact:
            return jax.random.bernoulli(leaf_key, fraction, leaf.shape)
        bits = jax.random.bits(leaf_key, (math.prod(leaf.shape),))
        return _lowest(bits, lambda values: portion(fraction, values.size)).reshape(leaf.shape)

    return map_named(draw, params, eligible(params, among))


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
    check_static("fraction", fraction)
    flags = eligible(params, among)
    magnitudes = [
        jnp.abs(leaf) if flag else None
        for flag, (_, leaf) in zip(flags, paths.named_leaves(params), strict=True)
    ]
    chosen = lowest(magnitudes, lambda values: portion(fraction, values.size), scope)
    return map_named(
        lambda path, leaf, own: jnp.zeros(leaf.shape, bool) if own is None else own, params, chosen
    )


def lowest(
    magnitudes: list[jax.Array | None], count_of: Callable[[jax.Array], Any], scope: Scope
) -> list[jax.Array | None]:
    """Mark the lowest values of each array, or of all together; what :func:`smallest` is made of.

    Args:
      magnitudes: arrays; ``None`` stands for one to leave out and gives ``None``.
      count_of: maps a flat array of values to how many of them to mark, an int or traced.
      scope: "tensor" or "global".
    """
    check_scope(scope)
    present = [array for array in magnitudes if array is not None]
    marked = [array.ravel() for array in present]
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
    limit = 10**9 if isinstance(count, int) else 30_000
    ratio = Fraction(float(fraction)).limit_denominator(limit)
    top, bottom = ratio.numerator, ratio.denominator
    # In two parts, so that no product is larger than the count or twice the denominator's square.
    return count // bottom * top + (2 * (count % bottom) * top + bottom) // (2 * bottom)


def check_static(field: str, value: float) -> None:
    """Raise unless ``value`` is a number in (0, 1) that is known when the program is traced."""
    if hasattr(value, "aval"):
        raise UsageError(f"{field} must be a number of Python, not an array: it fixes counts")
    check_inside(field, value)


def check_scope(scope: Scope) -> None:
    """Raise unless ``scope`` is one there is."""
    if scope not in get_args(Scope):
        raise UsageError(f"scope = {scope!r} must be one of {', '.join(get_args(Scope))}")


def check_inside(field: str, value: float) -> None:
    """Raise unless ``value``, which may be traced, is a number in (0, 1)."""
    check_number(field, value, lambda number: 0 < number < 1, "lie between 0 and 1, both excluded")


def kernel_slices(
    params: PyTree,
    keep: float,
    *,
    first: str,
    head: str,
    flattened: Mapping[str, int] | None = None,
) -> PyTree:
    r"""Select what lies OUTSIDE the fit slice of every kernel (KELS, kernel-level splitting).

    The fit slice of a kernel (last axis: outputs; last but one: inputs) are its first
    :math:`\lceil r C_{in} \rceil` inputs and first :math:`\lceil r C_{out} \rceil` outputs, so that
    the fit parts of all layers form a slim network of their own (see :func:`seal_jax.slimming.slim`).
    The first kernel keeps all its inputs, the head all its outputs and its bias; a depthwise kernel
    ``[h, w, 1, C]`` is cut by outputs alone. Of other biases and of norms the first
    :math:`\lceil r C \rceil` entries are fit. Grouped kernels that are not depthwise are cut within
    their groups' inputs, which is a network of its own only if the groups stay as many.

    Args:
      params: arrays or ``jax.ShapeDtypeStruct`` of dense and convolution layers.
      keep: r, the share of channels that is kept, in (0, 1).
      first: path of the layer (or the kernel) that sees the input.
      head: path of the layer (or the kernel) that gives the output.
      flattened: dense layers behind a flatten, with the number of channels before it: their input
        axis is (positions, channels), channels fastest, and is cut by channels. A norm on flattened
        features is named by the path of the vector itself.

    Raises:
      UsageError: a path that is no layer with a kernel, or channels that do not divide the axis.

    References:
      Taha et al., `Knowledge Evolution in Neural Networks`, 2021, section 3 (kernel-level
      convolutional-aware splitting).

    >>> params = {"conv": {"kernel": jnp.ones((3, 3, 1, 4))}, "fc": {"kernel": jnp.ones((4, 2))}}
    >>> selection = kernel_slices(params, 0.5, first="conv", head="fc")
    >>> selection["conv"]["kernel"][0, 0].tolist(), selection["fc"]["kernel"][:, 0].tolist()
    ([[False, False, True, True]], [False, False, True, True])
    """
    check_static("keep", keep)
    flattened = dict(flattened or {})
    ratio = Fraction(float(keep)).limit_denominator(10**9)
    find_layers(params, {"first": first, "head": head})
    check_flattened(params, flattened)

    def outside(path, leaf):
        shape, rank = leaf.shape, len(leaf.shape)
        cut = jnp.zeros(shape, bool)
        if rank == 0:
            return cut
        axes = []
        if not paths.below(path, head):
            axes.append(rank - 1)
        if rank >= 2 and not paths.below(path, first):
            axes.append(rank - 2)
        inputs = max(rank - 2, 0)  # the axis that a flatten makes: a kernel's inputs, or a vector
        for axis in axes:
            index = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            channels = channels_of(path, rank, flattened) if axis == inputs else None
            size = shape[axis] if channels is None else channels
            cut |= index % size >= math.ceil(ratio * size)
        return cut

    return map_named(outside, params)
