"""Start a training from the weights of another run, or of a file (``train.pretrained``)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from seal_jax import data, methods, paths
from seal_jax.core import files, vary
from seal_jax.core import settings as settings_lib
from seal_jax.core.settings import Settings
from seal_jax.errors import UsageError, nearest
from seal_jax.models import Model, torch_weights
from seal_jax.models.network import HEAD
from seal_jax.training import weight_files
from seal_jax.training import workdir as workdirs
from seal_jax.training.checkpoints import read_leaves
from seal_jax.training.weight_files import HUB

PyTree = Any
SOURCES = {"last": "weights/", "best": "best/weights/", "ema": "ema/"}
# What a run has to have for weights that not every run has.
NEEDS = {"best": "a validation split", "ema": "an average of the weights (optimizer.ema)"}
NORMALISERS = "weights/normalisers/"
# LW inserts its own normalisers, and the slim network that KELS leaves behind has none.
_WITHOUT_NORMALISERS = ("lw", "kels")


class Source(NamedTuple):
    """A run that a training starts from, or a file, as if it were the checkpoint of one with one seed."""

    settings: Settings  # of its training; with a file, of that which starts
    leaves: Mapping[str, np.ndarray]  # of its state, by name, each with the seeds' axis
    label: str  # what messages call it, such as "train.pretrained = 'run'"
    note: str = ""  # of a file: what to tell about it before the training
    run: Path | None = None  # its folder


def complete(settings: Settings, workdir: Path) -> Settings:
    """Return the settings with the normalisation that a file of weights wants, where it was left open.

    Where the file does not say it is ImageNet's, by which those of torchvision, and most of timm, were
    trained. A run in ``workdir`` keeps what it was started with, whatever has become of the file.

    Raises:
      UsageError: ``train.pretrained`` names a file that cannot be used.
    """
    if settings.data.normalisation or not settings.train.pretrained:
        return settings
    if (workdir / workdirs.CONFIG).is_file():
        started = settings_lib.read(Settings, workdirs.read(workdir))
        # Of another experiment: `workdir.claim` says so.
        if started.train.pretrained != settings.train.pretrained:
            return settings
        name = started.data.normalisation
    else:
        file = _file(settings, workdir)
        name = data.name_of(file.statistics() or data.statistics("imagenet")) if file else ""
    return dataclasses.replace(
        settings, data=dataclasses.replace(settings.data, normalisation=name)
    )


def read(
    settings: Settings, workdir: Path, model: Model | None = None, *, replaces_head: bool = False
) -> Source:
    """Read what ``train.pretrained`` names; a path that begins with ".." is relative to ``workdir``.

    Args:
      settings: of the training that starts.
      workdir: its folder.
      model: its network; None where only a run will do, with its settings and data.
      replaces_head: whether the training starts with a new classifier whatever the settings say.

    Raises:
      UsageError: there is no such run or file, a run has no checkpoint, or a file's weights do not fit.
    """
    file = _file(settings, workdir)
    if file is None:
        path = _path(settings, workdir)
        return read_run(files.as_path(path), f"train.pretrained = {path!r}")
    if model is None:
        raise UsageError(f"{file.label} is a file of weights: this needs a run, which has data too")
    train = settings.train
    if train.pretrained_weights != "last":
        raise UsageError(
            f"train.pretrained_weights = {train.pretrained_weights!r} is for runs, and {file.label} is a "
            'file; use "last"'
        )
    head = train.pretrained_head == "keep" and not replaces_head
    tensors, statistics, record = file.tensors(), file.statistics(), file.record()
    try:
        library, variables = torch_weights.from_torch(model, tensors, label=file.label, head=head)
    except UsageError as error:
        made_of = {k: v for k, v in record.get("model", {}).items() if v is not None}
        of = ", ".join(f"model.{field} = {value!r}" for field, value in made_of.items())
        raise UsageError(f"{error}; it was exported from {of}" if of else str(error)) from None
    expected = data.name_of(statistics) if statistics else "imagenet"
    classifier = "" if head else ", with a new classifier"
    guess = "" if statistics else " (as most are; the file does not say)"
    lines = [
        f"pretrained: {len(tensors)} tensors by the names of {library}{classifier}; trained on images "
        f"normalised by {expected}{guess}"
    ]
    if settings.data.normalisation != expected:
        lines.append(
            f"data.normalisation = {settings.data.normalisation!r} differs from that of the weights"
        )
    leaves = {f"weights/{name}": value[None] for name, value in variables.items()}
    return Source(settings, leaves, file.label, "\n".join(lines))


def _path(settings: Settings, workdir: Path) -> str:
    name = settings.train.pretrained
    # What does not begin with ".." may also be a repository of the hub.
    return str(files.relative_to(workdir, name)) if name.startswith("..") else name


def _file(settings: Settings, workdir: Path) -> weight_files.WeightsFile | None:
    """Return the file of weights that ``train.pretrained`` names, None for a run."""
    path = _path(settings, workdir)
    label = f"train.pretrained = {path!r}"
    try:
        # A run comes first, even if weights were exported into its folder.
        if not path.startswith(HUB) and (files.as_path(path) / workdirs.CHECKPOINTS).is_dir():
            return None
        return weight_files.find(path, label, allow_pickle=settings.train.allow_pickle)
    except OSError as error:
        raise UsageError(f"{label} cannot be read: {error.strerror or error}") from None


def read_run(folder: Path, label: str) -> Source:
    """Read the newest checkpoint of a run, which messages call ``label``.

    Raises:
      UsageError: there is no such run, or it has no checkpoint.
    """
    if not (folder / workdirs.CONFIG).is_file():
        raise UsageError(f"{label} is not the folder of a run")
    settings = settings_lib.read(Settings, workdirs.read_single(folder))
    leaves = read_leaves(folder / workdirs.CHECKPOINTS)
    if leaves is None:
        raise UsageError(f"{label} holds no checkpoint yet")
    return Source(settings, leaves, label, run=folder)


def take(
    settings: Settings, source: Source, abstract_state: PyTree, *, momentum: bool
) -> dict[str, np.ndarray]:
    """Return what a training takes from another run, by the leaf's name in its own state.

    Parameters and BatchNorm statistics are taken where name and shape agree; a classifier for
    another number of classes, or where ``train.pretrained_head`` is "replace", is not. The
    normalisers that LW inserted come with them, as constants. Seed i starts from seed i of that run, or
    all from its only one.

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
        replaces_head = settings.train.pretrained_head == "replace"
        if replaces_head and name.startswith(f"weights/params/{HEAD}/"):
            continue
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
    trainings = abstract["seed"].shape[0]
    points = len(vary.points(settings))
    return {
        # Every point starts from the same.
        name: np.concatenate([for_seeds(leaf, trainings // points, source.label)] * points)
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
