"""FAST and its baselines on CIFAR-100 (FAST paper, sections 6.2 to 6.7), most with ResNet-18.

    TFDS_DATA_DIR=... python -m seal_jax sweep --config=configs/fast_cifar100.py --workdir=runs/fast

`source` trains the network to start from. The paper starts from one trained on ImageNet, and in its
first scenario (section 6.2) from one trained on CIFAR-100 for 120 epochs: that is `source`, with
undamped momentum (Algorithm 1's damped one is --config.optimizer.learning_rate=0.001). All others adapt
it with a new head: batches of 100 images, one of each class, resized to 128x128 and flipped, 5 % held
out, damped momentum 0.9. A second task is --config.data.name=mnist (batches of 10).

The rates of FAST with SGD are those of Figure 8, alpha 0.01 and beta a tenth of it. Those of the others
are ours, since the legends of the figures are not in the text: 0.01 for both, and 1e-4 with Adam and
RAdam.

FAST and Kaiming initialisation are there with the paper's other networks, too, each with its own
`source_...`: VGG-19 (sections 6.5 and 6.6), DenseNet-201 (6.6) and ResNeXt-101 (6.7, 250 epochs). From
weights trained on ImageNet: --config.train.pretrained=FILE.safetensors. Any other network is
--config.model.name=...

Made for a TPU or GPU; not run at this size.
"""

from seal_jax import methods
from seal_jax.cli.configs import base, set_fields

SYSTEMS = {key: system for key, system in methods.VARIANTS.items() if system.method == "fast"}
# The networks of sections 6.5 to 6.7, and the systems that are compared on them.
NETWORKS = ("vgg19", "densenet201", "resnext101_32x8d")
ON_NETWORKS = ("source", "kaiming_fan_in", "fast")
VARIANTS = (
    "source",
    *SYSTEMS,
    *(f"{system}_{network}" for network in NETWORKS for system in ON_NETWORKS),
)


def get_config(variant="fast"):
    network = next((name for name in NETWORKS if variant.endswith(f"_{name}")), "resnet18")
    system = variant.removesuffix(f"_{network}")
    config = base("normal" if system == "source" else "fast")
    config.data.name = "cifar100"
    config.data.image_size = 128
    config.data.flip = True
    config.data.validation_fraction = 0.05
    config.model.name = network
    if network == "vgg19":
        config.model.norm = "batch"  # as torchvision's vgg19_bn; LW's has layer normalisation
    config.model.head_bias = False  # of the source, too
    config.optimizer.learning_rate = 0.01
    config.optimizer.schedule = "constant"
    config.optimizer.weight_decay = 0.0
    config.optimizer.label_smoothing = 0.0
    config.train.batch_size = 100
    config.train.sampling = "balanced"
    config.train.generations = 1
    epochs = 250 if network == "resnext101_32x8d" else 20
    config.train.epochs_per_generation = 120 if system == "source" else epochs
    if system == "source":
        return config
    config.train.pretrained = "../" + variant.replace(system, "source")
    set_fields(config, SYSTEMS[system].changes)
    # Alpha is the learning rate above, if it is not set.
    if system in ("fast", "fast_nesterov"):
        config.method.beta = 1e-3
    if system in ("fast_adam", "fast_radam"):
        config.optimizer.learning_rate = 1e-4
        config.method.alpha = 1e-3
        config.method.beta = 1e-4
    # The warm-up ends by validation accuracy within some ten steps, so it is scored more often than once an epoch.
    if config.method.get("warmup"):
        config.train.validate_every = 5
    return config
