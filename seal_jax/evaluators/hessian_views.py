"""Table and plot of Hessian spectra, with the numbers of the SEAL paper's Table 6."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from seal_jax import papers
from seal_jax.core import plots
from seal_jax.core.tables import MISSING, Table, grouped, newest, spread
from seal_jax.evaluators import transfer_data
from seal_jax.evaluators.evaluator import Record
from seal_jax.hessian import Density

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of the density's bumps, over the width of the spectrum.
_SIGMA = 0.01

# Title, field, scale and digits.
_BATCH_COLUMNS = (
    ("max (batches)", "batch_max", 1, 2),
    ("negative % (batches)", "batch_negative", 100, 2),
)
_CHECK_COLUMNS = (
    ("converged %", "batch_converged", 100, 1),
    ("sign sure %", "batch_certain", 100, 1),
)
_ENDS = ("largest", "smallest")
# Title, field and digits of a range in percent.
_MASS_COLUMNS = (
    ("negative mass %", "negative_mass", 1),
    ("clearly %", "clearly_negative_mass", 2),
)


def table(rows: Sequence[Record]) -> Table:
    """Return the statistics of mini-batches beside those of the whole data, mean over seeds."""
    known = any("batch_max" in row and _paper(row) for row in rows)
    parts = {name for row in rows for name in row}
    header = ["run", "weights", "step", "seeds"]
    for index, (title, field, _, _) in enumerate(_BATCH_COLUMNS):
        if field in parts:
            header += [title, *([f"paper {('max', 'negative %')[index]}"] if known else [])]
    header += [title for title, field, _, _ in _CHECK_COLUMNS if field in parts]
    header += [title for end in _ENDS if end in parts for title in (end, f"residual of {end}")]
    header += ["trace"] if "trace" in parts else []
    header += [title for title, field, _ in _MASS_COLUMNS if f"{field}_bounds" in parts]
    cells = []
    for (run, weights, step), own in grouped(rows, ("run", "weights", "step")).items():
        line = [str(run), weights, str(step), str(len(own))]
        theirs = _paper(own[0])
        for index, column in enumerate(_BATCH_COLUMNS):
            if column[1] in parts:
                line.append(_cell(own, *column[1:]))
                if known:
                    line.append(
                        MISSING
                        if theirs is None
                        else f"{theirs[('max', 'negative')[index]].mean:.2f}"
                    )
        line += [_cell(own, *column[1:]) for column in _CHECK_COLUMNS if column[1] in parts]
        line += [cell for end in _ENDS if end in parts for cell in _first(own, end)]
        line += [_cell(own, "trace", 1, 2)] if "trace" in parts else []
        line += [
            _range(own, *column[1:]) for column in _MASS_COLUMNS if f"{column[1]}_bounds" in parts
        ]
        cells.append(line)
    return Table("Eigenvalues of the Hessian", header, cells, _notes(rows, parts, known))


def _paper(row: Record) -> Mapping[str, papers.Number] | None:
    """Return the SEAL paper's Table 6 for a row's method: "max", and "negative" in %."""
    return papers.load("SEAL", "Table 6").rows.get((transfer_data.paper_method(row) or "",))


def _cell(own: Sequence[Record], field: str, scale: float, digits: int) -> str:
    found = [row[field] for row in own if field in row]
    return spread(found).text(digits, scale) if found else MISSING


def _first(own: Sequence[Record], field: str) -> tuple[str, str]:
    """Return the outermost eigenvalue, marked where not all converged, and its largest residual."""
    rows = [row for row in own if field in row]
    if not rows:
        return MISSING, MISSING
    text = spread([row[field][0] for row in rows]).text(3)
    residual = max(row[f"{field}_residuals"][0] for row in rows)
    return (
        text if all(row["converged"] for row in rows) else f"{text} (not converged)",
        f"{residual:.1e}",
    )


def _range(own: Sequence[Record], field: str, digits: int) -> str:
    """Return the mean bounds of a share, widened by twice the error of the random vectors."""
    rows = [row for row in own if f"{field}_bounds" in row]
    if not rows:
        return MISSING
    lower, upper = np.mean([row[f"{field}_bounds"] for row in rows], axis=0)
    error = np.sqrt(sum(row[f"{field}_error"] ** 2 for row in rows)) / len(rows)
    lower, upper = np.clip([lower - 2 * error, upper + 2 * error], 0, 1)
    return f"{100 * lower:.{digits}f}..{100 * upper:.{digits}f}"


def _notes(rows: Sequence[Record], parts: set[str], known: bool) -> list[str]:
    notes = []
    if "batch_max" in parts:
        notes.append(
            "batches: the eigenvalues of largest magnitude of each training mini-batch's own "
            "Hessian, pooled over the mini-batches; the largest of the pool, and the share of it "
            "that is negative (Park & Kim 2022, whom the SEAL paper follows). converged: "
            "mini-batches whose residuals are within the tolerance; sign sure: values that their "
            "residual keeps away from zero."
        )
    if "largest" in parts or "trace" in parts or "negative_mass_bounds" in parts:
        notes.append(
            "largest, smallest, trace, negative mass: of the one Hessian of the mean loss over the "
            "training data."
        )
    if "largest" in parts:
        notes.append(
            "residual: |H v - value v| of the outermost value, the largest over seeds: so far at "
            "most is the value from an eigenvalue. not converged: of all values computed at that end "
            "or the other, one has a residual above the tolerance."
        )
    if "negative_mass_bounds" in parts:
        notes.append(
            "negative mass: between which bounds the share of ALL its eigenvalues below zero is, "
            "mean over seeds; not the negative % of mini-batches, which is that of a few of the "
            "largest magnitude. The bounds are those that the Lanczos iteration proves (Chebyshev, "
            "Markov, Stieltjes), widened by two standard errors of the random vectors. Most "
            "eigenvalues are so near zero that only more --density-steps would tell their sign; "
            "clearly: the same of those below minus the threshold, times the largest."
        )
    if known:
        notes.append(
            "paper: SEAL paper, Table 6, the row of the same method: ResNet-50 on Tiny-ImageNet "
            "(64x64). It names neither the number of images in a mini-batch nor that of "
            "eigenvalues; maxima grow as mini-batches shrink."
        )
    return notes


def density_of(row: Record) -> Density:
    """Return a row's spectral density."""
    probes = row["density_probes"]
    nodes = np.reshape(row["nodes"], (probes, -1))
    weights = np.reshape(row["node_weights"], (probes, -1)) * probes
    return Density(nodes, weights, np.zeros_like(nodes), 0.0, row["parameters"])


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw the density of each run, and the pool of its mini-batches' eigenvalues, both log."""
    rows = newest(rows)
    kinds = grouped(rows, ("weights",))
    shown = [
        (field, title, painter)
        for field, title, painter in (
            ("nodes", "density of all eigenvalues, whole training data", _draw_density),
            ("batch_values", "share of the largest, by magnitude, of mini-batches", _draw_pool),
            ("largest", "outermost eigenvalues, whole training data", _draw_ends),
        )
        if any(field in row for row in rows)
    ]
    shown = shown[:2] or [("", "trace", _draw_trace)]
    panes = figure.subplots(len(kinds), len(shown), squeeze=False)
    for line, ((weights,), own) in zip(panes, kinds.items(), strict=True):
        for axes, (field, title, painter) in zip(line, shown, strict=True):
            painter(axes, [row for row in own if not field or field in row])
            axes.set_title(f"{title}\n{weights} weights", fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    plots.legend_below(figure, panes.flat)


def _draw_density(axes: Axes, rows: Sequence[Record]) -> None:
    low = min(min(row["nodes"]) for row in rows)
    high = max(max(row["nodes"]) for row in rows)
    width = (high - low) or 1.0
    grid = np.linspace(low - 0.05 * width, high + 0.05 * width, 600)
    highest = 0.0
    for index, (run, own) in _runs(rows):
        lines = np.array([density_of(row).on_grid(grid, _SIGMA * width) for row in own])
        axes.plot(grid, lines.mean(0), label=run, linewidth=1.2, **plots.style(index))
        highest = max(highest, float(np.max(lines.mean(0))))
    axes.set_yscale("log")
    # One eigenvalue among all of them is as little as there is to be seen.
    least = min(1 / row["parameters"] for row in rows) / (_SIGMA * width * np.sqrt(2 * np.pi))
    # A margin over all decades that a density falls through would leave the axis mostly empty.
    axes.set_ylim(0.05 * least, 3 * max(highest, least))
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")


def _draw_pool(axes: Axes, rows: Sequence[Record]) -> None:
    values = np.concatenate([row["batch_values"] for row in rows])
    low, high = float(np.min(values)), float(np.max(values))
    edges = np.linspace(low, high if high > low else low + 1, 61)
    for index, (run, own) in _runs(rows):
        pool = np.concatenate([row["batch_values"] for row in own])
        shares = np.histogram(pool, edges)[0] / len(pool)
        axes.stairs(shares, edges, label=run, linewidth=1.2, **plots.style(index))
    axes.axvline(0, color="#888888", linewidth=0.7)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5 / len(values), top=1)
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("share of the pool")


def _draw_ends(axes: Axes, rows: Sequence[Record]) -> None:
    for index, (run, own) in _runs(rows):
        for row in own:
            values = [*row["smallest"], *row["largest"]]
            colour = plots.style(index)["color"]
            axes.plot(np.full(len(values), index), values, "_", color=colour, label=run, ms=14)
    axes.set_xticks([])
    axes.set_ylabel("eigenvalue")


def _draw_trace(axes: Axes, rows: Sequence[Record]) -> None:
    for index, (run, own) in _runs(rows):
        for row in own:
            axes.errorbar(
                index, row["trace"], row["trace_error"], fmt="o", label=run,
                color=plots.style(index)["color"],
            )  # fmt: skip
    axes.set_xticks([])
    axes.set_ylabel("trace and its standard error")


def _runs(rows: Sequence[Record]) -> list[tuple[int, tuple[str, Any]]]:
    return [
        (own[0].get("index", index), (str(run), own))
        for index, ((run,), own) in enumerate(grouped(rows, ("run",)).items())
    ]


def size(rows: Sequence[Record]) -> tuple[float, float]:
    """Return the figure's size: a row of panels for each of the weights."""
    return 10.0, 1.0 + 3.4 * len({row["weights"] for row in rows})
