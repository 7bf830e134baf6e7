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


class OnHost(krylov.Iteration):
    """An iteration whose basis is in pinned host memory; vectors pass through the device one by one.

    Every vector keeps the sharding of the parameters: each device exchanges its own part with its
    host. Orthogonalisation is modified Gram-Schmidt, twice, so each step reads the basis twice.

    Args:
      op: the operator.
      key: of the random first vector.
      size: vectors, m.
    """

    def __init__(self, op: LinearOperator, key: jax.Array, size: int):
        super().__init__(op, size)
        self._device = jax.tree.map(lambda leaf: leaf.sharding, op.like)
        self._host = jax.tree.map(_pinned, op.like)
        self.basis = [self._stored(_start(op.like, key, krylov.selected(op)))]

    def vectors(self, rotation: np.ndarray) -> PyTree:
        """Return the combinations ``rotation [m, k]`` of the basis, each leaf ``[k, ...]``."""
        combined = [self._combined(column) for column in rotation.T]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *combined)

    def _vector(self, index: int) -> PyTree:
        return self._loaded(self.basis[index])

    def _append(self, index: int, vector: PyTree, least: float = 0.0) -> tuple[np.ndarray, float]:
        coefficients = np.zeros(self.size + 1)
        del self.basis[index:]
        for _ in range(2):
            pending: deque[jax.Array] = deque()
            parts = []
            for stored in self.basis:
                while len(pending) >= _ON_THE_WAY:
                    parts.append(float(pending.popleft()))
                vector, part = _without(vector, self._loaded(stored))
                pending.append(part)
            coefficients[:index] += np.array([*parts, *map(float, pending)])
        length = float(krylov.remainder(_norm(vector), coefficients, least))
        self.basis.append(self._stored(_unit(vector, length)))
        return coefficients, length

    def _rotate(self, rotation: np.ndarray) -> None:
        kept = [self._stored(self._combined(column)) for column in rotation.T]
        self.basis = [*kept, self.basis[-1]]

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


_norm = jax.jit(trees.norm)
_unit = jax.jit(krylov.unit)
_start = jax.jit(krylov.start)


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
    # In the end the vectors are multiplied once more, after restarts or in bfloat16: beside them
    # there are their products, and then the combinations of both.
    refining = (3 * k + _WORKING) * whole
    if basis == "host":
        return refining + _ON_THE_WAY * whole
    leaves = jax.tree.leaves(like)
    width = {id(leaf): 2 if basis == "bfloat16" else leaf.dtype.itemsize for leaf in leaves}
    rows = [(size + 1) * leaf.size * width[id(leaf)] for leaf in leaves]
    # A restart makes another basis, leaf by leaf.
    rotated = max(rows) + 2 * max(leaf.nbytes for leaf in leaves)
    return max(sum(rows) + max(_WORKING * whole, rotated, k * whole), refining)


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
