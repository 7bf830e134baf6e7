"""Size of the weights relative to the baseline: LW paper, Figure 7."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from seal_jax.core import plots
from seal_jax.core.tables import Record, Table, grouped
from seal_jax.reports.page import Missing, Section, data_table
from seal_jax.reports.studies import settings as grouping
from seal_jax.reports.studies.settings import BASELINE, Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Size of the weights"
FIELDS = ("method", "weights", "setting", "seed", "size", "size of the baseline", "ratio")
LEAST = 2  # ratios, for a standard deviation


def section(entries: Sequence[Entry], margins: Mapping[str, Sequence[Record]]) -> Section | Missing:
    """Plot the density of the ratio of the size of the weights to that of the baseline.

    ``margins`` has the rows of each run's evaluation of margins, by its name, all of one step: they
    hold the size.
    """
    groups = {
        key: records
        for key, records in grouped(ratios(entries, margins), ("weights", "method")).items()
        if len(records) >= LEAST
    }
    if not groups:
        return Missing(
            TITLE,
            "needs the evaluation of margins, at the newest checkpoint, of runs of the baseline "
            f"({BASELINE}) and of another method in the same settings, with two seeds or settings in "
            "common",
        )
    summary = []
    for (weights, method), records in groups.items():
        values = np.array([record["ratio"] for record in records])
        numbers = (values.mean(), values.std(ddof=1), np.min(values), np.max(values))
        cells = [f"{number:.3f}" for number in numbers]
        summary.append([method, weights, str(len(records)), *cells])
    lines = [
        {name: f"{v:.6g}" if isinstance(v, float) else v for name, v in record.items()}
        for records in groups.values()
        for record in records
    ]
    header = ("method", "weights", "networks", "mean", "std", "least", "most")
    return Section(
        "size_of_weights",
        TITLE,
        "Ratio of the size of the weights (norm of the classifier's inputs times that of its "
        "weights) to that of the baseline with the same seed and setting; the densities are normal, "
        "with the mean and deviation of the ratios (LW paper, appendix D, Figure 7, where LW's lies "
        "around 1).",
        tables=[Table("Size of the weights over the baseline's", header, summary)],
        data=data_table(lines),
        draw=lambda figure: _draw(figure, groups, grouping.styles(entries)),
        size=(4.2 * len({weights for weights, _ in groups}) + 2.4, 3.4),
        describe="Density of the ratio of the size of the weights to the baseline's, by method.",
    )


def ratios(entries: Sequence[Entry], margins: Mapping[str, Sequence[Record]]) -> list[Record]:
    """Return a record for each network that has a baseline of the same weights, setting and seed."""
    sizes: dict[tuple[Any, ...], float] = {}  # by method, weights, setting and seed
    for entry in entries:
        for row in margins.get(entry.run.name, ()):
            key = (entry.method, row["weights"], entry.setting, row["seed"])
            # Only seeds that no earlier run has: a network counts once.
            if row["seed"] in entry.seeds and np.isfinite(row["size_of_weights"]):
                sizes[key] = float(row["size_of_weights"])
    names = grouping.describe(list(dict.fromkeys(setting for _, _, setting, _ in sizes)))
    # There may be several baselines, told apart by options; the first that has the network counts.
    others = {entry.method for entry in entries if entry.name != BASELINE}
    baselines = [method for method in grouping.methods_of(entries) if method not in others]
    records: list[Record] = []
    for (method, weights, setting, seed), size in sizes.items():
        network = (weights, setting, seed)
        base = next((sizes[name, *network] for name in baselines if (name, *network) in sizes), 0)
        # A size of 0 is no baseline to divide by.
        if method in others and base:
            values = (method, weights, names[setting], seed, size, base, size / base)
            records.append(dict(zip(FIELDS, values, strict=True)))
    return records


def _draw(
    figure: Figure, groups: Mapping[tuple[Any, ...], Sequence[Record]], styles: Mapping[str, Any]
) -> None:
    kinds = list(dict.fromkeys(weights for weights, _ in groups))
    panels = plots.panel_grid(figure, len(kinds), len(kinds), grid=None)
    for axes, kind in zip(panels, kinds, strict=True):
        for method in dict.fromkeys(method for _, method in groups):
            values = np.array([record["ratio"] for record in groups.get((kind, method), ())])
            if len(values):
                _density(axes, values, plots.drawable(method), styles[method])
        axes.axvline(1, color="#888888", linewidth=0.8, zorder=0)
        axes.set_title(f"{kind} weights", fontsize=10)
        axes.set_xlabel("size of the weights, over the baseline's")
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("density")
    panels[-1].legend(frameon=False, fontsize=9)


def _density(axes: Axes, values: np.ndarray, label: str, look: Mapping[str, Any]) -> None:
    mean, std = values.mean(), values.std(ddof=1)
    # "A Gaussian approximation to the ratio" (appendix D); the ratios themselves are ticks on the axis.
    axes.plot(values, np.zeros(len(values)), "|", color=look["color"], markersize=8, clip_on=False)
    if std == 0:  # the density would be infinite
        axes.axvline(mean, label=label, **look)
        return
    x = np.linspace(mean - 4 * std, mean + 4 * std, 201)
    density = np.exp(-(((x - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))
    axes.plot(x, density, linewidth=1.5, label=label, **look)
