"""Anytime deployment performance and forgetting of adaptations: FAST paper, Figures 3 to 15, Table 1."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from seal_jax import papers
from seal_jax.core import plots, tables
from seal_jax.core.tables import MISSING, Column, Record, Table, grouped
from seal_jax.errors import UsageError, check_number
from seal_jax.evaluation import anytime as library
from seal_jax.evaluators import adaptation
from seal_jax.evaluators.adaptation import SYSTEMS, Replay, Trace
from seal_jax.evaluators.evaluator import Evaluator, WorkItem
from seal_jax.evaluators.loaded_run import LoadedRun, Network
from seal_jax.evaluators.options import check_names, flag
from seal_jax.training import experiment, metrics, pretrained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT_STEPS = 610
# Fields of a row, of the checkpoint's deployed state and of the state in training.
SERIES = (
    *("adp", "adp_top5", "adp_source", "adp_distance"),
    *("test", "test_top5", "source", "distance", "head_norm", "deployed"),
)
GROUP = ("run", "step", "weights", "system")
COLUMNS = 4  # checkpoints in the table, beside the end
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


@dataclasses.dataclass(frozen=True)
class Options:
    """How much of a training is repeated, and what a run that is not an adaptation is adapted to.

    All but the first two go with a run that does not start from another (``train.pretrained`` is
    empty): it is adapted by each system, which leaves nothing but the results in its folder.

    Attributes:
      max_steps: steps after which to stop; 0 for the whole of an adaptation's run, 610 otherwise.
      seeds: how many, the first ones; 0 for as many as there are. A run of one seed is adapted by as
        many as you like.
      dataset: data set to adapt to; none for the run's own, under a new classifier.
      systems: what to adapt by, of FAST and its baselines.
      alpha: learning rate of the classifier, and of the features in the baselines; a tenth of it with
        Adam and RAdam.
      beta: learning rate of the features in FAST; none for a tenth of alpha.
      sigma: deviation of the classifier's weights in "gaussian" and "frozen_head".
      batch_size: images a step, as many of each class; 0 for one of each.
      image_size: side that images are resized to; 0 for that of the run's images.
      validation_fraction: held out of the training images, unless they are the run's own.
      test_fraction: share of its images that a data set without a test split is tested on, stratified
        by class.
      flip: whether training images are flipped at random.
    """

    max_steps: int = 0
    seeds: int = 0
    dataset: str | None = None
    systems: tuple[str, ...] = (
        "fast",
        "kaiming_fan_in",
        "kaiming_fan_out",
        "xavier",
        "gaussian",
        "feature_extraction",
        "frozen_head",
        "warmup",
    )
    alpha: float = 0.01
    beta: float | None = None
    sigma: float = 0.01
    batch_size: int = 0
    image_size: int = 0
    validation_fraction: float = 0.05
    test_fraction: float = 0.2
    flip: bool = True

    def __post_init__(self):
        check_names("systems", self.systems, SYSTEMS)
        rules: list[tuple[str, Callable[[float], bool], str]] = [
            ("max_steps seeds batch_size image_size", lambda v: v >= 0, "be 0 or more"),
            ("alpha beta sigma", lambda v: 0 < v < math.inf, "be positive"),
            ("validation_fraction test_fraction", lambda v: 0 < v < 1, "lie in (0, 1)"),
        ]
        for fields, holds, what in rules:
            for field in fields.split():
                value = getattr(self, field)
                if value is not None:
                    check_number(flag(field), value, holds, what)


def work_items(loaded_run: LoadedRun, options: Options) -> Sequence[WorkItem]:
    """Return one work item per system and seed; the first of a system trains all of its seeds."""
    replays = _repeated if loaded_run.settings.train.pretrained else _adapted
    return [
        WorkItem(f"{key}/seed{seed}", functools.partial(record, index, int(seed)))
        for key, replay, record in replays(loaded_run, options)
        for index, seed in enumerate(replay.experiment.seeds)
    ]


# The key of an adaptation's work items, the adaptation, and the function that measures one of its seeds.
_Adaptation = tuple[str, Replay, Callable[[int, int], dict[str, Any]]]


def _repeated(loaded_run: LoadedRun, options: Options) -> list[_Adaptation]:
    """Return the adaptation that the run itself was."""
    settings = loaded_run.settings
    # An option at its default cannot be told from one that was left out, and changes nothing either way.
    for field in dataclasses.fields(options):
        if field.name in ("max_steps", "seeds") or getattr(options, field.name) == field.default:
            continue
        raise UsageError(
            f"{flag(field.name)} goes with a run to adapt, and {loaded_run.run} is an "
            f"adaptation (train.pretrained = {settings.train.pretrained!r}), which is gone through "
            "as it was; leave it out, or give the run that it started from"
        )
    if settings.data.draws == "per_seed":
        raise UsageError(
            f"{loaded_run.run} has data.draws = 'per_seed': only an adaptation on one draw of the data is gone through "
            "again"
        )
    count = options.seeds or settings.train.seeds
    if count > settings.train.seeds:
        raise UsageError(
            f"--seeds={count} is more than the {settings.train.seeds} of {loaded_run.run}"
        )
    # The network that the run started from, not the one that it ended with: the training is repeated from there.
    source = pretrained.read(settings, loaded_run.run)
    replay = Replay(
        dataclasses.replace(settings, train=dataclasses.replace(settings.train, seeds=count)),
        loaded_run.dataset,
        source,
        experiment.load_data(source.settings.data, source.run),
        options.max_steps,
    )
    network = loaded_run.networks[0]
    # Epochs with a loss in the run's own metrics: the repeated training is compared with these.
    recorded = {
        row["step"]: row["train/loss"]
        for row in metrics.read(loaded_run.run)
        if "train/loss" in row
    }
    system, weights = adaptation.system_of(settings), settings.train.pretrained_weights
    record = _recorder(replay, network, system, weights, recorded)
    return [(f"step{network.step}/replay", replay, record)]


def _adapted(loaded_run: LoadedRun, options: Options) -> list[_Adaptation]:
    """Return an adaptation by each system, from each of the run's checkpoints and weights."""
    target = adaptation.target(
        loaded_run,
        options.dataset,
        options.image_size,
        options.validation_fraction,
        options.test_fraction,
    )
    batch_size = options.batch_size or target.num_classes
    if batch_size % target.num_classes or batch_size > len(target.train):
        raise UsageError(
            f"--batch-size={batch_size} must be a multiple of the {target.num_classes} classes of "
            f"{target.name}, and no more than its {len(target.train)} training images"
        )
    # Seeds of one checkpoint are adapted together, in one program.
    groups: dict[tuple[int, str], list[Network]] = {}
    for network in loaded_run.networks:
        groups.setdefault((network.step, network.weights), []).append(network)
    max_steps = options.max_steps or DEFAULT_STEPS
    adaptations: list[_Adaptation] = []
    for (step, weights), networks in groups.items():
        count = options.seeds or len(networks)
        # A single network may start any number of seeds, which then differ in their random numbers alone.
        if options.seeds and loaded_run.settings.data.draws == "per_seed":
            raise UsageError(
                f"--seeds={options.seeds} goes with a run whose seeds share the draw of the data, and "
                f"{loaded_run.run} has data.draws = 'per_seed': leave it out"
            )
        if count > len(networks) > 1:
            raise UsageError(
                f"--seeds={count} is more than the {len(networks)} of {loaded_run.run}; give as many, or "
                "a run of one seed"
            )
        # Every system starts from the same weights, on the same data, with the same seeds.
        source = adaptation.source_of(loaded_run, networks)
        for name in options.systems:
            settings = adaptation.settings_of(
                name,
                loaded_run.settings,
                target,
                alpha=options.alpha,
                beta=options.beta or options.alpha / 10,
                sigma=options.sigma,
                batch_size=batch_size,
                steps=max_steps,
                seeds=count,
                flip=options.flip,
            )
            # One compiled scoring, and one copy of the data, serves all systems.
            scorer = adaptations[0][1] if adaptations else None
            replay = Replay(settings, target, source, loaded_run.dataset, max_steps, scorer)
            record = _recorder(replay, networks[0], name, weights)
            adaptations.append((f"step{step}/{weights}/{name}", replay, record))
    return adaptations


def _recorder(
    replay: Replay,
    network: Network,
    system: str,
    weights: str,
    recorded: Mapping[int, Sequence[float]] | None = None,
) -> Callable[[int, int], dict[str, Any]]:
    """Return a function of a seed's index and number that returns the seed's record.

    All seeds train in one program, when the first record is asked for.

    Args:
      replay: the adaptation.
      network: one that it starts from, or that it made.
      system: its name.
      weights: of the source, "last" or "best".
      recorded: the training losses in the run's metrics, ``[seeds]`` by step.
    """
    # Shared by the work items of all seeds. A resumed evaluation trains again if one of them is missing.
    train: Callable[[], Trace] = functools.cache(replay.run)
    settings = replay.settings
    rate = settings.optimizer.learning_rate
    rates = {name: settings.method.get(name) for name in ("alpha", "beta")}
    identity = {**network.identity, "weights": weights, "system": system}

    def record(index: int, seed: int) -> dict[str, Any]:
        trace = train()
        validation = np.stack(trace.validation, 1)[index]
        # Per seed: each deploys by its own validation accuracy.
        deployed = library.deployed(trace.checkpoints, trace.validated, validation)
        # Near zero where the repeated training is the recorded one; the table's note shows the largest.
        deviations = [
            abs(losses[index] - recorded[step][index])
            for step, losses in trace.train_loss.items()
            if recorded and step in recorded
        ]
        return {
            **identity,
            "target": settings.data.name,
            **{name: rate if value is None else value for name, value in rates.items()},
            "seed": seed,
            "checkpoints": list(trace.checkpoints),
            "validated": list(trace.validated),
            "validation": validation.tolist(),
            **{name: np.stack(v, 1)[index].tolist() for name, v in trace.series.items()},
            "deployed": np.asarray(trace.validated)[deployed].tolist(),
            # How far the epochs' training losses are from those in the run's metrics.
            "deviation": float(max(deviations)) if deviations else None,
        }

    return record


def combine(records: Sequence[Record]) -> Sequence[Record]:
    """Return one row per seed and checkpoint."""
    # A record is of a whole training; in rows its lists are taken apart, an entry for each checkpoint.
    per_record = {*SERIES, "checkpoints", "validated", "validation"}
    return [
        {
            **{name: value for name, value in record.items() if name not in per_record},
            "tau": tau,
            **{name: record[name][index] if record.get(name) else None for name in SERIES},
        }
        for record in records
        for index, tau in enumerate(record["checkpoints"])
    ]


def table(rows: Sequence[Record]) -> Table:
    """Return ADP at some checkpoints, and the measures of Table 1 at the end."""
    groups, labels = grouped(rows, GROUP), _labels(rows)
    compared = any(_paper(records[0]) for records in groups.values())
    columns = [
        Column("run", lambda records: labels[tuple(records[0][name] for name in GROUP)]),
        tables.shared("alpha", form="{:g}".format),
        tables.shared("beta", form="{:g}".format),
        *(_column(f"ADP {tau}", "adp", 1, 100, tau=tau) for tau in _shown(rows)),
        Column("steps", lambda records: str(max(row["tau"] for row in records))),
        _column("top-1 err.", "adp", 2, 100, error=True),
        _column("top-5 err.", "adp_top5", 2, 100, error=True),
        _column("ADP source", "adp_source", 1, 100),
        _column("ADP distance", "adp_distance", 3),
        _column("source", "source", 1, 100),
        _column("distance", "distance", 3),
        _column("|W|", "head_norm", 3),
        Column("paper", lambda records: _paper(records[0]) or MISSING, optional=True),
    ]
    targets = ", ".join(dict.fromkeys(row["target"] for row in rows))
    return Table.of_groups(
        f"Anytime deployment performance on {targets} (%), and forgetting",
        columns,
        groups.values(),
        (
            "ADP n: test accuracy of the state that was best on validation within n steps; errors are "
            "100 less that, at the end. Validations: at the start, and after intervals of 1, 2, ... "
            "10, 10, ... steps (the paper names only 1 and 10).",
            "ADP source: accuracy of the same state's features on the source's test data under its own "
            "head (Figure 3); ADP distance: of their parameters from the source's. source, distance: "
            "the same of the state that training is in; |W|: Frobenius norm of its new head.",
            *_deviations(rows),
            _SETTING if compared else f"{_SETTING} {_ALL}",
        ),
    )


def _column(
    title: str,
    name: str,
    digits: int,
    scale: float = 1.0,
    *,
    tau: int | None = None,
    error: bool = False,
) -> Column:
    """Declare a column of means over seeds at a checkpoint, by default the last, or of 1 less them."""

    def value(row: Record) -> float | None:
        number = row.get(name)
        return 1 - number if error and number is not None else number

    mean = tables.seed_mean(title, value, digits, scale)

    def text(records: Sequence[Record]) -> str:
        # Trainings of one table may end at different steps; "the last" is that of each group.
        shown = max(row["tau"] for row in records) if tau is None else tau
        return mean.text([row for row in records if row["tau"] == shown])

    return Column(title, text)


def _shown(rows: Sequence[Record]) -> list[int]:
    """Return some checkpoints, about evenly spaced on a logarithmic axis."""
    taus = sorted({row["tau"] for row in rows if row["tau"] > 0})
    # The end has columns of its own.
    inner = taus[:-1] or taus
    # Fibonacci numbers grow by a nearly constant factor, so even places among them are even on a log axis.
    index = np.linspace(0, len(inner) - 1, min(COLUMNS, len(inner))).round()
    return [inner[int(place)] for place in index]


def _paper(row: Record) -> str:
    """Return Table 1's numbers for this target, system and rate."""
    name = papers.dataset(row["target"])
    for (target, system, alpha), numbers in papers.load("FAST", "Table 1").rows.items():
        same_rate = alpha == "-" or np.isclose(float(alpha), row["alpha"])
        if (target, system) == (name, row["system"]) and same_rate:
            return " / ".join(f"{number.mean:g}" for number in numbers.values())
    return ""


def _deviations(rows: Sequence[Record]) -> list[str]:
    """Return notes on how close repeated trainings are to the runs' own records."""
    largest: dict[str, float] = {}
    for row in rows:
        if row.get("deviation") is not None:
            largest[row["run"]] = max(largest.get(row["run"], 0.0), row["deviation"])
    return [
        f"{run} was gone through again: its training losses differ from the recorded ones by at most "
        f"{value:.1e}."
        for run, value in largest.items()
    ]


def _labels(rows: Sequence[Record]) -> dict[tuple[Any, ...], str]:
    """Return a name for each group, with the fields alone in which groups differ."""
    groups = list(grouped(rows, GROUP))
    differ = [len(set(names)) > 1 for names in zip(*groups, strict=True)]
    # Different runs may have ended at different steps: where each has one, their names suffice.
    several_steps = len({group[:2] for group in groups}) > len({run for run, *_ in groups})
    labels = {}
    for run, step, weights, system in groups:
        parts = [str(run)] if differ[0] else []
        parts += [f"step {step}"] if several_steps else []
        parts += [str(weights)] if differ[2] else []
        labels[run, step, weights, system] = " ".join([*parts, str(system)])
    return labels


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw ADP on both tasks and the head's norm by step, with a 95 % band over seeds.

    Dotted: the accuracies of the state that training is in.
    """
    panels = figure.subplots(len(PANELS), 1, sharex=True)
    groups = grouped(rows, GROUP)
    styles, runs = plots.run_styles(rows), [group[0] for group in groups]
    for index, (group, label) in enumerate(_labels(rows).items()):
        by_tau = sorted(grouped(groups[group], ("tau",)).items())
        taus = np.array([tau for (tau,), _ in by_tau])
        # Of several runs each has its colour, and its systems differ in their marks.
        several = len(styles) > 1
        look = styles[group[0]] if several else plots.style(index)
        mark = MARKS[runs[:index].count(group[0]) % len(MARKS)] if several else "."
        line = {"label": label, "marker": mark, "markersize": 4, **look}
        for axes, (name, _, scale) in zip(panels, PANELS, strict=True):
            values = [[scale * row.get(name, np.nan) for row in seeds] for _, seeds in by_tau]
            # A band over no more than an accuracy can be.
            limits = (0.0, 100.0) if scale == 100 else None
            plots.line_with_band(axes, taus, values, limits=limits, **line)
            if current := {"adp": "test", "adp_source": "source"}.get(name):
                means = [
                    np.mean([row.get(current, np.nan) for row in seeds]) for _, seeds in by_tau
                ]
                axes.plot(taus, scale * np.array(means), ":", color=look["color"], linewidth=1)
    for axes, (_, title, _) in zip(panels, PANELS, strict=True):
        axes.set_ylabel(title)
        plots.tidy(axes, "both")
    norms = [row["head_norm"] for row in rows if row["head_norm"] > 0]
    if norms:  # the zero that FAST starts from is below the logarithmic axis
        panels[-1].set_yscale("log", nonpositive="mask")
        panels[-1].set_ylim(min(norms) / 1.5, max(norms) * 1.5)
    # The start, step 0, is drawn left of step 1.
    panels[0].set_xscale("symlog", linthresh=1, linscale=0.3)
    panels[0].set_xlim(0, None)
    targets = ", ".join(dict.fromkeys(row["target"] for row in rows))
    panels[-1].set_xlabel(f"step of the adaptation to {targets}; dotted: the state in training")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)


EVALUATOR = Evaluator(
    name="anytime",
    summary="anytime deployment performance and forgetting of adaptations, step by step",
    source="FAST paper, section 6, Figures 3 to 15, Table 1",
    options=Options,
    work_items=work_items,
    table=table,
    draw=draw,
    rows=combine,
    size=lambda rows: (8.0, 8.0),
    order=40,
)
