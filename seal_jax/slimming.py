"""Kernel-level splitting: the slim network inside a wide one (KELS of knowledge evolution).

:func:`kernel_slices` selects what lies outside of the slim network, :func:`slim` cuts it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from seal_jax import paths
from seal_jax.errors import UsageError, check_number, nearest
from seal_jax.selections import check_static

PyTree = Any


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
    the fit parts of all layers form a slim network of their own (see :func:`slim`).
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
    _check_layers(params, {"first": first, "head": head})
    _check_flattened(params, flattened)

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
            channels = _channels_of(path, rank, flattened) if axis == inputs else None
            size = shape[axis] if channels is None else channels
            # Channels are the fastest part of a flattened axis, so they repeat along it.
            cut |= index % size >= math.ceil(ratio * size)
        return cut

    return paths.map_named(outside, params)


def slim(params: PyTree, like: PyTree, flattened: Mapping[str, int] | None = None) -> PyTree:
    """Return the leading slices of every axis of ``params``, in the shapes of ``like``.

    With all parameters outside the fit slices at zero, a wide network with BatchNorm or without
    normalisation computes what the slim one does. One with LayerNorm does not: its zeros count in
    the mean and variance over channels. There the slim network is a network of its own. The released
    code of knowledge evolution reports the accuracies of both.

    Args:
      params: pytree of arrays of the wide network: parameters, batch statistics, or both.
      like: the same of the slim network, as arrays or ``jax.ShapeDtypeStruct``, for the shapes.
      flattened: dense layers behind a flatten, with the number of channels before it in the WIDE
        network; see :func:`kernel_slices`. Their paths are those of ``params``:
        ``"params/fc"`` where parameters and statistics come in one tree.

    Returns:
      A tree of the structure of ``like``, with the dtypes of ``params``.

    Raises:
      UsageError: the two differ in their paths, or a shape of ``like`` does not fit into its own.

    References:
      Taha et al., `Knowledge Evolution in Neural Networks`, 2021, section 3.

    >>> wide = {"fc": {"kernel": jnp.arange(6.0).reshape(3, 2)}}
    >>> like = {"fc": {"kernel": jax.ShapeDtypeStruct((2, 1), jnp.float32)}}
    >>> slim(wide, like)["fc"]["kernel"].tolist()
    [[0.0], [2.0]]
    """
    flattened = dict(flattened or {})
    _check_flattened(params, flattened)
    wide = dict(paths.named_leaves(params))
    narrow = paths.named_leaves(like)
    names = [path for path, _ in narrow]
    for path in [*wide, *names]:
        if path not in wide or path not in names:
            where, others = ("the wide", list(wide)) if path in names else ("the slim", names)
            raise UsageError(f"{path!r} is not in {where} network{nearest(path, others)}")

    def leading(path, leaf):
        return _leading(path, wide[path], leaf.shape, flattened)

    return paths.map_named(leading, like)


def _leading(path: str, leaf: Any, shape: tuple[int, ...], flattened: Mapping[str, int]) -> Any:
    full = leaf.shape
    if len(shape) != len(full) or any(new > old for new, old in zip(shape, full, strict=True)):
        raise UsageError(f"{path!r}: the slim shape {shape} does not fit into {full}")
    channels = _channels_of(path, len(full), flattened)
    if channels is None:
        return leaf[tuple(slice(size) for size in shape)]
    axis = max(len(full) - 2, 0)
    positions = full[axis] // channels
    kept, rest = divmod(shape[axis], positions)
    if rest:
        raise UsageError(
            f"{path!r}: the slim shape {shape} has no whole number of channels at each of the "
            f"{positions} positions that {channels} channels leave of {full}"
        )
    outer = leaf.reshape(*full[:axis], positions, channels, *full[axis + 1 :])
    cut = outer[tuple(slice(size) for size in (*shape[:axis], positions, kept, *shape[axis + 1 :]))]
    return cut.reshape(shape)


def _check_layers(params: PyTree, layers: Mapping[str, str]) -> None:
    """Raise unless each of ``layers`` (field: path) has a kernel in ``params``."""
    kernels = [
        path for path, leaf in paths.named_leaves(params) if len(getattr(leaf, "shape", ())) >= 2
    ]
    for field, layer in layers.items():
        if not any(paths.below(path, layer) for path in kernels):
            near = nearest(str(layer), paths.with_parents(kernels))
            raise UsageError(f"{field} = {layer!r} is no layer with a kernel{near}")


def _channels_of(path: str, rank: int, flattened: Mapping[str, int]) -> int | None:
    """Return the channels of a flattened axis: a layer's name means its kernel, not its bias."""
    for layer, channels in flattened.items():
        if path == layer or (rank >= 2 and paths.below(path, layer)):
            return channels
    return None


def _check_flattened(params: PyTree, flattened: Mapping[str, int]) -> None:
    """Raise unless each path of ``flattened`` has an axis that its channels divide."""
    for layer, channels in flattened.items():
        check_number(
            f"flattened[{layer!r}]",
            channels,
            lambda value: value >= 1 and value == int(value),
            "be a number of channels",
        )
        hits = 0
        for path, leaf in paths.named_leaves(params):
            rank = len(getattr(leaf, "shape", ()))
            if rank and _channels_of(path, rank, {layer: channels}) is not None:
                hits += 1
                size = leaf.shape[max(rank - 2, 0)]
                if size % channels:
                    raise UsageError(
                        f"flattened[{layer!r}] = {channels} does not divide the axis of {size} "
                        f"of {path!r}; it must be the number of channels before the flatten"
                    )
        if not hits:
            near = nearest(
                layer, paths.with_parents([path for path, _ in paths.named_leaves(params)])
            )
            raise UsageError(f"flattened names {layer!r}, which is no layer with a kernel{near}")
