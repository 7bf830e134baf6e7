"""Where a Krylov basis lies: on the device, there in bfloat16, or in host memory; and its bytes."""

from __future__ import annotations

from collections import deque
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.errors import UsageError
from seal_jax.hessian import krylov, trees
from seal_jax.hessian.krylov import LinearOperator, OnDevice

PyTree = Any
Basis = Literal["device", "bfloat16", "host"]
# Vectors that the steps themselves need: the newest, its product, what is left of it, and partial
# results, more than one compiler wants; and with a basis on the host those on their way.
_WORKING = 7
_ON_THE_WAY = 2


class OnHost:
    """A Krylov basis in pinned host memory; vectors pass through the device one by one.

    Every vector keeps the sharding of the parameters: each device exchanges its own part with its
    host. Orthogonalisation is modified Gram-Schmidt, twice, so each step reads the basis twice.

    Args:
      op: the operator.
      key: of the random first vector.
      size: vectors, m.
    """

    def __init__(self, op: LinearOperator, key: jax.Array, size: int):
        self.op, self.size = op, size
        self.projected, self.residual = np.zeros((size, size)), 0.0
        self._device = jax.tree.map(lambda leaf: leaf.sharding, op.like)
        self._host = jax.tree.map(_pinned, op.like)
        self.basis = [self._stored(jax.jit(krylov.start)(op.like, key, krylov.selected(op)))]

    def extend(self, start: int, stop: int) -> tuple[np.ndarray, float]:
        """Take Lanczos steps; return the projection in float64 and the norm of the residual.

        Raises:
          UsageError: products that are not finite.
        """
        for index in range(start, stop):
            vector = self._loaded(self.basis[index])
            image = krylov.product(self.op, vector)
            del vector
            rest, part = self._orthogonalised(image)
            length = float(_norm(rest))
            if not (np.isfinite(part).all() and np.isfinite(length)):
                raise UsageError(krylov.NOT_FINITE)
            if bool(krylov.exhausted(length, part)):
                length = 0.0
                any_other = krylov.scrambled(index, self._loaded(self.basis[0]))
                rest, _ = self._orthogonalised(any_other)
                if bool(krylov.spans(_norm(rest), _norm(any_other))):
                    rest = jax.tree.map(jnp.zeros_like, rest)
            self.basis.append(self._stored(_unit(rest)))
            column = np.pad(part, (0, self.size - len(part)))
            self.projected[:, index] = self.projected[index, :] = column
            self.residual = length
        return krylov.checked(self.projected, self.residual)

    def restart(self, rotation: np.ndarray, values: np.ndarray) -> None:
        """Keep the Ritz vectors ``rotation [m, p]`` of those ``values``, and the residual vector."""
        kept = [self._stored(self._combined(column)) for column in rotation.T]
        self.basis = [*kept, self.basis[-1]]
        self.projected = np.diag(np.pad(values, (0, self.size - len(values))))

    def vectors(self, rotation: np.ndarray) -> PyTree:
        """Return the combinations ``rotation [m, k]`` of the basis, each leaf ``[k, ...]``."""
        found = [self._combined(column) for column in rotation.T]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *found)

    def _orthogonalised(self, vector: PyTree) -> tuple[PyTree, np.ndarray]:
        found = np.zeros(len(self.basis))
        for _ in range(2):
            pending: deque[jax.Array] = deque()
            parts = []
            for stored in self.basis:
                while len(pending) >= _ON_THE_WAY:
                    parts.append(float(pending.popleft()))
                vector, part = _without(vector, self._loaded(stored))
                pending.append(part)
            found += np.array([*parts, *map(float, pending)])
        return vector, found

    def _combined(self, weights: np.ndarray) -> PyTree:
        total = None
        for weight, stored in zip(weights, self.basis, strict=False):
            part = self._loaded(stored)
            total = _scaled(part, weight) if total is None else _added(total, part, weight)
            # Transfers do not wait by themselves for those before.
            jax.block_until_ready(total)
        return total

    def _stored(self, vector: PyTree) -> PyTree:
        return jax.block_until_ready(jax.device_put(vector, self._host))

    def _loaded(self, stored: PyTree) -> PyTree:
        return jax.device_put(stored, self._device)


def _pinned(leaf: jax.Array) -> Any:
    kinds = {memory.kind for memory in next(iter(leaf.devices())).addressable_memories()}
    if "pinned_host" not in kinds:
        raise UsageError(
            'basis = "host" needs a device that can pin host memory: use "bfloat16" or a byte_budget'
        )
    return leaf.sharding.with_memory_kind("pinned_host")


@jax.jit
def _norm(vector: PyTree) -> jax.Array:
    return trees.norm(vector)


@jax.jit
def _unit(vector: PyTree) -> PyTree:
    length = trees.norm(vector)
    return trees.scale(vector, jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1.0), 0.0))


@jax.jit
def _without(vector: PyTree, unit: PyTree) -> tuple[PyTree, jax.Array]:
    part = trees.dot(unit, vector)
    return trees.add(vector, unit, -part), part


@jax.jit
def _scaled(vector: PyTree, weight: Any) -> PyTree:
    return trees.scale(vector, weight)


@jax.jit
def _added(total: PyTree, vector: PyTree, weight: Any) -> PyTree:
    return trees.add(total, vector, weight)


def begin(op: LinearOperator, key: jax.Array, size: int, basis: Basis) -> OnDevice | OnHost:
    """Return a Krylov basis of one random vector."""
    if basis == "host":
        return OnHost(op, key, size)
    return OnDevice(op, key, size, basis == "bfloat16")


def check_basis(basis: str) -> None:
    """Raise unless there is such a kind of basis."""
    if basis not in get_args(Basis):
        raise UsageError(f"basis = {basis!r} must be one of {', '.join(get_args(Basis))}")


def device_bytes(like: PyTree, size: int, k: int, basis: Basis = "device") -> int:
    """Return the bytes on the device at the most, besides what the products need.

    Args:
      like: a vector.
      size: vectors of the basis, m.
      k: how many are wanted in the end.
      basis: where it lies.
    """
    whole = trees.nbytes(like)
    if basis == "host":
        return (_WORKING + _ON_THE_WAY + k) * whole
    leaves = jax.tree.leaves(like)
    width = {id(leaf): 2 if basis == "bfloat16" else leaf.dtype.itemsize for leaf in leaves}
    rows = [(size + 1) * leaf.size * width[id(leaf)] for leaf in leaves]
    # A restart makes the basis anew, leaf by leaf.
    turned = max(rows) + 2 * max(leaf.nbytes for leaf in leaves)
    # In bfloat16 the vectors found are multiplied once more, for their residuals.
    found = (3 if basis == "bfloat16" else 1) * k * whole
    return sum(rows) + max(_WORKING * whole, turned, found)


def fitting_size(
    like: PyTree, k: int, most: int, byte_budget: int | None, basis: Basis, default: int
) -> int:
    """Return how many vectors a basis has.

    Args:
      like: a vector.
      k: how many eigenpairs are wanted.
      most: upper bound, at least the least that k pairs need.
      byte_budget: for :func:`device_bytes`, ``None`` for no limit.
      basis: where it lies.
      default: without a budget, and on the host.

    Raises:
      UsageError: the budget is too small for k pairs.
    """
    if byte_budget is None:
        return default
    least = min(k + 2, trees.size(like))
    needed = device_bytes(like, least, k, basis)
    if needed > byte_budget:
        mend = {"device": ' or basis = "bfloat16" or "host"', "bfloat16": ' or basis = "host"'}
        raise UsageError(
            f"byte_budget = {byte_budget} must be at least {needed}, for the {least} vectors that "
            f"k = {k} needs: raise it, lower k{mend.get(basis, '')}"
        )
    if basis == "host":
        return default
    fits = [m for m in range(least, most + 1) if device_bytes(like, m, k, basis) <= byte_budget]
    return fits[-1]
