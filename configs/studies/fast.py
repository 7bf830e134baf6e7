"""Study: does FAST adapt a trained network to another task faster, better and with less forgetting than its baselines?

    TFDS_DATA_DIR=... EUROSAT=... python -m seal_jax sweep --config=configs/studies/fast.py --workdir=runs/fast
    TFDS_DATA_DIR=... EUROSAT=... python -m studies evaluate --config=configs/studies/fast.py --workdir=runs/fast
    python -m studies collect --config=configs/studies/fast.py --workdir=runs/fast
    python -m studies write

EUROSAT is a folder with a subfolder of images for each class. The sources, ten networks each, are trained first. Every
system has 16 points of its settings, tuned on two seeds by validation accuracy, and then ten other seeds, each from
a source network of its own, all on the same images. Batches have one image of each class; the momentum is damped, the
rates are constant, and BatchNorm is frozen (section 6.2.1 of the FAST paper).
"""

import os

from seal_jax import methods
from studies.design import OURS, Claim, Measure, Study, System

# Of the classifier, and of all where there is no other.
RATES = {"optimizer.learning_rate": (0.01, 1.0)}
APART = RATES | {"beta": (0.003, 0.3)}
DECAYS = RATES | {"optimizer.weight_decay": (1e-5, 1e-2)}

IMAGES = {
    "data.image_size": 16,
    "data.channels": 1,
    "model.name": "resnet8",
    "model.width": 8,
    "optimizer.label_smoothing": 0.0,
    "train.generations": 1,
}
# Smaller splits, so that all checkpoints of a training can be scored.
FASHION = {
    "data.name": "fashion_mnist",
    "data.train_split": "train[:10%]",
    "data.test_split": "test[:20%]",
}
DIGITS = {"data.name": "digits"}
EUROSAT = {
    "data.name": "folder/eurosat",
    "data.data_dir": os.environ.get("EUROSAT", "eurosat"),
    "data.train_split": "train[:85%]",
    "data.test_split": "train[85%:]",
    "data.normalisation": "0.37/0.14",  # of the training images in grey
}


def system(name, key, space=DECAYS, **fields):
    return System(name, "fast", {**methods.VARIANTS[key].changes, **fields}, space)


SYSTEMS = {
    "fast": system("FAST", "fast", APART),
    "kaiming": system("Kaiming fan-in", "kaiming_fan_in"),
    "kaiming_apart": system("Kaiming fan-in, two rates", "kaiming_fan_in", APART),
    # Scored where every number of shots ends an epoch.
    "warmup": system("Classifier warm-up", "warmup", **{"train.validate_every": 5}),
    "extraction": system("Feature extraction", "feature_extraction"),
    "lp_ft": system("LP-FT", "lp_ft", RATES | {"probe_share": (0.1, 0.9)}),
}
FINE_TUNED = {key: SYSTEMS[key].name for key in ("kaiming", "kaiming_apart", "warmup", "lp_ft")}
# The paper draws warm-up in other settings.
NOT_IN_PAPER = ("kaiming_apart", "warmup", "lp_ft")


def claims(text, source, measure="accuracy", baselines=tuple(FINE_TUNED)):
    return tuple(
        Claim(
            text.format(SYSTEMS[key].name),
            OURS if key in NOT_IN_PAPER else source,
            "fast",
            key,
            measure,
        )
        for key in baselines
    )


STUDY = Study(
    title="Task adaptation",
    question="Does FAST, whose classifier starts at zero and whose features learn slowly, adapt faster than other ways "
    "of fine-tuning, end more accurate, and forget less? Images are 16x16 and grey; each number of images of a "
    "class is one draw, which all seeds share. Looked at before the settings were fixed: accuracies of FAST and "
    "Kaiming fan-in at grids of nine points, from Fashion-MNIST to 5 digits a class.",
    points=16,
    finalists=0,
    seeds=10,
    fields={
        **IMAGES,
        "data.draws": "shared",
        "optimizer.schedule": "constant",
        "optimizer.weight_decay": 0.0,
        "train.sampling": "balanced",
        "train.batch_size": 10,
    },
    sources={
        "fashion": {
            **IMAGES,
            **FASHION,
            "optimizer.learning_rate": 0.1,
            "train.batch_size": 64,
            "train.epochs_per_generation": 10,
        },
        "digits": {
            **IMAGES,
            **DIGITS,
            "optimizer.learning_rate": 0.1,
            "train.batch_size": 64,
            "train.epochs_per_generation": 20,
        },
    },
    settings={
        "fashion_digits": {
            **DIGITS,
            "data.validation_fraction": 0.2,
            "train.pretrained": "../source-fashion",
        },
        "fashion_eurosat": {
            **EUROSAT,
            "data.validation_fraction": 0.12,
            "train.pretrained": "../source-fashion",
        },
        "digits_fashion": {
            **FASHION,
            "data.validation_fraction": 0.3,
            "train.pretrained": "../source-digits",
        },
    },
    conditions={
        "n5": {"data.train_count": 5, "train.epochs_per_generation": 20},
        "n100": {"data.train_count": 100, "train.epochs_per_generation": 4},
    },
    names={
        "fashion_digits": "Fashion-MNIST to digits",
        "fashion_eurosat": "Fashion-MNIST to EuroSAT",
        "digits_fashion": "Digits to Fashion-MNIST",
        "n5": "5 a class, 100 steps",
        "n100": "100 a class, 400 steps",
    },
    systems=SYSTEMS,
    measures={
        "early": Measure(
            "test images after 8 steps, %", "test", "anytime", where={"tau": 8}, scale=100
        ),
        "epoch": Measure(
            "training images in the first epoch, %",
            "train/accuracy",
            where={"epoch": 0},
            scale=100,
        ),
        # The last checkpoint, whatever its step.
        "source": Measure("images of the source, %", "source", "anytime", scale=100),
        "distance": Measure("distance from the source", "distance", "anytime", lower=True),
    },
    claims=(
        *claims("FAST is ahead of {} after 8 steps", "FAST Figure 10", "early"),
        *claims("FAST is ahead of {} in the first epoch", "FAST Figure 10", "epoch"),
        *claims("FAST ends more accurate than {}", "FAST Figure 14, Table 1"),
        Claim(
            "FAST ends more accurate than feature extraction",
            OURS,
            "fast",
            "extraction",
        ),
        *claims("FAST forgets less than {}", "FAST Figures 3, 5", "source"),
        *claims("FAST stays closer to the source than {}", "FAST Table 1", "distance"),
    ),
)
VARIANTS = STUDY.variants


def get_config(variant=VARIANTS[-1]):
    return STUDY.config(variant)
