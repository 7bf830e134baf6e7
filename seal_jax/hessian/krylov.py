"""Lanczos iterations of symmetric operators with full reorthogonalisation, and where a basis is stored.

An operator is a pytree that can be called with a vector and has ``like``, one of its vectors. If it has
a true attribute ``eager`` it is not a pytree and is called from Python, as ``Streamed`` is. If it acts on a
part of its vectors alone, it has the attributes ``selected`` and ``size``, as ``Operator`` does.
"""

from collections import deque
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from seal_jax.errors import UsageError, check_integer, check_number
from seal_jax.hessian import trees

PyTree = Any
LinearOperator = Any
Basis = Literal["device", "bfloat16", "host"]
# Vectors that the steps themselves need: the newest, its product, what is left of it, and partial
# results, more than one compiler wants; and with a basis on the host those in transfer.
_WORKING = 7
_IN_TRANSFER = 2
NOT_FINITE = (
    "products with the Hessian hold NaN or infinity: "
    "the parameters, the data or the loss are broken, or overflow"
)


def check_wanted(k: int, size: int, tolerance: float) -> None:
    """Raise unless an operator with ``size`` rows has k eigenvalues and the tolerance is positive."""
    check_integer("k", k, 1, size)
    check_number("tolerance", tolerance, lambda value: value > 0, "be positive")


def selected(op: LinearOperator) -> PyTree:
    """Return the part that an operator acts on, 0 or 1 for each leaf; ``None`` for everything."""
    return getattr(op, "selected", None)


def rows(op: LinearOperator) -> int:
    """Return the number of rows of the operator's matrix: the entries that it acts on."""
    return getattr(op, "size", trees.size(op.like))


def product(op: LinearOperator, vector: PyTree) -> PyTree:
    """Return the product of any operator with a vector, from Python.

    Iterations are loops in Python: the product is compiled once for all of them, and compiling it takes
    longer than all the dispatches. One product runs at a time: on CPU, programs in flight whose devices
    wait for each other's part of a sum can take all threads, and XLA ends the process.
    """
    image = op(vector) if getattr(op, "eager", False) else applied(op, vector)
    return jax.block_until_ready(image)


def orthogonalise(basis: PyTree, vector: PyTree) -> tuple[PyTree, jax.Array]:
    """Return the vector without its part in the basis, and that part's coefficients, ``[count]``."""

    def project(_: Any, carry: tuple[PyTree, jax.Array]) -> tuple[PyTree, jax.Array]:
        vector, coefficients = carry
        part = trees.coefficients(basis, vector)
        return trees.add(vector, trees.combine(basis, part, vector), -1.0), coefficients + part

    # Twice is enough for full precision. A loop, so that it is compiled once.
    count = len(jax.tree.leaves(basis)[0])
    return jax.lax.fori_loop(0, 2, project, (vector, jnp.zeros(count)))


def remainder(length: Any, part: Any, least: Any = 0.0, packed: bool = False) -> Any:
    """Return the norm of a vector without its ``part`` in a basis, 0 if that is rounding.

    For a product that is a breakdown: the basis spans an invariant subspace. ``length`` is the norm as
    computed, ``part`` the coefficients; below ``least`` the remainder counts as nothing.
    """
    scale = jnp.maximum(jnp.max(jnp.abs(part)), jnp.finfo(jnp.float32).tiny)
    # What rounding to bfloat16 leaves is in the span: normalized, it would make the basis dependent.
    # 2^-8 is the rounding of bfloat16's 8 bits.
    bound = (2.0**-8 if packed else 4 * jnp.finfo(jnp.float32).eps) * scale
    return jnp.where(length <= jnp.maximum(bound, least), 0.0, length)


def append(
    basis: PyTree, index: Any, vector: PyTree, least: Any = 0.0
) -> tuple[PyTree, jax.Array, jax.Array]:
    """Put the part of a vector outside a basis into row ``index``, normalized.

    Returns:
      The basis, the vector's part in it, and the norm of the rest, 0 if that is rounding.
    """
    rest, part = orthogonalise(basis, vector)
    length = remainder(trees.norm(rest), part, least, trees.is_packed(basis))
    return trees.put(basis, index, trees.unit(rest, length)), part, length


def restart_direction(op: LinearOperator, index: Any) -> tuple[PyTree, Any]:
    """Return any direction to continue with after a breakdown, and the ``least`` of its remainder.

    If less is left of it, the basis spans everything that the operator acts on.
    """
    vector = trees.restrict(selected(op), trees.pseudo_random(index, op.like))
    return vector, 1e-3 * trees.norm(vector)


def random_unit(like: PyTree, key: jax.Array, selected: PyTree = None) -> PyTree:
    """Return a random unit vector, zero outside the selected leaves; traced."""
    vector = trees.restrict(selected, trees.random(key, like))
    return trees.unit(vector, trees.norm(vector))


def first_basis(
    like: PyTree, key: jax.Array, size: int, packed: bool = False, selected: PyTree = None
) -> PyTree:
    """Return a basis with room for ``size`` + 1 vectors, the first one random; traced."""
    basis = trees.empty_basis(like, size + 1, packed=packed)
    return trees.put(basis, 0, random_unit(like, key, selected))


def lanczos(op: LinearOperator, key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Take ``size`` Lanczos steps from a random vector, within a program.

    Returns:
      The operator projected on the basis, ``[size, size]``, and the norm of the last remainder.
    """

    def step(index: Any, carry: tuple[PyTree, jax.Array, jax.Array]) -> Any:
        basis, projected, _ = carry
        image = op(trees.take(basis, index, op.like))
        direction, least = restart_direction(op, index)

        def attempt(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            number, basis, part, length = carry
            first = number == 0
            vector = jax.tree.map(lambda a, b: jnp.where(first, a, b), image, direction)
            basis, *result = append(basis, index + 1, vector, jnp.where(first, 0.0, least))
            part, length = (
                jnp.where(first, new, old) for new, old in zip(result, (part, length), strict=True)
            )
            return number + 1, basis, part, length

        # The product, and after a breakdown another direction: a loop, so that `append` is compiled once.
        _, basis, part, length = jax.lax.while_loop(
            lambda carry: (carry[0] == 0) | ((carry[0] == 1) & (carry[3] == 0)),
            attempt,
            (0, basis, jnp.zeros(size + 1), jnp.zeros(())),
        )
        # Symmetry gives the column too, but only roughly except for its newest entry; this is the measured one.
        column = part[:size]
        return basis, projected.at[:, index].set(column).at[index, :].set(column), length

    basis = first_basis(op.like, key, size, False, selected(op))
    carry = (basis, jnp.zeros((size, size)), jnp.zeros(()))
    return jax.lax.fori_loop(0, size, step, carry)[1:]


class Iteration:
    """A Lanczos iteration that grows, is cut down to Ritz vectors, and grows again.

    It begins with a random vector. The projection is on the host, in float64; the basis of m = ``size``
    vectors is in device memory, sharded like the parameters, and in bfloat16 if it is ``packed``.
    """

    def __init__(self, op: LinearOperator, key: jax.Array, size: int, packed: bool = False):
        self.op, self.size = op, size
        self.projected, self.residual = np.zeros((size, size)), 0.0
        self.basis = self._first(key, packed)

    def extend(self, start: int, stop: int) -> tuple[np.ndarray, float]:
        """Take Lanczos steps; return the projection and the norm of the last remainder."""
        for index in range(start, stop):
            image = product(self.op, self._vector(index))
            part, self.residual = self._append(index + 1, image)
            if not (np.isfinite(part).all() and np.isfinite(self.residual)):
                raise UsageError(NOT_FINITE)
            # Symmetry gives the column too, but only roughly except for its newest entry: the measured one
            # keeps the projection exact after restarts, where it is not tridiagonal.
            self.projected[:, index] = self.projected[index, :] = part[: self.size]
            if self.residual == 0:
                self._append(index + 1, *restart_direction(self.op, index))
        return self.projected, self.residual

    def restart(self, rotation: np.ndarray, values: np.ndarray) -> None:
        """Keep the Ritz vectors ``rotation [m, p]`` of those ``values``, and the basis' last vector."""
        self._rotate(rotation)
        # Diagonal in the Ritz vectors; their couplings with the last vector come back with its product, in `extend`.
        self.projected = np.diag(np.pad(values, (0, self.size - len(values))))

    def vectors(self, rotation: np.ndarray) -> PyTree:
        """Return the combinations ``rotation [m, k]`` of the basis, each leaf ``[k, ...]``."""
        padded = np.pad(rotation, ((0, 1), (0, 0))).astype(np.float32)
        return _combine(self.basis, padded, self.op.like)

    def _first(self, key: jax.Array, packed: bool) -> PyTree:
        shardings = jax.tree.map(_with_leading_axis, self.op.like)
        first = jax.jit(first_basis, static_argnums=(2, 3), out_shardings=shardings)
        return first(self.op.like, key, self.size, packed, selected(self.op))

    def _vector(self, index: int) -> PyTree:
        return take(self.basis, index, self.op.like)

    def _append(self, index: int, vector: PyTree, least: float = 0.0) -> tuple[np.ndarray, float]:
        self.basis, part, length = _append(self.basis, index, vector, least)
        return np.asarray(part, np.float64), float(length)

    def _rotate(self, rotation: np.ndarray) -> None:
        count = rotation.shape[1]
        # The new basis: the Ritz vectors, then the last vector as it is.
        square = np.zeros((self.size + 1, self.size + 1), np.float32)
        square[:-1, :count], square[-1, count] = rotation, 1
        leaves, structure = jax.tree.flatten(self.basis)
        # The only references are now in ``leaves``: an old leaf is freed once its rotation has replaced it.
        self.basis = None
        # Leaf by leaf, so that no second basis is needed.
        for index, leaf in enumerate(jax.tree.leaves(self.op.like)):
            leaves[index] = _rotate(leaves[index], square, leaf)
        self.basis = jax.tree.unflatten(structure, leaves)


class OnHost(Iteration):
    """An iteration whose basis is a list of vectors in pinned host memory.

    They pass through the device one by one, each with the sharding of the parameters: a device
    exchanges its own part with its host. Orthogonalisation is modified Gram-Schmidt, twice, so each
    step reads the basis twice.
    """

    def _first(self, key: jax.Array, packed: bool) -> PyTree:
        self._device = jax.tree.map(lambda leaf: leaf.sharding, self.op.like)
        self._host = jax.tree.map(_pinned, self.op.like)
        return [self._store(_random_unit(self.op.like, key, selected(self.op)))]

    def vectors(self, rotation: np.ndarray) -> PyTree:
        """Return the combinations ``rotation [m, k]`` of the basis, each leaf ``[k, ...]``."""
        combined = [self._combined(column) for column in rotation.T]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *combined)

    def _vector(self, index: int) -> PyTree:
        return self._load(self.basis[index])

    def _append(self, index: int, vector: PyTree, least: float = 0.0) -> tuple[np.ndarray, float]:
        coefficients = np.zeros(self.size + 1)
        # After a breakdown the row is already there, as zero, and is written again.
        del self.basis[index:]
        for _ in range(2):
            pending: deque[jax.Array] = deque()
            parts = []
            for stored in self.basis:
                while len(pending) >= _IN_TRANSFER:
                    parts.append(float(pending.popleft()))
                vector, part = _project_out(vector, self._load(stored))
                pending.append(part)
            coefficients[:index] += np.array([*parts, *map(float, pending)])
        length = float(remainder(_norm(vector), coefficients, least))
        self.basis.append(self._store(_unit(vector, length)))
        return coefficients, length

    def _rotate(self, rotation: np.ndarray) -> None:
        ritz_vectors = [self._store(self._combined(column)) for column in rotation.T]
        self.basis = [*ritz_vectors, self.basis[-1]]

    def _combined(self, weights: np.ndarray) -> PyTree:
        total = None
        # Either may be longer: the weights are padded with zeros, and the newest vector of a full basis has none.
        for weight, stored in zip(weights, self.basis, strict=False):
            vector = self._load(stored)
            total = _scale(vector, weight) if total is None else _add(total, vector, weight)
            # Transfers do not wait for earlier ones: without this the whole basis would be loaded at once.
            jax.block_until_ready(total)
        return total

    def _store(self, vector: PyTree) -> PyTree:
        return jax.block_until_ready(jax.device_put(vector, self._host))

    def _load(self, stored: PyTree) -> PyTree:
        return jax.device_put(stored, self._device)


def begin(op: LinearOperator, key: jax.Array, size: int, basis: Basis) -> Iteration:
    """Return an iteration whose basis is one random vector, stored as ``basis`` says."""
    return (
        OnHost(op, key, size) if basis == "host" else Iteration(op, key, size, basis == "bfloat16")
    )


def device_bytes(like: PyTree, size: int, k: int, basis: Basis = "device") -> int:
    """Return the most bytes on the device that k eigenpairs from ``size`` vectors take, without products."""
    vector_bytes = trees.nbytes(like)
    # In the end the vectors are multiplied once more, after restarts or in bfloat16: the
    # device then holds them, their products, and the combinations of both.
    refining = (3 * k + _WORKING) * vector_bytes
    if basis == "host":
        return refining + _IN_TRANSFER * vector_bytes
    leaves = jax.tree.leaves(like)
    widths = [2 if basis == "bfloat16" else leaf.dtype.itemsize for leaf in leaves]
    stacks = [(size + 1) * leaf.size * width for leaf, width in zip(leaves, widths, strict=True)]
    # A restart makes another basis, leaf by leaf.
    rotated = max(stacks) + 2 * max(map(trees.nbytes, leaves))
    return max(sum(stacks) + max(_WORKING * vector_bytes, rotated, k * vector_bytes), refining)


def _with_leading_axis(leaf: jax.Array) -> Any:
    """Return the sharding of a stack of arrays like ``leaf``, ``None`` to leave it to the compiler."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def _pinned(leaf: jax.Array) -> Any:
    """Return the sharding of a leaf in its devices' pinned host memory."""
    kinds = {memory.kind for memory in next(iter(leaf.devices())).addressable_memories()}
    if "pinned_host" not in kinds:
        raise UsageError(
            'basis = "host" needs a device that can pin host memory: use "bfloat16" or a byte_budget'
        )
    return leaf.sharding.with_memory_kind("pinned_host")


@jax.jit
def _project_out(vector: PyTree, unit: PyTree) -> tuple[PyTree, jax.Array]:
    part = trees.dot(unit, vector)
    return trees.add(vector, unit, -part), part


# Programs called from Python.
take = jax.jit(trees.take)
put = jax.jit(trees.put, donate_argnums=0)
applied = jax.jit(lambda op, vector: op(vector))
_append = jax.jit(append, donate_argnums=0)
_rotate = jax.jit(trees.rotate)
_combine = jax.jit(trees.combine)
_norm = jax.jit(trees.norm)
_unit = jax.jit(trees.unit)
_scale = jax.jit(trees.scale)
_add = jax.jit(trees.add)
_random_unit = jax.jit(random_unit)
