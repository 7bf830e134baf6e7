"""SEAL, LLF and plain training on Fashion-MNIST with a small ResNet: real data, short trainings.

    TFDS_DATA_DIR=... python -m seal_jax sweep --config=configs/seal_fashion_mnist.py --workdir=runs/f

The data must be prepared as array_record; see docs/running.md. The setting is ours: no paper has it.
"""

from seal_jax.cli.configs import base, use_preset

VARIANTS = ("normal", "llf", "seal")


def get_config(method="seal"):
    config = base(method)
    use_preset(config, "reference")
    config.data.name = "fashion_mnist"
    config.data.crop_padding = 2
    config.data.flip = True
    config.model.name = "resnet8"
    config.train.batch_size = 128
    config.train.generations = 3
    config.train.epochs_per_generation = 12
    config.optimizer.warmup_epochs = 1
    # Fewer steps of ascent than in the paper, so a larger scale than its 0.01.
    if method == "seal":
        config.method.ascent_scale = 0.05
    return config
