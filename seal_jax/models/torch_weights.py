"""Weights under the names of torchvision and timm, and their layout, to our variables and back.

What the libraries call a layer its network declares (``Network.torch_layers``); names and layouts of the
layer's tensors follow from that here. A convolution's weight is ``[out, in, height, width]`` there and
``[height, width, in, out]`` here, grouped or not, and a dense layer's is transposed. ``num_batches_tracked``,
which nothing reads, is dropped and written as 0. A variable is called by its path below,
``params/conv1/kernel``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax
import numpy as np

from seal_jax import paths
from seal_jax.errors import UsageError, check_choice, nearest
from seal_jax.models import model as models
from seal_jax.models.model import Model

# The names of this package, which every network has.
OWN = "seal_jax"
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_COUNTER = "num_batches_tracked"
# See `Network.torch_layers`.
_CONV, _FOLDED = "conv:", "folded_bias"
# Side of the feature map that both libraries' VGG pools to before its first dense layer, whatever the image.
_POOLED = 7


class Imported(NamedTuple):
    """Variables that were read by name.

    Attributes:
        library: whose names these were, "torchvision", "timm" or "seal_jax".
        variables: float32 arrays by path.
    """

    library: str
    variables: dict[str, np.ndarray]


def libraries(model: Model) -> tuple[str, ...]:
    """Return under whose names the weights of a network can be read and written, ours the last."""
    return (*_layers(model), OWN)


def tensor_names(model: Model, library: str) -> dict[str, str]:
    """Return the name of each variable's tensor by the variable's path."""
    if library == OWN:
        return {path: path for path in _shapes(model)}
    layers, names = _layers(model)[library], {}
    for path in _shapes(model):
        _, _, parameter = path.partition("/")
        layer, _, leaf = parameter.rpartition("/")
        # A parameter outside of a layer is declared itself.
        module = layers.get(layer, "").removeprefix(_CONV)
        names[path] = layers.get(parameter) or f"{module}.{_LEAVES[leaf]}"
    return names


def from_torch(
    model: Model, tensors: Mapping[str, np.ndarray], *, label: str, head: bool = True
) -> Imported:
    """Return the variables of a network from tensors by name, of any of its ``libraries``.

    Every variable must have its tensor of the right shape, and every tensor its variable. A first
    component that all names have in common, such as ``module.``, is dropped. For square images of
    another size a VGG's first dense kernel absorbs that torch's network pools the last feature map to
    7x7, which is linear; and a ViT's position embeddings are interpolated.

    Args:
        model: the network.
        tensors: floating point arrays by name.
        label: what messages call the tensors.
        head: whether the classifier is wanted; without, its tensors may be of any shape or missing.

    Raises:
        UsageError: tensors that are missing, unexpected, of another shape or not finite, all of them in
            one message.
    """
    tensors = _without_prefix(
        {name: value for name, value in tensors.items() if not name.endswith(_COUNTER)}
    )
    expected = {library: tensor_names(model, library) for library in libraries(model)}
    # Unknown names are reported as if they were meant as those that they are most like.
    library = min(expected, key=lambda key: len({*expected[key].values()} ^ {*tensors}))
    names, shapes, folded = expected[library], dict(_shapes(model)), _folded(model, library)
    if library == OWN:
        # LW's, which a network has or not.
        both = (
            f"normalisers/{block}/{x}" for block in model.round_blocks for x in ("mean", "scale")
        )
        shapes |= (inserted := {path: () for path in both if path in tensors})
        names |= {path: path for path in inserted}
    if not head:
        of_head = f"params/{model.head}/"
        module = names[f"{of_head}kernel"].removesuffix(".weight").removesuffix("/kernel")
        tensors = {
            name: v for name, v in tensors.items() if not name.startswith((f"{module}.", of_head))
        }
        names = {path: name for path, name in names.items() if not path.startswith(of_head)}
    biases = {f"batch_stats/{norm}/mean": name for norm, name in folded.items() if name in tensors}
    means = {path: name for path, name in biases.items() if path in shapes}
    # Without BatchNorm no mean takes a bias in, so it must be zero.
    zeros = {name for path, name in biases.items() if path not in means and not tensors[name].any()}
    variables: dict[str, np.ndarray] = {}
    misshaped, broken = {}, []
    for path, name in [*names.items(), *means.items()]:
        if name not in tensors:
            continue
        value = tensors[name]
        # bfloat16 has NumPy's kind V, for void.
        if value.dtype.kind not in "fV" or not np.isfinite(value.astype(np.float32)).all():
            broken.append(f"{name} ({value.dtype})")
            continue
        value = value.astype(np.float32)
        if library != OWN:
            value = _from_layout(value, shapes[path], model.flattened.get(path.partition("/")[2]))
        if value.shape != shapes[path]:
            misshaped[path] = f"{name} {list(tensors[name].shape)}"
        elif path in variables:  # the bias, which comes after its mean
            variables[path] = variables[path] - value
        else:
            variables[path] = value
    known = {*names.values(), *means.values(), *zeros}
    problems = {
        "missing": [name for name in names.values() if name not in tensors],
        "unexpected": [name for name in tensors if name not in known],
        "of another shape": [*misshaped.values()],
        "not finite floating point": broken,
    }
    if any(problems.values()):
        found = "; ".join(
            f"{len(items)} {'is' if len(items) == 1 else 'are'} {kind} "
            f"({', '.join(items[:3])}{', ...' if len(items) > 3 else ''})"
            for kind, items in problems.items()
            if items
        )
        stored = {path: tensors[names[path]].shape for path in misshaped}
        raise UsageError(
            f"{label} is not of model.name = {model.name!r} as it is set up: of {len(tensors)} tensors "
            f"by the names of {library}, and {len(names)} here, {found}; "
            f"{_fix(model, library, tensors, problems, stored)}"
        )
    return Imported(library, variables)


def to_torch(
    model: Model, variables: Mapping[str, np.ndarray], library: str
) -> dict[str, np.ndarray]:
    """Return the tensors of a network's variables, by the names and in the layout of a library.

    ``load_state_dict`` of the library's module takes them, where it is built as the network is. What
    ``from_torch`` makes of them is equal bit for bit; but for the first dense kernel of a VGG for images
    of another size than 224, which is written in the form that torch's pooling to 7x7 needs.

    Args:
        model: the network.
        variables: arrays by path.
        library: one of ``libraries(model)``.

    Raises:
        UsageError: the library does not have this network, or no place for what the variables hold.
    """
    check_choice("--names", library, libraries(model))
    if library == OWN:
        return {path: np.asarray(value, order="C") for path, value in variables.items()}
    for path in variables:
        if path.startswith("normalisers/"):
            raise UsageError(
                f"--names={library}: the network has normalisers inserted by LW, which {library}'s "
                f"has not; use --names={OWN}"
            )
    layers, names = _layers(model)[library], tensor_names(model, library)
    tensors = {}
    for path, name in names.items():
        value = variables[path]
        parameter = path.partition("/")[2]
        if path.endswith("/kernel"):
            as_conv = layers[parameter.rpartition("/")[0]].startswith(_CONV)
            value = _to_layout(value, model.flattened.get(parameter), as_conv)
        # Safetensors writes the memory as it lies, so a transposed view would be written in the old order.
        tensors[name] = np.asarray(value, order="C")
        if path.endswith("/mean"):
            tensors[f"{name.rpartition('.')[0]}.{_COUNTER}"] = np.zeros((), np.int64)
    for norm, name in _folded(model, library).items():
        tensors[name] = np.zeros_like(variables[f"params/{norm}/bias"])
    return tensors


def _layers(model: Model) -> dict[str, dict[str, str]]:
    # A user's own module need not declare any.
    return getattr(model.module, "torch_layers", dict)()


@functools.lru_cache(maxsize=8)
def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    variables = jax.eval_shape(model.init, jax.random.key(0))
    return {path: leaf.shape for path, leaf in paths.named_leaves(variables)}


def _folded(model: Model, library: str) -> dict[str, str]:
    """Return the bias that is a part of a running mean here, by the path of its BatchNorm."""
    layers = _layers(model).get(library, {})
    return {
        layer.removesuffix(f"/{_FOLDED}"): name
        for layer, name in layers.items()
        if layer.endswith(f"/{_FOLDED}")
    }


def _from_layout(value: np.ndarray, shape: tuple[int, ...], channels: int | None) -> np.ndarray:
    """Return a tensor in our layout; one that cannot have this shape keeps its own.

    ``channels`` are those of the image whose pixels are the input of a dense kernel; None where there are none.
    """
    if value.ndim == len(shape) == 4:
        return value.transpose(2, 3, 1, 0)
    if value.ndim == len(shape) == 3 and value.shape[1] != shape[1]:
        return _positions(value, shape[1])
    if len(shape) != 2 or value.ndim not in (2, 4):
        return value
    if channels is None:
        return value.reshape(len(value), -1).T
    side, pooled = _side(shape[0], channels), _side(value[0].size, channels)
    if not side or not pooled:
        return value
    kernel = value.reshape(len(value), channels, pooled, pooled).transpose(2, 3, 1, 0)
    if side != pooled:
        kernel = _along_sides(kernel, _pooling(side, pooled).T)
    return kernel.reshape(-1, len(value))


def _positions(value: np.ndarray, count: int) -> np.ndarray:
    """Return position embeddings ``[1, 1 + h * h, C]``, the class token's first, for ``count`` tokens.

    Between two square grids they are interpolated as timm does, bicubically; else they stay as they are.
    """
    before, side = _side(value.shape[1] - 1, 1), _side(count - 1, 1)
    if not before or not side:
        return value
    grid = value[0, 1:].reshape(before, before, -1)
    grid = np.asarray(jax.image.resize(grid, (side, side, grid.shape[-1]), "cubic"))
    return np.concatenate([value[:, :1], grid.reshape(1, side * side, -1)], axis=1)


def _to_layout(kernel: np.ndarray, channels: int | None, as_conv: bool) -> np.ndarray:
    """Return a kernel in torch's layout, a dense one as that of a convolution where it is one there."""
    if kernel.ndim == 4:
        return kernel.transpose(3, 2, 0, 1)
    side = 1 if channels is None else _side(len(kernel), channels)
    if not side or (channels is not None and side > _POOLED):
        raise UsageError(
            f"the network's last feature map is larger than {_POOLED}x{_POOLED}, or not square, and torch's "
            f"network pools it; use --names={OWN}"
        )
    image = kernel.reshape(side, side, -1, kernel.shape[-1])
    if channels is not None and side != _POOLED:
        # The smallest kernel that does after the pooling what this one does without.
        image = _along_sides(image, np.linalg.pinv(_pooling(side, _POOLED).T))
    image = image.transpose(3, 2, 0, 1)
    return image if as_conv else image.reshape(len(image), -1)


def _side(inputs: int, channels: int) -> int:
    """Return the side of the square image of these inputs, 0 for any other."""
    side = math.isqrt(inputs // channels)
    return side if side * side * channels == inputs else 0


def _pooling(side: int, pooled: int) -> np.ndarray:
    """Return torch's adaptive average pooling along one side as a matrix ``[pooled, side]``.

    >>> _pooling(2, 3)
    array([[1. , 0. ],
           [0.5, 0.5],
           [0. , 1. ]])
    """
    matrix = np.zeros((pooled, side))
    for row in range(pooled):
        start, stop = row * side // pooled, -(-(row + 1) * side // pooled)
        matrix[row, start:stop] = 1 / (stop - start)
    return matrix


def _along_sides(kernel: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Apply a matrix to the first two axes of ``[h, w, in, out]``."""
    matrix = matrix.astype(np.float32)
    rows = np.tensordot(matrix, kernel, axes=(1, 0))
    return np.tensordot(matrix, rows, axes=(1, 1)).swapaxes(0, 1)


def _without_prefix(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drop the first component of the names as long as all have the same: ``module.`` of DataParallel."""
    while len(firsts := {name.partition(".")[0] for name in tensors}) == 1 and all(
        "." in name for name in tensors
    ):
        (first,) = firsts
        tensors = {name.removeprefix(f"{first}."): value for name, value in tensors.items()}
    return tensors


def _fix(
    model: Model,
    library: str,
    tensors: Mapping[str, np.ndarray],
    problems: Mapping[str, list[str]],
    misshaped: Mapping[str, tuple[int, ...]],
) -> str:
    """Return what to do about tensors that do not fit, most likely first."""
    unexpected, missing = problems["unexpected"], problems["missing"]
    shapes = _shapes(model)
    if not any(path.startswith("batch_stats/") for path in shapes) and any(
        name.endswith("running_mean") for name in unexpected
    ):
        return 'use model.norm = "batch"'
    others = " or ".join(map(repr, _families_of(model, tensors)))
    if others and (missing or unexpected):
        return f"use model.name = {others}"
    if len(unexpected) == 1 and not getattr(model.module, "head_bias", True):
        return 'use model.head_bias = True, or train.pretrained_head = "replace"'
    # The lowest layer of the network: its input are the images.
    first = next((path for path in misshaped if path.endswith("/kernel")), "")
    channels = (
        misshaped[first][2 if library == OWN else 1] if len(misshaped.get(first, ())) == 4 else 0
    )
    if channels == 3 and model.image_shape[-1] == 1:
        return "use data.channels = 3, which repeats grey images over red, green and blue"
    if channels and getattr(model.module, "stem", "imagenet") != "imagenet":
        return 'use model.stem = "imagenet"'
    if misshaped and all(path.startswith(f"params/{model.head}/") for path in misshaped):
        return 'use train.pretrained_head = "replace" for a new classifier'
    near = nearest(missing[0], unexpected) if missing else ""
    others = f"model.name = {others}, or " if others else ""
    return (
        f"use {others}the network and the options of model that the weights were trained with{near}"
    )


def _families_of(model: Model, tensors: Collection[str]) -> list[str]:
    """Return other networks whose layers have the names of these tensors."""
    modules = {name.rpartition(".")[0] for name in tensors}
    families = []
    for name in models.names():
        try:
            other = models.create(
                name, num_classes=model.num_classes, image_shape=model.image_shape
            )
        except UsageError:  # not for images of this size
            continue
        for layers in _layers(other).values():
            declared = {n.removeprefix(_CONV) for path, n in layers.items() if _FOLDED not in path}
            if (
                declared <= modules | {*tensors}
                and modules <= declared | {""}
                and name != model.name
            ):
                families.append(name)
                break
    return families
