"""Eight CPU devices for every test, and one cache of compiled programs for all processes."""

import os
import tempfile
from pathlib import Path

import jax
import pytest

CACHE = Path(tempfile.gettempdir()) / "seal_jax-tests-xla"

# Subprocesses of the tests share the cache through the environment.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module", autouse=True)
def _few_programs_at_a_time():
    """Forget compiled programs between modules before a worker runs out of room for them.

    Linux allows a process some 65,000 memory maps, and every compiled program has several: beyond
    that XLA aborts the process ("Cannot allocate memory").
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def programs_of_seconds():
    """Compile fast and keep all of it: where much is compiled once, most of the time goes there."""
    quick = {
        "jax_disable_most_optimizations": True,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in quick}
    for name, value in quick.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
