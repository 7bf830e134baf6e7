"""The settings of a run as frozen dataclasses, read strictly from nested mappings.

``ml_collections`` stays at the edge (``configs/`` and the command line); everything inside takes
these. A field that does not exist or has the wrong type is an error that names it.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from seal_jax.errors import UsageError, check_number, nonnegative, positive
from seal_jax.records import Scalar, check
from seal_jax.records import read as read
from seal_jax.schedules import boundaries
from seal_jax.transforms import aliases
from seal_jax.transforms.preconditioners import Name

# Ours, exact and with coupled decay; any other name is one of optax's.
OPTIMIZERS = typing.get_args(Name)


@dataclasses.dataclass(frozen=True)
class Data:
    """Which images, and what is done to them inside the compiled step.

    Attributes:
      name: "digits", "tiny_imagenet", or any TFDS name; or "folder/NAME" or "hf/NAME", a folder of images
        or of a Hugging Face data set as it is, with a NAME of your choice.
      data_dir: where TFDS keeps its data; empty for TFDS's own default (``TFDS_DATA_DIR``). Of the last two
        the folder itself.
      train_split: what to train on, a TFDS split such as "train" or "train[:10%]".
      test_split: what to test on; empty for "test", or "validation" where there is no test.
      label: the label feature; empty for "label".
      image_size: side that images are resized to; 0 leaves them as they are.
      validation_fraction: share of the training split held out, stratified by class.
      validation_seed: seed of that split: the same for all seeds of training.
      crop_padding: zero padding of the random crop; 0 for no crop.
      flip: random horizontal flip.
      cutout: side of the square that is cut out; 0 for none.
      normalisation: a key of ``seal_jax.data.STATISTICS``, or means and deviations as
        "0.5,0.5,0.5/0.5,0.5,0.5"; empty for that which the weights of ``train.pretrained`` want, where
        these are a file; else that of the data set, or ImageNet's.
      selection: what the best weights are chosen by: "validation", or "test_best", the test split
        itself, as the papers' released codes do: a number for comparing with theirs, no estimate.
      placement: where images are while a training runs: on every "device", or encoded where they are
        stored, from which batches are decoded and a "stream" sends them; "auto" streams what takes
        more than half of a device's or a host's free memory. Batches are the same.
      corrupt: what is done with an image that cannot be decoded: "raise" an error that names it, or
        "skip" it, which is counted and reported.
      channels: 3 repeats grey images over red, green and blue, 1 turns these into grey; 0 leaves them as
        they are.
      label_noise: share of the training images whose label is replaced by one of another class, drawn
        uniformly; validation and test labels stay as they are.
      label_noise_seed: of that draw: the same for all seeds of training.
      label_file: labels to train on, an integer for each image of ``train_split`` in stored order, as
        ``.npy`` or as text; empty for the data set's own.
      train_count: training images of each class; 0 for all that are not held out.
      imbalance: images of the first class for one of the last, with an exponential profile between
        them (Cao et al. 2019); 1 leaves the classes as they are.
      subset_seed: of the images that ``train_count`` and ``imbalance`` keep: the same for all seeds of
        training.
      warm_share: share of the training images, drawn by each seed of training, that it sees in the
        first ``warm_generations`` (Ash and Adams 2020).
      warm_generations: generations with that share only; 0 for none.
      mixup: α of the Beta distribution by which two images are mixed (Zhang et al. 2018); 0 for none.
      cutmix: α of the Beta distribution of the area that is pasted from another image (Yun et al.
        2019); 0 for none. With both, each batch draws one of the two.
      randaugment: operations of RandAugment on each image (Cubuk et al. 2020); 0 for none.
      randaugment_magnitude: of these, from 0 to 10, AutoAugment's strongest.
      draws: whether the draws of wrong labels and of subsets are "shared" by all seeds of training, or each
        seed has its own, "per_seed": then its seed is added to ``label_noise_seed`` and ``subset_seed``.
    """

    name: str = "digits"
    data_dir: str = ""
    train_split: str = "train"
    test_split: str = ""
    label: str = ""
    image_size: int = 0
    validation_fraction: float = 0.1
    validation_seed: int = 0
    crop_padding: int = 0
    flip: bool = False
    cutout: int = 0
    normalisation: str = ""
    selection: Literal["validation", "test_best"] = "validation"
    placement: Literal["auto", "device", "stream"] = "auto"
    corrupt: Literal["raise", "skip"] = "raise"
    channels: Literal[0, 1, 3] = 0
    label_noise: float = 0.0
    label_noise_seed: int = 0
    label_file: str = ""
    train_count: int = 0
    imbalance: float = 1.0
    subset_seed: int = 0
    warm_share: float = 0.5
    warm_generations: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    randaugment: int = 0
    randaugment_magnitude: float = 9.0
    draws: Literal["shared", "per_seed"] = "shared"


@dataclasses.dataclass(frozen=True)
class Model:
    """Which network; an option that is ``None`` is the method's own choice, or the network's.

    Attributes:
      name: see ``seal_jax.models.names()``.
      stem: "imagenet" or "cifar" (resnet18 to resnet101, ResNeXt and DenseNet).
      width: channels of the first stage, of a ViT's tokens, or of each hidden layer of an MLP.
      shortcut: "A" or "B" (the CIFAR networks of depth 6n + 2).
      norm: "batch", "layer" or "group".
      initialiser: "he", "he_fan_out", "xavier" or "normal".
      dropout: rate of the networks that have it.
      head_bias: whether the classifier has a bias.
      stride_on: the convolution of a wide residual block that strides, "first" or "second".
      dense_width: units of the dense layers of scnn and VGG.
      pool: side of scnn's max-pools.
      growth: channels that each dense layer of a DenseNet adds.
      patch: side of a ViT's patches.
      depth: blocks of a ViT, or hidden layers of an MLP.
    """

    name: str = "resnet18"
    stem: str | None = None
    width: int | None = None
    shortcut: str | None = None
    norm: str | None = None
    initialiser: str | None = None
    dropout: float | None = None
    head_bias: bool | None = None
    stride_on: str | None = None
    dense_width: int | None = None
    pool: int | None = None
    growth: int | None = None
    patch: int | None = None
    depth: int | None = None


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer, its schedule and its loss.

    Attributes:
      name: "sgd" with momentum, "adam" or "radam", all with coupled weight decay; or any optimizer of
        optax, such as "adamw", "lion", "lamb" or, of ``optax.contrib``, "muon", with ``args``.
      learning_rate: the peak.
      schedule: "restart" is a cosine in every generation, "single" one cosine over all generations,
        "steps" falls at ``decay_epochs`` of every generation, "constant" is no schedule.
      decay_epochs: epochs separated by commas, "60,120,160", for "steps".
      decay_factor: of each of these falls.
      warmup_epochs: linear warm-up by epochs at the start of each cosine.
      momentum: of "sgd"; the decay of the first moment in "adam" and "radam".
      nesterov: whether the momentum of "sgd" is Nesterov's.
      weight_decay: coupled L2, of "sgd", "adam" and "radam".
      reset_momentum: when the momentum is zeroed: "phase" (generation starts and the end of ascent),
        "generation", or "never".
      label_smoothing: spread over all classes.
      plateau_epochs: epochs without a better validation accuracy after which the learning rate is
        multiplied by ``plateau_factor`` for the rest of the generation; 0: never.
      plateau_factor: in (0, 1).
      args: of an optimizer of optax: its arguments by name, but the learning rate, which is the schedule's;
        those left out have optax's defaults.
      clip_norm: the gradient is scaled down to this norm, over all parameters, wherever its own is larger;
        0: never.
      accumulate: parts that a batch is cut into, whose gradients are computed one after the other and
        summed: activations take the memory of one part, and BatchNorm the statistics of each.
      ema: decay of an average of the weights, which is evaluated beside them; 0 for none.
    """

    name: str = "sgd"
    learning_rate: float = 0.01
    schedule: Literal["restart", "single", "steps", "constant"] = "restart"
    decay_epochs: str = ""
    decay_factor: float = 0.2
    warmup_epochs: int = 0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    reset_momentum: Literal["phase", "generation", "never"] = "phase"
    label_smoothing: float = 0.1
    plateau_epochs: int = 0
    plateau_factor: float = 0.5
    args: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)
    clip_norm: float = 0.0
    accumulate: int = 1
    ema: float = 0.0

    @property
    def of_optax(self) -> bool:
        """Whether it is an optimizer of optax, by its name there, and not one of ours."""
        return self.name not in OPTIMIZERS

    @property
    def coupled_decay(self) -> float:
        """The coupled weight decay that the gradient has; an optimizer of optax has its own or none."""
        return 0.0 if self.of_optax else self.weight_decay


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, how many at once, in which precision.

    Attributes:
      generations: G; generation 0 is plain training, so G - 1 forgetting events happen.
      epochs_per_generation: E.
      batch_size: images per step and seed, over all devices.
      drop_last: drop the last partial batch of an epoch; otherwise it is filled up with images that
        have no weight in the loss.
      sampling: "shuffle" goes through the images in a new order every epoch; "balanced" draws as
        many images of every class into each batch, of a multiple of the number of classes.
      patience: epochs without a better validation accuracy after which a training stops until its
        generation ends; 0: never. A generation ends early once all seeds have stopped.
      until_accuracy: training accuracy of an epoch at which a training stops likewise; 0: never.
      validate_every: steps between scorings of the validation split, a divisor of the steps in an
        epoch; 0 for once an epoch.
      pretrained: what the training starts from: the folder of a run, where name and shape of a
        parameter agree; or a file of weights, FILE.safetensors, a folder with one, FILE.pth or
        hf://owner/name, whose tensors must all fit. A path that begins with ".." is relative to the run's
        own folder, as in a sweep; empty for none.
      pretrained_weights: the "last" of that run, the "best" of its last generation, or its average of the
        weights, "ema".
      seed: of the first training; the others have the seeds after it.
      seeds: trainings in this run, all in one program.
      dtype: of the computation; parameters stay float32.
      batch_norm: statistics over the whole batch ("global") or each device's part ("device").
      batch_statistics: what BatchNorm normalises with in training: "batch", its own statistics, or
        "frozen", the running ones, which then stay as they are; ``None`` is the method's own choice.
      remat: whether the backward pass computes the activations of blocks again instead of keeping them:
        less memory of accelerators for more computation, and the same results up to rounding. XLA's
        CPU compiler undoes most of it.
      pretrained_head: "keep" takes the classifier of ``pretrained``; one for another number of classes is
        left out of a run, and is an error in a file. "replace" starts with a new one, as FAST always does.
      allow_pickle: whether ``pretrained`` may be a .pth, .pt or .bin file of PyTorch, a pickle; it is
        read by ``torch.load(weights_only=True)``.
      vary: settings that take several values in one program, as JSON: {"optimizer.learning_rate": [0.1, 0.3]},
        with more fields their product; or a list of points, [{"optimizer.learning_rate": 0.1}]. Every point
        has all seeds, and the outcome is a run folder for each in ``points/``. Numbers of the method, the
        optimizer, and ``data.label_noise``, ``label_noise_seed`` and ``subset_seed``; empty for none.
      tuned_on: the folder of a run with ``vary``, whose point with the best validation accuracy, a mean over its
        seeds, among those with this run's draws of the data gives its values; not beside ``vary``. A path that
        begins with ".." is relative to the run's own folder, as in a sweep; empty for none.
      tuned_points: how many of the best points are taken; several become those of ``vary``.
      tuned_weights: by which that accuracy is, the "last", the "best" of the last generation, or their average, "ema".
    """

    generations: int = 10
    epochs_per_generation: int = 160
    batch_size: int = 32
    drop_last: bool = True
    sampling: Literal["shuffle", "balanced"] = "shuffle"
    patience: int = 0
    until_accuracy: float = 0.0
    validate_every: int = 0
    pretrained: str = ""
    pretrained_weights: Literal["last", "best", "ema"] = "last"
    seed: int = 0
    seeds: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_norm: Literal["global", "device"] = "global"
    batch_statistics: Literal["batch", "frozen"] | None = None
    remat: bool = False
    pretrained_head: Literal["keep", "replace"] = "keep"
    allow_pickle: bool = False
    vary: str = ""
    tuned_on: str = ""
    tuned_points: int = 1
    tuned_weights: Literal["last", "best", "ema"] = "last"


@dataclasses.dataclass(frozen=True)
class Run:
    """What may differ when a run is resumed: it does not belong to the experiment.

    Attributes:
      seed_devices: devices along the mesh's seed axis; 0 chooses.
      data_devices: devices along the mesh's data axis; 0 chooses.
      seed_batching: how the seeds of one device run: together ("vmap"), one after the other ("map"),
        or "auto": together on accelerators, one after the other on CPU and, where the network has
        convolutions of 128 channels or more, on TPU.
      steps_per_call: steps in one call of the compiled program, a divisor of the steps in an epoch;
        0 for a whole epoch, or as many as fit 256 MB where images are streamed. A signal to stop is
        answered between calls.
      eval_batch_size: images in a step of evaluation.
      checkpoint_every_epochs: epochs between checkpoints.
      keep_checkpoints: how many of the newest are kept.
      data_workers: processes that decode streamed images; 0 chooses: all cores but one, or threads where
        there are few images.
      loggers: where the rows of ``metrics.jsonl`` are shown, names with commas between: "tensorboard", "csv",
        "wandb" and "mlflow"; empty for nowhere.
      deterministic: whether GPUs compute the same bits every time, without which a run resumed there agrees
        only up to rounding; slower. CPUs and TPUs always do.
      parameter_sharding: what each device along the data axis holds only a slice of: "none", the "optimizer"'s state
        with averages, best weights and what the method keeps, or "all" of them and the parameters.
      log_plasticity: whether each epoch's row has the share of dormant units, the norms of the weights, of their
        distance from the initial ones and of the gradient in every block, as ``evaluate --kind=plasticity``
        measures them, on 256 training images.
      keep_diverged: whether a run with several seeds goes on while any of their losses is finite; otherwise the first
        that is not ends it with an error. The metrics of one that diverged are ``null`` from there on.
    """

    seed_devices: int = 0
    data_devices: int = 0
    seed_batching: Literal["auto", "vmap", "map"] = "auto"
    steps_per_call: int = 0
    eval_batch_size: int = 256
    checkpoint_every_epochs: int = 1
    keep_checkpoints: int = 3
    data_workers: int = 0
    loggers: str = "tensorboard"
    deterministic: bool = False
    parameter_sharding: Literal["none", "optimizer", "all"] = "none"
    log_plasticity: bool = False
    keep_diverged: bool = False


# By the words of the messages. Fields whose condition does not exclude infinity are integers.
_CONDITIONS: dict[str, Callable[[Any], bool]] = {
    "be positive": positive,
    "be 0 or positive": nonnegative,
    "be at least 0": lambda value: value >= 0,
    "be at least 1": lambda value: value >= 1,
    "be finite, at least 1": lambda value: 1 <= value < math.inf,
    "lie in (0, 1)": lambda value: 0 < value < 1,
    "lie in [0, 1]": lambda value: 0 <= value <= 1,
    "lie in [0, 1)": lambda value: 0 <= value < 1,
    "lie in [0, 10]": lambda value: 0 <= value <= 10,
}
# The options of methods are checked where a method is built, by the same function.
_BOUNDS = (
    ("be at least 0", "data", "image_size crop_padding cutout train_count randaugment"),
    ("be at least 0", "data", "label_noise_seed subset_seed warm_generations"),
    ("be 0 or positive", "data", "mixup cutmix"),
    ("be finite, at least 1", "data", "imbalance"),
    ("lie in [0, 1)", "data", "label_noise"),
    ("lie in (0, 1)", "data", "warm_share"),
    ("lie in [0, 10]", "data", "randaugment_magnitude"),
    ("be at least 0", "optimizer", "warmup_epochs plateau_epochs"),
    ("be at least 0", "train", "patience validate_every seed"),
    ("be at least 1", "train", "generations epochs_per_generation batch_size seeds tuned_points"),
    ("be at least 0", "run", "seed_devices data_devices steps_per_call data_workers"),
    ("be at least 1", "run", "eval_batch_size checkpoint_every_epochs keep_checkpoints"),
    ("be at least 1", "optimizer", "accumulate"),
    ("be 0 or positive", "optimizer", "clip_norm"),
    ("lie in [0, 1)", "optimizer", "label_smoothing ema"),
    ("lie in [0, 1]", "train", "until_accuracy"),
    ("lie in (0, 1)", "optimizer", "decay_factor plateau_factor"),
)


def check_fields(section: str, values: Any, must: str, *fields: str) -> None:
    """Raise unless these fields of a section of settings are numbers that do what they ``must``."""
    for field in fields:
        check_number(f"{section}.{field}", getattr(values, field), _CONDITIONS[must], must)


@dataclasses.dataclass(frozen=True)
class Settings:
    """A whole experiment; ``method`` holds a ``name`` and the options of the method of that name."""

    data: Data = Data()
    model: Model = Model()
    method: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "normal"})
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    run: Run = Run()

    def __post_init__(self):
        for must, section, fields in _BOUNDS:
            check_fields(section, getattr(self, section), must, *fields.split())
        # With one step per epoch, the fewest; checked again once the data tells how many there are.
        check_steps(self.train, 1)
        # Seeds are uint32 on the devices.
        if self.train.seed + self.train.seeds > 2**32:
            raise UsageError(
                f"train.seed = {self.train.seed} must leave all seeds below 2**32 = {2**32}"
            )
        # The test split then takes the validation split's place (`load_data`), so there must be none.
        if self.data.selection == "test_best" and self.data.validation_fraction:
            raise UsageError(
                'data.selection = "test_best" chooses by the test split; set '
                "data.validation_fraction = 0"
            )
        if self.data.label_noise and self.data.label_file:
            raise UsageError(
                f"data.label_noise = {self.data.label_noise:g} does not go with data.label_file = "
                f"{self.data.label_file!r}: set one of them"
            )
        if self.train.tuned_on and self.train.vary:
            raise UsageError(
                f"train.tuned_on = {self.train.tuned_on!r} does not go with train.vary, which it would replace: set "
                "one of them"
            )
        if self.data.warm_generations > self.train.generations:
            raise UsageError(
                f"data.warm_generations = {self.data.warm_generations} is more than "
                f"train.generations = {self.train.generations}: lower it"
            )
        if self.train.sampling == "balanced":
            # The share may lack a class; neighbours in a balanced batch are always of the same two classes.
            for field in ("warm_generations", "mixup", "cutmix"):
                if value := getattr(self.data, field):
                    raise UsageError(
                        f'data.{field} = {value:g} does not go with train.sampling = "balanced"; use '
                        '"shuffle"'
                    )
        # Whatever the schedule is.
        if self.optimizer.decay_epochs or self.optimizer.schedule == "steps":
            boundaries(self.optimizer.decay_epochs, "optimizer.decay_epochs")
        _check_optimizer(self.optimizer)
        if not isinstance(self.method.get("name"), str):
            raise UsageError("method.name must name the method")
        # Here only that JSON can hold them; the method checks names and types of its options where it is built.
        for option, value in self.method.items():
            check(Scalar, value, f"method.{option}")


def _check_optimizer(optimizer: Optimizer) -> None:
    """Raise unless the name is known and takes what is set."""
    name, args = optimizer.name, optimizer.args
    if not optimizer.of_optax:
        if args:
            raise UsageError(
                f"optimizer.args.{next(iter(args))} is for optimizers of optax; {name} takes "
                "optimizer.momentum, optimizer.nesterov and optimizer.weight_decay"
            )
        return
    aliases.check(name, args)
    # At their defaults they stand for nothing that was asked for.
    default = Optimizer()
    for field in ("momentum", "nesterov", "weight_decay"):
        value = getattr(optimizer, field)
        if value and value != getattr(default, field):
            raise UsageError(
                f"optimizer.{field} = {value} has no effect on {name}: set it to "
                f"{type(value)()} and give {name}'s own in optimizer.args"
            )


def check_steps(train: Train, steps_per_epoch: int) -> None:
    """Raise if a training has more steps than its counter, an int32, can count."""
    most = (2**31 - 1) // (steps_per_epoch * train.generations)
    if train.epochs_per_generation > most:
        raise UsageError(
            f"train.epochs_per_generation = {train.epochs_per_generation} must be at most {most}, with "
            f"train.generations = {train.generations} and at least {steps_per_epoch} steps an epoch: "
            "steps are counted in 32 bits"
        )


def optional_fields(kind: type) -> dict[str, type]:
    """Return the fields of a dataclass that may be ``None``, with their type otherwise.

    >>> optional_fields(Model)["width"], optional_fields(Train)["batch_statistics"]
    (<class 'int'>, <class 'str'>)
    """
    types = {}
    for field, hint in typing.get_type_hints(kind).items():
        choices = typing.get_args(hint)
        if type(None) in choices:
            other = next(choice for choice in choices if choice is not type(None))
            # The Literals of settings are all of strings.
            types[field] = str if typing.get_origin(other) is Literal else other
    return types


def differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """List the settings in which two experiments differ, as ``field: old -> new``.

    >>> differences({"train": {"seed": 0}}, {"train": {"seed": 1}})
    ['train.seed: 0 -> 1']
    """
    lines = []
    # A dict, not a set: it keeps the fields' order.
    for field in {**old, **new}:
        path = f"{where}.{field}" if where else field
        a, b = old.get(field), new.get(field)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, path)
        elif a != b:
            lines.append(f"{path}: {a!r} -> {b!r}")
    return lines
