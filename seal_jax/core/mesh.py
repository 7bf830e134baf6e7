"""The device mesh of a run: a ``seed`` axis without communication and a ``data`` axis with it."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from seal_jax.core import vary
from seal_jax.core.settings import Settings
from seal_jax.core.state import State
from seal_jax.errors import UsageError

SEED, DATA = "seed", "data"

# Every leaf of a training state has the seeds as its first axis.
BY_SEED = PartitionSpec(SEED)
REPLICATED = PartitionSpec()
# Channels from which on seeds run one after the other on a TPU: the width of its multipliers (v4 to v5p).
WIDE = 128
# Arrays over batches, [batches, batch, ...].
BATCHES = PartitionSpec(None, DATA)

# Arrays with fewer numbers are stored whole on every device: their slices would save less than a collective costs.
_SMALLEST = 1024


def layout(settings: Settings, devices: int) -> tuple[int, int]:
    """Return how many devices there are along the seed and along the data axis.

    Seeds are distributed first, since they need no communication; what is left divides the batch.

    Raises:
      UsageError: the numbers asked for do not fit the devices, the seeds or the batch.
    """
    seeds, batch = vary.trainings(settings), settings.train.batch_size
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
    sharded = along_data > 1 and settings.run.parameter_sharding != "none"
    if sharded and jax.__version_info__ < (0, 10):
        # Older ones cannot lower a constraint within a shard_map over some of the axes.
        raise UsageError(
            f"run.parameter_sharding = {settings.run.parameter_sharding!r} needs jax 0.10 or newer, and this is "
            f'{jax.__version__}: upgrade it, or use "none"'
        )
    return along_seed, along_data


def make(settings: Settings, devices: list[Any]) -> Mesh:
    """Return the mesh over ``devices``: see :func:`layout` and :func:`over`."""
    return over(devices, *layout(settings, len(devices)))


def over(devices: list[Any], along_seed: int, along_data: int) -> Mesh:
    """Return the mesh over ``devices``, in an order in which neighbours along an axis are near one another.

    Several TPU slices are joined by the data centre's network alone. Seeds, which never communicate, are distributed
    over them first; gradients cross it only where there are more slices than the seeds can be divided over.

    Raises:
      UsageError: slices of different sizes.
    """
    sizes = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    slices = len(sizes)
    if len(set(sizes.values())) > 1:
        raise UsageError(
            f"the {len(devices)} devices are {', '.join(map(str, sizes.values()))} of {slices} slices; use as many "
            "of each"
        )
    seed_slices = math.gcd(along_seed, slices)
    data_slices = slices // seed_slices
    # Or 8 seeds on a v5p 4x4x4 are refused: eight devices are no whole axes of its torus.
    split = {"allow_split_physical_axes": True}
    if slices == 1:
        ordered = mesh_utils.create_device_mesh((along_seed, along_data), devices, **split)
    else:
        inner = (along_seed // seed_slices, along_data // data_slices)
        ordered = mesh_utils.create_hybrid_device_mesh(
            inner, (seed_slices, data_slices), devices, **split
        )
    # Auto, not Explicit, under which shardings are part of an array's type.
    return Mesh(ordered, (SEED, DATA), axis_types=(AxisType.Auto,) * 2)


def place_part(
    mesh: Mesh, shape: tuple[int, ...], spec: PartitionSpec, part: np.ndarray
) -> jax.Array:
    """Put on the mesh what :func:`local_part` of a global array this process has in host memory."""
    sharding, offsets = NamedSharding(mesh, spec), local_part(mesh, shape, spec)

    def shard(index: Any) -> np.ndarray:
        return part[
            tuple(
                slice(*(bound - offset.start for bound in axis.indices(size)[:2]))
                for axis, offset, size in zip(index, offsets, shape, strict=True)
            )
        ]

    return jax.make_array_from_callback(shape, sharding, shard)


def local_part(mesh: Mesh, shape: tuple[int, ...], spec: PartitionSpec) -> tuple[slice, ...]:
    """Return the smallest block of a global array that holds all shards of this process's devices."""
    indices: Any = NamedSharding(mesh, spec).addressable_devices_indices_map(shape).values()
    bounds = [
        [axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True)]
        for index in indices
    ]
    return tuple(
        slice(min(start for start, _ in axis), max(stop for _, stop in axis))
        for axis in zip(*bounds, strict=True)
    )


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


def sliced(shape: tuple[int, ...], parts: int) -> PartitionSpec:
    """Return how an array is divided over ``parts`` devices along the data axis: by its largest axis that they divide.

    Small arrays and those without such an axis stay whole.

    >>> [tuple(sliced(shape, 8)) for shape in ((3, 3, 64, 128), (10,))]
    [(None, None, None, 'data'), ()]
    """
    axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or math.prod(shape) < _SMALLEST or not axes:
        return REPLICATED
    return PartitionSpec(*[None] * max(axes, key=shape.__getitem__), DATA)


def state_specs(state: State, sharding: str, parts: int) -> State:
    """Return how every leaf of one training's ``state`` is divided along the data axis: see ``run.parameter_sharding``.

    Args:
      state: arrays or their shapes, without an axis of seeds.
      sharding: "none", "optimizer" or "all".
      parts: devices along the data axis.
    """
    specs = jax.tree.map(lambda leaf: sliced(leaf.shape, 1 if sharding == "none" else parts), state)
    whole = jax.tree.map(lambda leaf: REPLICATED, state.weights)
    return specs._replace(
        weights=whole._replace(params=specs.weights.params) if sharding == "all" else whole
    )


def sum_over_data(tree: Any, specs: Any) -> Any:
    """Return the sum of a tree over the data axis; of a leaf that its spec divides, this device's slice of the sum."""
    leaves: list[Any]
    structure: Any
    leaves, structure = jax.tree.flatten(tree)
    pairs = list(zip(leaves, structure.flatten_up_to(specs), strict=True))
    # All in one psum, so that XLA can make one all-reduce of it.
    sums = iter(jax.lax.psum([leaf for leaf, spec in pairs if DATA not in spec], DATA))
    return structure.unflatten(
        jax.lax.psum_scatter(leaf, DATA, scatter_dimension=tuple(spec).index(DATA), tiled=True)
        if DATA in spec
        else next(sums)
        for leaf, spec in pairs
    )


def over_seeds(function: Callable, batching: str, by_seed: Sequence[bool]) -> Callable:
    """Map a function of one seed over all seeds of a device.

    Of the arguments ``by_seed``, of which the first is one, every leaf has the seeds as its first axis;
    the others are shared. A single seed keeps its program as it is; several run as one batched program
    ("vmap") or one after the other ("map").
    """

    def mapped(*arguments: Any) -> Any:
        # Of one device: inside shard_map the leading axis has its own seeds only.
        count = jax.tree.leaves(arguments[0])[0].shape[0]
        if count > 1 and batching == "vmap":
            axes = tuple(0 if with_seeds else None for with_seeds in by_seed)
            return jax.vmap(function, in_axes=axes[: len(arguments)])(*arguments)

        def one_seed(seeded: list[Any]) -> Any:
            remaining = iter(seeded)
            return function(
                *(
                    next(remaining) if with_seeds else argument
                    for argument, with_seeds in zip(arguments, by_seed, strict=False)
                )
            )

        # The last arguments may be left out, hence zip without strict.
        seeded = [
            argument for argument, with_seeds in zip(arguments, by_seed, strict=False) if with_seeds
        ]
        if count > 1:
            return jax.lax.map(one_seed, seeded)
        one = one_seed(jax.tree.map(lambda leaf: leaf[0], seeded))
        return jax.tree.map(lambda leaf: leaf[None], one)

    return mapped


def varying(tree: Any, axes: str | tuple[str, ...]) -> Any:
    """Mark a tree that is the same along ``axes`` of a ``shard_map`` as one that may vary along them."""
    lax: Any = jax.lax
    # jax 0.7.2 has pvary alone, and 0.10 pcast alone.
    return lax.pcast(tree, axes, to="varying") if hasattr(lax, "pcast") else lax.pvary(tree, axes)


def platform(mesh: Mesh) -> str:
    """Return what the mesh's devices are: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def varying_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Mark arrays in a ``shard_map`` as varying along all axes along which any of them varies."""
    types: list[Any] = [jax.typeof(array) for array in arrays]
    # jax 0.7 has vma alone, and 0.10 manual_axis_type alone.
    axes = [of.vma if hasattr(of, "vma") else of.manual_axis_type.varying for of in types]
    missing = [tuple(sorted(frozenset().union(*axes) - own)) for own in axes]
    return tuple(
        varying(array, more) if more else array for array, more in zip(arrays, missing, strict=True)
    )


def on_cpu(mesh: Mesh) -> bool:
    """Return whether the mesh has CPU devices."""
    return platform(mesh) == "cpu"


def batching(settings: Settings, platform: str, channels: int) -> str:
    """Return how the seeds of one device run: see ``run.seed_batching``.

    ``channels`` are the outputs of the network's widest convolution, 0 without any.

    Raises:
      UsageError: "vmap" with a jax that cannot.

    >>> [batching(Settings(), "tpu", channels) for channels in (0, 512)]
    ['vmap', 'map']
    """
    asked = settings.run.seed_batching
    # Until 0.8 jax cannot map the derivative of its own convolutions within a shard_map.
    if jax.__version_info__ < (0, 8) and platform != "cpu" and channels:
        if asked == "vmap":
            raise UsageError(
                f'run.seed_batching = "vmap" needs jax 0.8 for convolutions, and this is {jax.__version__}: upgrade '
                'it, or use "map"'
            )
        return "map"
    if asked != "auto":
        return asked
    # Side by side small networks fill an accelerator; a CPU is full with one.
    if platform == "cpu":
        return "map"
    # Under vmap a convolution becomes one with a group for each seed, which costs a TPU more than it saves where one
    # seed's channels fill the multipliers: docs/performance.md has the figures. On GPUs it was not measured.
    return "map" if platform == "tpu" and channels >= WIDE else "vmap"


def compiler_options(settings: Settings, mesh: Mesh) -> dict[str, bool]:
    """Return XLA's options for the programs of a run: see ``run.deterministic``."""
    if not settings.run.deterministic or platform(mesh) in ("cpu", "tpu"):
        return {}
    # It leaves out operations that add in any order, and the choice of an algorithm by its time, which may be another
    # in the process that resumes. As an option of the programs it needs no XLA_FLAGS before JAX starts.
    return {"xla_gpu_deterministic_ops": True}
