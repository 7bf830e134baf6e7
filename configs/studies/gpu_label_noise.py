"""Label noise and clean labels on one GPU: a long training, LLF and SEAL, eight seeds of ResNet-18 together.

    python -m benchmarks.study pack --config=configs/studies/gpu_label_noise.py --output=fashion.npz
    python -m benchmarks.study train --study=fashion.npz --workdir=runs/gpu --minutes=30

Fashion-MNIST, 51,200 images. On a fifth of CIFAR-100, 9,000 images, by these overrides of `pack`:

    --config.data.name=cifar100 --config.data.train_split=train[:20%] --config.data.train_count=0
    --config.data.crop_padding=4 --config.run.steps_per_call=10

`epochs_per_generation` is the most that `train` takes; it shortens all variants alike to what fits the minutes. 40 % of
the training labels are wrong, but for the variants `_clean`; validation and test labels never are. Learning rate,
weight decay and SEAL's scale are those of configs/seal_fashion_mnist.py, fixed before any result: this has not been run
at its size.
"""

from seal_jax.cli.configs import base, use_preset

VARIANTS = ("normal_long", "llf", "seal", "normal_long_clean", "llf_clean", "seal_clean")


def get_config(variant="seal"):
    method = variant.split("_")[0]
    config = base(method)
    use_preset(config, "reference")
    config.data.name = "fashion_mnist"
    # 5,400 of each class are not held out. 400 steps make an epoch, and a signal is answered after 20.
    config.data.train_count = 5120
    config.run.steps_per_call = 20
    config.data.crop_padding = 2
    config.data.flip = True
    config.data.label_noise = 0.0 if variant.endswith("_clean") else 0.4
    config.model.name = "resnet18"
    config.model.stem = "cifar"
    config.optimizer.warmup_epochs = 0
    config.optimizer.label_smoothing = 0.0
    config.train.batch_size = 128
    config.train.dtype = "bfloat16"
    config.train.seeds = 8
    config.train.generations = 4
    config.train.epochs_per_generation = 30
    if "long" in variant:
        # As many epochs as the others, in one cosine.
        config.train.generations = 1
        config.train.epochs_per_generation = 120
    if method == "seal":
        config.method.ascent_scale = 0.05
    return config
