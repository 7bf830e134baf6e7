"""SEAL, LLF and plain training on CIFAR-100 with ResNet-18 (the setting of the SEAL paper, Table 10).

    TFDS_DATA_DIR=... python -m seal_jax sweep --config=configs/seal_cifar100.py --workdir=runs/cifar100

The data must be prepared as array_record; see docs/running.md. Images are 32x32, so the stem is the
3x3 one. The learning rate, batch size and epochs of Table 10 are those of another paper and not stated in
this one: the values here are ours (the reference preset with 40 epochs per generation). Its accuracies
(76.15 % before, 78.50 % after forgetting) are therefore a direction and not a target.
Table 9 is ResNet-110: the variants with `_resnet110`.

Made for a TPU or GPU; not run at this size.
"""

from seal_jax.cli.configs import base, use_preset

VARIANTS = ("normal", "llf", "seal", "normal_resnet110", "llf_resnet110", "seal_resnet110")


def get_config(variant="seal"):
    method, _, deep = variant.partition("_")
    config = base(method)
    use_preset(config, "reference")
    config.data.name = "cifar100"
    config.data.crop_padding = 4
    config.data.flip = True
    config.model.name = deep or "resnet18"
    # ResNet-110 has this stem by default.
    if not deep:
        config.model.stem = "cifar"
    # The preset's batch, epochs and warm-up are Tiny-ImageNet's: 32 images, 160 epochs, 20 of them warm-up.
    config.train.batch_size = 128
    config.train.epochs_per_generation = 40
    config.optimizer.warmup_epochs = 5
    return config
