"""How often to forget: epochs per generation from 60 to 200 (SEAL paper, Table 11).

    python -m seal_jax sweep --config=configs/seal_frequency.py --workdir=runs/frequency

Tiny-ImageNet, ResNet-50, the paper's preset; every variant trains 10 generations of E epochs and
ascends for the first E / 4 of each, to the nearest whole step. Expected (the paper's, after 10
generations): E=60 56.56 %, E=100 59.36 %, E=160 59.22 %, E=200 59.47 %. Not reproduced at this size.
"""

from seal_jax.cli.configs import base, use_preset

VARIANTS = ("E60", "E70", "E80", "E90", "E100", "E120", "E160", "E200")


def get_config(variant="E160"):
    config = base("seal")
    use_preset(config, "paper")
    config.data.name = "tiny_imagenet"
    config.data.crop_padding = 4
    config.data.flip = True
    config.model.name = "resnet50"
    # `ascent_epochs` is left open: a quarter of E, whatever E is.
    config.train.epochs_per_generation = int(variant.removeprefix("E"))
    return config
