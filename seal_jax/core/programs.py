"""Room for compiled programs in a process that goes through many runs."""

from __future__ import annotations

from pathlib import Path

import jax

_MAPS, _MOST_MAPS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


def make_room() -> None:
    """Forget the compiled programs of this process where they fill half of the memory maps that Linux allows it.

    On a CPU each takes some, which JAX keeps, and beyond the limit (65,530 by default) the compiler ends the process.
    What is needed again is read from the cache on disk. Nothing is done where the numbers cannot be read.
    """
    try:
        used, most = _MAPS.read_bytes().count(b"\n"), int(_MOST_MAPS.read_text())
    except OSError:
        return
    if used > most / 2:
        jax.clear_caches()
