"""Warm starts on CIFAR-10 with ResNet-18 (Ash & Adams 2020, sections 2 and 3), and what keeps networks trainable.

    TFDS_DATA_DIR=... python -m seal_jax sweep --config=configs/warm_start_cifar10.py --workdir=runs/warm_start_cifar10

A network that was trained on half of the images and then on all of them ends worse than one that was trained on all
from scratch. ResNet-18, SGD without momentum, batches of 128, a constant rate of 0.001, 350 epochs on the half, as many
on all. The methods have the defaults of their papers or released codes, most of them for other trainings, and
`l2_init` a strength of ours: tune them. `--config.data.name=cifar100` is the other usual data set.

Expected: several points less after a warm start than from scratch (their Table 1). Made for a TPU or GPU; not run at
this size.
"""

from seal_jax.cli.configs import base

METHODS = (
    "shrink_perturb",
    "l2_init",
    "dash",
    "fire",
    "hare_tortoise",
    "redo",
    "continual_backprop",
)
VARIANTS = ("scratch", "warm", *METHODS)


def get_config(variant=VARIANTS[-1]):
    config = base(variant if variant in METHODS else "normal")
    config.data.name = "cifar10"
    config.model.name = "resnet18"
    config.model.stem = "cifar"
    config.optimizer.learning_rate = 0.001
    config.optimizer.momentum = 0.0
    config.optimizer.schedule = "constant"
    config.optimizer.weight_decay = 0.01 if variant == "l2_init" else 0.0
    config.optimizer.label_smoothing = 0.0
    config.train.batch_size = 128
    config.train.epochs_per_generation = 350
    # "scratch" is the second generation alone.
    config.train.generations = 1 if variant == "scratch" else 2
    config.data.warm_generations = 0 if variant == "scratch" else 1
    config.data.warm_share = 0.5
    return config
