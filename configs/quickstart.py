"""Plain training, LLF and SEAL over generations, on scikit-learn's handwritten digits.

    python -m seal_jax sweep --config=configs/quickstart.py --workdir=runs/quickstart

About two minutes on two CPU cores; the table it prints stands in the README. The images are 8x8 and
easy, so that the interest lies in the curves: SEAL's training accuracy falls while the early layers
ascend and recovers in every generation but the first. An ascent of a few epochs has a few hundred
steps, where the paper's has 125,000; `ascent_scale` is larger than the paper's 0.01 to make up for it.
"""

from seal_jax.cli.configs import base

VARIANTS = ("normal", "llf", "seal")


def get_config(method="seal"):
    config = base(method)
    config.data.name = "digits"
    config.data.crop_padding = 1
    config.model.name = "resnet8"
    config.train.generations = 4
    config.train.epochs_per_generation = 24
    config.train.seeds = 4
    config.optimizer.learning_rate = 0.1
    if method != "normal":
        config.method.threshold = "layer2"
    if method == "seal":
        config.method.ascent_scale = 0.3
    return config
