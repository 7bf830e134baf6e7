"""Start a training from the weights of another run."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from seal_jax import paths
from seal_jax.errors import UsageError, nearest
from seal_jax.training import workdir as workdirs
from seal_jax.training.checkpoints import read_leaves
from seal_jax.training.settings import Settings

PyTree = Any
SOURCES = {"last": "weights/", "best": "best/weights/"}


def load(
    settings: Settings, workdir: Path, wanted: PyTree, *, momentum: bool
) -> dict[str, np.ndarray]:
    """Return what a training takes from ``train.pretrained``, by the leaf's name in its own state.

    Parameters and BatchNorm statistics are taken where name and shape agree; a classifier for
    another number of classes is not. Seed i starts from seed i of that run, or all from its only one.

    Args:
      settings: of the training that starts.
      workdir: its folder; a ``train.pretrained`` that begins with ".." is taken from there.
      wanted: its abstract state, every leaf with the seeds' axis.
      momentum: take the optimizer's memory of the parameters, too.

    Raises:
      UsageError: there is no such run or checkpoint, its number of seeds does not fit, or nothing
        of it fits this network.
    """
    fields = settings.train
    folder = Path(fields.pretrained)
    if folder.parts[:1] == ("..",):
        folder = Path(os.path.normpath(workdir / folder))
    if not (folder / workdirs.CONFIG).is_file():
        raise UsageError(f"train.pretrained = {str(folder)!r} is not the folder of a run")
    found = read_leaves(folder / workdirs.CHECKPOINTS)
    if found is None:
        raise UsageError(f"train.pretrained = {str(folder)!r} holds no checkpoint yet")
    source = SOURCES[fields.pretrained_weights]
    if any(name.startswith("weights/normalisers/") for name in found):
        raise UsageError(
            f"train.pretrained = {str(folder)!r} was trained by LW, whose inserted normalisers would "
            "be lost; start from another run"
        )
    if not any(name.startswith(source) for name in found):
        raise UsageError(
            f"train.pretrained_weights = {fields.pretrained_weights!r}: {folder} was trained without "
            'a validation split; use "last"'
        )
    memories = {
        _memory(name): leaf for name, leaf in found.items() if name.startswith("opt_state/")
    }
    given = {}
    for name, leaf in _numeric(wanted).items():
        if name.startswith("weights/"):
            theirs = found.get(source + name.removeprefix("weights/"))
        elif momentum and name.startswith("opt_state/") and _memory(name):
            theirs = memories.get(_memory(name))
        else:
            continue
        if theirs is not None and theirs.shape[1:] == leaf.shape[1:]:
            given[name] = _seeds(theirs, leaf.shape[0], folder)
    kernels = [
        name
        for name in _numeric(wanted)
        if name.startswith("weights/") and name.endswith("/kernel")
    ]
    taken = [name for name in kernels if name in given]
    if len(taken) < max(len(kernels) - 1, 1):
        missing = next(name for name in kernels if name not in given)
        raise UsageError(
            f"train.pretrained = {str(folder)!r} is of another network: nothing there fits "
            f"{missing.removeprefix('weights/')}{nearest(missing, found)}"
        )
    return given


def merge(tree: PyTree, given: dict[str, jax.Array], prefix: str) -> PyTree:
    """Return ``tree`` with the leaves that are ``given`` under ``prefix`` and their name."""
    if not given:
        return tree
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    merged = [given.get(prefix + paths.name(path), leaf) for path, leaf in leaves]
    return jax.tree.unflatten(structure, merged)


def _memory(name: str) -> str:
    """Return what an optimizer remembers about which parameter, wherever in its state; or "".

    >>> _memory("opt_state/0/1/inner/trace/fc/kernel")
    'trace/fc/kernel'
    """
    found = re.search(r"/((?:trace|mu|nu)/.+)", name)
    return found[1] if found else ""


def _numeric(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of an abstract state by name, but for random keys."""
    return {
        name: leaf
        for name, leaf in paths.named_leaves(tree)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }


def _seeds(leaf: np.ndarray, seeds: int, folder: Path) -> np.ndarray:
    if leaf.shape[0] == 1:
        return np.repeat(leaf, seeds, axis=0)
    if leaf.shape[0] < seeds:
        raise UsageError(
            f"train.seeds = {seeds} is more than the {leaf.shape[0]} of train.pretrained = "
            f"{str(folder)!r}; train as many, or one"
        )
    return leaf[:seeds]
