"""Kernel-level splitting: the slim network inside a wide one (KELS of knowledge evolution).

:func:`kernel_slices` selects all entries outside the slim network, :func:`slim` cuts that network out. Taha et
al., `Knowledge Evolution in Neural Networks`, 2021, section 3 (convolutional-aware splitting).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

from seal_jax import layers, paths
from seal_jax.errors import UsageError, check_integer, nearest
from seal_jax.selections import check_fraction

PyTree = Any
# Channels at each position of a flattened image, or the sizes of the parts of a concatenation.
Parts = int | Sequence[int]


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
    flattened: Mapping[str, Parts] | None = None,
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
      flattened: layers whose inputs consist of parts that are each cut on their own. Dense layers
        after a flatten have the number of channels before it: their input axis is (positions,
        channels), channels fastest. Layers after a concatenation have the sizes of its parts. A
        layer is named by its path, also a norm; a vector of another layer by the vector's own.

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
    parts_of = _parts(params, flattened)

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
            parts: tuple[int, ...] = (shape[axis],)
            if axis == max(rank - 2, 0):  # the axis that a flatten or a concatenation makes
                parts = parts_of.get(path, parts)
            flags = np.concatenate([np.arange(size) >= kept(keep, size) for size in parts])
            cut |= flags.reshape([-1 if other == axis else 1 for other in range(rank)])
        return cut

    return paths.map_named(outside, params, roles)


def slim(params: PyTree, like: PyTree, flattened: Mapping[str, Parts] | None = None) -> PyTree:
    """Return the leading slices of every axis of ``params``, in the shapes of ``like``.

    With all parameters outside the fit slices at zero, a wide network with BatchNorm or without
    normalisation computes what the slim one does. One with LayerNorm does not: its zeros count in
    the mean and variance over channels.

    Args:
      params: pytree of arrays of the wide network: parameters, batch statistics, or both.
      like: the same of the slim network, as arrays or ``jax.ShapeDtypeStruct``, for the shapes.
      flattened: layers whose inputs consist of parts, with those of the WIDE network; see
        :func:`kernel_slices`. Their paths are those of ``params``: ``"params/fc"`` where parameters
        and statistics come in one tree.

    Raises:
      UsageError: the two differ in their paths, or a shape of ``like`` does not fit into its own.

    >>> import jax
    >>> wide = {"fc": {"kernel": jnp.arange(6.0).reshape(3, 2)}}
    >>> like = {"fc": {"kernel": jax.ShapeDtypeStruct((2, 1), jnp.float32)}}
    >>> slim(wide, like)["fc"]["kernel"].tolist()
    [[0.0], [2.0]]
    """
    parts_of = _parts(params, flattened)
    wide = dict(paths.named_leaves(params))
    narrow = paths.named_leaves(like)
    names = [path for path, _ in narrow]
    for path in [*wide, *names]:
        if path not in wide or path not in names:
            where, others = ("the wide", list(wide)) if path in names else ("the slim", names)
            raise UsageError(f"{path!r} is not in {where} network{nearest(path, others)}")

    def leading(path, target):
        leaf, shape = wide[path], target.shape
        full, parts = leaf.shape, parts_of.get(path)
        if len(shape) != len(full) or any(new > old for new, old in zip(shape, full, strict=True)):
            raise UsageError(f"{path!r}: the slim shape {shape} does not fit into {full}")
        if parts is None:
            return leaf[tuple(map(slice, shape))]
        axis = max(len(full) - 2, 0)
        # Every part keeps the share that the whole axis does.
        kept_parts, rests = zip(
            *(divmod(size * shape[axis], full[axis]) for size in parts), strict=True
        )
        if any(rests):
            raise UsageError(
                f"{path!r}: the slim shape {shape} leaves no whole number of channels in each of the "
                f"{len(parts)} parts of {full}"
            )
        starts = np.cumsum((0, *parts[:-1]))
        rows = [start + np.arange(count) for start, count in zip(starts, kept_parts, strict=True)]
        index: list[Any] = [slice(size) for size in shape]
        index[axis] = np.concatenate(rows)
        return leaf[tuple(index)]

    return paths.map_named(leading, like)


def _parts(params: PyTree, flattened: Mapping[str, Parts] | None) -> dict[str, tuple[int, ...]]:
    """Return, by path, the parts of each leaf's axis that ``flattened`` names: a kernel's inputs, a vector.

    A layer's name means its kernel, not its bias; of a layer without a kernel, all vectors.
    """
    shapes = {path: getattr(leaf, "shape", ()) for path, leaf in paths.named_leaves(params)}
    by_path: dict[str, tuple[int, ...]] = {}
    for layer, value in (flattened or {}).items():
        below = {
            path: shape for path, shape in shapes.items() if shape and paths.below(path, layer)
        }
        kernels = {path: shape for path, shape in below.items() if len(shape) >= 2}
        of_layer = {
            path: shape[max(len(shape) - 2, 0)] for path, shape in (kernels or below).items()
        }
        if not of_layer:
            near = nearest(layer, paths.with_parents(list(shapes)))
            raise UsageError(
                f"flattened names {layer!r}, which is no layer of the parameters{near}"
            )
        for path, size in of_layer.items():
            if isinstance(value, Sequence):
                parts = tuple(value)
            else:
                check_integer(f"flattened[{layer!r}]", value, 1, bounds="of channels, at least 1")
                parts = (value,) * (size // value)
            if sum(parts) != size:
                raise UsageError(
                    f"flattened[{layer!r}] = {value} does not divide the axis of {size} "
                    f"of {path!r}; it must be the number of channels before the flatten, or the sizes "
                    "of the parts"
                )
            by_path.setdefault(path, parts)  # the first that names a leaf counts
    return by_path
