"""Products with the Hessian of a loss, over batches of data on the device or streamed from the host."""

import dataclasses
import math
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from seal_jax import masks
from seal_jax.errors import UsageError, check_choice, check_number, nonnegative
from seal_jax.hessian import trees

PyTree = Any
# Chunks on the device at a time: one that is worked on while the next one comes in.
_IN_FLIGHT = 2
Loss = Callable[..., jax.Array]
Mode = Literal["forward_over_reverse", "reverse_over_forward", "gauss_newton"]
Precision = Literal["highest", "high", "default"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operator:
    """The linear map ``v -> H v``: call it with a vector. It is a pytree and passes through ``jit``.

    A vector has the structure of the parameters, with ``None`` for those the mask leaves out.

    Attributes, besides the arguments of :func:`operator`:
      weights: of the batches, float32 ``[batches]``, or ``None`` without data.
      flags: for each parameter whether the mask selects it.
      selected: 0 or 1 for each array of a vector, or ``None``; see :meth:`block`.
    """

    params: PyTree
    data: PyTree
    weights: jax.Array | None
    weight_decay: jax.Array
    loss: Loss = dataclasses.field(metadata={"static": True})
    outer: Loss | None = dataclasses.field(metadata={"static": True})
    flags: tuple[bool, ...] = dataclasses.field(metadata={"static": True})
    mode: Mode = dataclasses.field(metadata={"static": True})
    precision: Precision = dataclasses.field(default="highest", metadata={"static": True})
    selected: PyTree = None

    @property
    def like(self) -> PyTree:
        """A vector of the operator's domain: the selected parameters."""
        leaves, structure = jax.tree.flatten(self.params)
        # None is an empty subtree to JAX: derivatives are taken by the selected leaves alone.
        kept = [leaf if flag else None for leaf, flag in zip(leaves, self.flags, strict=True)]
        return jax.tree.unflatten(structure, kept)

    @property
    def size(self) -> int:
        """Rows of the matrix, those of its block alone."""
        leaves = jax.tree.leaves(self.like)
        flags = [1] * len(leaves) if self.selected is None else jax.tree.leaves(self.selected)
        return sum(leaf.size for leaf, flag in zip(leaves, flags, strict=True) if flag)

    def block(self, mask: masks.Mask | None) -> "Operator":
        """Return the block ``P H P`` of a part of the parameters, zero elsewhere; ``None``: of all.

        The operator's own mask is compiled into the program and shortens the vectors. A block's mask
        is data: one program serves all parts of a network, with vectors of the whole.
        """
        flags = self.flags if mask is None else jax.tree.leaves(masks.resolve(mask, self.params))
        leaves, structure = jax.tree.flatten(self.params)
        selected = [
            jnp.asarray(flag, leaf.dtype) if kept else None
            for flag, leaf, kept in zip(flags, leaves, self.flags, strict=True)
        ]
        return dataclasses.replace(self, selected=jax.tree.unflatten(structure, selected))

    def __call__(self, vector: PyTree) -> PyTree:
        """Return ``H v``, a vector."""
        # On both sides, so that a block is symmetric; the decay is added to it alone.
        vector = trees.restrict(self.selected, vector)
        if self.weights is None:
            product = self._product(vector, ())
        else:
            total = self.weighted_sum(vector, len(self.weights))
            product = trees.scale(total, 1 / jnp.sum(self.weights))
        return trees.add(trees.restrict(self.selected, product), vector, self.weight_decay)

    def weighted_sum(self, vector: PyTree, count: Any) -> PyTree:
        """Return the sum of ``weight * H v`` over the first ``count`` batches, without decay."""
        assert self.weights is not None
        weights = self.weights

        def add(index: Any, total: PyTree) -> PyTree:
            batch = jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], self.data)
            return trees.add(total, self._product(vector, (batch,)), weights[index])

        # A loop over indices, not a scan over the data: a padded chunk ends after ``count`` batches.
        return jax.lax.fori_loop(0, count, add, jax.tree.map(jnp.zeros_like, vector))

    def of_batch(self, batch: PyTree) -> "Operator":
        """Return the Hessian of the loss on one batch, without a leading axis, with the decay."""
        # With its leading axis back, so that one batch takes the same path as many.
        one = jax.tree.map(lambda leaf: leaf[None], batch)
        return dataclasses.replace(self, data=one, weights=jnp.ones(1))

    def _product(self, vector: PyTree, batch: tuple[PyTree, ...]) -> PyTree:
        """Return the product with the Hessian of one batch, without decay."""

        def loss(part: PyTree) -> Any:
            return self.loss(trees.merge(self.params, part), *batch)

        # Read while the loss is traced: it holds for every product in it that names no precision.
        with jax.default_matmul_precision(self.precision):
            if self.mode == "forward_over_reverse":
                return jax.jvp(jax.grad(loss), (self.like,), (vector,))[1]
            if self.mode == "reverse_over_forward":
                return jax.grad(lambda part: jax.jvp(loss, (part,), (vector,))[1])(self.like)
            # J' H_outer J v: pushed forward to the outputs, multiplied there, pulled back.
            outer = self.outer
            assert outer is not None  # operator() has checked it
            outputs, tangent = jax.jvp(loss, (self.like,), (vector,))
            curved = jax.jvp(jax.grad(lambda z: outer(z, *batch)), (outputs,), (tangent,))[1]
            return jax.vjp(loss, self.like)[1](curved)[0]


def operator(
    loss: Loss,
    params: PyTree,
    data: PyTree = None,
    *,
    weights: Any = None,
    mask: masks.Mask | None = None,
    weight_decay: float = 0.0,
    mode: Mode = "forward_over_reverse",
    outer: Loss | None = None,
    precision: Precision = "highest",
) -> Operator:
    r"""Return the Hessian of a mean loss as an operator.

    .. math:: H v = \frac1{\sum_b w_b} \sum_b w_b \nabla^2 L_b(\theta)\, v + \lambda v

    Where not every batch has the same number of examples, pad them to one size; let
    :math:`L_b` be the mean over the real examples of its batch, by weights of 0 and 1 that the batch
    itself holds, and ``weights`` the number of them: then H is that of the mean over all examples.

    Args:
      loss: ``loss(params, batch) -> scalar``, the mean over a batch; ``loss(params)`` where there is
        no ``data``. A function that can be hashed, for the compiler's cache: define it once. For
        "gauss_newton" it returns the network's outputs.
      params: pytree of arrays, sharded or not.
      data: pytree on the device whose leaves have the batches, all of one size, as their leading
        axis; memory is that of one batch. :func:`streamed` takes data that does not fit there.
      weights: :math:`w_b`, ``[batches]``; or ``[batches, examples]``, which are summed over each
        batch. All 1 by default. A batch of weight 0 counts for nothing, but its loss must be finite.
      mask: restricts the Hessian to a subtree, in any form of :mod:`seal_jax.masks`.
      weight_decay: :math:`\lambda` of an L2 term :math:`\frac\lambda2 \|\theta\|^2`.
      mode: "forward_over_reverse" (the cheapest as a rule), "reverse_over_forward", or
        "gauss_newton", :math:`J^\top H_{outer} J`.
      outer: ``outer(outputs, batch) -> scalar``, for "gauss_newton".
      precision: of matrix products and convolutions on float32. "default" is up to six times
        faster on accelerators, which then round the factors to 8 or 11 bits: residuals much below
        1e-2 of the largest eigenvalue then mean nothing. A CPU makes no difference.

    Raises:
      UsageError: a mask that selects nothing, batches of different number, weights that do not fit
        them, an unknown mode or precision.

    >>> op = operator(lambda p: p["x"] ** 2 * p["y"], {"x": jnp.float32(1), "y": jnp.float32(3)})
    >>> product = op({"x": jnp.float32(1), "y": jnp.float32(0)})
    >>> float(product["x"]), float(product["y"])  # (2 y, 2 x)
    (6.0, 2.0)
    """
    check_choice("mode", mode, get_args(Mode))
    check_choice("precision", precision, get_args(Precision))
    if (mode == "gauss_newton") != (outer is not None):
        raise UsageError(f'outer must be given with mode = "gauss_newton" alone, not {mode!r}')
    check_number("weight_decay", weight_decay, nonnegative, "be 0 or positive")
    # On the device once, not with every product.
    params, data = jax.tree.map(
        lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, (params, data)
    )
    per_batch = None
    if data is not None:
        per_batch = jnp.asarray(batch_weights(data, weights))
    elif weights is not None:
        raise UsageError("weights are those of batches: give data too")
    flags: tuple[bool, ...] = (True,) * len(jax.tree.leaves(params))
    if mask is not None:
        flags = tuple(jax.tree.leaves(masks.resolve(mask, params)))
    decay = jnp.asarray(weight_decay, jnp.float32)
    return Operator(params, data, per_batch, decay, loss, outer, flags, mode, precision)


def batch_weights(data: PyTree, weights: Any = None) -> Any:
    """Return the weight of each batch, float32 ``[batches]``, all 1 by default."""
    # NumPy's reads the attribute, and never the data of what is not an array.
    counts = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
    if len(counts) != 1 or counts == {()} or counts == {(0,)}:
        raise UsageError(f"data must have batches along the first axis of every leaf: {counts}")
    ((count,),) = counts
    if weights is None:
        return np.ones(count, np.float32)
    if jnp.shape(weights)[:1] != (count,):
        raise UsageError(f"weights {jnp.shape(weights)} must begin with the {count} batches")
    # Traced weights have no values yet: they are trusted.
    if not isinstance(weights, jax.core.Tracer):
        weights = np.asarray(weights)
        if not (np.isfinite(weights).all() and np.min(weights) >= 0 and weights.sum() > 0):
            raise UsageError("weights must be 0 or positive, and not all 0")
    return weights.astype(np.float32).reshape(count, -1).sum(1)


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Like :class:`Operator`, but it is called from Python, not under ``jit``.

    Attributes, besides the arguments of :func:`streamed`:
      part: the operator without data.
      weights: of the batches, NumPy ``[batches]``.
      chunk: batches that are brought to the device together.
    """

    eager: ClassVar[bool] = True

    part: Operator
    data: PyTree
    weights: np.ndarray
    chunk: int
    sharding: Any = None

    @property
    def like(self) -> PyTree:
        """A vector of the operator's domain."""
        return self.part.like

    @property
    def size(self) -> int:
        """Rows of the matrix."""
        return self.part.size

    def __call__(self, vector: PyTree) -> PyTree:
        """Return ``H v``, a vector."""
        total = jax.tree.map(jnp.zeros_like, vector)
        running: deque[tuple[PyTree, PyTree]] = deque()
        for start in range(0, len(self.weights), self.chunk):
            while len(running) >= _IN_FLIGHT:
                # Transfers begin at once, whatever the device is busy with: without waiting here,
                # the whole data would be on the device before the first product is done.
                jax.block_until_ready(running.popleft()[1])
            rows = slice(start, start + self.chunk)
            op = dataclasses.replace(
                self.part,
                data=jax.tree.map(lambda leaf, rows=rows: self._place(leaf[rows]), self.data),
                weights=self._place(self.weights[rows]),
            )
            # The real batches of the chunk alone: the padding is never evaluated.
            total = _accumulate(op, vector, total, len(self.weights[rows]))
            running.append((op, total))
            del op  # or the chunk would outlive its turn
        # Or the next product's chunks would come before the last ones of this are freed.
        jax.block_until_ready(total)
        return _finish(total, vector, self.weights.sum(), self.part.weight_decay)

    def _place(self, rows: Any) -> jax.Array:
        """Return rows on the device, padded to a whole chunk: one shape, one program."""
        rows = np.asarray(rows)
        missing = self.chunk - len(rows)
        rows = np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1)) if missing else rows
        sharding = self.sharding
        if sharding is None:
            sharding = getattr(jax.tree.leaves(self.part.params)[0], "sharding", None)
            # Parameters may be divided over the mesh; the data is then on all of its devices.
            if isinstance(sharding, NamedSharding):
                sharding = NamedSharding(sharding.mesh, PartitionSpec())
        elif len(sharding.spec) > rows.ndim:  # the weights have no axis of examples
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        return jax.device_put(rows, sharding)


@jax.jit
def _accumulate(op: Operator, vector: PyTree, total: PyTree, count: Any) -> PyTree:
    return trees.add(total, op.weighted_sum(vector, count))


@jax.jit
def _finish(total: PyTree, vector: PyTree, weight: Any, decay: jax.Array) -> PyTree:
    return trees.add(trees.scale(total, 1 / weight), vector, decay)


def streamed(
    loss: Any,
    params: PyTree,
    data: PyTree,
    *,
    byte_budget: int,
    weights: Any = None,
    sharding: Any = None,
    **options: Any,
) -> Streamed:
    """Return the Hessian of a mean loss over data that stays on the host, as an operator.

    Its values are those of :func:`operator`. At most ``byte_budget`` bytes of the data are on the
    device at a time, in two chunks: one is transferred while the other is worked on. A Python loop
    hands the chunks to one compiled program and waits only for the chunk before the last, so that
    the device does not wait where transfers are faster than products.

    Args:
      loss: see :func:`operator`.
      params: likewise, on the device.
      data: batches along the leading axis of every leaf: NumPy arrays, memory-mapped ones, or what
        else has ``shape`` and ``dtype`` and gives an array when it is sliced.
      byte_budget: for the data on the device, at least that of two batches.
      weights: of the batches; see :func:`operator`.
      sharding: of a chunk's leaves, such as ``NamedSharding(mesh, PartitionSpec(None, "data"))`` for
        the second axis, the examples; by default every device of the parameters has all of them.
      **options: ``mask``, ``weight_decay``, ``mode``, ``outer``, ``precision``.

    Raises:
      UsageError: as for ``operator``, or a budget that two batches do not fit in.

    >>> data = np.arange(6, dtype=np.float32).reshape(6, 1)
    >>> op = streamed(
    ...     lambda x, batch: jnp.mean(batch) * x**2, jnp.float32(1), data, byte_budget=32
    ... )
    >>> op.chunk, float(op(jnp.float32(1)))
    (2, 5.0)
    """
    part = operator(loss, params, **options)
    per_batch = np.asarray(batch_weights(data, weights))
    leaves = jax.tree.leaves(data)
    batch = sum(math.prod(leaf.shape[1:]) * np.dtype(leaf.dtype).itemsize for leaf in leaves) + 4
    check_number(
        "byte_budget",
        byte_budget,
        lambda value: value >= _IN_FLIGHT * batch,
        f"be at least {_IN_FLIGHT * batch}: two batches of {batch} bytes; or use smaller batches",
    )
    # The weight of a batch, 4 bytes, is counted in its size.
    chunk = min(int(byte_budget) // (_IN_FLIGHT * batch), len(per_batch))
    # Chunks of equal size, or nearly so: the last one is padded.
    chunk = math.ceil(len(per_batch) / math.ceil(len(per_batch) / chunk))
    return Streamed(part, data, per_batch, chunk, sharding)
