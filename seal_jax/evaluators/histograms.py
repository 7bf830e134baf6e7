"""Histograms of many mini-batches' values, as shares of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def log_edges(values: np.ndarray, bins: int = 60) -> np.ndarray:
    """Return edges of bins of one width on a log axis, around all values, which are positive.

    >>> log_edges(np.array([0.01, 100.0]), 4).round(6).tolist()
    [0.01, 0.1, 1.0, 10.0, 100.0]
    """
    low, high = np.log10(np.min(values)), np.log10(np.max(values))
    if high - low < 1e-3:  # all the same
        low, high = low - 0.5, high + 0.5
    return np.logspace(low, high, bins + 1)


def bin_shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the share of the values in each bin; those beyond count in the outermost.

    >>> bin_shares(np.array([0.5, 1.5, 9.0, 1.7]), np.array([0.0, 1.0, 2.0])).tolist()
    [0.25, 0.75]
    """
    inside = np.clip(values, edges[0], edges[-1])
    return np.histogram(inside, edges)[0] / max(len(values), 1)


def histogram(
    axes: Axes, label: str, values: np.ndarray, edges: np.ndarray, style: Mapping[str, Any]
) -> None:
    """Draw the share of the values in each bin as filled steps, in a run's colour and dashes."""
    shares = bin_shares(values, edges)
    axes.stairs(shares, edges, fill=True, alpha=0.25, color=style["color"])
    axes.stairs(shares, edges, label=label, linewidth=1.2, **style)
