"""Training accuracy under noise on the weights: LW paper, Figures 5 and 12."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.core import plots, tables
from seal_jax.core.tables import Record, Table
from seal_jax.errors import check_number, nonnegative
from seal_jax.evaluation import margins as library
from seal_jax.evaluators import batching
from seal_jax.evaluators.evaluator import Evaluator, WorkItem
from seal_jax.evaluators.loaded_run import LoadedRun, Network
from seal_jax.evaluators.options import check_least
from seal_jax.training.batches import padded_batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Options:
    """The noise, and the images of the accuracy.

    Attributes:
      sigmas: standard deviations of the noise on every parameter.
      draws: of noise, the same for every deviation.
      images: training images the accuracy is of, a random sample; 0 for all.
      batch_size: images per step.
      seed: of noise and sample.
    """

    sigmas: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
    draws: int = 10
    images: int = 2000
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self):
        for sigma in self.sigmas:
            check_number("--sigmas", sigma, nonnegative, "be 0 or positive")
        check_least(self, draws=1, images=0, batch_size=1)


def work_items(loaded_run: LoadedRun, options: Options) -> Sequence[WorkItem]:
    """Return a work item for each network."""
    train = batching.subset(loaded_run.dataset.train, options.images, options.seed)
    rows, weights = padded_batches(len(train), min(options.batch_size, len(train)))
    batches = (train.images[rows], train.labels[rows], weights)

    # One function object for all networks, with everything that differs as an argument: they share its program.
    def accuracy(params: Any, others: Any, batches: Any) -> jax.Array:
        def add(correct: jax.Array, batch: Any) -> tuple[jax.Array, None]:
            images, labels, weights = batch
            logits = loaded_run.model.module.apply(
                {**others, "params": params}, loaded_run.normalise(images), train=False
            )
            # weights are 0 for the filling of the last batch
            return correct + (weights * (logits.argmax(-1) == labels)).sum(), None

        return jax.lax.scan(add, jnp.zeros(()), batches)[0] / len(train)

    def measure(network: Network) -> dict[str, Any]:
        params = network.variables["params"]
        # Noise is on the parameters alone. BatchNorm's statistics are data, and stay those of the training.
        others = {name: tree for name, tree in network.variables.items() if name != "params"}
        accuracies = library.flatness(
            accuracy,
            params,
            # A deviation of 0 gives the accuracy without noise in the same program.
            (0.0, *options.sigmas),
            rest=(others, batches),
            draws=options.draws,
            key=jax.random.key(options.seed),
        )
        # Without noise all draws are the same network.
        return {
            **network.identity,
            "train_accuracy": float(accuracies[0, 0]),
            "sigmas": list(options.sigmas),
            "accuracies": accuracies[1:].mean(1).tolist(),
            "draws_std": accuracies[1:].std(1).tolist(),
        }

    return [
        WorkItem(network.key, functools.partial(measure, network))
        for network in loaded_run.networks
    ]


def _lost(row: Record) -> dict[float, float]:
    """Return the points of training accuracy lost at each deviation."""
    # Against the accuracy on the same images without noise, not that of the training's log.
    lost = 100 * (row["train_accuracy"] - np.array(row["accuracies"]))
    return dict(zip(row["sigmas"], lost.tolist(), strict=True))


def _lost_at(sigma: float) -> tables.Column:
    return tables.seed_mean(f"{sigma:g}", lambda row: _lost(row).get(sigma), 1)


def table(rows: Sequence[Record]) -> Table:
    """Return the loss of training accuracy at each deviation, mean over seeds."""
    sigmas = dict.fromkeys(sigma for row in rows for sigma in row["sigmas"])
    return Table.of_groups(
        "Points of training accuracy lost under noise N(0, sigma^2) on every parameter",
        [
            *tables.CHECKPOINT_COLUMNS,
            tables.seed_mean("train acc. %", "train_accuracy", scale=100),
            *map(_lost_at, sigmas),
        ],
        tables.by_checkpoint(rows),
        (
            "Smaller is flatter. Mean over draws of noise. The LW paper shows this as a plot, without "
            "numbers.",
            "Networks whose weights differ in size feel the same noise differently: BatchNorm makes "
            "the size of a kernel meaningless, not that of the noise.",
        ),
    )


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw the change of training accuracy against the deviation, best and last side by side."""
    panels = plots.lines_by_weights(
        figure, tables.newest(rows), "sigmas", lambda row: [*_lost(row).values()], marker="."
    )
    for axes in panels:
        axes.set_xscale("log")
        axes.set_xlabel("sigma of the noise")
    panels[0].set_ylabel(f"training accuracy lost, points\n{plots.BAND}")
    panels[0].legend(frameon=False)


EVALUATOR = Evaluator(
    name="flatness",
    summary="training accuracy under noise on the weights",
    source="LW paper, Figures 5 and 12",
    options=Options,
    work_items=work_items,
    table=table,
    draw=draw,
    order=21,
)
