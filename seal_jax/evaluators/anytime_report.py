"""Table and plot of anytime deployment performance: FAST paper, Figures 3 to 15 and Table 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from seal_jax import papers
from seal_jax.core import plots
from seal_jax.core.tables import MISSING, Table, grouped, spread
from seal_jax.evaluators.evaluator import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUP = ("run", "step", "weights", "system")
# Checkpoints in the table, beside the end.
COLUMNS = 4
MARKS = ".sD^vPX*"

_SETTING = (
    "Paper: FAST, Table 1, top-1 error / top-5 error / distance, ResNeXt-101 32x8d from ImageNet, 250 "
    "epochs (CIFAR-100) or 330 (Caltech-256), batches of one image a class."
)
_ALL = (
    "CIFAR-100: FAST 12.63 ± 0.09 / 1.62 ± 0.04 / 7.19 ± 0.04, best baseline (Kaiming fan-in, alpha = "
    "beta = 0.005) 13.90 ± 0.13 / 2.22 ± 0.08 / 14.32 ± 0.12; Caltech-256: FAST 12.81 / 3.96 / 5.28, "
    "best baseline (0.01) 13.55 / 4.38 / 7.70."
)
PANELS = (
    ("adp", "ADP on the target (%)", 100.0),
    ("adp_source", "ADP on the source (%)", 100.0),
    ("head_norm", "‖W‖, Frobenius", 1.0),
)


def table(rows: Sequence[Record]) -> Table:
    """Return ADP at some checkpoints, and what Table 1 has, at the end."""
    shown = _shown(rows)
    groups = grouped(rows, GROUP)
    papers = {group: _paper(own[0]) for group, own in groups.items()}
    beside = any(papers.values())
    cells = []
    for group, label in _labels(rows).items():
        own = groups[group]
        end = max(row["tau"] for row in own)
        last = [row for row in own if row["tau"] == end]
        line = [label, f"{own[0]['alpha']:g}", f"{own[0]['beta']:g}"]
        line += [_text([row for row in own if row["tau"] == tau], "adp", 1, 100) for tau in shown]
        line += [f"{end}", _text(last, "adp", 2, 100, 100), _text(last, "adp_top5", 2, 100, 100)]
        line += [_text(last, "adp_source", 1, 100), _text(last, "adp_distance", 3)]
        line += [_text(last, "source", 1, 100), _text(last, "distance", 3)]
        line += [_text(last, "head_norm", 3)]
        cells.append(line + ([papers[group] or MISSING] if beside else []))
    header = ["run", "alpha", "beta", *(f"ADP {tau}" for tau in shown)]
    header += ["steps", "top-1 err.", "top-5 err.", "ADP source", "ADP distance"]
    header += ["source", "distance", "|W|"]
    targets = ", ".join(dict.fromkeys(row["target"] for row in rows))
    return Table(
        f"Anytime deployment performance on {targets} (%), and forgetting",
        header + (["paper"] if beside else []),
        cells,
        (
            "ADP n: test accuracy of the state that was best on validation within n steps; errors are "
            "100 less that, at the end. Validations: at the start, and after intervals of 1, 2, ... "
            "10, 10, ... steps (the paper names only 1 and 10).",
            "ADP source: accuracy of the same state's features on the source's test data under its own "
            "head (Figure 3); ADP distance: of their parameters from the source's. source, distance: "
            "the same of the state that training is in; |W|: Frobenius norm of its new head.",
            *_deviations(rows),
            _SETTING if beside else f"{_SETTING} {_ALL}",
        ),
    )


def _text(
    rows: Sequence[Record], name: str, digits: int, scale: float = 1, less: float | None = None
) -> str:
    """Return mean and interval over seeds; ``less`` the values, for errors."""
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values:
        return MISSING
    if less is not None:
        values = [less / scale - value for value in values]
    return spread(values).text(digits, scale)


def _shown(rows: Sequence[Record]) -> list[int]:
    """Return some checkpoints, about evenly spaced on a logarithmic axis."""
    taus = sorted({row["tau"] for row in rows if row["tau"] > 0})
    inner = taus[:-1] or taus
    index = np.linspace(0, len(inner) - 1, min(COLUMNS, len(inner))).round()
    return [inner[int(each)] for each in index]


def _paper(row: Record) -> str:
    """Return Table 1's numbers for this target, system and rate."""
    name = str(row["target"]).partition("/")[0].partition(":")[0]
    for (target, system, alpha), numbers in papers.load("FAST", "Table 1").rows.items():
        same_rate = alpha == "-" or np.isclose(float(alpha), row["alpha"])
        if (target, system) == (name, row["system"]) and same_rate:
            return " / ".join(f"{number.mean:g}" for number in numbers.values())
    return ""


def _deviations(rows: Sequence[Record]) -> list[str]:
    """Say how near a training that was gone through again is to the run's own record."""
    found: dict[str, float] = {}
    for row in rows:
        if row.get("deviation") is not None:
            found[row["run"]] = max(found.get(row["run"], 0.0), row["deviation"])
    return [
        f"{run} was gone through again: its training losses differ from the recorded ones by at most "
        f"{value:.1e}."
        for run, value in found.items()
    ]


def _labels(rows: Sequence[Record]) -> dict[tuple[Any, ...], str]:
    """Return a name for each group that says no more than tells it from the others."""
    groups = list(grouped(rows, GROUP))
    differ = [len({group[index] for group in groups}) > 1 for index in range(len(GROUP))]
    found = {}
    for group in groups:
        run, step, weights, system = group
        parts = [str(run)] if differ[0] else []
        parts += [f"step {step}"] if differ[1] and len({g[0] for g in groups}) < len(groups) else []
        parts += [str(weights)] if differ[2] else []
        found[group] = " ".join([*parts, str(system)])
    return found


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw ADP on both tasks and the head's norm by step, with a 95 % band over seeds.

    Dotted: the accuracies of the state that training is in.
    """
    axes = figure.subplots(len(PANELS), 1, sharex=True)
    groups = grouped(rows, GROUP)
    styles, runs = plots.run_styles(rows), [group[0] for group in groups]
    for index, (group, label) in enumerate(_labels(rows).items()):
        by_tau = sorted(grouped(groups[group], ("tau",)).items())
        taus = np.array([tau for (tau,), _ in by_tau])
        # Of several runs each has its colour, and its systems differ in their marks.
        several = len(styles) > 1
        look = styles[group[0]] if several else plots.style(index)
        mark = MARKS[runs[:index].count(group[0]) % len(MARKS)] if several else "."
        for each, (name, _, scale) in zip(axes, PANELS, strict=True):
            values = [[scale * row.get(name, np.nan) for row in own] for _, own in by_tau]
            mean, low, high = plots.over_seeds(values)
            each.plot(taus, mean, label=label, linewidth=1.4, marker=mark, markersize=4, **look)
            if name.startswith("adp"):  # and of the state that training is in
                current = {"adp": "test", "adp_source": "source"}[name]
                means = [np.mean([row.get(current, np.nan) for row in own]) for _, own in by_tau]
                each.plot(taus, scale * np.array(means), ":", color=look["color"], linewidth=1)
            if len(values[0]) > 1:
                if scale == 100:  # a band over no more than an accuracy can be
                    low, high = low.clip(0), high.clip(max=100)
                colour = look["color"]
                each.fill_between(taus, low, high, color=colour, alpha=0.2, linewidth=0)
    for each, (_, title, scale) in zip(axes, PANELS, strict=True):
        each.set_ylabel(title)
        each.grid(color="#dddddd", linewidth=0.6)
        each.spines[["top", "right"]].set_visible(False)
        if scale == 1:
            _logarithmic(each, rows)
    # The start, step 0, stands left of step 1.
    axes[0].set_xscale("symlog", linthresh=1, linscale=0.3)
    axes[0].set_xlim(0, None)
    targets = ", ".join(dict.fromkeys(row["target"] for row in rows))
    axes[-1].set_xlabel(f"step of the adaptation to {targets}; dotted: the state in training")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)


def _logarithmic(axes: Any, rows: Sequence[Record]) -> None:
    """Put norms on a logarithmic axis; the zero that FAST starts from lies below it."""
    positive = [row["head_norm"] for row in rows if row["head_norm"] > 0]
    if positive:
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(min(positive) / 1.5, max(positive) * 1.5)


def size(rows: Sequence[Record]) -> tuple[float, float]:
    """Return the figure's size."""
    del rows
    return (8.0, 8.0)
