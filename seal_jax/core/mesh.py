"""The device mesh of a run: a ``seed`` axis without communication and a ``data`` axis with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from seal_jax.core.settings import Settings
from seal_jax.errors import UsageError

SEED, DATA = "seed", "data"

# Every leaf of a training state has the seeds as its first axis.
BY_SEED = PartitionSpec(SEED)
REPLICATED = PartitionSpec()


def layout(settings: Settings, devices: int) -> tuple[int, int]:
    """Return how many devices there are along the seed and along the data axis.

    Seeds are distributed first, since they need no communication; what is left divides the batch.

    Raises:
      UsageError: the numbers asked for do not fit the devices, the seeds or the batch.
    """
    seeds, batch = settings.train.seeds, settings.train.batch_size
    along_seed, along_data = settings.run.seed_devices, settings.run.data_devices
    if not along_seed:
        # The most devices that the seeds can be divided over evenly.
        # More data devices than there are give 1 here, then the error below.
        along_seed = math.gcd(seeds, devices // (along_data or 1) or 1)
    if not along_data:
        along_data = devices // along_seed or 1
    if along_seed * along_data != devices:
        raise UsageError(
            f"run.seed_devices = {along_seed} times run.data_devices = {along_data} is not the number "
            f"of devices, {devices}"
        )
    if seeds % along_seed:
        raise UsageError(
            f"train.seeds = {seeds} is no multiple of run.seed_devices = {along_seed}; change either"
        )
    if batch % along_data:
        raise UsageError(
            f"train.batch_size = {batch} is no multiple of the {along_data} devices along the data "
            f"axis (run.data_devices); use a multiple, or train {devices} seeds (train.seeds)"
        )
    return along_seed, along_data


def make(settings: Settings, devices: list[Any]) -> Mesh:
    """Return the mesh over ``devices``."""
    shape = layout(settings, len(devices))
    # Auto, not make_mesh's default of Explicit, under which shardings are part of an array's type.
    return jax.make_mesh(shape, (SEED, DATA), axis_types=(AxisType.Auto,) * 2, devices=devices)


def along(axis: str, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of one axis over ``devices``, by default over all of this process."""
    devices = jax.local_devices() if devices is None else list(devices)
    return jax.make_mesh((len(devices),), (axis,), axis_types=(AxisType.Auto,), devices=devices)


def place(mesh: Mesh, value: np.ndarray, spec: PartitionSpec = REPLICATED) -> jax.Array:
    """Put a host array, the same in every process, on the mesh."""
    # The callback is asked only for the shards of this process's devices, so many processes may call this.
    return jax.make_array_from_callback(
        value.shape, NamedSharding(mesh, spec), lambda index: value[index]
    )


def over_seeds(function: Callable, batching: str) -> Callable:
    """Map a function of one seed's state (first argument) over all seeds of a device.

    A single seed keeps its program as it is; several run as one batched program ("vmap") or one
    after the other ("map"). The other arguments are shared.
    """

    def mapped(state: Any, *shared: Any) -> Any:
        # Of one device: inside shard_map the leading axis has its own seeds only.
        count = jax.tree.leaves(state)[0].shape[0]
        if count == 1:
            one = function(jax.tree.map(lambda leaf: leaf[0], state), *shared)
            return jax.tree.map(lambda leaf: leaf[None], one)
        if batching == "vmap":
            return jax.vmap(function, in_axes=(0, *(None for _ in shared)))(state, *shared)
        return jax.lax.map(lambda one_seed: function(one_seed, *shared), state)

    return mapped


def on_cpu(mesh: Mesh) -> bool:
    """Return whether the mesh has CPU devices."""
    return mesh.devices.flat[0].platform == "cpu"


def batching(settings: Settings, mesh: Mesh) -> str:
    """Return how the seeds of one device run: see ``run.seed_batching``."""
    if settings.run.seed_batching != "auto":
        return settings.run.seed_batching
    # Side by side the seeds fill an accelerator; a CPU is full with one.
    return "map" if on_cpu(mesh) else "vmap"
