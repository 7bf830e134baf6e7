"""The slim network inside a wide one: the leading slices that a kernel-level split keeps.

Which parts of a wide network those are is the other side of
:func:`seal_jax.selections.kernel_slices`; both know about axes that a flatten made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from seal_jax import paths
from seal_jax.errors import UsageError, check_number, nearest

PyTree = Any


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
        network; see :func:`seal_jax.selections.kernel_slices`. Their paths are those of ``params``:
        ``"params/fc"`` where parameters and statistics come in one tree.

    Returns:
      A tree of the structure of ``like``, with the dtypes of ``params``.

    Raises:
      UsageError: the two differ in their paths, or a shape of ``like`` does not fit into its own.

    References:
      Taha et al., `Knowledge Evolution in Neural Networks`, 2021, section 3.

    >>> import jax.numpy as jnp
    >>> wide = {"fc": {"kernel": jnp.arange(6.0).reshape(3, 2)}}
    >>> like = {"fc": {"kernel": jax.ShapeDtypeStruct((2, 1), jnp.float32)}}
    >>> slim(wide, like)["fc"]["kernel"].tolist()
    [[0.0], [2.0]]
    """
    flattened = dict(flattened or {})
    check_flattened(params, flattened)
    wide = dict(paths.named_leaves(params))
    narrow = paths.named_leaves(like)
    names = [path for path, _ in narrow]
    for path in [*wide, *names]:
        if path not in wide or path not in names:
            where, others = ("the wide", list(wide)) if path in names else ("the slim", names)
            raise UsageError(f"{path!r} is not in {where} network{nearest(path, others)}")
    leaves = [
        leaf if paths.is_placeholder(leaf) else _leading(path, wide[path], leaf.shape, flattened)
        for path, leaf in narrow
    ]
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf=paths.is_placeholder), leaves)


def _leading(path: str, leaf: Any, shape: tuple[int, ...], flattened: Mapping[str, int]) -> Any:
    own = leaf.shape
    if len(shape) != len(own) or any(new > old for new, old in zip(shape, own, strict=True)):
        raise UsageError(f"{path!r}: the slim shape {shape} does not fit into {own}")
    channels = channels_of(path, len(own), flattened)
    if channels is None:
        return leaf[tuple(slice(size) for size in shape)]
    axis = max(len(own) - 2, 0)
    positions = own[axis] // channels
    kept, rest = divmod(shape[axis], positions)
    if rest:
        raise UsageError(
            f"{path!r}: the slim shape {shape} has no whole number of channels at each of the "
            f"{positions} positions that {channels} channels leave of {own}"
        )
    outer = leaf.reshape(*own[:axis], positions, channels, *own[axis + 1 :])
    cut = outer[tuple(slice(size) for size in (*shape[:axis], positions, kept, *shape[axis + 1 :]))]
    return cut.reshape(shape)


def find_layers(params: PyTree, layers: Mapping[str, str]) -> None:
    """Raise unless each of ``layers`` (field: path) has a kernel in ``params``."""
    kernels = [
        path for path, leaf in paths.named_leaves(params) if len(getattr(leaf, "shape", ())) >= 2
    ]
    for field, layer in layers.items():
        if not any(paths.below(path, layer) for path in kernels):
            near = nearest(str(layer), paths.with_parents(kernels))
            raise UsageError(f"{field} = {layer!r} is no layer with a kernel{near}")


def channels_of(path: str, rank: int, flattened: Mapping[str, int]) -> int | None:
    """Return the channels of a flattened axis: a layer's name means its kernel, not its bias."""
    for layer, channels in flattened.items():
        if path == layer or (rank >= 2 and paths.below(path, layer)):
            return channels
    return None


def check_flattened(params: PyTree, flattened: Mapping[str, int]) -> None:
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
            if rank and channels_of(path, rank, {layer: channels}) is not None:
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
