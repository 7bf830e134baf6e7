"""The network that configs/fine_tuning.py adapts: ResNet-18 on a fifth of CIFAR-100, on two CPU cores.

TFDS_DATA_DIR=... python -m seal_jax train --config=configs/fine_tuning_source.py --workdir=runs/fine/source
python -m seal_jax export --checkpoint=runs/fine/source --output=runs/fine/source.safetensors

The variant `zapping` resamples its classifier before every epoch, which shall make features that are adapted faster.
"""

from seal_jax.cli.configs import base

VARIANTS = ("normal", "zapping")


def get_config(variant="normal"):
    config = base(variant)
    config.data.name = "cifar100"
    config.data.train_split = "train[:20%]"
    config.data.crop_padding = 4
    config.data.flip = True
    config.model.name = "resnet18"
    config.optimizer.learning_rate = 0.05
    config.train.generations = 1
    config.train.batch_size = 64
    config.train.epochs_per_generation = 10
    return config
