"""Meshes of TPU devices to compile for, on a machine without them."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
from typing import TYPE_CHECKING, Any

from seal_jax.errors import UsageError

if TYPE_CHECKING:
    import jax

EXAMPLES = "v5e:1x1, v5e:2x4, v5e:16x16, v4:2x2x1, v5p:2x2x1, v6e:2x4"
_NAME = re.compile(r"([A-Za-z]\w*):(\d+(?:x\d+){1,2})")
# Cloud TPU's accelerator types: the prefix, and how many of its units one chip counts for.
_ACCELERATORS = {"v4": ("v4", 2), "v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}


def prepare_environment(topology: str) -> None:
    """Set the variables that the TPU compiler needs on a host without a TPU; existing ones stay.

    Call it before JAX starts a backend, which ``jax.devices()``, any array and any compilation do.

    Args:
        topology: kind and shape, such as ``"v5e:2x4"``.

    Raises:
        UsageError: the topology is ill-formed.
    """
    kind, shape = parse(topology)
    prefix, units = _ACCELERATORS.get(kind, (kind, 1))
    defaults = {
        "JAX_PLATFORMS": "cpu",
        # Neither the metadata server nor the other hosts of a pod exist here. The compiler's result does
        # not depend on the next three values; without them it searches and complains on stderr.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{prefix}-{units * math.prod(shape)}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # Otherwise libtpu takes /tmp/libtpu_lockfile and a second process at the same time aborts. That is
        # right for a chip, which has one owner, but not needed for a compiler.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if "jax" in sys.modules:
        import jax

        # JAX reads JAX_PLATFORMS on import, which may have happened already.
        if not getattr(jax.config, "jax_platforms", None):
            jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


def devices_for(topology: str) -> list[jax.Device]:
    """Return the devices of a TPU slice that is only described, for ahead-of-time compilation.

    Args:
        topology: kind and shape, such as ``"v5e:2x4"`` (8 chips on two hosts).

    Raises:
        UsageError: the topology is unknown, or libtpu is not installed.
    """
    kind, shape = parse(topology)
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UsageError(
            f"topology={topology!r} needs the TPU compiler, libtpu, which is not installed; "
            'run: pip install "seal_jax[preflight]"'
        )
    prepare_environment(topology)

    from jax.experimental import topologies

    # By default a host is assumed to hold 2x2 chips, which a slice of one chip does not have.
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(shape) == 1 else {}
    if kind == "v4":
        # The two cores of a chip as one device, as a Cloud TPU has them and the newer kinds always do.
        options["chip_config_name"] = "megacore"
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{'x'.join(map(str, shape))}", **options
        )
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"topology={topology!r} is refused by libtpu ({reason}); examples: {EXAMPLES}"
        ) from error
    return list(described.devices)


def mesh_for(topology: str, *, seed: int, data: int) -> jax.sharding.Mesh:
    """Return a mesh over a TPU slice that is only described, for ``jit(...).lower(...).compile()``.

    The devices are ordered as the trainer orders them.

    Args:
        topology: kind and shape, such as ``"v5e:2x4"`` (8 chips on two hosts).
        seed: length of the axis over independent runs.
        data: length of the axis over the parts of a batch.

    Returns:
        A mesh with the axes ``("seed", "data")``, both of type ``Auto``.

    Raises:
        UsageError: the topology is unknown, ``seed * data`` is not its number of devices, or libtpu is
            not installed.
    """
    # Before libtpu is asked for, so that a misspelled topology is reported as such.
    parse(topology)
    for name, value in (("seed", seed), ("data", data)):
        if value < 1:
            raise UsageError(f"{name}={value} must be at least 1")
    devices = devices_for(topology)

    from seal_jax.core import mesh as meshes

    if seed * data != len(devices):
        raise UsageError(
            f"seed={seed} and data={data} make {seed * data} devices but topology={topology!r} has "
            f"{len(devices)} chip{'s' if len(devices) > 1 else ''}; choose seed * data = {len(devices)}"
        )
    return meshes.over(devices, seed, data)


def parse(topology: str) -> tuple[str, tuple[int, ...]]:
    """Return kind and shape of a topology, such as ``("v5e", (2, 4))`` of ``"v5e:2x4"``.

    Raises:
        UsageError: the topology is ill-formed.
    """
    match = _NAME.fullmatch(topology)
    if match is None:
        raise UsageError(f"topology={topology!r} is not of the form KIND:AxB; examples: {EXAMPLES}")
    return match[1].lower(), tuple(int(size) for size in match[2].split("x"))
