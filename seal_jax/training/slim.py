"""Export of the slim network that KELS trains inside the whole one."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from seal_jax import paths, slimming
from seal_jax.core import files, vary
from seal_jax.core import mesh as meshes
from seal_jax.core import settings as settings_lib
from seal_jax.core.state import Weights
from seal_jax.errors import UsageError
from seal_jax.methods import kels
from seal_jax.training import experiment as experiments
from seal_jax.training import workdir as workdirs
from seal_jax.training.batches import place
from seal_jax.training.pretrained import merge, read_run


def export(run: Path, output: Path) -> str:
    """Write the slim network of a KELS run as ``slim.npz`` and ``slim.json``; return its scores.

    ``slim.npz`` holds an array ``[seeds, ...]`` for each parameter and BatchNorm statistic, by name,
    and no pickles. Both networks are scored on the test split.

    Raises:
      UsageError: the folder is not that of a KELS run, or has no checkpoint; or cannot be written.
    """
    source = read_run(run, str(run))
    settings, leaves = source.settings, source.leaves
    if settings.method["name"] != "kels":
        raise UsageError(
            f"{run} was trained by {settings.method['name']!r}; only KELS has a slim network"
        )
    # The devices of the run do not matter here.
    settings = dataclasses.replace(settings, run=settings_lib.Run())
    keep = settings.method.get("keep", kels.Options.keep)
    dataset = experiments.load_data(vary.draw(settings.data, settings.train.seed), run)
    mesh = meshes.make(settings, jax.devices()[:1])
    experiment = experiments.build(settings, experiments.data_shape(dataset), mesh)
    abstract = experiment.abstract_state().weights
    for name, leaf in paths.named_leaves(abstract):
        shape = np.shape(leaves.get(f"weights/{name}", ()))
        if shape != leaf.shape:
            raise UsageError(
                f"the checkpoint in {run} is of another network than {workdirs.CONFIG} says: {name} is "
                f"{list(shape)} there and {list(leaf.shape)} here; give the run's own folder"
            )
    whole = merge(abstract, leaves, "weights/")
    model = experiment.model.slim(keep)
    cut = _slim(experiment.model, model, whole)
    test = place(mesh, dataset.test)
    # A new object compiles its own steps. Its batches keep the whole model, of which scoring uses the dtype only.
    slim_experiment = dataclasses.replace(
        experiment, context=dataclasses.replace(experiment.context, model=model)
    )
    scores = {}
    for name, scored_by, weights in (("whole", experiment, whole), ("slim", slim_experiment, cut)):
        sums = jax.device_get(scored_by.score(weights, test))
        scores[name] = {
            # Of one seed.
            "parameters": sum(leaf[0].size for leaf in jax.tree.leaves(weights.params)),
            "test_accuracy": (sums.correct / sums.weight).tolist(),
        }
    record = {"run": str(run), "keep": keep, "model": settings.model.name, **scores}
    _write(output, cut, record)
    lines = [
        f"{name:5}  {score['parameters']:>12,} parameters  test accuracy "
        + "  ".join(f"{100 * value:.2f} %" for value in score["test_accuracy"])
        for name, score in scores.items()
    ]
    # BatchNorm's statistics are by channel; those of the others are over several, zeros included.
    norm = getattr(experiment.model.module, "norm", None)
    if norm in ("layer", "group"):
        lines.append(
            f"model.norm={norm}: the slim network normalises over its own channels, which the whole one "
            "with zeros elsewhere would not"
        )
    return "\n".join([*lines, f"weights: {output / 'slim.npz'}"])


def _slim(dense: Any, model: Any, weights: Weights) -> Weights:
    """Cut the slim network's weights out of the whole one's, for each seed."""
    narrow = jax.eval_shape(model.init, jax.random.key(0))
    wide = {"params": weights.params, "batch_stats": weights.batch_stats}
    # Paths as in `wide`, whose parameters are one level further down.
    # A norm after a concatenation has statistics, too.
    flattened = {
        f"{collection}/{layer}": parts
        for collection, tree in wide.items()
        for layer, parts in {**dense.flattened, **dense.concatenated}.items()
        if any(paths.below(path, layer) for path, _ in paths.named_leaves(tree))
    }
    cut = jax.vmap(lambda tree: slimming.slim(tree, narrow, flattened))(wide)
    return Weights(cut["params"], cut["batch_stats"], {})


def _write(output: Path, weights: Weights, record: dict[str, Any]) -> None:
    arrays: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in paths.named_leaves(weights)}
    archive = io.BytesIO()
    np.savez(archive, **arrays)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}") from None
    files.write(output / "slim.npz", archive.getvalue())
    files.write(output / "slim.json", json.dumps(record, indent=2) + "\n")
