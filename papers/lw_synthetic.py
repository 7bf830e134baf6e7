"""The synthetic experiment of the layerwise paper: its data, its network and its six methods.

Forgetting is done by :mod:`seal_jax.layerwise`, :mod:`seal_jax.selections` and
:mod:`seal_jax.forgetting`; :func:`train` combines them. What happens between the rounds of a training
is data (:class:`Plan`), so that all methods, signal strengths, penalties and seeds are one compiled
program.

Arrays are feature-major, inputs ``[features, examples]`` and kernels ``[out, in]``: all plans train
on the same examples, and XLA then merges their first layers into one product, in half the time.

References:
  Alabdulmohsin et al., `The Impact of Reinitialization on Generalization in Convolutional Neural
  Networks`, 2022, section 1.1 (Table 1) and appendix A (Table 4).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax

from seal_jax import forgetting, layerwise, selections
from seal_jax.errors import check_choice, check_integer, check_number, positive
from seal_jax.losses import mean_cross_entropy
from seal_jax.papers import load

# Section 1.1: 128 features, of which the first three encode the eight labels; two hidden layers of 32.
DIMENSION, SIGNAL, CLASSES = 128, 3, 8
WIDTHS = (DIMENSION, 32, 32, CLASSES)
BLOCKS = ("dense1", "dense2", "head")  # from bottom to top, as the library's functions expect them
REPEATS = 3  # the paper's N, of Table 1
# The highest layer that is kept in each of the five rounds of Table 4: "above the first one in the first two
# rounds, above the second layer in the next two rounds, and only the top layer in the last round". The top layer
# is the third, which is what lies above the second.
PENALTY_ROUNDS = (1, 1, 2, 2, 2)
# Names in the paper, and in `jax.nn.initializers`, whose distributions are those of Keras.
INITIALISERS = {"he": "he_normal", "glorot": "glorot_uniform"}
PAPER = {table: load("LW", f"Table {table}") for table in ("1", "4")}
# The rows are signal strengths in Table 1 and L2 penalties in Table 4; the columns are methods.
ROWS = {table: tuple(float(row) for (row,) in paper.rows) for table, paper in PAPER.items()}
METHODS = {table: paper.columns for table, paper in PAPER.items()}
# What an event reinitialises in addition to the layers above a block; indices into the masks of `selection`.
NOTHING, FIXED_SUBSET, NEW_SUBSET, SMALLEST = range(4)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all trainings of a table share: hyperparameters, and answers to what the paper leaves open.

    ``HELP`` describes the fields that the command offers. In addition: with ``first_round`` "train" LW's
    first event follows a first round of training (section 1.1), with "algorithm" it precedes all training
    (Algorithm 1); the number of rounds is the same, so "train" omits the last event. ``fc`` "two" is LW
    with K = 1. ``epsilon`` is added to the standard deviation in the normalisers.
    """

    train_size: int = 256
    epsilon: float = 1e-6
    first_round: Literal["algorithm", "train"] = "train"
    head: Literal["bare", "normalised"] = "bare"
    normaliser: Literal["after", "before"] = "after"
    fc: Literal["two", "one"] = "two"
    dsd: Literal["tensor", "global"] = "tensor"
    biases: Literal["reinitialised", "kept"] = "reinitialised"
    share: float = 0.2
    data: Literal["own", "shared"] = "own"
    table4_normaliser: Literal["none", "hidden", "all"] = "none"
    penalty: Literal["half", "sum"] = "half"
    penalise: Literal["kernels", "all"] = "kernels"
    optimiser: Literal["gd", "adam"] = "gd"
    learning_rate: float = 0.05
    batch_size: int = 0
    steps: int = 200
    test_size: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("train_size", "test_size", "steps"):
            check_integer(field, getattr(self, field), 1)
        bounds = f"in 0..{self.train_size}, the training examples"
        check_integer("batch_size", self.batch_size, 0, self.train_size, bounds=bounds)
        for field in ("learning_rate", "epsilon"):
            check_number(field, getattr(self, field), positive, "be positive")
        check_number("share", self.share, lambda value: 0 < value < 1, "lie between 0 and 1")
        check_number("seed", self.seed, lambda value: 0 <= value < 2**32, "lie in [0, 2**32)")
        # The choices of a field are its `Literal` type; other types have no arguments.
        for field, kind in get_type_hints(Settings).items():
            value, choices = getattr(self, field), get_args(kind)
            if choices:
                check_choice(field, value, choices, suggest=True)


HELP = {
    "first_round": "LW's first event: after a round of training (default for Table 1), or before",
    "head": "whether LW normalises the logits too (default: bare)",
    "normaliser": "whether LW's normalisers follow the ReLU (default) or precede it",
    "fc": "how many of the uppermost layers FC reinitialises (default: two)",
    "dsd": "smallest magnitudes of each tensor (default) or of all kernels",
    "biases": "of reinitialised layers (default: reinitialised)",
    "share": "what WELS, WELSR and DSD reinitialise (default: 0.2)",
    "data": "whether each seed has its own examples (default)",
    "table4_normaliser": "what LW normalises in Table 4 (default: none)",
    "penalty": "Table 4: the penalty times half the sum of squares, or times the sum",
    "penalise": "Table 4: whether the penalty is on biases too (default: kernels)",
    "optimiser": "default: gd for Table 1, adam for Table 4",
    "learning_rate": "default: 0.05 for Table 1, 0.03 for Table 4",
    "batch_size": "examples of a step (default: 0, all)",
    "steps": "training steps of a round (default: 200 for Table 1, 100 for Table 4)",
    "test_size": "test examples of a seed (default: 2048)",
    "seed": "what all randomness comes from (default: 0)",
}


class Event(NamedTuple):
    """What happens before a round of training, in this order; each an int, or ints ``[rounds]``.

    Attributes:
      rescale: kernels of blocks 1 to this one are scaled to their initial Frobenius norms; 0 for none.
      normalise: the block whose normaliser is measured; 0 for none.
      keep: everything above this block is reinitialised; 3, the number of blocks, for nothing.
      part: what else is reinitialised, in all kernels: ``NOTHING``, ``FIXED_SUBSET``, ...
    """

    rescale: Any
    normalise: Any
    keep: Any
    part: Any


IDLE = Event(rescale=0, normalise=0, keep=len(BLOCKS), part=NOTHING)


class Plan(NamedTuple):
    """One training, or many with their fields stacked.

    Attributes:
      alpha: signal strength.
      initialiser: index into ``INITIALISERS``.
      penalty: factor of the sum of squares of the weights in the objective.
      events: what happens before each round, an :class:`Event` of ``[rounds]``.
    """

    alpha: Any
    initialiser: Any
    penalty: Any
    events: Event


def events(table: str, settings: Settings) -> dict[str, Event]:
    """Return the events of the methods of a table, ``[rounds]`` each.

    >>> events("1", Settings())["LW"].keep.tolist()
    [3, 1, 1, 1, 2, 2, 2, 3, 3]

    References:
      Alabdulmohsin et al. (2022), Algorithm 1.
    """
    # How many rounds of plain training precede the first event of LW and Rescaling; of the others it is one.
    layers, lw_wait = len(BLOCKS), 1 if settings.first_round == "train" else 0
    if table == "1":
        # Algorithm 1's block of each round: 1 1 1 2 2 2 3 3 3. With 3, the head, nothing is above it.
        k = np.repeat(np.arange(1, layers + 1), REPEATS)
        normalised = layers if settings.head == "normalised" else layers - 1
    else:
        k = np.array(PENALTY_ROUNDS)
        normalised = {"none": 0, "hidden": layers - 1, "all": layers}[settings.table4_normaliser]

    def rounds(event: Event, wait: int = 1) -> Event:
        """Return an event before each round except the first ``wait``, which have none."""
        # Shifted, not stretched: every method has the same number of rounds, so the last events are cut off.
        fields = []
        for value, idle in zip(event, IDLE, strict=True):
            waited = np.concatenate([np.full(wait, idle), np.broadcast_to(value, k.shape)])
            fields.append(waited[: len(k)].astype(np.int32))
        return Event(*fields)

    lw = Event(rescale=k, normalise=np.where(k <= normalised, k, 0), keep=k, part=NOTHING)
    if table == "1":
        # All layers here are dense; FC reinitialises the uppermost ones.
        fc_keeps = layers - {"two": 2, "one": 1}[settings.fc]
        return {
            "BL": rounds(IDLE),
            "WELSR": rounds(IDLE._replace(part=NEW_SUBSET)),
            "DSD": rounds(IDLE._replace(part=SMALLEST)),
            "WELS": rounds(IDLE._replace(part=FIXED_SUBSET)),
            "FC": rounds(IDLE._replace(keep=fc_keeps)),
            "LW": rounds(lw, lw_wait),
        }
    # Appendix A scales back "all weights" in every round, not only those up to its block.
    return {
        "Baseline": rounds(IDLE),
        "Rescaling": rounds(IDLE._replace(rescale=layers), lw_wait),
        "LW": rounds(lw._replace(rescale=layers), lw_wait),
    }


def cells(table: str, initialisers: Sequence[str]) -> Iterator[tuple[str, float, str]]:
    """Return the cells of a table: initialiser, row (signal strength or penalty) and method."""
    # The one order of plans and of results: `plans` and `lw_tables.make_cells` both follow it.
    return itertools.product(initialisers, ROWS[table], METHODS[table])


def plans(table: str, settings: Settings, initialisers: Sequence[str]) -> Plan:
    """Return the plans of a table, stacked, in the order of :func:`cells`.

    >>> plans("1", Settings(), ["he"]).alpha.shape
    (18,)
    """
    by_method = events(table, settings)
    # "L2 penalty" may be the factor of the sum of squares (Keras) or of half of it.
    factor = 0.5 if settings.penalty == "half" else 1.0
    by_cell = [
        # NumPy scalars of one dtype, so that stacked plans are arrays that the program traces.
        Plan(
            alpha=np.float32(row if table == "1" else 0.5),
            initialiser=np.int32(list(INITIALISERS).index(initialiser)),
            penalty=np.float32(0.0 if table == "1" else factor * row),
            events=by_method[method],
        )
        for initialiser, row, method in cells(table, initialisers)
    ]
    return jax.tree.map(lambda *fields: np.stack(fields), *by_cell)


def concatenate(plans: Sequence[Plan]) -> Plan:
    """Return stacked plans, one after the other."""
    return jax.tree.map(lambda *fields: np.concatenate(fields), *plans)


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
    # [3, size]; `>>` binds tighter than `&`.
    bits = labels[None] >> jnp.arange(SIGNAL)[::-1, None] & 1
    noise = jax.random.normal(noise_key, (DIMENSION - SIGNAL, size))
    return jnp.concatenate([2.0 * bits - 1.0, noise]), labels


def examples(settings: Settings, seed: jax.Array) -> tuple[Any, Any]:
    """Draw the training and the test examples of a seed."""
    # All methods and signal strengths of a seed have the same examples: their differences are paired.
    data_seed = jnp.zeros_like(seed) if settings.data == "shared" else seed
    keys = jax.random.split(jax.random.fold_in(jax.random.key(settings.seed), data_seed))
    return sample(keys[0], settings.train_size), sample(keys[1], settings.test_size)


def batch(
    settings: Settings, key: jax.Array, step: jax.Array, inputs: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the examples of a step of a round; an incomplete last batch of an epoch is left out."""
    size = settings.batch_size
    if size in (0, settings.train_size):
        return inputs, labels
    steps_per_epoch = settings.train_size // size
    # The whole order is drawn again in every step of its epoch: 256 numbers, and no state to carry.
    epoch_key = jax.random.fold_in(key, step // steps_per_epoch)
    order = jax.random.permutation(epoch_key, settings.train_size)
    chosen = jax.lax.dynamic_slice(order, (step % steps_per_epoch * size,), (size,))
    return inputs[:, chosen], labels[chosen]


def init(key: jax.Array, initialiser: jax.Array | int) -> dict[str, dict[str, jax.Array]]:
    """Return initial parameters: kernels by one of ``INITIALISERS`` (an index, may be traced), biases 0."""
    params = {}
    keys = jax.random.split(key, len(BLOCKS))
    for name, layer_key, shape in zip(BLOCKS, keys, itertools.pairwise(WIDTHS), strict=True):
        # By both, then one is selected: the choice is data. Kernels are [out, in], hence the axes.
        drawn = [
            getattr(jax.nn.initializers, law)(in_axis=-1, out_axis=-2)(layer_key, shape[::-1])
            for law in INITIALISERS.values()
        ]
        kernel = jax.lax.select_n(initialiser, *drawn)
        params[name] = {"kernel": kernel, "bias": jnp.zeros(shape[1])}
    return params


def forward(
    params: Any, normalisers: jax.Array, inputs: jax.Array, alpha: Any, position: str
) -> tuple[list[jax.Array], jax.Array]:
    """Apply the network.

    Args:
      params: from :func:`init`.
      normalisers: mean and scale of each block, ``[3, 2]``; (0, 1) before one is inserted.
      inputs: ``[128, examples]``.
      alpha: signal strength.
      position: the normalisers' place, "after" the ReLU or "before" it.

    Returns:
      The outputs of the blocks before their normalisers, ``[width, examples]`` each, and the logits,
      ``[8, examples]``.
    """
    # The signal strength multiplies the first kernel's columns instead of the inputs, so that
    # trainings on the same examples share one matrix.
    strength = jnp.where(jnp.arange(DIMENSION) < SIGNAL, alpha, 1.0)
    outputs, hidden = [], inputs
    for name, (mean, scale) in zip(BLOCKS, normalisers, strict=True):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        hidden = (kernel * strength if name == BLOCKS[0] else kernel) @ hidden + bias[:, None]
        last = name == BLOCKS[-1]
        if position == "after" and not last:
            hidden = jax.nn.relu(hidden)
        outputs.append(hidden)
        hidden = (hidden - mean) * scale
        if position == "before" and not last:
            hidden = jax.nn.relu(hidden)
    return outputs, hidden


def insert_normaliser(
    normalisers: jax.Array, outputs: Sequence[jax.Array], block: Any, epsilon: float
) -> jax.Array:
    """Return the normalisers with that of ``block`` (from 1; 0 for none) measured on its outputs."""
    # All are measured and one is taken, since the block is data; the others keep their values.
    measured = jnp.array(
        [layerwise.normaliser(*layerwise.statistics(output), epsilon) for output in outputs]
    )
    return jnp.where(jnp.arange(1, len(outputs) + 1)[:, None] == block, measured, normalisers)


def selection(
    settings: Settings, params: Any, event: Event, fixed_key: jax.Array, new_key: jax.Array
) -> Any:
    """Return what the event of one round reinitialises, a tree of bool like ``params``."""
    # Every mask is computed and one is selected, since the kind of event is data.
    above = layerwise.above(params, BLOCKS, event.keep)
    if settings.biases == "kept":
        above = {name: {**flags, "bias": jnp.array(False)} for name, flags in above.items()}
    parts = {  # of the kernels: `selections` leaves biases alone
        NOTHING: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, bool), params),
        FIXED_SUBSET: selections.random_subset(fixed_key, params, settings.share),
        NEW_SUBSET: selections.random_subset(new_key, params, settings.share),
        SMALLEST: selections.smallest(params, settings.share, scope=settings.dsd),
    }
    return jax.tree.map(
        lambda whole, *masks: whole | jax.lax.select_n(event.part, *masks),
        above,
        *(parts[part] for part in range(len(parts))),
    )


class Results(NamedTuple):
    """Measurements at the end of every round.

    Attributes:
      test: test accuracy, ``[seeds, plans, rounds]``.
      train: training accuracy, likewise.
      loss: training loss without the penalty, likewise.
    """

    test: Any
    train: Any
    loss: Any


def train(settings: Settings, plan: Plan, key: jax.Array, data: Any, test: Any) -> Results:
    """Train once by a plan; return the measurements of its rounds, ``[rounds]`` each."""
    # The fixed key is that of WELS, whose subset is the same in all rounds.
    optimizer = {"gd": optax.sgd, "adam": optax.adam}[settings.optimiser](settings.learning_rate)
    first_key, fixed_key, round_key = jax.random.split(key, 3)
    init_fn = functools.partial(init, initialiser=plan.initialiser)
    initial_params = init_fn(first_key)
    norms = layerwise.kernel_norms(initial_params)

    def network(params, normalisers, inputs):
        return forward(params, normalisers, inputs, plan.alpha, settings.normaliser)

    def loss(params, normalisers, inputs, labels):
        return mean_cross_entropy(network(params, normalisers, inputs)[1].T, labels)

    def objective(params, *arguments):
        penalised = [
            leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1 or settings.penalise == "all"
        ]
        squares = sum(jnp.sum(leaf**2) for leaf in penalised)
        return loss(params, *arguments) + plan.penalty * squares

    def accuracy(params, normalisers, inputs, labels):
        return (network(params, normalisers, inputs)[1].argmax(0) == labels).mean()

    def one_round(carry, indexed_event):
        params, normalisers = carry
        # By the round's index: no key is carried, and equal rounds of two methods reinitialise alike.
        index, event = indexed_event
        fresh_key, new_key, batch_key = jax.random.split(jax.random.fold_in(round_key, index), 3)
        # The order of Algorithm 1, lines 4 to 12: the statistics are those of the rescaled kernels, taken
        # before anything above the block is reinitialised. The sample is the whole training set.
        params = layerwise.rescale(params, norms, BLOCKS, event.rescale)
        outputs, _ = network(params, normalisers, data[0])
        normalisers = insert_normaliser(normalisers, outputs, event.normalise, settings.epsilon)
        forget = selection(settings, params, event, fixed_key, new_key)
        params = forgetting.reinitialise_selected(fresh_key, params, forget, init_fn)

        def step(carry, count):
            params, opt_state = carry
            examples = batch(settings, batch_key, count, *data)
            gradient = jax.grad(objective)(params, normalisers, *examples)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        # Every round starts with a fresh optimizer state: it is not part of the outer carry.
        (params, _), _ = jax.lax.scan(
            step, (params, optimizer.init(params)), jnp.arange(settings.steps)
        )
        measured = Results(
            test=accuracy(params, normalisers, *test),
            train=accuracy(params, normalisers, *data),
            loss=loss(params, normalisers, *data),
        )
        return (params, normalisers), measured

    no_normalisers = jnp.tile(jnp.array([0.0, 1.0]), (len(BLOCKS), 1))
    rounds = jnp.arange(len(plan.events.part))
    return jax.lax.scan(one_round, (initial_params, no_normalisers), (rounds, plan.events))[1]


def train_all(settings: Settings, plans: Plan, seeds: int, *, progress: bool = False) -> Results:
    """Train each plan with each seed, several seeds at a time on all devices.

    Args:
      settings: what all trainings share.
      plans: the plans, their fields stacked.
      seeds: number of seeds; each has other initial weights and, unless shared, other examples.
      progress: whether to show a bar, if stderr is a terminal.

    Returns:
      Arrays ``[seeds, plans, rounds]``.
    """
    import tqdm

    check_integer("seeds", seeds, 1)
    devices = jax.devices()[:seeds]
    # One seed at a time fills the cache of a CPU core; an accelerator is given all seeds at once.
    per_device = 1 if devices[0].platform == "cpu" else -(-seeds // len(devices))
    mesh = jax.sharding.Mesh(np.array(devices), ("seed",))
    plans = jax.tree.map(jnp.asarray, plans)
    results = []
    with tqdm.tqdm(total=seeds, unit="seed", disable=None if progress else True) as bar:
        for first in range(0, seeds, per_device * len(devices)):
            # The last chunk may train more seeds than asked for, which are cut off below: one shape needs
            # one compilation.
            chunk = jnp.arange(first, first + per_device * len(devices), dtype=jnp.uint32)
            results.append(jax.device_get(_train_chunk(settings, mesh, plans, chunk)))
            bar.update(min(len(chunk), seeds - first))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:seeds], *results)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train_chunk(settings: Settings, mesh: jax.sharding.Mesh, plans: Plan, seeds: jax.Array):
    def train_seed(plans, seed):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(settings.seed), seed), 2)
        data, test = examples(settings, seed)
        # The examples are not mapped over: all plans share them.
        return jax.vmap(lambda plan: train(settings, plan, key, data, test))(plans)

    over_seeds = jax.P("seed")
    return jax.shard_map(
        jax.vmap(train_seed, in_axes=(None, 0)),
        mesh=mesh,
        in_specs=(jax.P(), over_seeds),
        out_specs=over_seeds,
        check_vma=False,  # seeds do not communicate
    )(plans, seeds)
