"""Accuracy against the compute budget: LW paper, Figures 4 and 9."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from seal_jax.core import plots
from seal_jax.core.tables import Table, spread
from seal_jax.reports import curves
from seal_jax.reports.page import Missing, Section
from seal_jax.reports.studies import settings as grouping
from seal_jax.reports.studies.settings import BASELINE, EPOCHS, Entry, Setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Accuracy against compute budget"
ACROSS = 2


class Panel(NamedTuple):
    """One experiment in a fixed number of rounds, with several budgets.

    Attributes:
      title: describes the experiment.
      rounds: number of rounds.
      scores: accuracies of the seeds by method, weights, steps per round and steps in all, ordered by
        the steps per round.
    """

    title: str
    rounds: int
    scores: Mapping[tuple[str, str, float, int], list[float]]


def section(entries: Sequence[Entry]) -> Section | Missing:
    """Plot test accuracy at the end against steps per round, in experiments that differ only in these."""
    # The total of epochs is part of a setting. Without it, runs of several budgets come together.
    groups: dict[Setting, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(grouping.without(entry.setting, EPOCHS), []).append(entry)
    names = grouping.describe(list(groups))
    panels = [
        panel for setting, members in groups.items() for panel in _panels(names[setting], members)
    ]
    if not panels:
        return Missing(
            TITLE,
            "needs finished runs of a method that differ only in train.epochs_per_generation, and "
            "have more than one generation",
        )
    header = ("experiment", "rounds", "method", "weights", "steps per round", "steps in all")
    cells = [
        [
            *(panel.title, str(panel.rounds), method, weights, f"{steps:g}", str(total)),
            f"{100 * mean:.2f}",
            "" if std is None else f"{100 * std:.2f}",
            str(len(scores)),
        ]
        for panel in panels
        for (method, weights, steps, total), scores in panel.scores.items()
        for mean, std, *_ in [spread(scores)]
    ]
    return Section(
        "compute_budget",
        TITLE,
        "Test accuracy at the end by the training steps of a round of reinitialisation (LW paper, "
        "Figures 4 and 9); the baseline, which trains once, stands where its steps are as many in "
        "all. A round that ends early by validation takes fewer steps than its budget.",
        tables=[Table("Test accuracy (%) by budget", (*header, "mean", "std", "seeds"), cells)],
        draw=lambda figure: _draw(figure, panels, grouping.styles(entries)),
        size=(4.2 * min(len(panels), ACROSS) + 2.4, 3.4 * -(-len(panels) // ACROSS)),
        describe="Test accuracy against training steps per round, a line for each method.",
    )


def _panels(name: str, members: Sequence[Entry]) -> Iterator[Panel]:
    """Yield a panel for each number of rounds in which some method has several budgets."""
    # The x axis is in steps per round, so runs of different numbers of rounds cannot share a panel. A run
    # of one round has nothing between rounds.
    others = {entry.method for entry in members if entry.name != BASELINE}
    rounds = {entry.run.generations: None for entry in members if entry.name != BASELINE}
    rounds.pop(1, None)
    for count in rounds:
        scores: dict[tuple[str, str, float, int], list[float]] = {}
        for entry in members:
            # "For the baseline, the test accuracy is plotted over the same total number of steps as
            # reinitialization" (Figure 4): it is in every panel, its steps divided by the rounds there.
            if entry.name == BASELINE or entry.run.generations == count:
                total = entry.run.epochs * entry.run.steps_per_epoch
                for weights in grouping.WEIGHTS:
                    key = (entry.method, weights, total / count, total)
                    # Several runs of one method and budget give more seeds.
                    if of_seeds := list(entry.scores(weights).values()):
                        scores.setdefault(key, []).extend(of_seeds)
        budgets = {(method, steps) for method, _, steps, _ in scores if method in others}
        # More budgets than methods: at least one method has two.
        if len(budgets) > len({method for method, _ in budgets}):  # a method has two
            title = name if len(rounds) == 1 else f"{name}, {count} rounds"
            ordered = sorted(scores.items(), key=lambda item: item[0][2])
            yield Panel(title, count, dict(ordered))


def _draw(figure: Figure, panels: Sequence[Panel], styles: Mapping[str, Mapping[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    keys = [key[:2] for panel in panels for key in panel.scores]  # method and weights
    methods = list(dict.fromkeys(method for method, _ in keys))
    for axes, panel in zip(plots.panel_grid(figure, len(panels), ACROSS), panels, strict=True):
        for method in methods:
            for weights in grouping.WEIGHTS:
                points = {
                    key[2]: scores
                    for key, scores in panel.scores.items()
                    if key[:2] == (method, weights)
                }
                # By steps per round, [n][seeds]; budgets may have different numbers of seeds.
                if points:
                    percent = [[100 * score for score in scores] for scores in points.values()]
                    curves.marks(axes, weights, list(points), percent, styles[method])
        axes.set_title(panel.title, fontsize=10, parse_math=False)
        axes.set_xlabel(f"training steps per round, of {panel.rounds}")
        axes.set_ylabel(f"test accuracy (%)\n{plots.BAND}", fontsize=9)
    entries = [
        (Line2D([], [], linewidth=2, **styles[method]), plots.drawable(method))
        for method in methods
    ]
    # The marks need explaining only where both kinds of weights are drawn.
    if len({weights for _, weights in keys}) > 1:
        entries += [
            (Line2D([], [], **curves.mark(weights, curves.KEY)), label)
            for weights, label in grouping.WEIGHTS.items()
        ]
    plots.legend_beside(figure, entries)
