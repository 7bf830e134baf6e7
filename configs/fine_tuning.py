"""FAST and its baselines from a file of weights: CIFAR-100 to EuroSAT and Fashion-MNIST, on two CPU cores.

    TFDS_DATA_DIR=... EUROSAT=... python -m seal_jax sweep --config=configs/fine_tuning.py --workdir=runs/fine/adapted

The file is runs/fine/source.safetensors, the export of configs/fine_tuning_source.py. It has torchvision's names:
torchvision's or timm's own weights take its place by --config.train.pretrained=FILE. EUROSAT is a folder with a
subfolder of images for each class. The network is adapted with a new head, five seeds each, on some 100 images of
each class (section 6.2.1 of the FAST paper: balanced batches, constant rates, damped momentum, no decay).
"""

import os

from seal_jax import methods
from seal_jax.cli.configs import base, set_fields

SYSTEMS = ("fast", "kaiming_fan_in", "feature_extraction", "warmup", "lp_ft")
VARIANTS = tuple(f"{task}_{system}" for task in ("eurosat", "fashion") for system in SYSTEMS)


def get_config(variant="eurosat_fast"):
    task, system = variant.split("_", 1)
    config = base("fast")
    config.data.image_size = 32
    config.data.channels = 3
    config.data.flip = True
    config.model.name = "resnet18"
    config.train.generations = 1
    if task == "eurosat":
        config.data.name = "folder/eurosat"
        config.data.data_dir = os.environ.get("EUROSAT", "eurosat")
        config.data.train_split = "train[:80%]"
        config.data.test_split = "train[80%:]"
    else:
        config.data.name = "fashion_mnist"
        config.data.train_count = 100
        config.data.validation_fraction = 0.01
    config.optimizer.learning_rate = 0.01
    config.optimizer.schedule = "constant"
    config.optimizer.weight_decay = 0.0
    config.optimizer.label_smoothing = 0.0
    config.train.sampling = "balanced"
    config.train.batch_size = 50
    config.train.epochs_per_generation = 12
    config.train.seeds = 5
    config.train.pretrained = "../../source.safetensors"
    set_fields(config, methods.VARIANTS[system].changes)
    if system == "fast":
        config.method.beta = 1e-3
    if system == "warmup":
        config.train.validate_every = 1
    return config
