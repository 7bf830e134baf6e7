"""Every system of the four papers on scikit-learn's handwritten digits, seconds each.

    python -m seal_jax methods
    python -m seal_jax sweep --config=configs/digits.py --workdir=runs/digits
    python -m seal_jax train --config=configs/digits.py:lw --workdir=runs/digits/lw

Expected: about five minutes on two CPU cores for all of them, most of it compilation; test accuracies
between 85 and 96 %. The network is an MLP of 32 and 32 units and there are 359 training images, four
generations of eight epochs, two seeds: enough to see every method at work, too little to rank them.

PoF goes on from the run of `sam`, FAST and its baselines from that of `normal`: train these first,
in folders beside (a sweep does).
"""

from seal_jax.cli.configs import base

# Those that others start from come first.
VARIANTS = (
    "normal",
    "sam",
    "llf",
    "seal",
    "sa_gd",
    "wels",
    "welsr",
    "kels",
    "dsd",
    "fc",
    "imp",
    "lw",
    "asam",
    "pof",
    "foca",
    "fast",
    "fast_nesterov",
    "fast_adam",
    "fast_radam",
    "kaiming_fan_in",
    "kaiming_fan_out",
    "xavier",
    "gaussian",
    "feature_extraction",
    "frozen_head",
    "warmup",
    "born_again",
    "tolerant_teacher",
    "smoothed_teacher",
    "shrink_perturb",
)
METHODS = {
    "welsr": "wels",
    "asam": "sam",
    "tolerant_teacher": "born_again",
    "smoothed_teacher": "born_again",
}
# What the FAST paper compares: how the new head starts, and what does not learn.
ADAPTATION = {
    "fast": {"beta": 0.02},
    "fast_nesterov": {"beta": 0.02},
    "fast_adam": {"alpha": 0.01, "beta": 0.001},
    "fast_radam": {"alpha": 0.01, "beta": 0.001},
    "kaiming_fan_in": {"head": "kaiming_fan_in"},
    "kaiming_fan_out": {"head": "kaiming_fan_out"},
    "xavier": {"head": "xavier"},
    "gaussian": {"head": "normal", "sigma": 0.1},
    "feature_extraction": {"beta": 0.0},
    "frozen_head": {"head": "normal", "sigma": 0.1, "alpha": 0.0},
    "warmup": {"head": "kaiming_fan_in", "warmup": True},
}


def get_config(variant="normal"):
    method = "fast" if variant in ADAPTATION else METHODS.get(variant, variant)
    config = base(method)
    config.data.name = "digits"
    config.data.validation_fraction = 0.75
    config.model.name = "mlp"
    config.optimizer.learning_rate = 0.1
    config.optimizer.label_smoothing = 0.0
    config.train.generations = 4
    config.train.epochs_per_generation = 8
    config.train.seeds = 2
    config.run.checkpoint_every_epochs = 8
    if variant in ("llf", "seal"):
        config.method.threshold = "dense2"
    if variant == "seal":
        config.method.ascent_scale = 0.2
    if variant == "welsr":
        config.method.redraw = True
    if variant == "lw":
        config.method.rounds = 2  # of two blocks: four rounds
    if variant in ("sam", "asam", "pof"):
        config.optimizer.nesterov = True
    if variant == "asam":
        config.method.adaptive = True
        config.method.rho = 0.5
    if variant == "pof":
        config.train.pretrained = "../sam"
        config.train.generations = 1
        config.optimizer.learning_rate = 0.003
        config.optimizer.schedule = "constant"
    if variant == "born_again":
        config.method.temperature = 4.0
    if variant == "tolerant_teacher":
        config.method.tolerance = 0.2
    if variant == "smoothed_teacher":
        config.optimizer.label_smoothing = 0.1
    if variant in ADAPTATION:
        config.train.pretrained = "../normal"
        config.train.generations = 1
        config.train.sampling = "balanced"
        config.train.batch_size = 10
        config.optimizer.schedule = "constant"
        config.optimizer.weight_decay = 0.0
        for field, value in ADAPTATION[variant].items():
            config.method[field] = value
    if variant == "fast_nesterov":
        config.optimizer.nesterov = True
    if variant in ("fast_adam", "fast_radam"):
        config.optimizer.name = variant.removeprefix("fast_")
    if variant == "warmup":
        config.train.validate_every = 5  # steps; the rule of the paper counts ten
    return config
