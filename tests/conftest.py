"""Eight CPU devices for every test, programs compiled in a hurry, and one cache of them for all processes."""

import ctypes
import os
import sys
import tempfile
from pathlib import Path

# Subprocesses of the tests are set up by the same environment.
SETTINGS = {
    # Compiling takes most of the time of tests; what is computed is the same up to rounding.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    # Lowering writes the Python stack of every operation into the program otherwise.
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
    # Two workers share the cores; with a thread for every core each, NumPy and PyTorch wait for one another.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "seal_jax-tests-xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)

import jax  # noqa: E402 - it reads the environment
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

# Of a worker's resident memory, in kB, and of its memory maps, of which Linux allows some 65,000:
# every compiled program takes several, and beyond that XLA aborts the process.
MOST_MEMORY, MOST_MAPS = 1_500_000, 20_000


def pytest_configure(config):
    """Compile small programs in two thirds of the time, where XLA still has its older emitters.

    Slow tests keep XLA's own emitters: some of them compare two programs bit for bit.
    """
    if config.option.markexpr == "not slow" and jax.__version_info__ < (0, 11):
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")


@pytest.fixture(scope="session")
def rounding():
    """By how much, relatively, two programs may round apart: not at all, unless older emitters made them."""
    return 1e-5 if "fusion_emitters=false" in os.environ.get("XLA_FLAGS", "") else 0.0


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder that the processes of a test session share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def digits_dir(shared_folder):
    """Where digits is prepared, by the first test that needs it, for all."""
    folder = shared_folder / "digits"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _few_programs_at_a_time():
    """Forget compiled programs between modules before a worker runs out of room for them."""
    yield
    status, maps = Path("/proc/self/status"), Path("/proc/self/maps")
    if not maps.exists():
        return
    resident = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    if int(resident.split()[1]) > MOST_MEMORY or maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        # glibc keeps what was freed; then every later module would begin beyond the bound and without programs.
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
