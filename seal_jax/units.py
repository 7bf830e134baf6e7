"""Hidden units of a network: which parameters make them, which read them, and how active they are.

A unit is a neuron of a dense layer or a channel of a convolution, after its nonlinearity. Methods that
replace single units (ReDo, continual backpropagation) and measures of plasticity share what is here.
Kernels have their outputs along the last axis and their inputs along the one before it, as in Flax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seal_jax import forgetting, layers, paths
from seal_jax.errors import UsageError, nearest

PyTree = Any
Chosen = Mapping[str, jax.Array]


class Units(NamedTuple):
    """A layer of hidden units.

    Only units that nothing else than ``outgoing`` reads can be replaced: not those that are added to a
    residual sum, whose readers are all layers above.

    Attributes:
      name: of their activations.
      incoming: paths of the layers that make them: what lies below and has one entry per unit along
        its last axis, kernel, bias and normalisation.
      outgoing: paths of the layers whose kernels read them. Of a dense layer after a flatten the
        inputs are (positions, units), units fastest; a grouped convolution is known by its shape.
    """

    name: str
    incoming: tuple[str, ...]
    outgoing: tuple[str, ...]


def mean_magnitude(activations: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Return the mean magnitude of each unit over examples and positions, float32 ``[n]``.

    Args:
      activations: ``[N, ..., n]``, after the nonlinearity.
      weights: of the examples, ``[N]``, in place of 1 / N each.

    >>> mean_magnitude(jnp.array([[1.0, 0.0], [-3.0, 2.0]])).tolist()
    [2.0, 1.0]
    """
    magnitudes = jnp.abs(activations.astype(jnp.float32))
    by_example = magnitudes.mean(tuple(range(1, magnitudes.ndim - 1)))
    return by_example.mean(0) if weights is None else jnp.tensordot(weights, by_example, 1)


def dormant(magnitudes: jax.Array, threshold: Any) -> jax.Array:
    r"""Return which units are dormant, bool ``[n]``, of their mean magnitudes ``[n]``.

    The score of unit i is :math:`s_i = \bar{|h_i|} / \frac1n \sum_k \bar{|h_k|}`; it is dormant if
    :math:`s_i \le \tau`. Where no unit of the layer is ever active, all are.

    References:
      Sokar et al., `The Dormant Neuron Phenomenon in Deep Reinforcement Learning`, 2023, section 3.

    >>> dormant(jnp.array([0.0, 0.1, 2.9]), 0.1).tolist()
    [True, True, False]
    """
    # Not by the quotient, which a layer without any activity does not have.
    return magnitudes <= threshold * magnitudes.mean()


class _Parts(NamedTuple):
    """Sizes of layers of units by name, and the name of the layer by path of the leaves that make and read it."""

    sizes: dict[str, int]
    incoming: dict[str, str]
    outgoing: dict[str, str]


def sizes(units: Sequence[Units], params: PyTree) -> dict[str, int]:
    """Return the number of units of each layer, by name.

    Raises:
      UsageError: a path names no layer, or two layers of units name the same one; or shapes do not fit.

    >>> params = {"a": {"kernel": jnp.ones((3, 5))}, "b": {"kernel": jnp.ones((5, 2))}}
    >>> sizes([Units("hidden", ("a",), ("b",))], params)
    {'hidden': 5}
    """
    return _parts(units, params).sizes


def zeros(units: Sequence[Units], params: PyTree) -> dict[str, jax.Array]:
    """Return zeros for each unit, float32 ``[n]`` by name of the layer, on the devices of what makes it.

    >>> params = {"a": {"kernel": jnp.ones((3, 5))}, "b": {"kernel": jnp.ones((5, 2))}}
    >>> zeros([Units("hidden", ("a",), ("b",))], params)["hidden"].shape
    (5,)
    """
    # Like a part of a parameter: where that differs between devices, so may what is kept of its units.
    leaves = dict(paths.named_leaves(params))
    # One leaf of each layer, whichever comes last.
    made = {name: leaves[path] for path, name in _parts(units, params).incoming.items()}
    return {
        name: jnp.zeros_like(leaf[(0,) * (leaf.ndim - 1)], jnp.float32)
        for name, leaf in made.items()
    }


def _parts(units: Sequence[Units], params: PyTree) -> _Parts:
    leaves = zip(paths.named_leaves(params), layers.roles(params), strict=True)
    shapes = {path: (jnp.shape(leaf), role) for (path, leaf), role in leaves}
    parts = _Parts({}, {}, {})

    def below(layer: Units, field: str, kinds: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
        layer_shapes: dict[str, tuple[int, ...]] = {}
        for parent in getattr(layer, field):
            here = {
                path: shape
                for path, (shape, role) in shapes.items()
                if role in kinds and shape and paths.below(path, parent)
            }
            if not here:
                near = nearest(parent, paths.with_parents(list(shapes)))
                raise UsageError(
                    f"units {layer.name!r}: {field} names {parent!r}, which is no such layer{near}"
                )
            layer_shapes |= here
        taken = getattr(parts, field)
        for path in layer_shapes:
            if path in taken:
                raise UsageError(
                    f"units {layer.name!r} and {taken[path]!r} both name {path!r} as {field}: leave one out"
                )
            taken[path] = layer.name
        return layer_shapes

    for layer in units:
        made = below(layer, "incoming", ("kernel", "bias", "norm"))
        count = parts.sizes[layer.name] = next(iter(made.values()))[-1]
        for path, shape in made.items():
            if shape[-1] != count:
                raise UsageError(
                    f"units {layer.name!r}: {path!r} of shape {shape} does not make {count} units"
                )
        for path, shape in below(layer, "outgoing", ("kernel",)).items():
            inputs, outputs = shape[-2:]
            if inputs % count and (count % inputs or outputs % (count // inputs)):
                raise UsageError(
                    f"units {layer.name!r}: {path!r} of shape {shape} does not read {count} units"
                )
    return parts


def selections(chosen: Chosen, units: Sequence[Units], params: PyTree) -> tuple[PyTree, PyTree]:
    """Return two selections (:mod:`seal_jax.selections`): what makes the chosen units, what reads them.

    Args:
      chosen: bool ``[n]`` by name of the layer; may be traced.
      units: the layers.
      params: arrays or ``jax.ShapeDtypeStruct``.

    >>> params = {"a": {"kernel": jnp.ones((1, 2))}, "b": {"kernel": jnp.ones((2, 1))}}
    >>> hidden = Units("hidden", ("a",), ("b",))
    >>> incoming, outgoing = selections({"hidden": jnp.array([False, True])}, [hidden], params)
    >>> incoming["a"]["kernel"].tolist(), outgoing["b"]["kernel"].tolist()
    ([[False, True]], [[False], [True]])
    """
    parts = _parts(units, params)

    def incoming(path, leaf):
        name = parts.incoming.get(path)
        return name is not None and jnp.broadcast_to(chosen[name], leaf.shape)

    def outgoing(path, leaf):
        name = parts.outgoing.get(path)
        if name is None:
            return False
        flags, (inputs, outputs) = chosen[name], leaf.shape[-2:]
        if inputs >= len(flags):  # several positions after a flatten, each with all units
            flags = jnp.tile(flags, inputs // len(flags))[:, None]
        else:  # the outputs of a group read the inputs of that group alone
            groups = len(flags) // inputs
            flags = jnp.repeat(flags.reshape(groups, inputs).T, outputs // groups, axis=1)
        return jnp.broadcast_to(flags, leaf.shape)

    return paths.map_named(incoming, params), paths.map_named(outgoing, params)


def outgoing_magnitudes(units: Sequence[Units], params: PyTree) -> dict[str, jax.Array]:
    """Return the sum of the magnitudes of all weights that read each unit, float32 ``[n]`` by layer.

    >>> params = {"a": {"kernel": jnp.ones((1, 2))}, "b": {"kernel": jnp.array([[1.0, -2.0], [0.0, 3.0]])}}
    >>> outgoing_magnitudes([Units("hidden", ("a",), ("b",))], params)["hidden"].tolist()
    [3.0, 3.0]
    """
    parts = _parts(units, params)
    magnitude_sums = {name: jnp.zeros(count) for name, count in parts.sizes.items()}
    for path, leaf in paths.named_leaves(params):
        if (name := parts.outgoing.get(path)) is not None:
            magnitudes = jnp.abs(leaf.astype(jnp.float32)).sum(tuple(range(leaf.ndim - 2)))
            inputs, groups = leaf.shape[-2], max(1, parts.sizes[name] // leaf.shape[-2])
            # [inputs, groups] -> [groups, inputs]: unit i of group g is unit g * inputs + i of the layer.
            by_input = magnitudes.reshape(inputs, groups, -1).sum(2).T
            magnitude_sums[name] += by_input.reshape(-1, parts.sizes[name]).sum(0)
    return magnitude_sums


def replace(params: PyTree, fresh: PyTree, chosen: Chosen, units: Sequence[Units]) -> PyTree:
    """Return ``params`` with the chosen units replaced by new ones that nothing reads yet.

    What makes them is taken from ``fresh``, bit for bit; the weights that read them are zero, so that
    what the network computes does not depend on the new units until it has learnt to read them. Where
    both of two chosen units share a weight, the one that it makes gets the fresh value.

    Two things still let the rest notice: normalisation over several channels (LayerNorm, GroupNorm),
    and the running statistics of BatchNorm, which are no parameters and follow in the next steps.

    Args:
      params: pytree of arrays.
      fresh: a tree like ``params``, of new initial values.
      chosen: bool ``[n]`` by name of the layer; may be traced.
      units: the layers.

    >>> params = {"a": {"kernel": jnp.ones((1, 2))}, "b": {"kernel": jnp.ones((2, 1))}}
    >>> fresh = jax.tree.map(lambda leaf: 5 * leaf, params)
    >>> new = replace(params, fresh, {"hidden": jnp.array([False, True])}, [Units("hidden", ("a",), ("b",))])
    >>> new["a"]["kernel"].tolist(), new["b"]["kernel"].tolist()
    ([[1.0, 5.0]], [[1.0], [0.0]])
    """
    incoming, outgoing = selections(chosen, units, params)
    # In this order: a new unit may read another new one, since nothing reads itself.
    unread = forgetting.replace(params, jax.tree.map(jnp.zeros_like, params), outgoing)
    return forgetting.replace(unread, fresh, incoming)
