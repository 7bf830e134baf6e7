import jax.numpy as jnp
import numpy as np
import pytest
from hessian_oracles import dense_hessian


@pytest.fixture(scope="session")
def problem():
    """Parameters of a small network, and three batches."""
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    params = {"one": {"kernel": normal(6, 8), "bias": normal(8)}, "two": {"kernel": normal(8, 4)}}
    data = (normal(3, 16, 6), jnp.asarray(random.integers(0, 4, (3, 16)), jnp.int32))
    return params, data


@pytest.fixture(scope="session")
def dense_batches(problem):
    """The Hessian of each batch."""
    return dense_hessian(*problem)


@pytest.fixture(scope="session")
def dense(dense_batches):
    """The Hessian of the mean over batches."""
    return dense_batches.mean(0)
