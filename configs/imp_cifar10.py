"""IMP with rewinding on CIFAR-10 with ResNet-20 (Frankle & Carbin 2019; Frankle et al. 2020).

    TFDS_DATA_DIR=... python -m seal_jax sweep --config=configs/imp_cifar10.py --workdir=runs/imp

`imp` rewinds to the initial values, `imp_early` to those after 1,000 steps of 128 images, which matters
at this learning rate. Twenty generations prune 19 times and leave (1 - 0.2)^19 = 1.4 % of the weights.

Made for a TPU or GPU; not run at this size.
"""

from seal_jax.cli.configs import base

VARIANTS = ("normal", "imp", "imp_early")


def get_config(variant="imp_early"):
    config = base("normal" if variant == "normal" else "imp")
    config.data.name = "cifar10"
    config.data.crop_padding = 4
    config.data.flip = True
    config.model.name = "resnet20"
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 1e-4
    config.optimizer.label_smoothing = 0.0
    config.train.batch_size = 128
    # Rewound, every generation trains as long as the baseline does once.
    config.train.generations = 1 if variant == "normal" else 20
    config.train.epochs_per_generation = 160
    if variant == "imp_early":
        config.method.rewind_step = 1000
    return config
