"""TPU slices by the names that preflight, Cloud TPU and GKE give them."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from seal_jax.errors import UsageError


class _Kind(NamedTuple):
    accelerator: str  # the prefix of Cloud TPU's accelerator type
    units: int  # what a chip counts for in that type
    runtime: str  # Cloud TPU's software version
    gke: str  # the node label
    dimensions: int


_KINDS = {
    "v4": _Kind("v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice", 3),
    "v5e": _Kind("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 2),
    "v5p": _Kind("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice", 3),
    "v6e": _Kind("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice", 2),
}


class Slice(NamedTuple):
    """A TPU slice."""

    chips: int
    hosts: int
    accelerator_type: str  # for Cloud TPU, such as "v5litepod-8"
    runtime: str
    gke_accelerator: str
    shape: str  # GKE's topology, such as "2x4"


def parse(topology: str) -> Slice:
    """Return the slice of a name such as "v5e:2x4", as `python -m tools.preflight` takes it.

    >>> parse("v5e:2x4").accelerator_type, parse("v5p:2x2x2").accelerator_type
    ('v5litepod-8', 'v5p-16')
    >>> parse("v5e:2x4").hosts, parse("v5e:4x4").hosts
    (1, 4)

    Raises:
      UsageError: it is no slice of a TPU that is known here.
    """
    name, _, shape = topology.partition(":")
    kind = _KINDS.get(name)
    if kind is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        raise UsageError(
            f"--topology={topology} must be KIND:SHAPE, the kind one of {', '.join(_KINDS)}; such as "
            "v5e:2x4"
        )
    sizes = [int(size) for size in shape.split("x")]
    if len(sizes) != kind.dimensions:
        raise UsageError(
            f"--topology={topology}: {name} has shapes of {kind.dimensions} dimensions"
        )
    chips = math.prod(sizes)
    # v5e and v6e have machines with 1, 4 or 8 chips, and larger slices are of those with 4; the others always 4.
    on_host = chips if kind.dimensions == 2 and chips <= 8 else min(chips, 4)
    return Slice(
        chips,
        chips // on_host,
        f"{kind.accelerator}-{kind.units * chips}",
        kind.runtime,
        kind.gke,
        shape,
    )
