"""Which method is best for which design of experiment: LW paper, Figure 3."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from seal_jax.core import plots
from seal_jax.data.catalogue import DATA_SETS
from seal_jax.evaluation import decision_tree
from seal_jax.evaluation.decision_tree import Node
from seal_jax.reports.page import Missing, Section, data_table
from seal_jax.reports.runs import Run
from seal_jax.reports.studies import settings as grouping
from seal_jax.reports.studies.scatter import augmented
from seal_jax.reports.studies.settings import Entry, Setting
from seal_jax.training import workdir as workdirs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Decision tree"
# Classes by name of the data set; for one that is in no paper they are read from the run's checkpoints.
CLASSES = {name: info.classes for info in DATA_SETS for name in info.names}
# In caltech101 and cassava TFDS has one class more than the papers count: background, and healthy leaves.
CLASSES |= {"caltech101": 102, "cassava": 5, "digits": 10, "mnist": 10}


def section(entries: Sequence[Entry]) -> Section | Missing:
    """Fit a tree that predicts the best method from the design of the experiment."""
    # One kind of weights only: a setting must not count twice.
    weights = "best" if "best" in grouping.available(entries) else "last"
    least = 2 * decision_tree.MIN_LEAF
    methods, scores = _complete(entries, weights, least)
    # Any run of a setting will do: what the tree asks is the same in all of them.
    runs = {entry.setting: entry.run for entry in entries}
    designs = {setting: design(runs[setting], setting) for setting in scores}
    unknown = [setting for setting, values in designs.items() if None in values.values()]
    used = [setting for setting in scores if setting not in unknown]
    if len(methods) < 2 or len(used) < least:
        return Missing(
            TITLE,
            f"needs two methods that both finished in at least {least} settings (two leaves of "
            f"{decision_tree.MIN_LEAF}) with known numbers of classes; here are {len(used)}",
        )
    features = {name: [designs[setting][name] for setting in used] for name in designs[used[0]]}
    # Of equal scores `argmax` takes the first method, which is the baseline if there is one.
    best = [methods[int(np.argmax(scores[setting]))] for setting in used]
    root = decision_tree.fit(features, best)
    names = grouping.describe(used)
    records = [
        {
            "setting": names[setting],
            **designs[setting],
            "best": winner,
            **{
                f"{name} %": f"{100 * score:.6g}"
                for name, score in zip(methods, scores[setting], strict=True)
            },
        }
        for setting, winner in zip(used, best, strict=True)
    ]
    leaves = len(list(root.leaves()))
    warnings = []
    if others := [name for name in grouping.methods_of(entries) if name not in methods]:
        warnings.append(f"Left out, as trained in too few settings: {', '.join(others)}.")
    if unknown:
        warnings.append(
            f"{len(unknown)} settings are left out: their number of classes is not known."
        )
    return Section(
        "decision_tree",
        TITLE,
        f"Predicts which method has the highest test accuracy ({grouping.WEIGHTS[weights]}, mean "
        "over seeds; of equals the first listed) from the design of the experiment, as in the LW "
        f"paper's Figure 3: depth at most {decision_tree.MAX_DEPTH}, at least "
        f"{decision_tree.MIN_LEAF} settings in a leaf. A leaf with a Gini index over "
        f"{decision_tree.IMPURE} names the most frequent methods that make up half of it.",
        text=root.as_text(),
        data=data_table(records),
        draw=lambda figure: _draw(figure, root),
        size=(max(6.0, 1.7 * leaves), 1.3 * (root.depth + 1)),
        describe="The decision tree; the same as text stands above it.",
        warnings=warnings,
    )


def _complete(
    entries: Sequence[Entry], weights: str, least: int
) -> tuple[list[str], dict[Setting, list[float]]]:
    """Return as many methods as have ``least`` settings in common, with their scores in these.

    A method that was trained in few settings would leave too few settings to the others.
    """
    table = grouping.by_setting(entries, weights)
    methods = grouping.methods_of(entries)
    # The methods with the most settings first; the last one is dropped until enough settings remain.
    ordered = sorted(methods, key=lambda name: -sum(name in scores for scores in table.values()))
    while True:
        kept = [name for name in methods if name in ordered]
        scores = grouping.means(table, kept)
        if len(scores) >= least or len(kept) <= 2:
            return kept, scores
        ordered.pop()


def design(run: Run, setting: Setting) -> dict[str, Any]:
    """Return the features of the tree; the number of classes is ``None`` where it is not known.

    The training set size is the number of images in the batches of an epoch.
    """
    # The six features of the paper's Figure 3.
    values = dict(setting)
    return {
        "training images": run.steps_per_epoch * values["train.batch_size"],
        "classes": CLASSES.get(values["data.name"]) or classes_in_checkpoint(run),
        "model": values["model.name"],
        "dropout": float(values.get("model.dropout") or 0.0),
        "augmentation": augmented(setting),
        "initializer": values.get("model.initialiser") or "the model's own",
    }


def classes_in_checkpoint(run: Run) -> int | None:
    """Return the number of the classifier's outputs, from the metadata of the newest checkpoint."""
    # Read as JSON and not restored: a report does not load Orbax.
    step = run.newest_checkpoint
    if step is None:
        return None
    path = run.path / workdirs.CHECKPOINTS / str(step) / "metadata" / "metadata"
    try:
        leaves = json.loads(path.read_text(encoding="utf-8"))["leaves"]
        return int(leaves["weights/params/fc/kernel"]["shape"][-1])
    # A damaged checkpoint, or one of another layout: the setting is left out with a warning.
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _draw(figure: Figure, root: Node) -> None:
    """Draw the nodes as boxes, the answer yes to the left."""
    axes = figure.subplots()
    axes.set_axis_off()
    _, leaves = _place(axes, root, 0, 0)
    axes.set_xlim(-0.6, leaves - 0.4)
    axes.set_ylim(-root.depth - 0.5, 0.5)


def _place(axes: Axes, node: Node, start: int, depth: int) -> tuple[float, int]:
    """Draw a node and what is below it, its leaves from column ``start`` on.

    Returns:
      The column of the node and the first free column.
    """
    # Every leaf takes a column, and a node is centred above its two children.
    if node.yes is None or node.no is None:
        place, end = float(start), start + 1
        names = " or\n".join(node.top)
        text = f"{names}\nGini {node.gini:.2f}, n = {node.samples}"
        face = "#eaf4fb"
    else:
        left, middle = _place(axes, node.yes, start, depth + 1)
        right, end = _place(axes, node.no, middle, depth + 1)
        place = (left + right) / 2
        for child, answer in ((left, "yes"), (right, "no")):
            axes.plot([place, child], [-depth, -depth - 1], color="#888888", linewidth=1, zorder=1)
            axes.text((place + child) / 2, -depth - 0.5, answer, fontsize=8, ha="center", zorder=2)
        text = f"{node.question}?\nn = {node.samples}"
        face = "white"
    box = {"boxstyle": "round,pad=0.4", "facecolor": face, "edgecolor": "#555555", "linewidth": 0.8}
    text = plots.drawable(text)
    axes.text(place, -depth, text, fontsize=8, ha="center", va="center", bbox=box, zorder=3)
    return place, end
