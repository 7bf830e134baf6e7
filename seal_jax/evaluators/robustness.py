"""Accuracy on other test sets of the same classes, such as corrupted images: Hendrycks and Dietterich 2019."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from seal_jax import data
from seal_jax.core import plots, tables
from seal_jax.core.tables import Record, Table, grouped
from seal_jax.data.readers import open_data
from seal_jax.errors import UsageError
from seal_jax.evaluators import batching
from seal_jax.evaluators.evaluator import Evaluator, WorkItem
from seal_jax.evaluators.loaded_run import LoadedRun, Network
from seal_jax.evaluators.options import check_least

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEAN = "mean"


@dataclasses.dataclass(frozen=True)
class Options:
    """The test sets.

    Attributes:
      datasets: prepared data sets whose classes are classes of the run, by name.
      splits: of each of them; "none" takes its test split, or if it has none, as Tiny-ImageNet-C, all.
      batch_size: images per step of the network.
    """

    datasets: tuple[str, ...] = ("tiny_imagenet_c",)
    splits: tuple[str, ...] | None = None
    batch_size: int = 256

    def __post_init__(self):
        check_least(self, batch_size=1)


def work_items(loaded_run: LoadedRun, options: Options) -> Sequence[WorkItem]:
    """Return a work item for each test set and network, the run's own test split first."""
    own = loaded_run.dataset
    fields = loaded_run.settings.data
    sets = []
    for name in options.datasets:
        opened = open_data(name, loaded_run.data_dir(name))
        names = [opened.test_split] if opened.test_split else [*opened.counts]
        labels = class_labels(name, opened.class_names, own.class_names)
        for split in options.splits or ():
            opened.reader(split, "--splits")  # an error before any work
        sets += [(name, split, labels) for split in options.splits or names]

    # Work items have the test sets outermost, so one at a time is enough.
    @functools.lru_cache(maxsize=1)
    def load(name: str, split: str) -> data.Split:
        loaded, _ = data.load_labelled(
            name,
            data_dir=loaded_run.data_dir(name),
            split=split,
            image_size=own.image_shape[:2],
            channels=loaded_run.channels,
            corrupt=fields.corrupt,
        )
        return loaded

    def score(name: str, split: str, images: Any, labels: Any, network: Network) -> dict[str, Any]:
        logits = loaded_run.logits(network, images, options.batch_size)
        accuracy = float((logits.argmax(-1) == labels).mean())
        place = {"dataset": name, "split": split, "images": len(labels)}
        return {**network.identity, **place, "accuracy": accuracy}

    def measure(name: str, split: str, labels: np.ndarray, network: Network) -> dict[str, Any]:
        loaded = load(name, split)
        return score(name, split, loaded.images, labels[loaded.labels], network)

    of_run = functools.partial(score, own.name, "of the run", own.test.images, own.test.labels)
    tests = [("run", of_run)] + [
        (f"{name}/{split}", functools.partial(measure, name, split, labels))
        for name, split, labels in sets
    ]
    return [
        WorkItem(f"{network.key}/{key}", functools.partial(test, network))
        for key, test in tests
        for network in loaded_run.networks
    ]


def class_labels(dataset: str, names: Sequence[str], own: Sequence[str]) -> np.ndarray:
    """Return the run's label of each class of another data set, matched by name.

    Classes without names of their own, which are called by their numbers, are those of the same numbers.

    >>> class_labels("other", ["n02", "n01"], ["n01", "n02", "n03"])
    array([1, 0])

    Raises:
      UsageError: where the run does not have such a class.
    """
    numbers = [str(label) for label in range(len(own))]
    if list(names) == numbers:
        return np.arange(len(own))
    for name in names:
        if name not in own:
            raise UsageError(
                f"--datasets={dataset} has the class {name!r}, which the run was not trained on: "
                "give data of the run's classes"
            )
    return np.array([list(own).index(name) for name in names])


def combined(records: Sequence[Record]) -> Sequence[Record]:
    """Return a row for each network and corruption, over its severities, and one for the mean of all."""
    rows = []
    for of_network in grouped(records, (*batching.NETWORK, "dataset")).values():
        corruptions: dict[str, list[Record]] = {}
        for record in of_network:
            # A split of a corruption and its severity, such as fog_3; others stand for themselves.
            match = re.fullmatch(r"(.+)_[1-5]", record["split"])
            corruptions.setdefault(match[1] if match else record["split"], []).append(record)
        parts = [
            {
                **of_one[0],
                "split": name,
                "splits": len(of_one),
                "images": sum(record["images"] for record in of_one),
                "accuracy": float(np.mean([record["accuracy"] for record in of_one])),
            }
            for name, of_one in corruptions.items()
        ]
        rows += parts
        if len(parts) > 1:
            rows.append(
                {
                    **parts[0],
                    "split": MEAN,
                    "splits": len(of_network),
                    "images": sum(part["images"] for part in parts),
                    "accuracy": float(np.mean([part["accuracy"] for part in parts])),
                }
            )
    return rows


def table(rows: Sequence[Record]) -> Table:
    """Return the accuracy on every test set, mean over seeds."""
    return Table.of_groups(
        "Accuracy on other test sets of the run's classes",
        [
            *tables.CHECKPOINT_COLUMNS,
            tables.shared("test set", "dataset"),
            tables.shared("split"),
            tables.shared("severities", "splits"),
            tables.shared("images"),
            tables.seed_mean("accuracy %", "accuracy", scale=100),
        ],
        tables.by_checkpoint(rows, "dataset", "split"),
        (
            "Mean over the severities of a corruption; mean: of all corruptions alike. Not divided by "
            "the errors of AlexNet, as the mCE of Hendrycks and Dietterich is.",
        ),
    )


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw the accuracy on every test set, one line per run, best and last side by side."""
    rows = tables.newest(rows)
    names = list(dict.fromkeys(_name(row) for row in rows))

    def accuracies(of_network: Sequence[Record]) -> list[float]:
        found = {_name(row): 100 * row["accuracy"] for row in of_network}
        return [found.get(name, np.nan) for name in names]

    networks = [
        {**of_network[0], "accuracies": accuracies(of_network)}
        for of_network in grouped(rows, batching.NETWORK).values()
    ]
    panels = plots.lines_by_weights(
        figure, networks, "places", lambda row: row["accuracies"], marker="o"
    )
    for axes in panels:
        axes.set_xticks(range(1, len(names) + 1), names, rotation=90)
    panels[0].set_ylabel(f"accuracy, %\n{plots.BAND}")
    panels[0].legend(frameon=False)


def _name(row: Record) -> str:
    return f"{row['dataset']}: {row['split']}"


EVALUATOR = Evaluator(
    name="robustness",
    summary="accuracy on other test sets of the same classes, such as corrupted images",
    source="Hendrycks & Dietterich 2019",
    options=Options,
    work_items=work_items,
    table=table,
    draw=draw,
    rows=combined,
    order=50,
)
