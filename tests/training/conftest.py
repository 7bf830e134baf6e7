import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """Compile without most optimizations: for programs of a few steps that takes most of the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
