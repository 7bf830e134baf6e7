"""The Hessian of any loss on any pytree: products, eigenpairs, spectral density, trace.

Only jax is needed. A vector is a pytree like the parameters; nothing is ever flattened into one
array, so sharded parameters stay sharded, and so does every vector of a Krylov basis.
"""

from seal_jax.hessian.lanczos import Eigenpairs, eigenpairs, power_iteration
from seal_jax.hessian.operator import Operator, Streamed, operator, streamed
from seal_jax.hessian.per_batch import BatchEigenvalues, batch_eigenvalues
from seal_jax.hessian.spectrum import Density, density
from seal_jax.hessian.traces import Trace, trace

__all__ = [
    "BatchEigenvalues",
    "Density",
    "Eigenpairs",
    "Operator",
    "Streamed",
    "Trace",
    "batch_eigenvalues",
    "density",
    "eigenpairs",
    "operator",
    "power_iteration",
    "streamed",
    "trace",
]
