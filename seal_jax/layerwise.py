"""LW, layerwise reinitialisation: the steps of its rounds, as pure functions.

A network is declared from bottom to top: ``order`` are path prefixes that together cover every
parameter exactly once, ``blocks`` those of them after which rounds take place (by default all), each
an entry of ``order`` or a prefix of several neighbours. "Blocks 1 to k" are all entries up to and
including the k-th block, a stem below the first included; the others are above.

Before round (k, n) of K N rounds in all::

    params = rescale(params, norms, order, k)  # norms = kernel_norms(initial_params)
    mean, scale = normaliser(*statistics(outputs_of_block_k))  # block k's own normaliser off
    params = reinitialise_above(key, params, order, k, init_fn)

and the network computes ``(x - mean) * scale`` after block k from then on. The first round already
starts from the initial weights, so K N rounds are K N trainings. k may be traced everywhere: one
program, also of vmapped seeds, serves all rounds.

References:
  Alabdulmohsin et al., `The Impact of Reinitialization on Generalization in Convolutional Neural
  Networks`, 2022, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from seal_jax import forgetting, layers, paths
from seal_jax.errors import UsageError, check_integer, check_number, nearest

PyTree = Any


def kernel_norms(params: PyTree, *, vectors: bool = False) -> PyTree:
    """Return the Frobenius norm of every kernel, as a tree of float32 scalars like ``params``.

    Args:
      params: pytree of arrays, usually the initial parameters.
      vectors: include biases and normalisation parameters. What is not included has 0, which
        :func:`rescale` leaves alone.

    >>> norms = kernel_norms({"bias": jnp.ones(2), "kernel": jnp.full((2, 2), 3.0)})
    >>> float(norms["bias"]), float(norms["kernel"])
    (0.0, 6.0)
    """

    def norm(path, leaf, role):
        return _norm(leaf) if vectors or role == "kernel" else jnp.zeros((), jnp.float32)

    return paths.map_named(norm, params, layers.roles(params))


def _norm(leaf: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(leaf.astype(jnp.float32))))


def rescale(
    params: PyTree,
    norms: PyTree,
    order: Sequence[str],
    k: Any,
    *,
    blocks: Sequence[str] | None = None,
) -> PyTree:
    """Return ``params`` with the tensors of blocks 1 to k rescaled to their initial norms.

    A tensor whose norm is or was zero stays as it is, since no factor can change that.

    Args:
      params: pytree of arrays.
      norms: tree of scalars like ``params``, from :func:`kernel_norms`.
      order, k, blocks: see above.

    >>> params = {"a": jnp.full((1, 1), 8.0), "b": jnp.full((1, 1), 8.0)}
    >>> new = rescale(params, {"a": jnp.float32(2), "b": jnp.float32(2)}, ("a", "b"), k=1)
    >>> float(new["a"][0, 0]), float(new["b"][0, 0])
    (2.0, 8.0)
    """
    paths.check_tree("norms", norms, params)

    def one(leaf, is_above, norm):
        now, norm = _norm(leaf), jnp.asarray(norm, jnp.float32)
        # `where` and no branch: k may be traced, so that one program serves all rounds.
        possible = ~is_above & (now > 0) & (norm > 0)
        # The branch that is not taken is computed, too: it must not divide by zero.
        factor = norm / jnp.where(now > 0, now, 1.0)
        return jnp.where(possible, (leaf * factor).astype(leaf.dtype), leaf)

    return jax.tree.map(one, params, above(params, order, k, blocks=blocks), norms)


def above(
    params: PyTree, order: Sequence[str], k: Any, *, blocks: Sequence[str] | None = None
) -> PyTree:
    """Select the parameters above block k: a tree with one bool for each, traced if k is.

    >>> selection = above({"a": jnp.ones(1), "b": jnp.ones(1)}, ("a", "b"), k=1)
    >>> bool(selection["a"]), bool(selection["b"])
    (False, True)
    """
    if not hasattr(k, "aval"):
        count = len(order if blocks is None else blocks)
        check_integer("k", k, 1, count, bounds=f"from 1 to the number of blocks, {count}")
    # Python integers, whatever k is: the comparison with k is all that is traced.
    levels = block_levels(params, order, blocks)
    return paths.map_named(lambda path, leaf, level: jnp.asarray(k) < level, params, levels)


def reinitialise_above(
    key: jax.Array,
    params: PyTree,
    order: Sequence[str],
    k: Any,
    init_fn: forgetting.Initialiser,
    *,
    blocks: Sequence[str] | None = None,
) -> PyTree:
    """Return ``params`` with everything above block k as ``init_fn`` initializes it, bit for bit.

    Args:
      key: a random key; use a new one for every round.
      params: pytree of arrays.
      order, k, blocks: see above.
      init_fn: maps a key to a whole tree like ``params``, or "torch_default".

    >>> params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    >>> zeros = lambda key: jax.tree.map(jnp.zeros_like, params)
    >>> fresh = reinitialise_above(jax.random.key(0), params, ("a", "b"), 1, zeros)
    >>> float(fresh["a"][0]), float(fresh["b"][0])
    (1.0, 0.0)
    """
    selection = above(params, order, k, blocks=blocks)
    return forgetting.reinitialise_selected(key, params, selection, init_fn)


def statistics(outputs: jax.Array, axis_name: str | None = None) -> tuple[jax.Array, jax.Array]:
    """Return mean and standard deviation over ALL of a block's outputs, two float32 scalars.

    Args:
      outputs: of block k over a sample, in inference mode, with the normalisers of earlier blocks in
        place and its own off; any shape.
      axis_name: an axis of ``vmap`` or ``shard_map`` that divides the sample into equal parts.

    >>> mean, std = statistics(jnp.array([[1.0, 3.0], [5.0, 7.0]]))
    >>> print(f"{mean:.3f} {std:.3f}")
    4.000 2.236
    """

    def average(x):
        # Over devices the mean of means, which is that of all outputs since the parts are equal.
        mean = jnp.mean(x)
        return mean if axis_name is None else jax.lax.pmean(mean, axis_name)

    outputs = outputs.astype(jnp.float32)
    mean = average(outputs)
    # Two passes: E[x^2] - E[x]^2 in float32 would lose a deviation that is small against the mean.
    return mean, jnp.sqrt(average(jnp.square(outputs - mean)))


def normaliser(mean: Any, std: Any, eps: float = 1e-5) -> tuple[jax.Array, jax.Array]:
    r"""Return ``(mean, scale)`` of :math:`(x - \mu) / (\sigma + \epsilon)`, scale its factor.

    A block that has no normaliser yet has ``(0, 1)``.

    >>> mean, scale = normaliser(4.0, 2.0, eps=0.0)
    >>> float((jnp.float32(8.0) - mean) * scale)
    2.0
    """
    check_number("eps", eps, lambda value: value >= 0, "be 0 or positive")
    # Algorithm 1 divides by σ alone; ε keeps a block of constant output finite.
    return jnp.asarray(mean, jnp.float32), 1 / (jnp.asarray(std, jnp.float32) + eps)


def round_of(generation: Any, repeats: int) -> tuple[Any, Any]:
    """Return (k, n), both from 1 on, of a generation from 0 on; may be traced.

    Args:
      generation: 0 to K N - 1.
      repeats: N, the rounds for each block.

    >>> [round_of(generation, 2) for generation in range(4)]
    [(1, 1), (1, 2), (2, 1), (2, 2)]
    """
    check_integer("repeats", repeats, 1)
    return generation // repeats + 1, generation % repeats + 1


def block_levels(
    params: PyTree, order: Sequence[str], blocks: Sequence[str] | None = None
) -> list[int]:
    """Return for each leaf of ``params`` the first block k such that it is among blocks 1 to k.

    Leaves above the last of K blocks have K + 1.

    Raises:
      UsageError: a block is not in the order, or blocks are not in the order's sequence; an entry of
        the order covers no parameter; a parameter is covered by no entry, or by two.

    >>> block_levels({"fc": 0.0, "one": 0.0, "stem": 0.0}, ("stem", "one", "fc"), ("one",))
    [2, 1, 1]
    """
    names = [path for path, _ in paths.named_leaves(params)]
    places = []
    for path in names:
        entries = [index for index, entry in enumerate(order) if paths.below(path, entry)]
        if len(entries) != 1:
            how = f"{len(entries)} entries" if entries else "no entry"
            near = "" if entries else nearest(path, order)
            raise UsageError(
                f"order covers the parameter {path!r} with {how}; exactly one must{near}"
            )
        places.append(entries[0])
    # The other direction as well: a misspelt entry would otherwise cover nothing in silence.
    for index, entry in enumerate(order):
        if index not in places:
            near = nearest(entry, paths.with_parents(names))
            raise UsageError(f"order has an entry {entry!r} that covers no parameter{near}")
    ends: list[int] = []  # the place of each block's last entry in the order
    for block in order if blocks is None else blocks:
        entries = [index for index, entry in enumerate(order) if paths.below(entry, block)]
        if not entries:
            raise UsageError(f"block {block!r} is not in the declared order{nearest(block, order)}")
        # A gap in the block, or a block that does not end above the one before it.
        if entries[-1] - entries[0] >= len(entries) or (ends and entries[-1] <= ends[-1]):
            raise UsageError(
                f"block {block!r} must be neighbours in the declared order, and blocks stand in its "
                "sequence"
            )
        ends.append(entries[-1])
    if not ends:
        raise UsageError("blocks is empty; name at least one block of the declared order")
    # One more than the number of blocks that end below the leaf.
    return [1 + sum(end < place for end in ends) for place in places]
