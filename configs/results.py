"""Plain training, LLF, SEAL, LW, SAM and PoF on small data: the runs that docs/reproduce.md evaluates.

    python -m seal_jax sweep --config=configs/results.py --workdir=runs/digits
    TFDS_DATA_DIR=... python -m seal_jax sweep --config=configs/results.py --workdir=runs/fashion \
        --config.data.name=fashion_mnist --config.data.train_split=train[:10%] \
        --config.data.validation_fraction=0.1 --config.train.epochs_per_generation=10

Expected: digits five minutes on two CPU cores, a tenth of Fashion-MNIST half an hour. A ResNet-8 of width 8, three
seeds, three generations (LW: three rounds, one per block). PoF continues the run of `sam` for four epochs.
"""

from seal_jax.cli.configs import base

# PoF starts from SAM's run, which comes first.
VARIANTS = ("normal", "llf", "seal", "lw", "sam", "pof")


def get_config(method="normal"):
    config = base(method)
    config.data.name = "digits"
    config.data.validation_fraction = 0.5
    config.data.crop_padding = 2
    config.model.name = "resnet8"
    config.model.width = 8
    config.optimizer.learning_rate = 0.05
    config.optimizer.label_smoothing = 0.0
    config.train.batch_size = 50
    config.train.generations = 3
    config.train.epochs_per_generation = 20
    config.train.seeds = 3
    config.run.checkpoint_every_epochs = 5
    # All of them, for evaluations over training (SEAL's Figure 3).
    config.run.keep_checkpoints = 12
    if method == "seal":
        # A few hundred steps of ascent per generation, where the paper has 125,000 at a scale of 0.01.
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
