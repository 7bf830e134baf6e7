"""The command that writes a trained network as a safetensors file, for PyTorch or for a later training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from seal_jax import paths
from seal_jax.core import files
from seal_jax.errors import UsageError
from seal_jax.evaluators.loaded_run import LoadedRun
from seal_jax.models import torch_weights
from seal_jax.training import weight_files


def export(run: Path, output: Path, *, weights: str, seed: int | None, names: str | None) -> str:
    """Write a network of a run's newest checkpoint as safetensors; return a line that says what it is.

    Args:
      run: the run's folder.
      output: the file, which must not exist.
      weights: "last", "best" or "ema".
      seed: of the training; None for the run's first.
      names: whose names the tensors get, "torchvision", "timm" or "seal_jax"; None for the first of them
        that has this network.

    Raises:
      UsageError: no such run, weights or seed, names that the network does not have, or a file that
        exists or cannot be written.
    """
    if output.suffix != ".safetensors":
        raise UsageError(f"--output={output} must be a file, NAME.safetensors")
    if output.exists():
        raise UsageError(f"--output={output} exists; give another file, or remove it")
    loaded_run = LoadedRun(run, weights=(weights,))
    networks = {network.seed: network for network in loaded_run.networks}
    if seed is not None and seed not in networks:
        seeds = ", ".join(map(str, networks))
        raise UsageError(f"--seed={seed} is none of {run}, which has {seeds}")
    network = networks[min(networks) if seed is None else seed]
    library = names or torch_weights.libraries(loaded_run.model)[0]
    variables = {name: np.asarray(v) for name, v in paths.named_leaves(network.variables)}
    tensors = torch_weights.to_torch(loaded_run.model, variables, library)
    settings, augmentation = loaded_run.settings, loaded_run.augmentation
    record: weight_files.Record = {
        "model": dataclasses.asdict(settings.model),
        "names": library,
        "classes": list(loaded_run.dataset.class_names),
        "image_shape": list(loaded_run.dataset.image_shape),
        "mean": list(augmentation.mean),
        "std": list(augmentation.std),
        "data": settings.data.name,
        "weights": weights,
        "seed": network.seed,
        "step": network.step,
    }
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output={output} cannot be written: {error.strerror}") from None
    files.write(output, weight_files.to_bytes(tensors, record))
    return (
        f"{output}: {len(tensors)} tensors by the names of {library}, of {settings.model.name}, seed "
        f"{network.seed}, {weights} weights at step {network.step}"
    )
