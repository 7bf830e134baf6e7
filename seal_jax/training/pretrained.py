"""Start a training from the weights of another run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from seal_jax import methods, paths
from seal_jax.core import settings as settings_lib
from seal_jax.core.settings import Settings
from seal_jax.errors import UsageError, nearest
from seal_jax.training import checkpoint_files as files
from seal_jax.training import workdir as workdirs
from seal_jax.training.checkpoints import Checkpoints, read_leaves

PyTree = Any
SOURCES = {"last": "weights/", "best": "best/weights/"}
NORMALISERS = "weights/normalisers/"
# LW inserts its own normalisers, and the slim network that KELS leaves behind has none.
_WITHOUT_NORMALISERS = ("lw", "kels")


def folder(settings: Settings, workdir: Path) -> Path:
    """Return the folder that ``train.pretrained`` names.

    Args:
      settings: of the training that starts.
      workdir: its folder; a ``train.pretrained`` that begins with ".." is taken from there.

    Raises:
      UsageError: there is no run.
    """
    found = Path(settings.train.pretrained)
    if found.parts[:1] == ("..",):
        found = Path(os.path.normpath(workdir / found))
    if not (found / workdirs.CONFIG).is_file():
        raise UsageError(f"train.pretrained = {str(found)!r} is not the folder of a run")
    return found


def load(
    settings: Settings, workdir: Path, wanted: PyTree, *, momentum: bool
) -> dict[str, np.ndarray]:
    """Return what a training takes from ``train.pretrained``, by the leaf's name in its own state.

    Parameters and BatchNorm statistics are taken where name and shape agree; a classifier for
    another number of classes is not. The normalisers that LW inserted come with them, as constants.
    Seed i starts from seed i of that run, or all from its only one.

    Args:
      settings: of the training that starts.
      workdir: its folder; see :func:`folder`.
      wanted: its abstract state, every leaf with the seeds' axis.
      momentum: take the optimizer's memory of the parameters, too.

    Raises:
      UsageError: there is no such run or checkpoint, its number of seeds does not fit, or nothing
        of it fits this network.
    """
    source = folder(settings, workdir)
    leaves = read_leaves(source / workdirs.CHECKPOINTS)
    if leaves is None:
        raise UsageError(f"train.pretrained = {str(source)!r} holds no checkpoint yet")
    name = f"train.pretrained = {str(source)!r}"
    theirs = settings_lib.read(Settings, workdirs.read(source))
    return take(settings, leaves, wanted, name, theirs, momentum=momentum)


def take(
    settings: Settings,
    found: Mapping[str, np.ndarray],
    wanted: PyTree,
    source: str,
    theirs: Settings,
    *,
    momentum: bool,
) -> dict[str, np.ndarray]:
    """Return what :func:`load` does, from the leaves of a state in memory.

    Args:
      settings: of the training that starts.
      found: the leaves by name, each with an axis of seeds.
      wanted: its abstract state.
      source: what messages call the run that the leaves are of, such as "train.pretrained = 'run'".
      theirs: the settings of that run.
      momentum: take the optimizer's memory of the parameters, too; where the run's is a damped
        average (1 - M) b, the undamped sum b is made of it.
    """
    which = settings.train.pretrained_weights
    prefix = SOURCES[which]
    if not any(name.startswith(prefix) for name in found):
        raise UsageError(
            f"train.pretrained_weights = {which!r}: {source} was trained without "
            'a validation split; use "last"'
        )
    normalisers = {
        name.removeprefix(prefix.removesuffix("weights/")): leaf
        for name, leaf in found.items()
        if name.startswith(f"{prefix}normalisers/")
    }
    method = settings.method["name"]
    if normalisers and method in _WITHOUT_NORMALISERS:
        raise UsageError(
            f"{source} was trained by LW, whose inserted normalisers method "
            f"{method!r} would lose; start from another run"
        )
    weight = methods.momentum_weight(theirs) if momentum else 1.0
    memories = {
        _memory(name): leaf if weight == 1 else (leaf / weight).astype(leaf.dtype)
        for name, leaf in found.items()
        if momentum and name.startswith("opt_state/") and _memory(name)
    }
    abstract = _numeric(wanted)
    given = {}
    for name, leaf in abstract.items():
        if name.startswith("weights/"):
            there = found.get(prefix + name.removeprefix("weights/"))
        elif name.startswith("opt_state/"):
            there = memories.get(_memory(name))
        else:
            continue
        if there is not None and there.shape[1:] == leaf.shape[1:]:
            given[name] = there
    kernels = [
        name for name in abstract if name.startswith("weights/") and name.endswith("/kernel")
    ]
    taken = [name for name in kernels if name in given]
    if len(taken) < max(len(kernels) - 1, 1):
        missing = next(name for name in kernels if name not in given)
        raise UsageError(
            f"{source} is of another network: nothing there fits "
            f"{missing.removeprefix('weights/')}{nearest(missing, found)}"
        )
    count = abstract["seed"].shape[0]
    return {name: _seeds(leaf, count, source) for name, leaf in {**given, **normalisers}.items()}


def inserted(given: Mapping[str, Any]) -> PyTree:
    """Return the normalisers among what is given, as the collection a network takes.

    >>> inserted({"weights/params/fc/bias": 0, "weights/normalisers/dense1/mean": 2.0})
    {'dense1': {'mean': 2.0}}
    """
    names = [name for name in given if name.startswith(NORMALISERS)]
    return traverse_util.unflatten_dict(
        {name.removeprefix(NORMALISERS): given[name] for name in names}, sep="/"
    )


def inserted_before(workdir: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the normalisers, by name, in the checkpoints of a run that is taken up again.

    Only shapes: the values come with the rest of the checkpoint.
    """
    folder = workdir / workdirs.CHECKPOINTS
    for step in reversed(Checkpoints(folder).steps()):
        try:
            leaves = files.read_record(epath.Path(os.path.abspath(folder)) / str(step))["leaves"]
        except files.Damaged:
            continue  # they all have the same leaves
        return {
            name: jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"])
            for name, leaf in leaves.items()
            if name.startswith(NORMALISERS)
        }
    return {}


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
        if not paths.is_placeholder(leaf)  # of an optimizer in parts
        and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }


def _seeds(leaf: np.ndarray, seeds: int, source: str) -> np.ndarray:
    if leaf.shape[0] == 1:
        return np.repeat(leaf, seeds, axis=0)
    if leaf.shape[0] < seeds:
        raise UsageError(
            f"train.seeds = {seeds} is more than the {leaf.shape[0]} of {source}; train as many, or one"
        )
    return leaf[:seeds]
