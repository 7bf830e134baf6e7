"""The compiled program of Linear+Affines: how an episode is learnt and scored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from seal_jax import models
from seal_jax.errors import UsageError, check_number
from seal_jax.evaluation import episodes, memory
from seal_jax.evaluation.episodes import EPISODES, Episode

if TYPE_CHECKING:
    from seal_jax.models import Model

Statistics = Literal["batch", "batch_only", "running"]


@dataclasses.dataclass(frozen=True)
class Protocol(episodes.Protocol):
    """What an episode is, and how it is learnt; the other fields are the linear classifier's.

    Attributes:
      affine_learning_rate: of scales and biases, by SGD without momentum and without decay.
      statistics: what BatchNorm normalises with while it learns; queries always see the running
        statistics.

        "batch" is what a network in training mode does in the public protocol: statistics of the
        batch, which also enter the running ones, the variance times n / (n - 1). Without that the
        queries, of another domain than the network's own data, would be normalised with statistics
        that the scales and biases have never met. A last batch of one image joins the batch before
        it: one image has no statistics where the last feature map is one pixel, and poor ones
        elsewhere. It then is one of ``batch_size + 1``, and no image is left out.

        "batch_only" leaves the running statistics as they are. "running" uses them for learning too,
        and keeps a batch of one.
    """

    affine_learning_rate: float = 0.01
    statistics: Statistics = "batch"

    def __post_init__(self):
        super().__post_init__()
        check_number(
            "affine_learning_rate",
            self.affine_learning_rate,
            lambda v: 0 <= v < math.inf,
            "not be negative",
        )
        if self.statistics not in get_args(Statistics):
            raise UsageError(
                f"statistics = {self.statistics!r} must be one of {', '.join(get_args(Statistics))}"
            )
        if self.statistics != "running" and self.batch_size == 1:
            raise UsageError(
                "batch_size = 1 leaves no statistics of a batch: use 2 or more, or running statistics"
            )


def affines_of(params: Any, batch_stats: Any) -> dict[str, Any]:
    """Return the scales and biases of the BatchNorm layers, a part of the tree ``params``.

    >>> params = {"conv": {"kernel": 1}, "bn": {"scale": 2, "bias": 3}, "norm": {"scale": 4}}
    >>> affines_of(params, {"bn": {"mean": 0, "var": 1}})
    {'bn': {'scale': 2, 'bias': 3}}
    """
    found: dict[str, Any] = {}
    for name, below in batch_stats.items():
        if name in params and isinstance(below, Mapping):
            part = params[name]
            inner = dict(part) if "mean" in below else affines_of(part, below)
            if inner:
                found[name] = inner
    return found


def _merged(params: Any, part: Any) -> Any:
    """Return ``params`` with the leaves of ``part`` in place of its own."""
    if not isinstance(part, Mapping):
        return part
    return {**params, **{name: _merged(params[name], below) for name, below in part.items()}}


class Spec(NamedTuple):
    """What is fixed in the compiled program."""

    model: Model
    normalise: Callable[[jax.Array], jax.Array]
    protocol: Protocol
    mesh: Mesh
    keep: bool


def _features(spec: Spec, variables: Any, rows: jax.Array, train: bool) -> tuple[jax.Array, Any]:
    """Return features and batch statistics of flat images."""
    images = spec.normalise(rows.reshape(len(rows), *spec.model.image_shape))
    with models.batch_statistics(unbiased=True):  # as torch, and with it the protocol
        features, statistics = spec.model.extract(variables, images, train)
    return features.astype(jnp.float32), statistics


def _logits(features: jax.Array, head: tuple[jax.Array, jax.Array]) -> jax.Array:
    return jnp.matmul(features, head[0].T, precision="highest") + head[1]


def cut(protocol: Protocol) -> tuple[int, int]:
    """Return how many whole batches an epoch has, and how many images its last batch.

    >>> cut(Protocol()), cut(Protocol(shots=1)), cut(Protocol(statistics="running"))
    ((5, 5), (0, 5), (6, 1))
    """
    full, rest = divmod(protocol.ways * protocol.shots, protocol.batch_size)
    if rest == 1 and full and protocol.statistics != "running":
        return full - 1, protocol.batch_size + 1
    return full, rest


@partial(jax.jit, static_argnames=("spec",))
def tune(variables: Any, pixels: jax.Array, drawn: Episode, spec: Spec) -> Any:
    """Learn and score episodes, divided over the devices.

    Args:
      variables: of the network.
      pixels: uint8 ``[episodes, images, bytes]``, of each episode its support and then its query.
      drawn: the episodes, stacked.
      spec: what is fixed.

    Returns:
      How many queries are right, whether the features were finite before the first step, whether
      the logits of the query were not in the end, and the trained parameters, or None.
    """

    def here(variables: Any, pixels: jax.Array, drawn: Episode) -> Any:
        return jax.vmap(lambda rows, one: _one(variables, rows, one, spec))(pixels, drawn)

    split = PartitionSpec(EPISODES)
    divided = jax.shard_map(
        here,
        mesh=spec.mesh,
        in_specs=(PartitionSpec(), split, split),
        out_specs=split,
        check_vma=False,
    )
    return divided(variables, pixels, drawn)


def _loss(trained: Any, statistics: Any, variables: Any, rows: jax.Array, labels: Any, spec: Spec):
    """Return the cross-entropy of a batch, and the running statistics after it."""
    affines, head = trained
    now = {
        **variables,
        "params": _merged(variables["params"], affines),
        "batch_stats": statistics,
    }
    features, changed = _features(spec, now, rows, spec.protocol.statistics != "running")
    chances = jax.nn.log_softmax(_logits(features, head))
    picked = jnp.take_along_axis(chances, labels[:, None], axis=1)
    return -picked.mean(), changed if spec.protocol.statistics == "batch" else statistics


def _one(variables: Any, pixels: jax.Array, drawn: Episode, spec: Spec) -> Any:
    """Learn and score one episode; ``pixels`` are its support and its query, ``[images, bytes]``."""
    protocol = spec.protocol
    full, last = cut(protocol)
    count, batch = protocol.ways * protocol.shots, protocol.batch_size
    labels = jnp.repeat(jnp.arange(protocol.ways), protocol.shots)
    support, query = pixels[:count], pixels[count:]

    def step(state, rows):
        (affines, head), momentum, statistics, number = state
        (affine_slope, head_slope), statistics = jax.grad(_loss, has_aux=True)(
            (affines, head), statistics, variables, support[rows], labels[rows], spec
        )
        share = jnp.where(number == 0, 1.0, 1 - protocol.dampening)
        # Zero before the first step, so that what it is multiplied with does not matter there.
        momentum = jax.tree.map(
            lambda m, g, p: protocol.momentum * m + share * (g + protocol.weight_decay * p),
            momentum,
            head_slope,
            head,
        )
        head = jax.tree.map(lambda p, m: p - protocol.learning_rate * m, head, momentum)
        affines = jax.tree.map(
            lambda p, g: p - protocol.affine_learning_rate * g, affines, affine_slope
        )
        return ((affines, head), momentum, statistics, number + 1), None

    def epoch(state, order):
        # Batches have their true sizes: filling would enter the statistics.
        if full:
            state, _ = jax.lax.scan(step, state, order[: full * batch].reshape(full, batch))
        if last:
            state, _ = step(state, order[full * batch :])
        return state, None

    statistics = variables["batch_stats"]
    head = (jnp.asarray(drawn.kernel), jnp.asarray(drawn.bias))
    trained = (affines_of(variables["params"], statistics), head)
    start = (trained, jax.tree.map(jnp.zeros_like, head), statistics, jnp.zeros((), jnp.int32))
    ((affines, head), _, statistics, _), _ = jax.lax.scan(epoch, start, drawn.orders)

    def infer(variables, rows):
        return _features(spec, variables, rows, False)[0]

    now = {
        **variables,
        "params": _merged(variables["params"], affines),
        "batch_stats": statistics,
    }
    # One class at a time: the query has more images than a batch.
    queries = query.reshape(protocol.ways, protocol.queries, -1)
    logits = _logits(jax.lax.map(partial(infer, now), queries), head)
    right = logits.argmax(-1) == jnp.arange(protocol.ways)[:, None]
    sound = jnp.isfinite(infer(variables, support[: protocol.ways])).all()
    kept = (affines, statistics) if spec.keep else None
    return right.sum(), sound, ~jnp.isfinite(logits).all(), kept


def sizes(spec: Spec, variables: Any) -> tuple[int, int]:
    """Return the length of a feature vector, and about how many bytes an episode takes."""
    protocol = spec.protocol
    batch = max(protocol.batch_size, cut(protocol)[1])
    pixels = math.prod(spec.model.image_shape)
    rows = jax.ShapeDtypeStruct((batch, pixels), jnp.uint8)
    train = protocol.statistics != "running"
    traced, out = jax.make_jaxpr(
        lambda variables, rows: _features(spec, variables, rows, train)[0], return_shape=True
    )(variables, rows)
    images = protocol.ways * (protocol.shots + protocol.queries)
    # The forward pass's values, kept for the way back, which needs about as much again.
    return out.shape[-1], 2 * memory.written(traced.jaxpr) + images * pixels
