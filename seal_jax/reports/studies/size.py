"""Size of the weights beside the baseline's: LW paper, Figure 7."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from seal_jax.core import plots
from seal_jax.core.tables import Table
from seal_jax.reports.page import Missing, Section
from seal_jax.reports.studies import settings as grouping
from seal_jax.reports.studies.settings import BASELINE, Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Size of the weights"
LEAST = 2  # ratios, for a deviation

Ratios = dict[tuple[str, str], list["Ratio"]]  # by weights and method


class Ratio(NamedTuple):
    """The size of one network's weights beside that of the baseline's of the same seed."""

    setting: str
    seed: int
    size: float
    baseline: float
    value: float


def section(
    entries: Sequence[Entry], margins: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Section | Missing:
    """Plot the density of the ratio of the size of the weights to the baseline's.

    Args:
      entries: of the runs.
      margins: by name of the run, the rows of its evaluation of margins, of one step.
    """
    by_method = ratios(entries, margins)
    if not by_method:
        return Missing(
            TITLE,
            "needs the evaluation of margins, at the newest checkpoint, of runs of the baseline "
            f"({BASELINE}) and of another method in the same settings, with two seeds or settings in "
            "common",
        )
    summary = []
    for (weights, method), networks in by_method.items():
        values = np.array([ratio.value for ratio in networks])
        numbers = (values.mean(), values.std(ddof=1), np.min(values), np.max(values))
        cells = [f"{number:.3f}" for number in numbers]
        summary.append([method, weights, str(len(networks)), *cells])
    lines = [
        [method, weights, *map(str, ratio[:2]), *(f"{number:.6g}" for number in ratio[2:])]
        for (weights, method), networks in by_method.items()
        for ratio in networks
    ]
    header = ("method", "weights", "networks", "mean", "std", "least", "most")
    csv_header = ("method", "weights", "setting", "seed", "size", "size of the baseline", "ratio")
    across = len({weights for weights, _ in by_method})
    return Section(
        "size_of_weights",
        TITLE,
        "Ratio of the size of the weights (norm of the classifier's inputs times that of its "
        "weights) to that of the baseline with the same seed and setting; the densities are normal, "
        "with the mean and deviation of the ratios (LW paper, appendix D, Figure 7, where LW's lies "
        "around 1).",
        tables=[Table("Size of the weights over the baseline's", header, summary)],
        data=Table(TITLE, csv_header, lines),
        draw=lambda figure: _draw(figure, by_method, grouping.styles(entries)),
        size=(4.2 * across + 2.4, 3.4),
        describe="Density of the ratio of the size of the weights to the baseline's, by method.",
    )


def ratios(entries: Sequence[Entry], margins: Mapping[str, Sequence[Mapping[str, Any]]]) -> Ratios:
    """Return the ratios by weights and method, of those that have two or more."""
    sizes: dict[tuple[Any, ...], float] = {}
    for entry in entries:
        for row in margins.get(entry.run.name, ()):
            key = (row["weights"], entry.method, entry.setting, row["seed"])
            if row["seed"] in entry.seeds and np.isfinite(row["size_of_weights"]):
                sizes[key] = float(row["size_of_weights"])
    names = grouping.describe(list(dict.fromkeys(key[2] for key in sizes)))
    others = {entry.method for entry in entries if entry.name != BASELINE}
    baselines = [method for method in grouping.methods_of(entries) if method not in others]
    by_method: Ratios = {}
    for (weights, method, setting, seed), size in sizes.items():
        keys = [(weights, baseline, setting, seed) for baseline in baselines]
        base = next((sizes[key] for key in keys if key in sizes), None)
        if method in others and base:
            ratio = Ratio(names[setting], seed, size, base, size / base)
            by_method.setdefault((weights, method), []).append(ratio)
    return {key: networks for key, networks in by_method.items() if len(networks) >= LEAST}


def _draw(figure: Figure, by_method: Ratios, styles: Mapping[str, Any]) -> None:
    kinds = list(dict.fromkeys(weights for weights, _ in by_method))
    methods = list(dict.fromkeys(method for _, method in by_method))
    panels = plots.panel_grid(figure, len(kinds), len(kinds), grid=None)
    for axes, weights in zip(panels, kinds, strict=True):
        for method in methods:
            if (weights, method) in by_method:
                values = np.array([ratio.value for ratio in by_method[weights, method]])
                _density(axes, values, plots.drawable(method), styles[method])
        axes.axvline(1, color="#888888", linewidth=0.8, zorder=0)
        axes.set_title(f"{weights} weights", fontsize=10)
        axes.set_xlabel("size of the weights, over the baseline's")
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("density")
    panels[-1].legend(frameon=False, fontsize=9)


def _density(axes: Axes, values: np.ndarray, label: str, look: Mapping[str, Any]) -> None:
    mean, std = values.mean(), values.std(ddof=1)
    axes.plot(values, np.zeros(len(values)), "|", color=look["color"], markersize=8, clip_on=False)
    if std == 0:  # all of the density is in one place
        axes.axvline(mean, label=label, **look)
        return
    x = np.linspace(mean - 4 * std, mean + 4 * std, 201)
    density = np.exp(-(((x - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))
    axes.plot(x, density, linewidth=1.5, label=label, **look)
