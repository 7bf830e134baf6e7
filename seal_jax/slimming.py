"""Kernel-level splitting: the slim network inside a wide one (KELS of knowledge evolution).

:func:`kernel_slices` selects all entries outside the slim network, :func:`slim` cuts that network out. Taha et
al., `Knowledge Evolution in Neural Networks`, 2021, section 3 (convolutional-aware splitting).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from seal_jax import layers, paths
from seal_jax.errors import UsageError, check_integer, nearest
from seal_jax.selections import check_fraction

PyTree = Any


def kept(keep: float, size: int) -> int:
    """Return how many of ``size`` channels are fit: ``keep * size`` rounded up, without rounding errors.

    >>> kept(0.5, 3), kept(0.07, 100), 0.07 * 100
    (2, 7, 7.000000000000001)
    """
    # The simple fraction that the decimal stood for.
    return math.ceil(Fraction(float(keep)).limit_denominator(10**9) * size)


def kernel_slices(
    params: PyTree,
    keep: float,
    *,
    first: str,
    head: str,
    flattened: Mapping[str, int] | None = None,
) -> PyTree:
    r"""Select the entries OUTSIDE the fit slice of every kernel, for them to be forgotten (KELS).

    The fit slice of a kernel (last axis: outputs; last but one: inputs) are its first
    :math:`\lceil r C_{in} \rceil` inputs and first :math:`\lceil r C_{out} \rceil` outputs, so that
    the fit parts of all layers together are a slim network (see :func:`slim`).
    The first kernel keeps all its inputs, the head all its outputs and its bias; a depthwise kernel
    ``[h, w, 1, C]`` is cut by outputs alone. Of other biases and of norms the first
    :math:`\lceil r C \rceil` entries are fit. Grouped kernels that are not depthwise are cut within
    their groups' inputs; the result is a network only if the number of groups stays.

    Args:
      params: arrays or ``jax.ShapeDtypeStruct`` of dense and convolution layers.
      keep: r, the share of channels that is kept, in (0, 1).
      first: path of the layer (or the kernel) that sees the input.
      head: path of the layer (or the kernel) that computes the output.
      flattened: dense layers after a flatten, with the number of channels before it: their input
        axis is (positions, channels), channels fastest, and is cut by channels. A norm on flattened
        features is named by the path of the vector itself.

    Raises:
      UsageError: a path that names no layer with a kernel, or channels that do not divide the axis.

    >>> params = {"conv": {"kernel": jnp.ones((3, 3, 1, 4))}, "fc": {"kernel": jnp.ones((4, 2))}}
    >>> selection = kernel_slices(params, 0.5, first="conv", head="fc")
    >>> selection["conv"]["kernel"][0, 0].tolist(), selection["fc"]["kernel"][:, 0].tolist()
    ([[False, False, True, True]], [False, False, True, True])
    """
    check_fraction("keep", keep)
    roles = layers.roles(params)
    leaves = zip(paths.named_leaves(params), roles, strict=True)
    kernels = [path for (path, _), role in leaves if role == "kernel"]
    for field, layer in (("first", first), ("head", head)):
        if not any(paths.below(path, layer) for path in kernels):
            near = nearest(str(layer), paths.with_parents(kernels))
            raise UsageError(f"{field} = {layer!r} is no layer with a kernel{near}")
    flattened_channels = _flattened_channels(params, flattened)

    def outside(path, leaf, role):
        shape, rank = leaf.shape, len(leaf.shape)
        cut = jnp.zeros(shape, bool)
        if rank == 0:
            return cut
        axes = []
        # The head keeps its outputs, the classes, and with them its bias.
        if not paths.below(path, head):
            axes.append(rank - 1)
        # The first layer keeps its inputs, the channels of the image.
        if role == "kernel" and not paths.below(path, first):
            axes.append(rank - 2)
        # A depthwise kernel has one input, which the ceiling keeps.
        for axis in axes:
            index = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            size = shape[axis]
            if axis == max(rank - 2, 0):  # the axis that a flatten makes
                size = flattened_channels.get(path, size)
            # Channels are the fastest part of a flattened axis, so they repeat along it.
            cut |= index % size >= kept(keep, size)
        return cut

    return paths.map_named(outside, params, roles)


def slim(params: PyTree, like: PyTree, flattened: Mapping[str, int] | None = None) -> PyTree:
    """Return the leading slices of every axis of ``params``, in the shapes of ``like``.

    With all parameters outside the fit slices at zero, a wide network with BatchNorm or without
    normalisation computes what the slim one does. One with LayerNorm does not: its zeros count in
    the mean and variance over channels.

    Args:
      params: pytree of arrays of the wide network: parameters, batch statistics, or both.
      like: the same of the slim network, as arrays or ``jax.ShapeDtypeStruct``, for the shapes.
      flattened: dense layers after a flatten, with the number of channels before it in the WIDE
        network; see :func:`kernel_slices`. Their paths are those of ``params``:
        ``"params/fc"`` where parameters and statistics come in one tree.

    Raises:
      UsageError: the two differ in their paths, or a shape of ``like`` does not fit into its own.

    >>> wide = {"fc": {"kernel": jnp.arange(6.0).reshape(3, 2)}}
    >>> like = {"fc": {"kernel": jax.ShapeDtypeStruct((2, 1), jnp.float32)}}
    >>> slim(wide, like)["fc"]["kernel"].tolist()
    [[0.0], [2.0]]
    """
    flattened_channels = _flattened_channels(params, flattened)
    wide = dict(paths.named_leaves(params))
    narrow = paths.named_leaves(like)
    names = [path for path, _ in narrow]
    for path in [*wide, *names]:
        if path not in wide or path not in names:
            where, others = ("the wide", list(wide)) if path in names else ("the slim", names)
            raise UsageError(f"{path!r} is not in {where} network{nearest(path, others)}")

    def leading(path, target):
        leaf, shape = wide[path], target.shape
        full, channels = leaf.shape, flattened_channels.get(path)
        if len(shape) != len(full) or any(new > old for new, old in zip(shape, full, strict=True)):
            raise UsageError(f"{path!r}: the slim shape {shape} does not fit into {full}")
        if channels is None:
            return leaf[tuple(map(slice, shape))]
        axis = max(len(full) - 2, 0)
        positions = full[axis] // channels
        kept, rest = divmod(shape[axis], positions)
        if rest:
            raise UsageError(
                f"{path!r}: the slim shape {shape} has no whole number of channels at each of the "
                f"{positions} positions that {channels} channels leave of {full}"
            )
        # [..., positions, channels, ...], of which the first ``kept`` channels stay at every position.
        outer = leaf.reshape(*full[:axis], positions, channels, *full[axis + 1 :])
        leading_slices = map(slice, (*shape[:axis], positions, kept, *shape[axis + 1 :]))
        return outer[tuple(leading_slices)].reshape(shape)

    return paths.map_named(leading, like)


def _flattened_channels(params: PyTree, flattened: Mapping[str, int] | None) -> dict[str, int]:
    """Return, by path, the channels of each leaf with a flattened axis: a kernel's inputs, a vector.

    A layer's name means its kernel, not its bias.
    """
    shapes = {path: getattr(leaf, "shape", ()) for path, leaf in paths.named_leaves(params)}
    by_path: dict[str, int] = {}
    for layer, channels in (flattened or {}).items():
        check_integer(f"flattened[{layer!r}]", channels, 1, bounds="of channels, at least 1")
        sizes = {
            path: shape[max(len(shape) - 2, 0)]
            for path, shape in shapes.items()
            if shape and (path == layer or (len(shape) >= 2 and paths.below(path, layer)))
        }
        for path, size in sizes.items():
            if size % channels:
                raise UsageError(
                    f"flattened[{layer!r}] = {channels} does not divide the axis of {size} "
                    f"of {path!r}; it must be the number of channels before the flatten"
                )
        if not sizes:
            near = nearest(layer, paths.with_parents(list(shapes)))
            raise UsageError(f"flattened names {layer!r}, which is no layer with a kernel{near}")
        by_path = dict.fromkeys(sizes, channels) | by_path  # the first that names a leaf counts
    return by_path
