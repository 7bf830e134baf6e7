"""Knowledge evolution on CIFAR-100 (Taha et al. 2021): KELS, its slim network, WELS; a relative.

    TFDS_DATA_DIR=... python -m seal_jax sweep --config=configs/ke_cifar100.py --workdir=runs/ke
    python -m seal_jax slim runs/ke/kels --output=runs/ke/slim

The paper's data sets are fine-grained ones at 224x224 (--config.data.name=caltech_birds2011, ...). It
trains ten generations of 200 epochs and keeps 0.8 (KELS) and 0.5 (WELS), as here. `shrink_perturb` (Ash
& Adams 2020) is compared at equal epochs; the setting is not that paper's.

Made for a TPU or GPU; not run at this size.
"""

from seal_jax.cli.configs import base

VARIANTS = ("normal", "wels", "kels", "shrink_perturb")


def get_config(variant="kels"):
    config = base(variant)
    config.data.name = "cifar100"
    config.data.crop_padding = 4
    config.data.flip = True
    config.model.name = "resnet18"
    config.model.stem = "cifar"
    config.model.width = 80  # 0.8 of it are 64 channels, the slim network is ResNet-18
    config.optimizer.learning_rate = 0.256
    config.optimizer.weight_decay = 1e-4
    config.train.batch_size = 256
    config.train.epochs_per_generation = 200
    # What is reinitialised, not what is kept. The default is the LW paper's 0.2.
    if variant == "wels":
        config.method.fraction = 0.5
    return config
