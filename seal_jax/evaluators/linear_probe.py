"""Linear probe on other data sets: SEAL paper, Tables 1 and 12."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax import data, papers
from seal_jax.core import plots, tables
from seal_jax.core.tables import Column, Record, Table, grouped
from seal_jax.errors import UsageError, check_number
from seal_jax.evaluation import linear_probe
from seal_jax.evaluators import transfer_data
from seal_jax.evaluators.evaluator import Evaluator, WorkItem
from seal_jax.evaluators.loaded_run import LoadedRun, Network
from seal_jax.evaluators.options import check_least, check_names
from seal_jax.training.batches import padded_batches

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Options:
    """The classifier's training. The paper leaves image size, augmentation and batch size open.

    Attributes:
      datasets: trained on the training split of each and scored on its test split.
      learning_rates: a classifier for each, without a schedule; the best test accuracy counts.
      epochs: passes over the training images.
      batch_size: of the classifier's training.
      augmentation: of the training images, drawn in every epoch; "crop_flip" is that of the paper's
        pre-training, padding included. The features of all images are then computed in every epoch.
      crop_padding: pixels around the image, for "crop_flip".
      image_size: side of the images; "none" for the run's own.
      normalisation: name of channel statistics, such as "imagenet"; left out, the run's.
      test_fraction: fraction of its images that a data set without a test split is scored on,
        stratified by class and the same for every network; the rest are trained on.
      features: the classifier's input: that of the network's own classifier, or the output of a block,
        averaged over the image.
      seed: of the classifier's initial weights and of the order of the images.
      feature_batch_size: images per step of the frozen network.
    """

    datasets: tuple[str, ...] = (
        "oxford_flowers102",
        "caltech_birds2011",
        "fgvc_aircraft",
        "mit_indoor67",
        "stanford_dogs",
    )
    learning_rates: tuple[float, ...] = (1e-1, 1e-2, 1e-3)
    epochs: int = 120
    batch_size: int = 128
    augmentation: Literal["none", "flip", "crop_flip"] = "none"
    crop_padding: int = 4
    image_size: int | None = None
    normalisation: str = ""
    test_fraction: float = 0.2
    features: str = "features"
    seed: int = 0
    feature_batch_size: int = 256

    def __post_init__(self):
        check_least(self, crop_padding=1, image_size=1, feature_batch_size=1)
        fraction = self.test_fraction
        check_number("--test-fraction", fraction, lambda v: 0 < v < 1, "be between 0 and 1")
        # Built for its checks alone: what the library refuses is an error before any work.
        self.protocol()

    def protocol(self) -> linear_probe.Protocol:
        """Return how the classifiers learn."""
        return linear_probe.Protocol(self.learning_rates, self.epochs, self.batch_size)


def work_items(loaded_run: LoadedRun, options: Options) -> Sequence[WorkItem]:
    """Return a work item for each data set and network, data sets outermost."""
    model = transfer_data.model_for(loaded_run, options.image_size)
    _, renormalise = transfer_data.normalisation(loaded_run, options.normalisation)
    known = ("features", *model.round_blocks)
    check_names("features", (options.features,), known)
    augmentation = _augmentation(options, model.image_shape)
    # Also opens every data set, so one that was not prepared is an error before the work on the first.
    complete = {name: transfer_data.has_test_split(loaded_run, name) for name in options.datasets}
    rates = np.array(options.learning_rates)

    # Work items have the data sets outermost, so one at a time is enough.
    @functools.lru_cache(maxsize=1)
    def load(name: str) -> data.Dataset:
        return data.load(
            name,
            data_dir=loaded_run.data_dir(name),
            image_size=model.image_shape[:2],
            channels=loaded_run.channels,
            test_fraction=options.test_fraction,
            validation_fraction=0.0,
            corrupt=loaded_run.settings.data.corrupt,
        )

    def features_of(variables: Any, images: jax.Array) -> jax.Array:
        outputs = model.features(variables, renormalise(images))[options.features]
        # A block's output is [n, height, width, channels] or [n, tokens, channels]; the classifier's own
        # input is already flat.
        between = tuple(range(1, outputs.ndim - 1))
        return outputs.mean(between, dtype=jnp.float32) if between else outputs

    def features(network: Network, images: np.ndarray) -> np.ndarray:
        return transfer_data.features(
            loaded_run, network, images, features_of, options.feature_batch_size
        )

    def measure(name: str, network: Network) -> dict[str, Any]:
        dataset = load(name)
        train, test = dataset.train, dataset.test

        def of_epoch(epoch: int) -> np.ndarray:
            return features(network, _augmented(train, augmentation, options, epoch))

        probe = linear_probe.fit(
            (of_epoch if augmentation else features(network, train.images), train.labels),
            (features(network, test.images), test.labels),
            dataset.num_classes,
            options.protocol(),
            seed=options.seed,
        )
        return {
            **network.identity,
            "dataset": name,
            "train_images": len(train),
            "test_images": len(test),
            # Without a test split, images were held out to be scored on: the table says so.
            "held_out": not complete[name],
            "classes": dataset.num_classes,
            "accuracy": float(probe.accuracies[probe.best]),
            "learning_rate": options.learning_rates[probe.best],
            "learning_rates": list(options.learning_rates),
            "accuracies": probe.accuracies.tolist(),
            "diverged": rates[~np.isfinite(probe.kernels).all((1, 2))].tolist(),
        }

    return [
        WorkItem(f"{network.key}/{name}", functools.partial(measure, name, network))
        for name in options.datasets
        for network in loaded_run.networks
    ]


def _augmentation(options: Options, shape: tuple[int, int, int]) -> data.Augmentation | None:
    """Return crop and flip, with a "normalisation" that leaves the pixels their values."""
    if options.augmentation == "none":
        return None
    channels = shape[-1]
    padding = options.crop_padding if options.augmentation == "crop_flip" else 0
    # (x / 255 - 0) / (1 / 255) = x: augmented images stay uint8, and are normalised later like all others.
    augmentation = data.Augmentation(
        mean=(0.0,) * channels, std=(1 / 255,) * channels, crop_padding=padding, flip=True
    )
    try:
        data.check_image_shape(augmentation, shape)
    except UsageError:
        raise UsageError(
            f"--crop-padding={padding} must be smaller than the images ({shape[0]}x{shape[1]})"
        ) from None
    return augmentation


def _augmented(
    split: data.Split, augmentation: data.Augmentation | None, options: Options, epoch: int
) -> np.ndarray:
    """Return the images of one epoch, uint8: a pure function of the seed and the epoch."""
    # Not a function of the network: all networks of a comparison see the same crops and flips.
    key = jax.random.fold_in(jax.random.key(options.seed), epoch)
    batch = min(options.feature_batch_size, len(split))
    augmented = [
        _augment(jax.random.fold_in(key, rows[0]), split.images[rows], augmentation)
        for rows in padded_batches(len(split), batch)[0]
    ]
    return np.concatenate(augmented)[: len(split)]


@functools.partial(jax.jit, static_argnames=("augmentation",))
def _augment(key: jax.Array, images: jax.Array, augmentation: data.Augmentation) -> jax.Array:
    height, width, channels = images.shape[1:]
    parameters = data.draw(key, len(images), augmentation, (height, width, channels))
    # The division by 255 and back may be off by a rounding: a cast alone would cut 41.99 to 41.
    return jnp.rint(data.apply(images, parameters, augmentation)).astype(jnp.uint8)


def paper(row: Record) -> float | None:
    """Return the paper's accuracy in % for a row's method and data set."""
    # Table 12 is of ResNet-18, Table 1 of ResNet-50, beside which other networks are shown too.
    model = row["model"] if row["model"] == "resnet18" else "resnet50"
    method = transfer_data.paper_method(row) or ""
    column = transfer_data.paper_name(row["dataset"])
    number = papers.load("SEAL", "Tables 1, 12").get(model, method, column=column)
    return number.mean if number else None


def table(rows: Sequence[Record]) -> Table:
    """Return a line for each run and data set: the best accuracy, and that of every rate."""
    rates = sorted({rate for row in rows for rate in row["learning_rates"]}, reverse=True)
    notes = [
        "Test accuracy in %; best: of the learning rates, by test accuracy as in the paper, for each "
        "seed."
    ]
    if any(paper(row) is not None for row in rows):
        notes.append(
            "paper: SEAL paper, Table 1 (ResNet-50; for a resnet18 Table 12, ResNet-18), the row of "
            "the same method, trained on Tiny-ImageNet (64x64) for 10 generations of 160 epochs, "
            "Normal for one. Its image size, augmentation and batch size are not given. Here: "
            f"{transfer_data.settings_of(rows)}."
        )
    held_out = {
        f"{transfer_data.paper_name(row['dataset'])} ({row['test_images']} of "
        f"{row['train_images'] + row['test_images']})"
        for row in rows
        if row.get("held_out")
    }
    if held_out:
        notes.append(
            "Without a test split, so scored on images held out of all that it has, stratified by "
            f"class: {', '.join(sorted(held_out))}."
        )
    diverged = {rate for row in rows for rate in row.get("diverged", ())}
    if diverged:
        notes.append(
            f"At rate {_rates(diverged)} some classifier diverged; its accuracy is that of one class "
            "alone."
        )
    return Table.of_groups(
        "Linear probe on other data sets",
        [
            *tables.CHECKPOINT_COLUMNS,
            tables.shared("data set", lambda row: transfer_data.paper_name(row["dataset"])),
            tables.seed_mean("best", "accuracy", scale=100),
            tables.shared("paper", paper, "{:.2f}".format, optional=True),
            Column("best rate", lambda seeds: _rates({row["learning_rate"] for row in seeds})),
            *(
                tables.seed_mean(
                    f"rate {rate:g}", tables.entry("learning_rates", "accuracies", rate), scale=100
                )
                for rate in rates
            ),
        ],
        tables.by_checkpoint(rows, "dataset"),
        notes,
    )


def _rates(rates: set[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in sorted(rates, reverse=True))


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw bars by data set with intervals over seeds, the paper's as marks; a panel per weights."""
    rows = tables.newest(rows)
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    panels = plots.panels_by_weights(figure, rows, sharex=True)
    for weights, of_weights, (axes,) in panels:
        _draw_bars(axes, of_weights, names)
        axes.set_ylabel(f"test accuracy, %, {weights} weights\n{plots.BAND}", fontsize=9)
    plots.legend_below(figure, [axes for _, _, (axes,) in panels], transfer_data.PAPER_LABEL)


def _draw_bars(axes: Axes, rows: Sequence[Record], names: Sequence[str]) -> None:
    runs = grouped(rows, ("run",))
    width = 0.8 / len(runs)
    marks: list[tuple[float, float]] = []
    styles = plots.run_styles(rows)
    for index, ((run,), of_run) in enumerate(runs.items()):
        for number, ((name,), seeds) in enumerate(grouped(of_run, ("dataset",)).items()):
            place = names.index(name) + (index - (len(runs) - 1) / 2) * width
            points = plots.over_seeds([[100 * row["accuracy"] for row in seeds]])
            axes.bar(
                place,
                points[0],
                0.92 * width,
                yerr=plots.bars(points) if len(seeds) > 1 else None,
                color=styles[run]["color"],
                ecolor="#444444",
                label=run if number == 0 else None,
            )
            # The paper's number depends on the method, so all seeds share it.
            published = paper(seeds[0])
            if published is not None:
                marks.append((place, published))
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
    axes.set_axisbelow(True)


def size(rows: Sequence[Record]) -> tuple[float, float]:
    """Return the figure's size: wider for more bars."""
    bars = len({(row["run"], row["dataset"]) for row in rows})
    return (min(5 + 0.35 * bars, 16.0), 2.8 * len({row["weights"] for row in rows}) + 0.8)


EVALUATOR = Evaluator(
    name="linear_probe",
    summary="linear classifiers on the frozen features, on other data sets",
    source="SEAL paper, Tables 1 and 12",
    options=Options,
    work_items=work_items,
    table=table,
    draw=draw,
    size=size,
    order=10,
)
