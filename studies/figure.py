"""The picture of a study: every difference in points with its interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from seal_jax.core import plots
from studies.analysis import OPEN, Comparison
from studies.design import Study

TICKS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def drawable(study: Study, comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons of what is measured in %."""
    return [one for one in comparisons if study.is_percentage(one.claim.measure)]


def draw(study: Study, drawn: Sequence[Comparison]) -> Figure:
    """Return a panel for each condition, a line for each claim, a colour for each setting; right is as claimed."""
    claims = [claim for claim in study.claims if any(one.claim == claim for one in drawn)]
    settings, conditions = (
        [key for key in keys if any(getattr(one, of) == key for one in drawn)]
        for keys, of in ((study.settings, "setting"), (study.conditions, "condition"))
    )
    height = max(0.25, 0.13 * (1 + len(settings))) * len(claims)
    figure = Figure((4.5 + 2.4 * len(conditions), 1.3 + height), dpi=110, layout="constrained")
    panels = plots.panel_grid(
        figure, len(conditions), len(conditions), grid="x", sharex=True, sharey=True
    )
    for panel, condition in zip(panels, conditions, strict=True):
        for one in drawn:
            if one.condition == condition:
                place = settings.index(one.setting)
                shift = (place + 1) / (len(settings) + 1) - 0.5
                colour = plots.style(place)["color"]
                panel.errorbar(
                    -one.effect if one.lower else one.effect,
                    claims.index(one.claim) + shift,
                    xerr=one.half,
                    fmt="o",
                    color=colour,
                    markersize=4,
                    # Hollow where Holm's correction leaves it open.
                    markerfacecolor="white" if one.verdict == OPEN else colour,
                    linewidth=1,
                )
        for line in range(len(claims)):
            panel.axhline(line, color="#eeeeee", linewidth=0.6, zorder=0)
        panel.axvline(0, color="black", linewidth=0.8, zorder=0)
        panel.set_title(study.names[condition], fontsize=10)
        panel.set_xlabel("points", fontsize=9)
        panel.tick_params(axis="x", labelsize=8)
    widths = [abs(one.effect) + one.half for one in drawn]
    # A few differences may be far larger than all others.
    linear = max(np.quantile(widths, 0.9), 1e-3)
    if max(widths) > 4 * linear:
        panels[0].set_xscale("symlog", linthresh=linear, linscale=1.5)
        ends = [end for end in TICKS if 0.3 * linear < end <= max(widths)]
        panels[0].set_xticks([*(-end for end in ends[::-1]), 0.0, *ends])
        panels[0].minorticks_off()
    panels[0].xaxis.set_major_formatter(lambda tick, _: f"{tick:+g}" if tick else "0")
    panels[0].margins(x=0.08)
    panels[0].set_yticks(range(len(claims)), [claim.text for claim in claims], fontsize=9)
    panels[0].set_ylim(len(claims) - 0.5, -0.5)
    entries = [
        (Line2D([], [], marker="o", **plots.style(place)), study.names[key])
        for place, key in enumerate(settings)
    ]
    handles, names = zip(*entries, strict=True)
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    return figure
