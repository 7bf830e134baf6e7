"""Self-distillation over generations on CIFAR-100 with ResNet-110 (SEAL paper, Table 9).

    TFDS_DATA_DIR=... python -m seal_jax sweep --config=configs/born_again_cifar100.py --workdir=runs/b

Table 9's networks learn for ten generations with the hyper-parameters of another paper (Yang et al.),
which this one does not state; weights, temperatures and the tolerance here are ours. The length is that
of `seal_cifar100.py`, so that both can be compared at equal epochs. Table 10 is ResNet-18:
--config.model.name=resnet18 --config.model.stem=cifar.

Made for a TPU or GPU; not run at this size.
"""

from seal_jax.cli.configs import base, use_preset

VARIANTS = ("labels_only", "born_again", "tolerant_teacher", "smoothed_teacher")


def get_config(variant="born_again"):
    config = base("born_again")
    use_preset(config, "reference")
    config.data.name = "cifar100"
    config.data.crop_padding = 4
    config.data.flip = True
    config.model.name = "resnet110"
    config.train.batch_size = 128
    config.train.epochs_per_generation = 40
    config.optimizer.warmup_epochs = 5
    # The preset smooths the labels of every method; here that is a variant of the teacher.
    config.optimizer.label_smoothing = 0.1 if variant == "smoothed_teacher" else 0.0
    # Weight 0 leaves the labels alone: students without a teacher, at equal epochs.
    config.method.weight = 0.0 if variant == "labels_only" else 0.5
    config.method.temperature = 2.0
    if variant == "tolerant_teacher":
        config.method.tolerance = 0.2
    return config
