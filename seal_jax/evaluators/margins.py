"""Margins of the training examples and size of the weights: LW paper, Figures 6, 7, 10 and 11."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from seal_jax.core import plots, tables
from seal_jax.core.tables import Record, Table
from seal_jax.errors import UsageError
from seal_jax.evaluation import margins as library
from seal_jax.evaluators.evaluator import Evaluator, WorkItem
from seal_jax.evaluators.loaded_run import LoadedRun, Network
from seal_jax.evaluators.options import check_least

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Options:
    """The numbers of margins and of images.

    Attributes:
      count: smallest margins that are kept.
      sample: training images for the size of the weights.
      seed: of that sample.
    """

    count: int = 400
    sample: int = 256
    seed: int = 0

    def __post_init__(self):
        check_least(self, count=1, sample=1)


def work_items(loaded_run: LoadedRun, options: Options) -> Sequence[WorkItem]:
    """Return a work item for each network."""
    train = loaded_run.dataset.train
    if options.sample > len(train):
        raise UsageError(f"--sample={options.sample} is more than the {len(train)} training images")
    # The same sample for all networks.
    chosen = np.random.default_rng(options.seed).choice(len(train), options.sample, replace=False)

    def measure(network: Network) -> dict[str, Any]:
        # All training images, ascending: a positive margin is a correct prediction.
        margins = library.margins(loaded_run.logits(network, train.images), train.labels)
        head = network.variables["params"][loaded_run.model.head]
        features = loaded_run.features(network, train.images[np.sort(chosen)])
        return {
            **network.identity,
            "train_accuracy": float((margins > 0).mean()),
            "median": float(np.median(margins)),
            # The bias is left out: the paper's measure is of the weight matrix.
            "size_of_weights": library.size_of_weights(features, np.asarray(head["kernel"])),
            "smallest": margins[: options.count].tolist(),
        }

    return [
        WorkItem(network.key, functools.partial(measure, network))
        for network in loaded_run.networks
    ]


def table(rows: Sequence[Record]) -> Table:
    """Return margins and size of the weights, mean over seeds."""
    return Table.of_groups(
        "Margins in the softmax on the training images",
        [
            *tables.CHECKPOINT_COLUMNS,
            tables.seed_mean("train acc. %", "train_accuracy", scale=100),
            # Margins are stored in ascending order.
            tables.seed_mean("smallest", lambda row: row["smallest"][0], 3),
            tables.seed_mean(
                f"mean of {len(rows[0]['smallest'])} smallest",
                lambda row: float(np.mean(row["smallest"])),
                3,
            ),
            tables.seed_mean("median", "median", 4),
            tables.seed_mean("size of weights", "size_of_weights", 1),
        ],
        tables.by_checkpoint(rows),
        (
            "margin: probability of the true class less the largest other one, in [-1, 1]; the "
            "images are not augmented, so the accuracy is not that of the training's log.",
            "size of weights: norm of a sample of classifier inputs times that of its weights "
            "(LW paper, appendix D).",
            "The LW paper shows these as plots, without numbers.",
        ),
    )


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw the smallest margins in ascending order, one line per run, best and last side by side."""
    panels = plots.lines_by_weights(
        figure, tables.newest(rows), "rank", lambda row: row["smallest"]
    )
    for axes in panels:
        axes.axhline(0, color="#888888", linewidth=0.7)
        axes.set_xlabel("rank of the training image")
    panels[0].set_ylabel(f"margin\n{plots.BAND}")
    panels[-1].legend(frameon=False)


EVALUATOR = Evaluator(
    name="margins",
    summary="smallest margins of the training images, and the size of the weights",
    source="LW paper, Figures 6, 7, 10, 11 and appendix D",
    options=Options,
    work_items=work_items,
    table=table,
    draw=draw,
    order=20,
)
