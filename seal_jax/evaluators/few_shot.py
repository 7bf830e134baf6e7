"""Cross-domain few-shot classification: SEAL paper, Tables 4 and 5."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from seal_jax import data, papers
from seal_jax.core import plots, tables
from seal_jax.core.tables import Column, Record, Table, grouped
from seal_jax.errors import UsageError
from seal_jax.evaluation import affines, few_shot
from seal_jax.evaluators import transfer_data
from seal_jax.evaluators.evaluator import Evaluator, WorkItem
from seal_jax.evaluators.loaded_run import LoadedRun, Network
from seal_jax.evaluators.options import check_least, check_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEADS = {"linear": "Linear", "linear_affines": "Linear+Affines"}


@dataclasses.dataclass(frozen=True)
class Options:
    """The definition of episodes and their training; what has no option is as in the public protocol.

    Attributes:
      datasets: episodes are drawn from all labelled images of each.
      heads: "linear" on frozen features; "linear_affines" trains BatchNorm's scales and biases too.
      shots: images of each class to learn from.
      ways: classes of an episode.
      queries: images of each class to be scored on.
      episodes: how many, for each data set, head and number of shots.
      epochs: passes over the images to learn from.
      image_size: side of the images, after a resize to int(1.15 * side) and a crop of the centre;
        "none" for the run's own. The public protocol has 224.
      normalisation: name of channel statistics, such as the public protocol's "imagenet"; left out,
        the run's.
      statistics: what BatchNorm normalises with while its scales and biases learn: statistics of the
        batch that enter the running ones too (batch) or not (batch_only), or the running ones.
        Queries see the running ones.
      seed: of the episodes.
      chunk: episodes of the linear head in a work item.
      affines_chunk: episodes of the other head in a work item.
      together: of these, how many side by side on a device; "none" for what its memory holds.
      batch_size: images per step of the frozen network.
    """

    datasets: tuple[str, ...] = (
        "chestx",
        "isic2018",
        "image_folder/eurosat",
        "crop_disease",
    )
    heads: tuple[str, ...] = ("linear", "linear_affines")
    shots: tuple[int, ...] = (1, 5, 20, 50)
    ways: int = 5
    queries: int = 15
    episodes: int = 600
    epochs: int = 100
    image_size: int | None = None
    normalisation: str = ""
    statistics: affines.Statistics = "batch"
    seed: int = 0
    chunk: int = 100
    affines_chunk: int = 20
    together: int | None = None
    batch_size: int = 256

    def __post_init__(self):
        check_names("heads", self.heads, HEADS)
        counts = ("episodes", "chunk", "affines_chunk", "together", "image_size", "batch_size")
        check_least(self, **dict.fromkeys(counts, 1))
        # Built for its checks alone: what the library refuses is an error before any work.
        for shots in self.shots:
            self.protocol(shots)

    def protocol(self, shots: int) -> affines.Protocol:
        """Return the protocol of both heads."""
        # The linear head ignores the statistics; all other fields are the same for both.
        fields = {name: getattr(self, name) for name in ("ways", "queries", "epochs", "statistics")}
        return affines.Protocol(shots=shots, **fields)


def work_items(loaded_run: LoadedRun, options: Options) -> Sequence[WorkItem]:
    """Return a work item for every chunk of episodes, data sets outermost."""
    height, width, _ = transfer_data.model_for(loaded_run, options.image_size).image_shape
    if height != width:
        raise UsageError(
            f"the run's images are {height}x{width}, and those of episodes are square: "
            "give --image-size"
        )
    normalise, renormalise = transfer_data.normalisation(loaded_run, options.normalisation)
    variables = loaded_run.networks[0].variables
    trainable = affines.affines_of(variables["params"], variables["batch_stats"])
    if "linear_affines" in options.heads and not trainable:
        raise UsageError(
            f"--heads=linear_affines: {loaded_run.model.name} has no BatchNorm whose scales and "
            "biases could train; use --heads=linear"
        )
    for name in options.datasets:
        # From the labels alone: all data sets are checked before an image of the first is decoded.
        labels = transfer_data.episode_data(loaded_run, name, height, images=False).labels
        try:
            # The most shots need the most images of each class.
            few_shot.check(labels, options.protocol(max(options.shots)))
        except UsageError as error:
            raise UsageError(f"--datasets={name}: {error}") from None

    # Work items are ordered by data set and then by network, so one of each is enough to keep in memory.
    @functools.lru_cache(maxsize=1)
    def load(name: str) -> data.Split:
        return transfer_data.episode_data(loaded_run, name, height)

    def features_of(variables: Any, images: jax.Array) -> jax.Array:
        # LoadedRun.apply normalises as the run did; other channel statistics come on top of that.
        return loaded_run.model.features(variables, renormalise(images))["features"]

    @functools.lru_cache(maxsize=1)
    def features(name: str, network: Network) -> np.ndarray:
        return transfer_data.features(
            loaded_run, network, load(name).images, features_of, options.batch_size
        )

    # An episode with affines trains the whole network, so a work item has fewer of them.
    chunks = {"linear": options.chunk, "linear_affines": options.affines_chunk}

    def measure(name: str, network: Network, head: str, shots: int, first: int) -> dict[str, Any]:
        protocol, split, diverged = options.protocol(shots), load(name), 0
        episodes = min(chunks[head], options.episodes - first)
        # Episodes are numbered through, so chunks of any size draw the same ones.
        span: dict[str, Any] = {"seed": options.seed, "episodes": episodes, "first": first}
        if head == "linear":
            scores = few_shot.linear(features(name, network), split.labels, protocol, **span)
        else:
            tuned = affines.linear_affines(
                loaded_run.model,
                network.variables,
                split.images,
                split.labels,
                normalise,
                protocol,
                together=options.together,
                **span,
            )
            scores, diverged = tuned.scores, int(tuned.diverged.sum())
        return {
            **network.identity,
            "dataset": name,
            "head": head,
            "ways": options.ways,
            "shots": shots,
            "first": first,
            "diverged": diverged,
            "accuracies": scores.accuracies.tolist(),
        }

    return [
        WorkItem(
            f"{network.key}/{name}/{head}/{shots}-shot/{first}",
            functools.partial(measure, name, network, head, shots, first),
        )
        # Data sets outermost: their images are decoded once for all networks.
        for name in options.datasets
        for network in loaded_run.networks
        for head in options.heads
        for shots in options.shots
        for first in range(0, options.episodes, chunks[head])
    ]


def combine(records: Sequence[Record]) -> Sequence[Record]:
    """Return one row for all episodes of a network, data set, head and number of shots."""
    fields = ("run", "weights", "seed", "step", "dataset", "head", "shots")
    rows = []
    for chunks in grouped(records, fields).values():
        accuracies = [value for record in chunks for value in record["accuracies"]]
        scores = few_shot.Scores(np.array(accuracies))
        row = {key: value for key, value in chunks[0].items() if key not in ("first", "accuracies")}
        row["episodes"] = len(accuracies)
        row |= {"accuracy": scores.mean, "interval": scores.interval}
        row["diverged"] = sum(record["diverged"] for record in chunks)
        rows.append({**row, "accuracies": accuracies})
    return rows


def paper(row: Record) -> papers.Number | None:
    """Return the paper's accuracy and half its interval in % for a method, data set, head and shots."""
    # The paper has 5-way episodes only.
    if row["ways"] != 5:
        return None
    keys = (row["head"], transfer_data.paper_method(row) or "", str(row["shots"]))
    column = transfer_data.paper_name(row["dataset"])
    return papers.load("SEAL", "Tables 4, 5").get(*keys, column=column)


def table(rows: Sequence[Record]) -> Table:
    """Return a line for each run, head and number of shots, as in Tables 4 and 5."""
    notes = [
        f"Accuracy in % of {rows[0]['ways']}-way episodes ({rows[0]['episodes']} of each kind). In "
        "brackets: the 95 % interval of one network over its episodes (1.96 standard errors).",
    ]
    if any(map(paper, rows)):
        notes.append(
            "paper: SEAL paper, Tables 4 and 5, the row of the same method; ResNet-50 trained on "
            "Tiny-ImageNet (64x64) for 10 generations of 160 epochs, Normal for one. Its ± is half "
            "the 95 % interval over 600 episodes. Here: "
            f"{transfer_data.settings_of(rows)}."
        )
    diverged = sum(row["diverged"] for row in rows)
    if diverged:
        notes.append(f"{diverged} episodes diverged; each counts with the accuracy of chance.")
    return Table.of_groups(
        "Few-shot classification across domains",
        [
            *map(tables.shared, ("run", "weights", "step")),
            Column("seed", _seeds),
            tables.shared("head", lambda row: HEADS[row["head"]]),
            tables.shared("shots"),
            *itertools.chain(*map(_columns_of, dict.fromkeys(row["dataset"] for row in rows))),
        ],
        _each_seed_and_all(rows),
        notes,
    )


def _each_seed_and_all(rows: Sequence[Record]) -> Iterator[Sequence[Record]]:
    """Yield groups of rows: of each seed, whose interval is over episodes, then of all seeds."""
    for same_task in tables.by_checkpoint(rows, "head", "shots"):
        seeds = grouped(same_task, ("seed",))
        yield from seeds.values()
        if len(seeds) > 1:
            yield same_task


def _seeds(rows: Sequence[Record]) -> str:
    seeds = {row["seed"] for row in rows}
    return f"{len(seeds)} seeds" if len(seeds) > 1 else f"{rows[0]['seed']}"


def _columns_of(name: str) -> tuple[Column, Column]:
    """Return the columns of a data set: its accuracy, and the paper's where it has one."""

    def accuracy(rows: Sequence[Record]) -> str:
        # One network has an interval over its episodes; of several the interval is over seeds.
        on_it = [row for row in rows if row["dataset"] == name]
        if len(on_it) != 1:
            return seed_mean.text(on_it)
        mean, half = 100 * on_it[0]["accuracy"], 100 * on_it[0]["interval"]
        return f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"

    def published(rows: Sequence[Record]) -> str:
        number = next((paper(row) for row in rows if row["dataset"] == name), None)
        return tables.cell(number, lambda number: "{:.2f} ± {:.2f}".format(*number))

    title = transfer_data.paper_name(name)
    seed_mean = tables.seed_mean(title, "accuracy", scale=100)
    return Column(title, accuracy), Column("paper", published, optional=True)


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw accuracy over shots: a panel for each data set and weights, a line for each run and head."""
    rows = tables.newest(rows)
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    shots = sorted({row["shots"] for row in rows})
    panels = plots.panels_by_weights(figure, rows, len(names), sharex=True, sharey="col")
    for weights, of_weights, line in panels:
        for axes, name in zip(line, names, strict=True):
            _draw_lines(axes, [row for row in of_weights if row["dataset"] == name], shots)
        line[0].set_ylabel(f"accuracy, %, {weights} weights\nmean, 95 % interval")
    for axes, name in zip(panels[0][2], names, strict=True):
        axes.set_title(transfer_data.paper_name(name), parse_math=False)
    for axes in panels[-1][2]:
        axes.set_xticks(range(len(shots)), [str(count) for count in shots])
        axes.set_xlabel("images a class")
    every_panel = [axes for _, _, line in panels for axes in line]
    plots.legend_below(figure, every_panel, transfer_data.PAPER_LABEL)


def _draw_lines(axes: Axes, rows: Sequence[Record], shots: Sequence[int]) -> None:
    styles = plots.run_styles(rows)
    for (run, head), of_head in grouped(rows, ("run", "head")).items():
        colour, marker = styles[run]["color"], "o" if head == "linear" else "s"
        by_shots = grouped(of_head, ("shots",))
        place = [shots.index(count) for (count,) in by_shots]
        points = 100 * np.array([_point(seeds) for seeds in by_shots.values()]).T
        axes.errorbar(
            place,
            points[0],
            plots.bars(points),
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.4,
            elinewidth=1.0,
            linestyle="-" if head == "linear" else "--",
            label=f"{run}, {HEADS[head]}",
        )
        # The paper's number depends on the method, so all seeds share it.
        published = [paper(seeds[0]) for seeds in by_shots.values()]
        numbers = [(x, number.mean) for x, number in zip(place, published, strict=True) if number]
        if numbers:
            axes.plot(
                *zip(*numbers, strict=True),
                linestyle="none",
                marker=marker,
                markersize=7,
                markerfacecolor="none",
                markeredgecolor=colour,
                alpha=0.6,
                label=f"{transfer_data.PAPER_LABEL} (hollow)",
            )
    if rows:
        axes.axhline(100 / rows[0]["ways"], color="#888888", linewidth=0.7, linestyle=":")


def _point(rows: Sequence[Record]) -> tuple[float, float, float]:
    """Return accuracy and ends of its interval: of one seed over episodes, of several over seeds."""
    # The same two meanings as in the table.
    mean, _, _, low, high = tables.spread([row["accuracy"] for row in rows])
    half = rows[0]["interval"]
    return (mean, mean - half, mean + half) if len(rows) == 1 else (mean, low, high)


def size(rows: Sequence[Record]) -> tuple[float, float]:
    """Return the figure's size: a panel for each data set and weights."""
    wide = len({row["dataset"] for row in rows})
    high = len({row["weights"] for row in rows})
    lines = math.ceil(len({(row["run"], row["head"]) for row in rows}) / 2)
    return (max(2.7 * wide + 0.8, 6.0), 2.7 * high + 0.7 + 0.25 * lines)


EVALUATOR = Evaluator(
    name="few_shot",
    summary="few-shot classification of other domains, on frozen features and with BatchNorm's affines",
    source="SEAL paper, Tables 4 and 5; Guo et al. 2020; Yazdanpanah et al. 2022",
    options=Options,
    work_items=work_items,
    table=table,
    draw=draw,
    rows=combine,
    size=size,
    order=11,
)
