"""Margins of the training examples and size of the weights: LW paper, Figures 6, 7, 10 and 11."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from seal_jax.core import plots
from seal_jax.core.tables import Table, grouped, spread
from seal_jax.errors import UsageError
from seal_jax.evaluation import margins as library
from seal_jax.evaluators.evaluator import Evaluator, Record, WorkItem
from seal_jax.evaluators.loaded_run import LoadedRun, Network

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
      count: smallest margins that are kept.
      sample: training images for the size of the weights.
      seed: of that sample.
    """

    count: int = 400
    sample: int = 256
    seed: int = 0

    def __post_init__(self):
        for field in ("count", "sample"):
            if getattr(self, field) < 1:
                raise UsageError(f"--{field}={getattr(self, field)} must be at least 1")


def units(loaded_run: LoadedRun, options: Options) -> Sequence[WorkItem]:
    """Return one unit a network."""
    train = loaded_run.dataset.train
    if options.sample > len(train):
        raise UsageError(f"--sample={options.sample} is more than the {len(train)} training images")
    chosen = np.random.default_rng(options.seed).choice(len(train), options.sample, replace=False)

    def measure(network: Network) -> dict[str, Any]:
        found = library.margins(loaded_run.logits(network, train.images), train.labels)
        head = network.variables["params"][loaded_run.model.head]
        features = loaded_run.features(network, train.images[np.sort(chosen)])
        return {
            **network.identity,
            "train_accuracy": float((found > 0).mean()),
            "median": float(np.median(found)),
            "size_of_weights": library.size_of_weights(features, np.asarray(head["kernel"])),
            "smallest": found[: options.count].tolist(),
        }

    return [WorkItem(each.key, functools.partial(measure, each)) for each in loaded_run.networks]


def table(rows: Sequence[Record]) -> Table:
    """Return margins and size of the weights, mean over seeds."""
    cells = []
    for (run, weights, step), own in grouped(rows, ("run", "weights", "step")).items():
        smallest = [np.asarray(row["smallest"]) for row in own]
        cells.append(
            [
                f"{run}",
                weights,
                str(step),
                str(len(own)),
                spread([row["train_accuracy"] for row in own]).text(scale=100),
                spread([part[0] for part in smallest]).text(3),
                spread([part.mean() for part in smallest]).text(3),
                spread([row["median"] for row in own]).text(4),
                spread([row["size_of_weights"] for row in own]).text(1),
            ]
        )
    count = len(rows[0]["smallest"])
    return Table(
        "Margins in the softmax on the training images",
        (
            "run",
            "weights",
            "step",
            "seeds",
            "train acc. %",
            "smallest",
            f"mean of {count} smallest",
            "median",
            "size of weights",
        ),
        cells,
        (
            "margin: probability of the true class less the largest other one, in [-1, 1]; the "
            "images are not augmented, so the accuracy is not that of the training's log.",
            "size of weights: norm of a sample of classifier inputs times that of its weights "
            "(LW paper, appendix D).",
            "The LW paper shows these as plots, without numbers.",
        ),
    )


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw the smallest margins in ascending order, one line a run, best and last side by side."""
    found, styles = grouped(rows, ("weights",)), plots.run_styles(rows)
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for each, ((weights,), own) in zip(axes, found.items(), strict=True):
        for (run,), mine in grouped(own, ("run",)).items():
            newest = max(row["step"] for row in mine)
            lines = np.array([row["smallest"] for row in mine if row["step"] == newest])
            rank = np.arange(1, lines.shape[1] + 1)
            style = styles[run]
            mean, low, high = plots.over_seeds(lines.T)
            each.plot(rank, mean, label=run, linewidth=1.4, **style)
            if len(lines) > 1:
                each.fill_between(rank, low, high, color=style["color"], alpha=0.2, linewidth=0)
        each.axhline(0, color="#888888", linewidth=0.7)
        each.set_title(f"{weights} weights")
        each.set_xlabel("rank of the training image")
        each.grid(axis="y", color="#dddddd", linewidth=0.6)
        each.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"margin\n{plots.BAND}")
    axes[-1].legend(frameon=False)


KIND = Evaluator(
    name="margins",
    summary="smallest margins of the training images, and the size of the weights",
    source="LW paper, Figures 6, 7, 10, 11 and appendix D",
    options=Options,
    units=units,
    table=table,
    draw=draw,
)
