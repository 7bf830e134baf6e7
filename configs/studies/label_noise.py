"""Study: which ways of forgetting help where training labels are wrong?

    TFDS_DATA_DIR=... python -m seal_jax sweep --config=configs/studies/label_noise.py --workdir=runs/label_noise
    python -m studies collect --config=configs/studies/label_noise.py --workdir=runs/label_noise
    python -m studies write

Part of it: `--only='*mlp_digits*'`. Every system has 16 points of its settings, tuned on two seeds by the accuracy
on validation images with right labels, and then ten other seeds, each with wrong labels (and a subset of Fashion-MNIST)
of its own. All train 80 epochs, in four generations where they forget; LW in one for each block.
"""

from studies.design import Claim, Study
from studies.systems import for_network, systems

SYSTEMS = systems(generations=4, epochs=20)
# Of the networks that take longer.
SOME = (
    "short",
    "long",
    "restarts",
    "smoothing",
    "sam",
    "llf",
    "seal",
    "lw",
    "shrink_perturb",
    "fire",
)
SMALL = {"model.name": "mlp", "model.width": 128, "model.depth": 3}
FORGETTING = ("llf", "seal", "lw", "wels", "kels", "dsd", "shrink_perturb", "dash", "fire", "redo")
NOISY = ("noise20", "noise40", "noise60")

STUDY = Study(
    title="Label noise",
    question="Do trainings that forget and relearn beat plain training where training labels are wrong, and where they "
    "are right? Looked at before the settings were fixed: test accuracies of an MLP on digits and on Fashion-MNIST "
    "with 40 % noise, by plain training, LLF and SEAL (configs/quickstart.py), and of all these systems on digits with "
    "a grid of nine points, whose best points often lay at its ends: hence the wider ranges here.",
    fields={
        "data.draws": "per_seed",
        "optimizer.label_smoothing": 0.0,
        "train.batch_size": 64,
        "train.generations": 4,
        "train.epochs_per_generation": 20,
    },
    settings={
        "mlp_digits": {"data.name": "digits", **SMALL},
        "mlp_fashion": {
            "data.name": "fashion_mnist",
            "data.train_count": 200,
            "data.validation_fraction": 0.02,
            "data.test_split": "test[:20%]",
            **SMALL,
        },
        "mlp_cifar100": {
            "data.name": "cifar100",
            "data.label": "coarse_label",
            "data.image_size": 8,
            "data.train_count": 100,
            "data.validation_fraction": 0.04,
            "data.test_split": "test[:20%]",
            **SMALL,
        },
        "resnet8_digits": {
            "data.name": "digits",
            "data.validation_fraction": 0.2,
            "model.name": "resnet8",
            "model.width": 8,
        },
        "scnn_digits": {
            "data.name": "digits",
            "data.train_count": 50,
            "data.validation_fraction": 0.2,
            "model.name": "scnn",
            "model.dense_width": 128,
        },
    },
    conditions={
        "clean": {},
        "noise20": {"data.label_noise": 0.2},
        "noise40": {"data.label_noise": 0.4},
        "noise60": {"data.label_noise": 0.6},
    },
    names={
        "mlp_digits": "MLP on digits",
        "mlp_fashion": "MLP on 2,000 images of Fashion-MNIST",
        "mlp_cifar100": "MLP on 2,000 images of CIFAR-100, 8x8, twenty classes",
        "resnet8_digits": "ResNet-8 of width 8 on digits",
        "scnn_digits": "Simple CNN on 500 images of digits",
        "clean": "right labels",
        "noise20": "20 % wrong",
        "noise40": "40 % wrong",
        "noise60": "60 % wrong",
    },
    systems=SYSTEMS,
    adapt=for_network,
    some={
        "mlp_fashion": (SOME, ("clean", "noise40")),
        "mlp_cifar100": (SOME, ("clean", "noise40")),
        "resnet8_digits": (
            ("short", "long", "smoothing", "llf", "seal", "shrink_perturb"),
            ("noise40",),
        ),
        "scnn_digits": (("short", "long", "llf", "seal", "lw"), ("noise40",)),
    },
    chance={"mlp_cifar100": 5.0},
    claims=(
        Claim("SEAL beats plain training as long", "SEAL Table 2", "seal", "long"),
        Claim("SEAL beats LLF", "SEAL Table 2", "seal", "llf"),
        Claim("LLF beats plain training as long", "Zhou et al. 2022", "llf", "long"),
        Claim("LW beats plain training as long", "LW Table 2", "lw", "long"),
        Claim("LW beats WELS", "LW Table 2", "lw", "wels"),
        Claim("LW beats DSD", "LW Table 2", "lw", "dsd"),
        Claim("SAM beats plain training as long", "PoF Table 1", "sam", "long"),
        Claim("Momentum-SAM beats plain training as long", "Becker et al. 2024", "msam", "long"),
        Claim("LookSAM is as good as SAM or better", "Liu et al. 2022", "looksam", "sam"),
        Claim("SAM late beats plain training as long", "Zhou et al. 2024", "late_sam", "long"),
        *(
            Claim(
                f"{SYSTEMS[key].name} beats plain training that stops in time",
                "Zaidi et al. 2022",
                key,
                "short",
            )
            for key in (*FORGETTING, "smoothing")
        ),
    ),
)
VARIANTS = STUDY.variants


def get_config(variant=VARIANTS[-1]):
    return STUDY.config(variant)
