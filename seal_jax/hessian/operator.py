"""Products with the Hessian, over batches of data, restricted to a subtree if one likes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from seal_jax import masks
from seal_jax.errors import UsageError, check_number
from seal_jax.hessian import trees

PyTree = Any
Loss = Callable[..., jax.Array]
Mode = Literal["forward_over_reverse", "reverse_over_forward", "gauss_newton"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operator:
    """The linear map ``v -> H v``; call it with a vector. A pytree: pass it through ``jit``.

    A vector has the structure of the parameters, with ``None`` for those the mask leaves out.

    Attributes:
      params: where the Hessian is taken.
      data: batches along the leading axis of every leaf, or ``None``.
      weight_decay: added to every eigenvalue.
      loss: ``loss(params)`` or ``loss(params, batch)``; see :func:`operator`.
      outer: of the Gauss-Newton matrix, otherwise ``None``.
      flags: for each parameter whether it is in the subtree.
      mode: how a product is computed.
    """

    params: PyTree
    data: PyTree
    weight_decay: jax.Array
    loss: Loss = dataclasses.field(metadata={"static": True})
    outer: Loss | None = dataclasses.field(metadata={"static": True})
    flags: tuple[bool, ...] = dataclasses.field(metadata={"static": True})
    mode: Mode = dataclasses.field(metadata={"static": True})

    @property
    def like(self) -> PyTree:
        """A vector of the operator's domain: the parameters of the subtree."""
        leaves, structure = jax.tree.flatten(self.params)
        kept = [leaf if flag else None for leaf, flag in zip(leaves, self.flags, strict=True)]
        return jax.tree.unflatten(structure, kept)

    @property
    def size(self) -> int:
        """Rows of the matrix."""
        return trees.size(self.like)

    def __call__(self, vector: PyTree) -> PyTree:
        """Return ``H v``, a vector."""
        if self.data is None:
            product = self._product(vector, ())
        else:
            count = len(jax.tree.leaves(self.data)[0])

            def add(total: PyTree, batch: PyTree) -> tuple[PyTree, None]:
                return trees.add(total, self._product(vector, (batch,))), None

            zero = jax.tree.map(jnp.zeros_like, vector)
            product, _ = jax.lax.scan(add, zero, self.data)
            product = trees.scale(product, 1 / count)
        return trees.add(product, vector, self.weight_decay)

    def _whole(self, part: PyTree) -> PyTree:
        """Return all parameters, those of the subtree taken from ``part``."""
        own = iter(jax.tree.leaves(part))
        leaves, structure = jax.tree.flatten(self.params)
        return jax.tree.unflatten(
            structure,
            [next(own) if flag else leaf for leaf, flag in zip(leaves, self.flags, strict=True)],
        )

    def _product(self, vector: PyTree, batch: tuple[PyTree, ...]) -> PyTree:
        def loss(part: PyTree) -> jax.Array:
            return self.loss(self._whole(part), *batch)

        if self.mode == "forward_over_reverse":
            return jax.jvp(jax.grad(loss), (self.like,), (vector,))[1]
        if self.mode == "reverse_over_forward":
            return jax.grad(lambda part: jax.jvp(loss, (part,), (vector,))[1])(self.like)
        assert self.outer is not None
        outer = self.outer

        def outputs(part: PyTree) -> PyTree:
            return self.loss(self._whole(part), *batch)

        found, pushed = jax.jvp(outputs, (self.like,), (vector,))
        curved = jax.jvp(jax.grad(lambda z: outer(z, *batch)), (found,), (pushed,))[1]
        return jax.vjp(outputs, self.like)[1](curved)[0]


def operator(
    loss: Loss,
    params: PyTree,
    data: PyTree = None,
    *,
    mask: masks.Mask | None = None,
    weight_decay: float = 0.0,
    mode: Mode = "forward_over_reverse",
    outer: Loss | None = None,
) -> Operator:
    r"""Return the Hessian of a mean loss as an operator.

    .. math:: H v = \frac1B \sum_b \nabla^2 L_b(\theta)\, v + \lambda v

    Args:
      loss: ``loss(params, batch) -> scalar``, the mean over a batch; ``loss(params)`` where there is
        no ``data``. A function that can be hashed, for the compiler's cache: define it once. For
        "gauss_newton" it returns the network's outputs.
      params: pytree of arrays, sharded or not.
      data: pytree whose leaves have the batches as their leading axis, all of one size: a scan goes
        over them, so that memory is that of one batch.
      mask: restrict the Hessian to a subtree, in any form of :mod:`seal_jax.masks`.
      weight_decay: :math:`\lambda` of an L2 term :math:`\frac\lambda2 \|\theta\|^2`.
      mode: "forward_over_reverse" (the cheapest as a rule), "reverse_over_forward", or
        "gauss_newton", :math:`J^\top H_{outer} J`.
      outer: ``outer(outputs, batch) -> scalar``, for "gauss_newton".

    Raises:
      UsageError: a mask that selects nothing, batches of different number, an unknown mode.

    >>> op = operator(lambda p: p["x"] ** 2 * p["y"], {"x": jnp.float32(1), "y": jnp.float32(3)})
    >>> product = op({"x": jnp.float32(1), "y": jnp.float32(0)})
    >>> float(product["x"]), float(product["y"])  # (2 y, 2 x)
    (6.0, 2.0)
    """
    if mode not in get_args(Mode):
        raise UsageError(f"mode = {mode!r} must be one of {', '.join(get_args(Mode))}")
    if (mode == "gauss_newton") != (outer is not None):
        raise UsageError(f'outer must be given with mode = "gauss_newton" alone, not {mode!r}')
    check_number(
        "weight_decay", weight_decay, lambda value: 0 <= value < math.inf, "be 0 or positive"
    )
    if data is not None:
        counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
        if len(counts) != 1 or counts == {()} or counts == {(0,)}:
            raise UsageError(f"data must have batches along the first axis of every leaf: {counts}")
    flags: tuple[bool, ...] = (True,) * len(jax.tree.leaves(params))
    if mask is not None:
        flags = tuple(jax.tree.leaves(masks.resolve(mask, params)))
    decay = jnp.asarray(weight_decay, jnp.float32)
    return Operator(params, data, decay, loss, outer, flags, mode)
