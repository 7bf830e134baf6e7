"""LW and the methods it is compared with on CIFAR-10 (LW paper, Table 2), with the simple CNN.

    TFDS_DATA_DIR=... python -m seal_jax sweep --config=configs/lw_cifar10.py --workdir=runs/lw_cifar10

The paper's other networks are --config.model.name=vgg16, mobilenet or resnet50, with as many
generations as the network has blocks (13, 7, 16), for resnet50 also --config.model.norm=layer; its
other data sets are --config.data.name=cifar100, fashion_mnist, caltech101, stanford_dogs, ...; dropout
is --config.model.dropout=0.25, the other initialiser --config.model.initialiser=xavier.

Section 3: SGD with learning rate 0.003, momentum 0.9, weight decay 1e-5, batches of 256; the rate is
halved after 20 epochs without better validation accuracy; a round ends after 100,000 steps, here 575
epochs, or earlier by validation. `bl` trains once, for as many steps as all rounds together. The paper
resizes images to 224x224 (--config.data.image_size=224), crops from 248 and flips; the crop here
keeps that proportion, four pixels in all.

Expected (the paper's, one seed, at 224x224 with augmentation): BL 82.7, WELSR 84.2, DSD 82.5, WELS
83.7, FC 84.9, LW 84.3 %. Made for a TPU or GPU; not run at this size.
"""

from seal_jax.cli.configs import base

VARIANTS = ("bl", "welsr", "dsd", "wels", "fc", "lw")
METHODS = {"bl": "normal", "welsr": "wels"}
ROUNDS = 4  # K blocks of scnn times N = 1


def get_config(variant="lw"):
    config = base(METHODS.get(variant, variant))
    config.data.name = "cifar10"
    config.data.flip = True
    config.data.crop_padding = 2
    config.model.name = "scnn"
    config.optimizer.learning_rate = 0.003
    config.optimizer.schedule = "constant"
    config.optimizer.weight_decay = 1e-5
    config.optimizer.label_smoothing = 0.0
    config.optimizer.plateau_epochs = 20
    config.train.batch_size = 256
    config.train.generations = ROUNDS
    config.train.epochs_per_generation = 575
    # A round ends after 60 epochs without better validation accuracy, or at its full length.
    config.train.patience = 60
    # All rounds in one.
    if variant == "bl":
        config.train.generations = 1
        config.train.epochs_per_generation *= ROUNDS
    if variant == "welsr":
        config.method.redraw = True
    return config
