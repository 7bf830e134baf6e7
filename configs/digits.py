"""Every system of the four papers on scikit-learn's handwritten digits, seconds each.

    python -m seal_jax methods
    python -m seal_jax sweep --config=configs/digits.py --workdir=runs/digits
    python -m seal_jax train --config=configs/digits.py:lw --workdir=runs/digits/lw

Expected: about five minutes on two CPU cores for all of them, most of it compilation; test accuracies
between 85 and 96 %. The network is an MLP of 32 and 32 units and there are 359 training images, four
generations of eight epochs, two seeds: enough to see every method at work, too little to rank them.

What sets a variant apart is declared in its method's file, in `seal_jax/methods/`. PoF continues from
the run of `sam`, FAST and its baselines from the run of `normal`: train these first, in folders beside
it (a sweep does).
"""

from seal_jax import methods
from seal_jax.cli.configs import base, set_fields

STARTS = {
    variant.digits["train.pretrained"].removeprefix("../")
    for variant in methods.VARIANTS.values()
    if "train.pretrained" in variant.digits
}
# A sweep trains in this order, so the variants that others start from come first.
VARIANTS = tuple(sorted(methods.VARIANTS, key=lambda key: key not in STARTS))


def get_config(variant="normal"):
    system = methods.VARIANTS[variant]
    config = base(system.method)
    config.data.name = "digits"
    # 359 images remain to train on.
    config.data.validation_fraction = 0.75
    config.model.name = "mlp"
    config.optimizer.learning_rate = 0.1
    config.optimizer.label_smoothing = 0.0
    config.train.generations = 4
    config.train.epochs_per_generation = 8
    config.train.seeds = 2
    config.run.checkpoint_every_epochs = 8
    # What makes the variant, then what it needs to train in seconds; the latter wins.
    set_fields(config, {**system.changes, **system.digits})
    return config
