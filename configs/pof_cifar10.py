"""SGD, SAM and PoF on CIFAR-10 with WRN-28-10 (PoF paper, Table 1), with SAM's relatives and FOCA.

    TFDS_DATA_DIR=... python -m seal_jax sweep --config=configs/pof_cifar10.py --workdir=runs/pof

Section 4.1: batches of 256, learning rate 0.1 times 0.2 at epochs 60, 120, 160 and 200, Nesterov
momentum 0.9, weight decay 5e-4, cutout of 16 pixels; SAM with rho 0.05 for 200 epochs; then PoF for 10
epochs with a constant rate of 3e-5, from the SAM run in the folder beside it. CIFAR-100 is
--config.data.name=cifar100. SVHN has --config.data.name=svhn_cropped, its 530K extra images
(--config.data.train_split=train+extra), rate 0.01, rho 0.01, 50 epochs of PoF and no cutout;
Fashion-MNIST no cutout.

Expected (the paper's test errors): SGD 3.22 +- 0.14, SAM 2.50 +- 0.07, SAM then PoF 2.41 +- 0.02 %. A
tenth of the training split is held out (--config.data.validation_fraction=0 trains on all). Made for a
TPU or GPU; not run at this size.
"""

from seal_jax.cli.configs import base

VARIANTS = ("sgd", "sam", "asam", "sam_late", "msam", "looksam", "foca", "pof")
METHODS = {"sgd": "normal", "asam": "sam", "sam_late": "sam"}


def get_config(variant="pof"):
    config = base(METHODS.get(variant, variant))
    config.data.name = "cifar10"
    config.data.crop_padding = 4
    config.data.flip = True
    config.data.cutout = 16
    config.model.name = "wrn28-10"
    config.optimizer.learning_rate = 0.1
    config.optimizer.schedule = "steps"
    config.optimizer.decay_epochs = "60,120,160,200"
    config.optimizer.nesterov = True
    config.optimizer.label_smoothing = 0.0
    config.train.batch_size = 256
    config.train.generations = 1
    config.train.epochs_per_generation = 200
    # ASAM measures the radius in units of the weights, so its rho is ten times SAM's.
    if variant == "asam":
        config.method.adaptive = True
        config.method.rho = 0.5
    # Zhou et al. 2024 change over to SAM at epoch 175 of 200.
    if variant == "sam_late":
        config.method.last_epochs = 25
    if variant == "pof":
        # As seen from the run's folder: the one that a sweep has trained before.
        config.train.pretrained = "../sam"
        config.train.epochs_per_generation = 10
        config.optimizer.learning_rate = 3e-5
        config.optimizer.schedule = "constant"
    return config
