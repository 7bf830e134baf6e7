"""Table and plot of linear probes, with the numbers of the SEAL paper's Tables 1 and 12."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seal_jax import papers
from seal_jax.core import plots
from seal_jax.core.tables import MISSING, Table, grouped, newest, spread
from seal_jax.evaluators import transfer_data
from seal_jax.evaluators.evaluator import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def paper(row: Record) -> float | None:
    """Return the paper's accuracy in % for a row's method and data set."""
    model = row["model"] if row["model"] == "resnet18" else "resnet50"
    method = transfer_data.paper_method(row) or ""
    column = transfer_data.paper_name(row["dataset"])
    number = papers.load("SEAL", "Tables 1, 12").get(model, method, column=column)
    return number.mean if number else None


def table(rows: Sequence[Record]) -> Table:
    """Return a line for each run and data set: the best accuracy, and that of every rate."""
    rates = sorted({rate for row in rows for rate in row["learning_rates"]}, reverse=True)
    known = any(paper(row) is not None for row in rows)
    cells = []
    for (run, weights, step, dataset), own in grouped(
        rows, ("run", "weights", "step", "dataset")
    ).items():
        best = sorted({row["learning_rate"] for row in own}, reverse=True)
        theirs = paper(own[0])
        cells.append(
            [
                str(run),
                weights,
                str(step),
                str(len(own)),
                transfer_data.paper_name(dataset),
                spread([row["accuracy"] for row in own]).text(scale=100),
                *([MISSING if theirs is None else f"{theirs:.2f}"] if known else []),
                ", ".join(f"{rate:g}" for rate in best),
                *(_of_rate(own, rate) for rate in rates),
            ]
        )
    header = ("run", "weights", "step", "seeds", "data set", "best", *(["paper"] if known else []))
    notes = [
        "Test accuracy in %; best: of the learning rates, by test accuracy as in the paper, for each "
        "seed."
    ]
    if known:
        notes.append(
            "paper: SEAL paper, Table 1 (ResNet-50; for a resnet18 Table 12, ResNet-18), the row of "
            "the same method, trained on Tiny-ImageNet (64x64) for 10 generations of 160 epochs, "
            "Normal for one. Its image size, augmentation and batch size are not given. Here: "
            f"{transfer_data.settings_of(rows)}."
        )
    parts = {
        f"{transfer_data.paper_name(row['dataset'])} ({row['test_images']} of "
        f"{row['train_images'] + row['test_images']})"
        for row in rows
        if row.get("held_out")
    }
    if parts:
        notes.append(
            "Without a test split, so scored on images held out of all that it has, stratified by "
            f"class: {', '.join(sorted(parts))}."
        )
    diverged = sorted({rate for row in rows for rate in row.get("diverged", ())}, reverse=True)
    if diverged:
        notes.append(
            f"At rate {', '.join(f'{rate:g}' for rate in diverged)} some classifier diverged; its "
            "accuracy is that of one class alone."
        )
    return Table(
        "Linear probe on other data sets",
        (*header, "best rate", *(f"rate {rate:g}" for rate in rates)),
        cells,
        notes,
    )


def _of_rate(own: Sequence[Record], rate: float) -> str:
    found = [
        row["accuracies"][row["learning_rates"].index(rate)]
        for row in own
        if rate in row["learning_rates"]
    ]
    return spread(found).text(scale=100) if found else MISSING


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw bars by data set with intervals over seeds, the paper's as marks; a panel per weights."""
    rows = newest(rows)
    kinds = grouped(rows, ("weights",))
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    panes = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axes, ((weights,), own) in zip(panes, kinds.items(), strict=True):
        _draw_bars(axes, own, names)
        axes.set_ylabel(f"test accuracy, %, {weights} weights\n{plots.BAND}", fontsize=9)
    plots.legend_below(figure, panes.flat, transfer_data.PAPER_LABEL)


def _draw_bars(axes: Axes, rows: Sequence[Record], names: Sequence[str]) -> None:
    runs = grouped(rows, ("run",))
    width = 0.8 / len(runs)
    marks: list[tuple[float, float]] = []
    styles = plots.run_styles(rows)
    for index, ((run,), own) in enumerate(runs.items()):
        for number, ((name,), mine) in enumerate(grouped(own, ("dataset",)).items()):
            place = names.index(name) + (index - (len(runs) - 1) / 2) * width
            points = plots.over_seeds([[100 * row["accuracy"] for row in mine]])
            axes.bar(
                place,
                points[0],
                0.92 * width,
                yerr=plots.bars(points) if len(mine) > 1 else None,
                color=styles[run]["color"],
                ecolor="#444444",
                label=run if number == 0 else None,
            )
            theirs = paper(mine[0])
            if theirs is not None:
                marks.append((place, theirs))
    if marks:
        axes.hlines(
            [height for _, height in marks],
            [place - 0.46 * width for place, _ in marks],
            [place + 0.46 * width for place, _ in marks],
            color="black",
            linewidth=2,
            label=transfer_data.PAPER_LABEL,
        )
    axes.set_xticks(range(len(names)), [transfer_data.paper_name(name) for name in names])
    axes.set_ylim(0, None)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def size(rows: Sequence[Record]) -> tuple[float, float]:
    """Return the figure's size: wider for more bars."""
    bars = len({(row["run"], row["dataset"]) for row in rows})
    return (min(5 + 0.35 * bars, 16.0), 2.8 * len({row["weights"] for row in rows}) + 0.8)
