"""Start a training from the weights of another run (``train.pretrained``)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from seal_jax import methods, paths
from seal_jax.core import settings as settings_lib
from seal_jax.core.settings import Settings
from seal_jax.errors import UsageError, nearest
from seal_jax.models.network import HEAD
from seal_jax.training import workdir as workdirs
from seal_jax.training.checkpoints import read_leaves

PyTree = Any
SOURCES = {"last": "weights/", "best": "best/weights/", "ema": "ema/"}
# What a run has to have for weights that not every run has.
NEEDS = {"best": "a validation split", "ema": "an average of the weights (optimizer.ema)"}
NORMALISERS = "weights/normalisers/"
# LW inserts its own normalisers, and the slim network that KELS leaves behind has none.
_WITHOUT_NORMALISERS = ("lw", "kels")


class Source(NamedTuple):
    """A run that a training starts from."""

    settings: Settings  # of its training
    leaves: Mapping[str, np.ndarray]  # of its state, by name, each with the seeds' axis
    label: str  # what messages call it, such as "train.pretrained = 'run'"


def read(settings: Settings, workdir: Path) -> Source:
    """Read the run that ``train.pretrained`` names; one that begins with ".." is relative to ``workdir``.

    Raises:
      UsageError: there is no such run, or it has no checkpoint.
    """
    folder = Path(settings.train.pretrained)
    if folder.parts[:1] == ("..",):
        folder = Path(os.path.normpath(workdir / folder))
    return read_run(folder, f"train.pretrained = {str(folder)!r}")


def read_run(folder: Path, label: str) -> Source:
    """Read the newest checkpoint of a run, which messages call ``label``.

    Raises:
      UsageError: there is no such run, or it has no checkpoint.
    """
    if not (folder / workdirs.CONFIG).is_file():
        raise UsageError(f"{label} is not the folder of a run")
    settings = settings_lib.read(Settings, workdirs.read(folder))
    leaves = read_leaves(folder / workdirs.CHECKPOINTS)
    if leaves is None:
        raise UsageError(f"{label} holds no checkpoint yet")
    return Source(settings, leaves, label)


def take(
    settings: Settings, source: Source, abstract_state: PyTree, *, momentum: bool
) -> dict[str, np.ndarray]:
    """Return what a training takes from another run, by the leaf's name in its own state.

    Parameters and BatchNorm statistics are taken where name and shape agree; a classifier for
    another number of classes is not. The normalisers that LW inserted come with them, as constants.
    Seed i starts from seed i of that run, or all from its only one.

    Args:
      settings: of the training that starts.
      source: the other run.
      abstract_state: of the training that starts.
      momentum: take the moments of the optimizer, too; where the run's momentum is a damped average
        (1 - M) b, the undamped sum b is computed from it.

    Raises:
      UsageError: its number of seeds does not fit, or nothing of it fits this network.
    """
    which = settings.train.pretrained_weights
    prefix = SOURCES[which]
    if not any(name.startswith(prefix) for name in source.leaves):
        raise UsageError(
            f"train.pretrained_weights = {which!r}: {source.label} was trained without "
            f'{NEEDS[which]}; use "last"'
        )
    normalisers = {
        # The best weights' are best/weights/normalisers/... there and weights/normalisers/... here.
        f"weights/{name.removeprefix(prefix)}": leaf
        for name, leaf in source.leaves.items()
        if name.startswith(f"{prefix}normalisers/")
    }
    method = settings.method["name"]
    if normalisers and method in _WITHOUT_NORMALISERS:
        raise UsageError(
            f"{source.label} was trained by LW, whose inserted normalisers method "
            f"{method!r} would lose; start from another run"
        )
    # A damped momentum is M V + (1 - M) g: 1 - M times the undamped sum, once both have started at zero.
    weight = methods.momentum_weight(source.settings) if momentum else 1.0
    moments = {
        # By the parameter's name only: two methods nest the same optimizer differently.
        _moment(name): leaf if weight == 1 else (leaf / weight).astype(leaf.dtype)
        for name, leaf in source.leaves.items()
        if momentum and name.startswith("opt_state/") and _moment(name)
    }
    abstract = {
        name: leaf
        for name, leaf in paths.named_leaves(abstract_state)
        if not paths.is_placeholder(leaf)  # of an optimizer in parts
    }
    taken = {}
    for name, leaf in abstract.items():
        candidate = None
        # The "best" weights and the average have another prefix there than the weights that start here.
        if name.startswith("weights/"):
            candidate = source.leaves.get(prefix + name.removeprefix("weights/"))
        elif name.startswith("opt_state/"):
            candidate = moments.get(_moment(name))
        # Without the seeds' axis: `for_seeds` makes that fit.
        if candidate is not None and candidate.shape[1:] == leaf.shape[1:]:
            taken[name] = candidate
    kernels = [name for name in abstract if re.fullmatch("weights/.*/kernel", name)]
    # The classifier's kernel may be missing, if there are others.
    classifier = f"weights/params/{HEAD}/kernel"
    missing = [
        name for name in kernels if name not in taken and (name != classifier or len(kernels) == 1)
    ]
    if missing:
        raise UsageError(
            f"{source.label} is of another network: nothing there fits "
            f"{missing[0].removeprefix('weights/')}{nearest(missing[0], source.leaves)}"
        )
    seeds = abstract["seed"].shape[0]
    return {
        name: for_seeds(leaf, seeds, source.label)
        for name, leaf in {**taken, **normalisers}.items()
    }


def for_seeds(leaf: np.ndarray, seeds: int, label: str) -> np.ndarray:
    """Return the first ``seeds`` rows of a leaf, or its only one repeated.

    Raises:
      UsageError: there are fewer; ``label`` is what the message calls their run.
    """
    if leaf.shape[0] == 1:
        return np.repeat(leaf, seeds, axis=0)
    if leaf.shape[0] < seeds:
        raise UsageError(
            f"train.seeds = {seeds} is more than the {leaf.shape[0]} of {label}; train as many, or one"
        )
    return leaf[:seeds]


def inserted(init_from: Mapping[str, Any]) -> PyTree:
    """Return the normalisers among arrays by name, as the collection a network takes.

    >>> inserted({"weights/params/fc/bias": 0, "weights/normalisers/dense1/mean": 2.0})
    {'dense1': {'mean': 2.0}}
    """
    names = [name for name in init_from if name.startswith(NORMALISERS)]
    return traverse_util.unflatten_dict(
        {name.removeprefix(NORMALISERS): init_from[name] for name in names}, sep="/"
    )


def merge(tree: PyTree, init_from: Mapping[str, Any], prefix: str) -> PyTree:
    """Return ``tree`` with the leaves that ``init_from`` has under ``prefix`` and their name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: init_from.get(prefix + paths.name(path), leaf), tree
    )


def _moment(name: str) -> str:
    """Return which moment of which parameter a leaf is, wherever in the optimizer's state; or "".

    >>> _moment("opt_state/0/1/inner/trace/fc/kernel")
    'trace/fc/kernel'
    """
    # optax's names: `trace` is the momentum of SGD, `mu` and `nu` are the moments of Adam and RAdam.
    match = re.search(r"/((?:trace|mu|nu)/.+)", name)
    return match[1] if match else ""
