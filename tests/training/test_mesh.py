"""The order of devices in a run's mesh, of TPU slices that are described by what JAX reads of them."""

import dataclasses
import itertools

import numpy as np
import pytest

from seal_jax.core import mesh as meshes
from seal_jax.core.settings import Settings, Train


@dataclasses.dataclass(frozen=True)
class Chip:
    slice_index: int
    coords: tuple[int, ...]
    device_kind: str = "TPU v5p"
    platform: str = "tpu"
    core_on_chip: int = 0


def chips(shape, slices=1):
    places = list(itertools.product(*map(range, shape)))
    return [Chip(index, coords) for index in range(slices) for coords in places]


@pytest.mark.parametrize(
    ("slices", "seeds", "shape", "joined"),
    [
        (2, 1, (1, 16), 2),
        (2, 2, (2, 8), 1),
        (2, 8, (8, 2), 1),
        (4, 2, (2, 16), 2),
        (4, 6, (2, 16), 2),
    ],
)
def test_seeds_are_distributed_over_slices_before_batches(slices, seeds, shape, joined):
    """``joined`` is how many slices a seed's gradients cross."""
    devices = chips((2, 2, 2), slices)
    mesh = meshes.make(Settings(train=Train(seeds=seeds, batch_size=96)), devices)
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(devices)
    assert {len({chip.slice_index for chip in row}) for row in mesh.devices} == {joined}


@pytest.mark.parametrize("seeds", [2, 8, 32])
def test_seeds_that_divide_a_torus_across_its_axes(seeds):
    """The devices of each seed are a box, in which a reduction crosses no other seed's."""
    mesh = meshes.make(Settings(train=Train(seeds=seeds, batch_size=96)), chips((4, 4, 4)))
    assert mesh.devices.shape == (seeds, 64 // seeds)
    for row in mesh.devices:
        places = np.array([chip.coords for chip in row])
        assert np.prod(np.ptp(places, axis=0) + 1) == len(row)
