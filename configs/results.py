"""Plain training, LLF, SEAL, LW, SAM and PoF on small data: the runs of docs/results.md.

    export TFDS_DATA_DIR=...
    python -m seal_jax sweep --config=configs/results.py --workdir=runs/fashion
    python -m seal_jax sweep --config=configs/results.py --workdir=runs/digits \
        --config.data.name=digits --config.data.train_split=train --config.data.validation_fraction=0.5

Expected: half an hour on two CPU cores for Fashion-MNIST, a few minutes for digits. A tenth of
Fashion-MNIST's training images, a ResNet-8 of width 8, three seeds, thirty epochs each (LW: three
rounds, one a block). PoF goes on for four epochs from the run of `sam`.
"""

from seal_jax.cli.configs import base

# PoF starts from SAM's run, which comes first.
VARIANTS = ("normal", "llf", "seal", "lw", "sam", "pof")


def get_config(method="normal"):
    config = base(method)
    config.data.name = "fashion_mnist"
    config.data.train_split = "train[:10%]"
    config.data.crop_padding = 2
    config.model.name = "resnet8"
    config.model.width = 8
    config.optimizer.learning_rate = 0.05
    config.optimizer.label_smoothing = 0.0
    config.train.batch_size = 50
    config.train.generations = 3
    config.train.epochs_per_generation = 10
    config.train.seeds = 3
    config.run.checkpoint_every_epochs = 5
    config.run.keep_checkpoints = 10
    if method == "seal":
        # Some 250 steps of ascent a generation, where the paper has 125,000 at 0.01.
        config.method.ascent_scale = 0.1
    if method == "lw":
        config.method.rounds = 1
    if method == "pof":
        config.train.pretrained = "../sam"
        config.train.generations = 1
        config.train.epochs_per_generation = 4
        config.optimizer.learning_rate = 0.001
        config.optimizer.schedule = "constant"
    return config
