"""Study: which ways of forgetting help where there are few training images, with right labels?

    TFDS_DATA_DIR=... python -m seal_jax sweep --config=configs/studies/few_images.py --workdir=runs/few_images
    python -m studies collect --config=configs/studies/few_images.py --workdir=runs/few_images
    python -m studies write

Every system has 32 points of its settings, of which the best four by validation accuracy have eight more seeds, and
then twenty other seeds, each with a subset of its own. All train 160 epochs, in four generations where they forget; LW
in one for each block.
"""

from studies.design import OURS, Claim, Study
from studies.settings import MLP_ON_DIGITS, NAMES, RESNET8
from studies.systems import for_network, systems

CHOSEN = (
    "long",
    "stopped",
    "restarts",
    "smoothing",
    "sam",
    "llf",
    "seal",
    "lw",
    "wels",
    "kels",
    "dsd",
    "imp",
    "born_again",
    "shrink_perturb",
    "dash",
    "fire",
)
ALL = systems(generations=4, epochs=40)
SYSTEMS = {key: ALL[key] for key in CHOSEN}

STUDY = Study(
    title="Few images",
    question="Do trainings that forget and relearn beat plain training on few images with right labels, the regime of "
    "the layerwise paper and of knowledge evolution? Nothing was looked at on these subsets before the settings were "
    "fixed, which are those of the study of label noise, but for WELS and DSD, as there.",
    fields={
        "data.draws": "per_seed",
        "data.validation_fraction": 0.2,
        "optimizer.label_smoothing": 0.0,
        "train.batch_size": 32,
        "train.generations": 4,
        "train.epochs_per_generation": 40,
    },
    settings={
        "mlp_digits": MLP_ON_DIGITS,
        "resnet8_digits": {"data.name": "digits", **RESNET8},
    },
    conditions={
        "n10": {"data.train_count": 10},
        "n30": {"data.train_count": 30},
        "n100": {"data.train_count": 100},
    },
    names={
        **NAMES,
        "n10": "10 a class",
        "n30": "30 a class",
        "n100": "100 a class",
    },
    systems=SYSTEMS,
    adapt=for_network,
    some={
        "resnet8_digits": (
            ("long", "sam", "llf", "seal", "lw", "wels", "dsd", "shrink_perturb"),
            ("n10",),
        )
    },
    claims=(
        *(
            Claim(f"{SYSTEMS[key].name} beats plain training as long", source, key, "long")
            for key, source in {
                "lw": "LW Table 2",
                "seal": "SEAL Table 2",
                "llf": "Zhou et al. 2022",
                "kels": "Taha et al. 2021",
                "dsd": "Han et al. 2017",
                "born_again": "Furlanello et al. 2018",
                "sam": "PoF Table 1",
                **dict.fromkeys(("wels", "shrink_perturb", "dash", "fire", "smoothing"), OURS),
            }.items()
        ),
        *(
            Claim(f"{SYSTEMS[better].name} beats {SYSTEMS[worse].name}", source, better, worse)
            for better, worse, source in (
                ("lw", "wels", "LW Table 2"),
                ("lw", "dsd", "LW Table 2"),
                ("seal", "llf", "SEAL Table 2"),
                ("seal", "born_again", "SEAL Table 9"),
            )
        ),
    ),
)
VARIANTS = STUDY.variants


def get_config(variant=VARIANTS[-1]):
    return STUDY.config(variant)
