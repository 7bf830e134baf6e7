"""Few-shot classification that also trains BatchNorm's scales and biases ("Linear+Affines").

Yazdanpanah et al., `Revisiting Learnable Affines for Batch Norm in Few-Shot Transfer Learning`, 2022,
as the SEAL paper uses it (Tables 4 and 5): in every episode a new linear classifier and the affine
parameters of all BatchNorm layers learn from a few images; everything else is frozen. The episodes
are those of :func:`seal_jax.evaluation.few_shot.linear`, down to the order of the images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seal_jax import models
from seal_jax.core import mesh as meshes
from seal_jax.errors import UsageError, check_choice, check_number, nonnegative
from seal_jax.evaluation import few_shot
from seal_jax.evaluation.few_shot import EPISODES, Episode, Scores
from seal_jax.evaluation.resizing import resized
from seal_jax.losses import mean_cross_entropy
from seal_jax.models import Model

Statistics = Literal["batch", "batch_only", "running"]


@dataclasses.dataclass(frozen=True)
class Protocol(few_shot.Protocol):
    """The definition of an episode and of its training; the other fields are the linear classifier's.

    Attributes:
      affine_learning_rate: of scales and biases, by SGD without momentum and without decay.
      statistics: what BatchNorm normalises with while it learns; queries always see the running
        statistics.

        "batch" is what a network in training mode does in the public protocol: statistics of the
        batch, which also enter the running ones, the variance times n / (n - 1). Without that the
        queries, of another domain than the network's own data, would be normalised with statistics
        that the scales and biases were not trained with. A last batch of one image joins the batch
        before it: one image has no statistics where the last feature map is one pixel, and poor ones
        elsewhere. Together they are a batch of ``batch_size + 1``; no image is left out.

        "batch_only" leaves the running statistics as they are. "running" uses them for learning too,
        and keeps a batch of one.
    """

    affine_learning_rate: float = 0.01
    statistics: Statistics = "batch"

    def __post_init__(self):
        super().__post_init__()
        check_number(
            "affine_learning_rate", self.affine_learning_rate, nonnegative, "not be negative"
        )
        check_choice("statistics", self.statistics, get_args(Statistics))
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
    affines: dict[str, Any] = {}
    for name, statistics in batch_stats.items():
        if name in params and isinstance(statistics, Mapping):
            part = params[name]
            # Only running statistics tell a BatchNorm: other norms have a scale and a bias too.
            below = dict(part) if "mean" in statistics else affines_of(part, statistics)
            if below:
                affines[name] = below
    return affines


class Tuned(NamedTuple):
    """The results of :func:`linear_affines`.

    Attributes:
      scores: accuracies of the episodes.
      diverged: bool ``[episodes]``, whether a logit of a query is not finite; it then counts as a
        vote for the first class.
      affines: the trained scales and biases, a part of the tree of parameters, each leaf
        ``[episodes, ...]``; None unless they were asked for.
      batch_stats: the final running statistics, with the same axes and under the same condition.
    """

    scores: Scores
    diverged: np.ndarray
    affines: Any
    batch_stats: Any


def linear_affines(
    model: Model,
    variables: Any,
    images: np.ndarray,
    labels: np.ndarray,
    normalise: Callable[[jax.Array], jax.Array],
    protocol: Protocol | None = None,
    *,
    seed: int = 0,
    episodes: int = 600,
    first: int = 0,
    together: int | None = None,
    byte_budget: int | None = None,
    devices: Sequence[Any] | None = None,
    keep: bool = False,
) -> Tuned:
    """Return the accuracy of classifier and affine parameters in every episode.

    All episodes go through one compiled program, ``together`` of them at a time on each device. Only
    their own images are sent there, as bytes. Dropout is off throughout. ``seed``, ``episodes``,
    ``first`` and ``devices`` are as in :func:`seal_jax.evaluation.few_shot.linear`.

    Args:
      model: a network with BatchNorm.
      variables: its variables, ``{"params": ..., "batch_stats": ...}``, and "normalisers" where there are some.
      images: uint8 ``[n, height, width, channels]``, on the host.
      labels: integers ``[n]``.
      normalise: traced function of uint8 ``[N, height, width, channels]`` to the network's input.
      protocol: the definition of an episode and of its training.
      together: episodes side by side on a device; by default as many as ``byte_budget`` holds.
      byte_budget: bytes of a device for the activations of learning, as estimated; by default a
        third of its memory, or 256 MiB where it does not report one (CPU).
      keep: return the trained parameters.

    Raises:
      UsageError: a model without BatchNorm, images or labels that do not fit, too few of them, or a
        network whose features are not finite to begin with.
    """
    protocol = Protocol() if protocol is None else protocol
    if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
        raise UsageError(
            f"images {images.shape} of {images.dtype} and labels {labels.shape} must be uint8 "
            "[n, height, width, channels] and [n]"
        )
    if not affines_of(variables["params"], variables.get("batch_stats", {})):
        raise UsageError(
            f"model.name = {model.name!r} has no BatchNorm whose scales and biases could train: "
            "evaluate it with the linear classifier alone"
        )
    images_of_class = few_shot.check(labels, protocol)
    mesh = meshes.along(EPISODES, devices)
    spec, size, together = plan(
        model,
        variables,
        images.shape[1:],
        normalise,
        protocol,
        mesh,
        together=together,
        byte_budget=byte_budget,
        keep=keep,
    )
    # Placed once: every chunk of episodes would otherwise send the weights again.
    variables = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    # Episodes gather their images on the host, so the whole data set is never on a device.
    rows = images.reshape(len(images), -1)

    def learn(drawn: Episode) -> Any:
        pixels = rows[np.concatenate([drawn.support, drawn.query], axis=1)]
        correct, finite, diverged, kept = jax.device_get(tune(variables, pixels, drawn, spec))
        # Checked with each chunk: unlike in few_shot.linear, features are not computed beforehand.
        if not np.all(finite):
            raise UsageError("features hold NaN or infinity: the network or its input is broken")
        return correct, diverged, kept

    draw_episode = partial(few_shot.draw, images_of_class, size, protocol, seed=seed)
    correct, diverged, kept = few_shot.over_chunks(
        learn, draw_episode, mesh, first, episodes, together * mesh.size
    )
    accuracies = correct / (protocol.ways * protocol.queries)
    return Tuned(Scores(accuracies), diverged, *(kept or (None, None)))


def plan(
    model: Model,
    variables: Any,
    image_shape: tuple[int, int, int],
    normalise: Callable[[jax.Array], jax.Array],
    protocol: Protocol,
    mesh: Mesh,
    *,
    together: int | None = None,
    byte_budget: int | None = None,
    keep: bool = False,
) -> tuple[Spec, int, int]:
    """Return the static arguments of :func:`tune`, the length of a feature vector, and episodes at a time.

    The arguments are those of :func:`linear_affines`; of ``variables`` the shapes suffice.
    """
    device = mesh.devices.flat[0]
    # The parameters are those of the run; only the shape of the images changes, and of the activations with it.
    model = resized(_for_episodes(model, device), image_shape)
    spec = Spec(model, normalise, protocol, mesh, keep)
    # Traced, not run: the classifier needs the length of a feature vector, the chunk the bytes of an episode.
    size, bytes_per_episode = sizes(spec, variables)
    if together is None:
        if byte_budget is None:
            byte_budget = (device.memory_stats() or {}).get("bytes_limit", 3 * 2**28) // 3
        together = max(1, byte_budget // bytes_per_episode)
    return spec, size, together


def _for_episodes(model: Model, device: Any) -> Model:
    """Return the model without dropout and for one device; its parameters stay the same."""
    # A device has whole episodes, so there is no axis of devices over which BatchNorm could average.
    fields: dict[str, Any] = {"dropout": 0.0, "bn_axis_name": None}
    if device.platform == "cpu":
        # The backward pass runs in a loop; see seal_jax.models.convolution.
        fields["convolution"] = "canonical"
    # Modules declare only the fields that they use: one without dropout has nothing to turn off.
    fields = {name: value for name, value in fields.items() if hasattr(model.module, name)}
    return dataclasses.replace(model, module=model.module.clone(**fields))


class Spec(NamedTuple):
    """The static arguments of the compiled program."""

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
    # Kernel [ways, d], as torch stores it. Full precision, since accelerators round the factors of products.
    return jnp.matmul(features, head[0].T, precision="highest") + head[1]


def cut(protocol: Protocol) -> tuple[int, int]:
    """Return how many whole batches an epoch has, and how many images its last batch has.

    >>> cut(Protocol()), cut(Protocol(shots=1)), cut(Protocol(statistics="running"))
    ((5, 5), (0, 5), (6, 1))
    """
    full, rest = divmod(protocol.ways * protocol.shots, protocol.batch_size)
    # A batch of one has no variance: see Protocol.
    if rest == 1 and full and protocol.statistics != "running":
        return full - 1, protocol.batch_size + 1
    return full, rest


@partial(jax.jit, static_argnames=("spec",))
def tune(variables: Any, pixels: jax.Array, drawn: Episode, spec: Spec) -> Any:
    """Learn and score stacked episodes, whose support and then query are in ``pixels``.

    The pixels are uint8 ``[episodes, images, bytes]``. Returned are the number of correct queries, whether
    the features were finite before the first step, whether the logits of the query were not finite at the
    end, and the trained parameters, or None.
    """
    return few_shot.of_each(partial(_tune_one, spec), spec.mesh, variables, pixels, drawn)


def _with_trained(variables: Any, affines: Any, statistics: Any) -> dict[str, Any]:
    """Return the network's variables with the affines and running statistics of an episode."""

    def merged(params: Any, part: Any) -> Any:
        # The affines are a part of the tree of parameters, so only their branches are copied.
        if not isinstance(part, Mapping):
            return part
        return {**params, **{name: merged(params[name], below) for name, below in part.items()}}

    params = merged(variables["params"], affines)
    return {**variables, "params": params, "batch_stats": statistics}


def _tune_one(spec: Spec, variables: Any, pixels: jax.Array, drawn: Episode) -> Any:
    """Learn and score one episode; ``pixels`` are its support and its query, ``[images, bytes]``."""
    protocol = spec.protocol
    full, last = cut(protocol)
    count, batch = protocol.ways * protocol.shots, protocol.batch_size
    # The support is stored class by class, with the classes numbered 0 to ways - 1 within the episode.
    labels = jnp.repeat(jnp.arange(protocol.ways), protocol.shots)
    support, query = pixels[:count], pixels[count:]

    def loss(trained, statistics, rows):
        affines, head = trained
        tuned = _with_trained(variables, affines, statistics)
        features, updated = _features(spec, tuned, support[rows], protocol.statistics != "running")
        mean = mean_cross_entropy(_logits(features, head), labels[rows])
        # "batch_only" normalises with the batch too, and drops the running statistics that result.
        return mean, updated if protocol.statistics == "batch" else statistics

    def step(state, rows):
        (affines, head), momentum, statistics, number = state
        (affine_grads, head_grads), statistics = jax.grad(loss, has_aux=True)(
            (affines, head), statistics, rows
        )
        # As torch: the first gradient enters the momentum undamped.
        undamped = jnp.where(number == 0, 1.0, 1 - protocol.dampening)
        # Momentum is zero before the first step, so its factor does not matter there.
        momentum = jax.tree.map(
            lambda m, g, p: protocol.momentum * m + undamped * (g + protocol.weight_decay * p),
            momentum,
            head_grads,
            head,
        )
        # The classifier has momentum and decay; the affines are plain SGD's (see Protocol).
        head = jax.tree.map(lambda p, m: p - protocol.learning_rate * m, head, momentum)
        affines = jax.tree.map(
            lambda p, g: p - protocol.affine_learning_rate * g, affines, affine_grads
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
    # [ways, d] and [ways]
    head = (jnp.asarray(drawn.kernel), jnp.asarray(drawn.bias))
    trained = (affines_of(variables["params"], statistics), head)
    start = (trained, jax.tree.map(jnp.zeros_like, head), statistics, jnp.zeros((), jnp.int32))
    ((affines, head), _, statistics, _), _ = jax.lax.scan(epoch, start, drawn.orders)

    def infer(variables, rows):
        return _features(spec, variables, rows, False)[0]

    tuned = _with_trained(variables, affines, statistics)
    # One class at a time: the query has more images than a batch.
    queries = query.reshape(protocol.ways, protocol.queries, -1)
    logits = _logits(jax.lax.map(partial(infer, tuned), queries), head)
    # logits [ways, queries, ways]: queries are stored class by class, too
    correct = logits.argmax(-1) == jnp.arange(protocol.ways)[:, None]
    # With the network as it was: a broken network or input is thus told from an episode that diverged.
    finite = jnp.isfinite(infer(variables, support[: protocol.ways])).all()
    kept = (affines, statistics) if spec.keep else None
    return correct.sum(), finite, ~jnp.isfinite(logits).all(), kept


def sizes(spec: Spec, variables: Any) -> tuple[int, int]:
    """Return the length of a feature vector and an estimate of the bytes that an episode takes."""
    protocol = spec.protocol
    batch = max(protocol.batch_size, cut(protocol)[1])
    pixels = math.prod(spec.model.image_shape)
    rows = jax.ShapeDtypeStruct((batch, pixels), jnp.uint8)
    train = protocol.statistics != "running"
    traced, out = jax.make_jaxpr(
        lambda variables, rows: _features(spec, variables, rows, train)[0], return_shape=True
    )(variables, rows)
    images = protocol.ways * (protocol.shots + protocol.queries)
    # The forward pass's values are kept for the backward pass, which needs about as much again.
    return out.shape[-1], 2 * written(traced.jaxpr) + images * pixels


def written(jaxpr: Any) -> int:
    """Return the bytes of all values that a traced program computes, a loop's body counted once.

    >>> import jax
    >>> written(jax.make_jaxpr(lambda x: (x + 1) * 2)(jax.numpy.zeros(3)).jaxpr)
    24
    """
    total = 0
    for equation in jaxpr.eqns:
        # Equations of calls and loops hold closed or open jaxprs; what these compute is counted inside.
        parameters = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        inner = [value for value in parameters if hasattr(value, "eqns")]
        if inner:
            total += sum(map(written, inner))
        else:
            total += sum(out.aval.size * out.aval.dtype.itemsize for out in equation.outvars)
    return total
