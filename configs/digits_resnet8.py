"""Plain training, LLF and SEAL over generations with a small ResNet: what ascent does, and the benchmarks' setting.

    python -m seal_jax sweep --config=configs/digits_resnet8.py --workdir=runs/digits_resnet8

Expected: about two minutes on two CPU cores, four seeds of each method; test accuracies of 97 to 99 %,
for SEAL less than for plain training. The curves show what the methods do: SEAL's training accuracy falls while
the early layers ascend and then recovers, in every generation except the first.

Three quarters of the training images are held out, which leaves 359 to train on: with all of them
every method is right on 99.5 % of the test images. A generation has 88 steps of ascent where the
paper has 125,000, so `ascent_scale` is 0.2 and not the paper's 0.01: less does not forget.
"""

from seal_jax.cli.configs import base

VARIANTS = ("normal", "llf", "seal")


def get_config(method="seal"):
    config = base(method)
    config.data.name = "digits"
    config.data.validation_fraction = 0.75
    config.data.crop_padding = 1
    config.model.name = "resnet8"
    config.optimizer.learning_rate = 0.1
    config.train.generations = 4
    config.train.epochs_per_generation = 32
    config.train.seeds = 4
    config.run.checkpoint_every_epochs = 8
    # Few steps of ascent need a larger scale; see above.
    if method == "seal":
        config.method.ascent_scale = 0.2
    return config
