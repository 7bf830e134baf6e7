"""The synthetic experiment of the layerwise paper: its data, its network and one training.

A training is data too: a :class:`seal_jax.reproduce.lw_plans.Plan` says what happens between its
rounds. So all methods, signal strengths, penalties and seeds are one compiled program.

Arrays are feature-major, ``[features, examples]`` and ``[out, in]``: half the time on a CPU.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from seal_jax.errors import check_number
from seal_jax.reproduce import lw_events as events
from seal_jax.reproduce.lw_plans import INITIALISERS, Plan, check_choice, check_least

DIMENSION, SIGNAL, CLASSES = 128, 3, 8
WIDTHS = (DIMENSION, 32, 32, CLASSES)
CHOICES = {
    "optimiser": ("gd", "adam"),
    "normaliser": ("after", "before"),
    "data": ("own", "shared"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all trainings of a table share.

    Attributes:
      train_size: training examples.
      batch_size: those of a step, shuffled every epoch; 0 for all of them, as in the paper's Table 1.
      test_size: test examples of a seed; not in the paper.
      learning_rate: of the optimizer.
      optimiser: "gd" or "adam", fresh in every round.
      steps: training steps of a round.
      normaliser: whether a block's normaliser follows its ReLU ("after") or precedes it ("before").
      epsilon: what the normaliser adds to the standard deviation.
      share: the share of the parameters that WELS, WELSR and DSD reinitialise.
      data: whether every seed draws its own examples or all have those of the first.
      seed: what all randomness comes from.
    """

    train_size: int = 256
    batch_size: int = 0
    test_size: int = 2048
    learning_rate: float = 0.05
    optimiser: str = "gd"
    steps: int = 200
    normaliser: str = "after"
    epsilon: float = 1e-6
    share: float = 0.2
    data: str = "own"
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("train_size", "test_size", "steps"):
            check_least(field, getattr(self, field))
        check_number(
            "batch_size",
            self.batch_size,
            lambda value: 0 <= value <= self.train_size,
            f"lie in 0..{self.train_size}, the training examples",
        )
        for field in ("learning_rate", "epsilon"):
            check_number(
                field, getattr(self, field), lambda value: 0 < value < math.inf, "be positive"
            )
        check_number("share", self.share, lambda value: 0 < value < 1, "lie between 0 and 1")
        check_number("seed", self.seed, lambda value: 0 <= value < 2**32, "lie in [0, 2**32)")
        for field, choices in CHOICES.items():
            check_choice(field, getattr(self, field), choices)


class Results(NamedTuple):
    """What is measured at the end of every round.

    Attributes:
      test: test accuracy, ``[seeds, plans, rounds]``.
      train: training accuracy, alike.
      loss: training loss without the penalty, alike.
    """

    test: np.ndarray
    train: np.ndarray
    loss: np.ndarray


def sample(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Draw examples of signal strength 1.

    The first three features are the bits of the label, the highest first, as -1 and 1: those of
    label 5 are (1, -1, 1). All others are standard normal.

    Returns:
      The inputs, ``[128, size]``, and the labels, ``[size]``.

    >>> inputs, labels = sample(jax.random.key(0), 4)
    >>> inputs.shape, int(labels[0]), inputs[:3, 0].tolist()
    ((128, 4), 7, [1.0, 1.0, 1.0])

    References:
      Alabdulmohsin et al. (2022), section 1.1.
    """
    label_key, noise_key = jax.random.split(key)
    labels = jax.random.randint(label_key, (size,), 0, CLASSES)
    bits = labels[None] >> jnp.arange(SIGNAL)[::-1, None] & 1
    noise = jax.random.normal(noise_key, (DIMENSION - SIGNAL, size))
    return jnp.concatenate([2.0 * bits - 1.0, noise]), labels


def initial(key: jax.Array, initialiser: jax.Array) -> events.Params:
    """Draw the network: kernels by one of ``INITIALISERS`` (an index, may be traced), biases 0."""
    keys = jax.random.split(key, len(WIDTHS) - 1)
    params = []
    for layer_key, (in_, out) in zip(keys, itertools.pairwise(WIDTHS), strict=True):
        kernel = jax.lax.select_n(
            initialiser,
            *(
                getattr(jax.nn.initializers, name)(in_axis=-1, out_axis=-2)(layer_key, (out, in_))
                for name in INITIALISERS.values()
            ),
        )
        params.append(events.Layer(kernel, jnp.zeros_like(kernel[:, :1])))
    return tuple(params)


def forward(
    params: events.Params,
    normaliser: events.Normaliser,
    inputs: jax.Array,
    alpha: Any,
    position: str,
) -> tuple[list[jax.Array], jax.Array]:
    """Return the outputs of the blocks before their normalisers, and the logits ``[8, examples]``.

    The signal strength multiplies the first kernel's columns instead of the inputs, so that
    trainings on the same examples share one matrix.
    """
    strength = jnp.where(jnp.arange(DIMENSION) < SIGNAL, alpha, 1.0)
    outputs, hidden = [], inputs
    for index, layer in enumerate(params):
        kernel = layer.kernel * strength if index == 0 else layer.kernel
        hidden = kernel @ hidden + layer.bias
        last = index == len(params) - 1
        if position == "after" and not last:
            hidden = jax.nn.relu(hidden)
        outputs.append(hidden)
        hidden = (hidden - normaliser.mean[index]) * normaliser.scale[index]
        if position == "before" and not last:
            hidden = jax.nn.relu(hidden)
    return outputs, hidden


def batch(
    settings: Settings, key: jax.Array, step: jax.Array, inputs: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the examples of a step of a round; the rest of an epoch is left out."""
    size = settings.batch_size
    if size in (0, settings.train_size):
        return inputs, targets
    steps_per_epoch = settings.train_size // size
    epoch_key = jax.random.fold_in(key, step // steps_per_epoch)
    order = jax.random.permutation(epoch_key, settings.train_size)
    chosen = jax.lax.dynamic_slice(order, (step % steps_per_epoch * size,), (size,))
    return inputs[:, chosen], targets[:, chosen]


def train(
    settings: Settings, plan: Plan, key: jax.Array, data: Any, test: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Train once by a plan; return what :class:`Results` has, ``[rounds]`` each."""
    optimizer = {"gd": optax.sgd, "adam": optax.adam}[settings.optimiser](settings.learning_rate)
    first_key, mask_key, round_key = jax.random.split(key, 3)
    inputs, labels = data
    targets = jax.nn.one_hot(labels, CLASSES, axis=0)
    start = initial(first_key, plan.initialiser)
    norms = events.norms(start)

    def network(params, normaliser, inputs):
        return forward(params, normaliser, inputs, plan.alpha, settings.normaliser)

    def cross_entropy(params, normaliser, inputs, targets):
        logits = network(params, normaliser, inputs)[1]
        return -(targets * jax.nn.log_softmax(logits, axis=0)).sum(0).mean()

    def objective(params, normaliser, inputs, targets):
        squares = [
            jnp.sum(layer.kernel**2) + plan.penalise_biases * jnp.sum(layer.bias**2)
            for layer in params
        ]
        return cross_entropy(params, normaliser, inputs, targets) + plan.penalty * sum(squares)

    def accuracy(params, normaliser, inputs, labels):
        return (network(params, normaliser, inputs)[1].argmax(0) == labels).mean()

    def one_round(carry, event):
        params, normaliser = carry
        index, event = event
        params = events.rescale(params, norms, event.rescale)
        outputs, _ = network(params, normaliser, inputs)
        normaliser = events.normalise(normaliser, outputs, event.normalise, settings.epsilon)
        fresh_key, new_mask_key, batch_key = jax.random.split(
            jax.random.fold_in(round_key, index), 3
        )
        params = events.forget(
            params,
            initial(fresh_key, plan.initialiser),
            events.selected(params, event, mask_key, new_mask_key, settings.share),
            event.reinitialise & plan.forget_biases,
        )

        def step(carry, count):
            params, state = carry
            gradient = jax.grad(objective)(
                params, normaliser, *batch(settings, batch_key, count, inputs, targets)
            )
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(
            step, (params, optimizer.init(params)), jnp.arange(settings.steps)
        )
        measured = (
            accuracy(params, normaliser, *test),
            accuracy(params, normaliser, inputs, labels),
            cross_entropy(params, normaliser, inputs, targets),
        )
        return (params, normaliser), measured

    rounds = plan.events.rescale.shape[0]
    _, measured = jax.lax.scan(
        one_round, (start, events.identity(norms)), (jnp.arange(rounds), plan.events)
    )
    return measured


def train_all(settings: Settings, plans: Plan, seeds: int, *, progress: bool = False) -> Results:
    """Train by every plan with every seed, several seeds at a time on all devices.

    Args:
      settings: what all trainings share.
      plans: the plans, their fields stacked.
      seeds: how many times, each with its own weights and, unless shared, its own examples.
      progress: whether to show a bar, if stderr is a terminal.

    Returns:
      ``[seeds, plans, rounds]`` of everything.
    """
    check_least("seeds", seeds)
    devices = jax.devices()[:seeds]
    # On a CPU one seed fills the cache of a core; an accelerator wants all there are.
    each = 1 if devices[0].platform == "cpu" else -(-seeds // len(devices))
    mesh = jax.sharding.Mesh(np.array(devices), ("seed",))
    plans = jax.tree.map(jnp.asarray, plans)
    batches: list[Any] = []
    with tqdm.tqdm(total=seeds, unit="seed", disable=None if progress else True) as bar:
        for first in range(0, seeds, each * len(devices)):
            # More seeds than asked for at the end: one shape, one compilation.
            some = jnp.arange(first, first + each * len(devices), dtype=jnp.uint32)
            batches.append(jax.device_get(_train_batch(settings, mesh, plans, some)))
            bar.update(min(len(some), seeds - first))
    return Results(*(np.concatenate(parts)[:seeds] for parts in zip(*batches, strict=True)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train_batch(settings: Settings, mesh: jax.sharding.Mesh, plans: Plan, seeds: jax.Array):
    over_seeds = jax.sharding.PartitionSpec("seed")
    return jax.shard_map(
        lambda plans, seeds: jax.vmap(lambda seed: _train_seed(settings, plans, seed))(seeds),
        mesh=mesh,
        in_specs=(jax.sharding.PartitionSpec(), over_seeds),
        out_specs=over_seeds,
    )(plans, seeds)


def _train_seed(settings: Settings, plans: Plan, seed: jax.Array):
    """Train by every plan on the examples of one seed."""
    train_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(settings.seed), seed), 2)
    data, test = examples(settings, seed)
    return jax.vmap(lambda plan: train(settings, plan, train_key, data, test))(plans)


def examples(settings: Settings, seed: jax.Array) -> tuple[Any, Any]:
    """Draw the training and the test examples of a seed."""
    own = jnp.zeros_like(seed) if settings.data == "shared" else seed
    keys = jax.random.split(jax.random.fold_in(jax.random.key(settings.seed), own))
    return sample(keys[0], settings.train_size), sample(keys[1], settings.test_size)
