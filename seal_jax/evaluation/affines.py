"""Few-shot classification that also trains BatchNorm's scales and biases ("Linear+Affines").

Yazdanpanah et al., `Revisiting Learnable Affines for Batch Norm in Few-Shot Transfer Learning`, 2022,
as the SEAL paper uses it (Tables 4 and 5): in every episode a new linear classifier and the affine
parameters of all BatchNorm layers learn from a few images; everything else is frozen. The episodes
are those of :func:`seal_jax.evaluation.few_shot.linear`, down to the order of the images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seal_jax.errors import UsageError
from seal_jax.evaluation import episodes as episodes_lib
from seal_jax.evaluation import memory
from seal_jax.evaluation.episodes import Scores
from seal_jax.evaluation.resizing import resized
from seal_jax.evaluation.tuning import Protocol, Spec, Statistics, affines_of, sizes, tune

if TYPE_CHECKING:
    from seal_jax.models import Model

__all__ = ["Protocol", "Statistics", "Tuned", "affines_of", "linear_affines"]


class Tuned(NamedTuple):
    """What :func:`linear_affines` found.

    Attributes:
      scores: the accuracies.
      diverged: bool ``[episodes]``, whether a logit of a query is no finite number; it then counts
        as a vote for the first class.
      affines: the trained scales and biases, a part of the tree of parameters, each leaf
        ``[episodes, ...]``; None unless they were asked for.
      batch_stats: the running statistics in the end, the same.
    """

    scores: Scores
    diverged: np.ndarray
    affines: Any
    batch_stats: Any


def linear_affines(
    model: Model,
    variables: Any,
    images: np.ndarray,
    labels: np.ndarray,
    normalise: Callable[[jax.Array], jax.Array],
    protocol: Protocol | None = None,
    *,
    seed: int = 0,
    episodes: int = 600,
    first: int = 0,
    together: int | None = None,
    byte_budget: int | None = None,
    devices: Sequence[Any] | None = None,
    keep: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Tuned:
    """Return the accuracy of classifier and affine parameters in every episode.

    All episodes go through one compiled program, ``together`` of them at a time on each device. Only
    their own images travel there, as bytes. A dropout of the network is off throughout.

    Args:
      model: a network with BatchNorm.
      variables: of it, ``{"params": ..., "batch_stats": ...}``, and "normalisers" where it has some.
      images: uint8 ``[n, height, width, channels]``, on the host.
      labels: integers ``[n]``.
      normalise: traced function of uint8 ``[N, height, width, channels]`` to what the network takes.
      protocol: see :class:`Protocol`.
      seed: of the evaluation.
      episodes: how many.
      first: the number of the first, to go on with an evaluation.
      together: episodes side by side on a device; by default as many as ``byte_budget`` holds.
      byte_budget: bytes of a device for the activations of learning, as estimated; by default a
        third of what it has, or 256 MiB where it does not say (CPU).
      devices: over which the episodes are divided; by default all of this process.
      keep: return the trained parameters.
      progress: called with the number of episodes done.

    Raises:
      UsageError: a model without BatchNorm, images or labels that do not fit, too few of them, or a
        network whose features are no finite numbers to begin with.
    """
    protocol = Protocol() if protocol is None else protocol
    if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
        raise UsageError(
            f"images {images.shape} of {images.dtype} and labels {labels.shape} must be uint8 "
            "[n, height, width, channels] and [n]"
        )
    if not affines_of(variables["params"], variables.get("batch_stats", {})):
        raise UsageError(
            f"model.name = {model.name!r} has no BatchNorm whose scales and biases could train: "
            "evaluate it with the linear classifier alone"
        )
    groups = episodes_lib.check(labels, protocol)
    mesh = episodes_lib.mesh_of(devices)
    height, width, channels = images.shape[1:]
    model = resized(_prepared(model, mesh), (height, width, channels))
    spec = Spec(model, normalise, protocol, mesh, keep)
    size, needed = sizes(spec, variables)
    if together is None:
        budget = memory.budget(mesh.devices.flat[0]) if byte_budget is None else byte_budget
        together = max(1, budget // needed)
    variables = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    rows = images.reshape(len(images), -1)
    found = []
    for start, count, drawn in episodes_lib.chunks(
        groups,
        size,
        protocol,
        mesh,
        seed=seed,
        span=(first, episodes),
        chunk=together * mesh.size,
    ):
        pixels = rows[np.concatenate([drawn.support, drawn.query], axis=1)]
        right, sound, diverged, kept = jax.device_get(tune(variables, pixels, drawn, spec))
        if not np.all(sound):
            raise UsageError("features hold NaN or infinity: the network or its input is broken")
        found.append((right, diverged, kept))
        if progress is not None:
            progress(start + count)
    # The last call was filled up.
    right, diverged, kept = jax.tree.map(lambda *parts: np.concatenate(parts)[:episodes], *found)
    accuracies = right / (protocol.ways * protocol.queries)
    return Tuned(Scores(accuracies), diverged, *(kept or (None, None)))


def _prepared(model: Model, mesh: Mesh) -> Model:
    """Return the model without dropout, for a device on its own; its parameters stay the same."""
    fields: dict[str, Any] = {"dropout": 0.0, "bn_axis_name": None}
    if mesh.devices.flat[0].platform == "cpu":
        # The backward pass runs in a loop; see seal_jax.models.convolution.
        fields["convolution"] = "matmul"
    fields = {name: value for name, value in fields.items() if hasattr(model.module, name)}
    return dataclasses.replace(model, module=model.module.clone(**fields))
