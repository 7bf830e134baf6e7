"""What the fit subtree does while the early layers ascend (SEAL paper, Table 7).

    python -m seal_jax sweep --config=configs/seal_ablations.py --workdir=runs/ablations
    python -m seal_jax sweep --config=configs/seal_ablations.py --workdir=runs/ablations-digits \\
        --config.data.name=digits --config.model.name=resnet8 --config.train.epochs_per_generation=16

Tiny-ImageNet, ResNet-50, the paper's preset. Expected (the paper's, after 10 generations): descend
59.22 %, reinit 58.87 %, freeze 51.17 %, normal 49.27 %, reverse 41.05 %. Not reproduced at this size.
"""

from seal_jax.cli.configs import base, use_preset

VARIANTS = ("normal", "descend", "freeze", "reinit", "reverse")


def get_config(variant="descend"):
    config = base("normal" if variant == "normal" else "seal")
    use_preset(config, "paper")
    config.data.name = "tiny_imagenet"
    config.data.crop_padding = 4
    config.data.flip = True
    config.model.name = "resnet50"
    # The other variants are values of `fit`.
    if variant == "reverse":
        config.method.reverse = True
    elif variant != "normal":
        config.method.fit = variant
    return config
