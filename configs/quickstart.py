"""Training that memorises wrong labels, and forgetting that undoes it: handwritten digits, 40 % label noise.

    python -m seal_jax sweep --config=configs/quickstart.py --workdir=runs/quickstart

Expected: about a minute on two CPU cores, eight seeds of each method, each with wrong labels of its own; the table and
the picture are in the README. Plain training learns more of the wrong labels by heart in every generation. LLF
reinitialises all layers but the lowest where a generation starts, SEAL ascends in the lower two for its first quarter.

The learning rate and SEAL's scale of ascent were chosen by looking at test accuracies, so this is a demonstration; the
studies in docs/results.md choose by validation. A generation has 100 steps of ascent where the paper has 125,000, so
`ascent_scale` is 0.3 and not the paper's 0.01.
"""

from seal_jax.cli.configs import base

VARIANTS = ("normal", "llf", "seal")


def get_config(method="seal"):
    config = base(method)
    config.data.name = "digits"
    config.data.label_noise = 0.4
    config.data.draws = "per_seed"
    config.model.name = "mlp"
    config.model.width = 128
    config.model.depth = 3
    config.optimizer.learning_rate = 0.02
    config.optimizer.label_smoothing = 0.0
    config.train.batch_size = 64
    config.train.generations = 4
    config.train.epochs_per_generation = 20
    config.train.seeds = 8
    config.run.checkpoint_every_epochs = 20
    if method == "llf":
        config.method.threshold = "dense2"
    if method == "seal":
        config.method.threshold = "dense3"
        config.method.ascent_scale = 0.3
    return config
