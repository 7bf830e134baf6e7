"""The Hessian of any loss on any pytree: products, eigenpairs, spectral density, trace.

Only jax is needed. A vector is a pytree like the parameters; nothing is ever flattened into one
array, so sharded parameters stay sharded, and so does every vector of a Krylov basis.
"""

from seal_jax.hessian.lanczos import Eigenpairs, eigenpairs
from seal_jax.hessian.operator import Operator, operator
from seal_jax.hessian.power import power_iteration
from seal_jax.hessian.spectrum import Density, Trace, density, trace

__all__ = [
    "Density",
    "Eigenpairs",
    "Operator",
    "Trace",
    "density",
    "eigenpairs",
    "operator",
    "power_iteration",
    "trace",
]
