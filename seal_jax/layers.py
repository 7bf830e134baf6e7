"""The layers of a parameter tree: which leaves are kernels, and which of their axes are inputs.

Leaves with the same parent are a layer. Names follow Flax (``kernel``, ``bias``, ``scale``), Haiku
(``w``, ``b``, ``scale``, ``offset``), and PyTorch and Equinox (``weight``, ``bias``).
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal, get_args

from seal_jax import paths
from seal_jax.errors import check_choice

PyTree = Any
Layout = Literal["in_out", "out_in"]
Role = Literal["kernel", "bias", "norm"]
BIASES = ("bias", "b", "offset", "beta")
SCALES = ("scale", "weight", "gamma")
# Added to the tokens of a transformer: timm's names, and big_vision's.
EMBEDDINGS = ("cls_token", "pos_embed", "cls", "pos_embedding")


def roles(params: PyTree) -> list[Role]:
    """Return what each leaf of ``params``, hidden ones included, is to its layer.

    A kernel has two or more dimensions. Any other leaf of a layer with a kernel is a bias, and so is one of
    more dimensions that has the name of a bias and one axis longer than 1 (``[C, 1, 1]``). The
    leaves of a layer without a kernel belong to a normalisation, and so do a scale and a bias of
    equal shape (LayerNorm over several axes). Class tokens and position embeddings are biases.

    >>> import numpy as np
    >>> roles({"bn": {"scale": np.ones(2)}, "fc": {"bias": np.ones(2), "kernel": np.ones((3, 2))}})
    ['norm', 'bias', 'kernel']
    """
    # Shapes of whole layers first: the role of a leaf depends on the other leaves of its layer.
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    split = []
    for path, leaf in paths.named_leaves(params):
        layer, _, name = path.rpartition("/")
        layers.setdefault(layer, {})[name] = tuple(getattr(leaf, "shape", ()))
        split.append((layer, name))

    def is_kernel(name: str, shapes: dict[str, tuple[int, ...]]) -> bool:
        shape = shapes[name]
        # Equinox shapes the bias of a convolution [C, 1, 1]; a LayerNorm over several axes has a
        # scale and a bias of several dimensions.
        vector = name in BIASES and sum(size > 1 for size in shape) <= 1
        partners = BIASES if name in SCALES else SCALES if name in BIASES else ()
        affine = any(shapes.get(partner) == shape for partner in partners)
        return len(shape) >= 2 and not vector and not affine and name not in EMBEDDINGS

    def role(layer: str, name: str) -> Role:
        if name in EMBEDDINGS:
            return "bias"
        if is_kernel(name, layers[layer]):
            return "kernel"
        return "bias" if any(is_kernel(other, layers[layer]) for other in layers[layer]) else "norm"

    return [role(layer, name) for layer, name in split]


def fans(path: str, shape: tuple[int, ...], layout: Layout | None = None) -> tuple[int, int]:
    """Return the inputs of each output of a kernel, and the number of its outputs.

    Args:
      path: of the kernel.
      shape: of the kernel.
      layout: "in_out" where the last axis is the outputs, "out_in" where the first is; ``None``
        infers "out_in" from a name like ``weight`` (PyTorch, Equinox), else "in_out" (Flax, Haiku).

    >>> fans("conv/kernel", (3, 3, 8, 16)), fans("conv/weight", (16, 8, 3, 3))
    ((72, 16), (72, 16))
    """
    outputs = shape[0] if layout_of(path, layout) == "out_in" else shape[-1]
    return math.prod(shape) // max(outputs, 1), outputs


def layout_of(path: str, layout: Layout | None = None) -> Layout:
    """Return ``layout``, or if it is ``None`` the one that the name of a kernel tells; see :func:`fans`.

    >>> layout_of("conv/kernel"), layout_of("conv/weight")
    ('in_out', 'out_in')
    """
    check_choice("layout", layout, (*get_args(Layout), None))
    if layout is not None:
        return layout
    # Recurrent cells have several kernels: ``weight_ih``, ``weight_hh``.
    torch = re.fullmatch(r"weight(_.*)?", path.rpartition("/")[2])
    return "out_in" if torch else "in_out"
