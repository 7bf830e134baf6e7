"""Study: does a training that begins on half of the images end worse, and what of forgetting undoes it?

    TFDS_DATA_DIR=... python -m seal_jax sweep --config=configs/studies/warm_start.py --workdir=runs/warm_start
    python -m studies collect --config=configs/studies/warm_start.py --workdir=runs/warm_start
    python -m studies write

Two generations of 60 epochs: half of the images, then all of them. "From scratch" trains the second one alone. Every
system has 32 points of its settings, of which the best four by validation accuracy have eight more seeds, and then
twenty other seeds, each with a subset, a half and wrong labels of its own.
"""

from studies.design import OURS, Claim, Study, System
from studies.settings import LABEL_NOISE, MLP, NAMES
from studies.systems import PLAIN, for_network, systems

ONCE = {"train.generations": 1, "data.warm_generations": 0}
KEPT = ("llf", "seal", "wels", "dsd", "shrink_perturb", "l2_init", "dash", "fire", "hare_tortoise")
SYSTEMS = {
    "scratch": System("From scratch", fields=ONCE, space=PLAIN),
    "warm": System("Plain, warm start", space=PLAIN),
    **{key: system for key, system in systems(2, 60).items() if key in KEPT},
}

STUDY = Study(
    title="Warm start",
    question="Ash and Adams (2020): a network that was trained on half of the images first ends worse than one from "
    "scratch. Does it, and which ways of forgetting undo it? Nothing was looked at in this regime before the settings "
    "were fixed, which are those of the study of label noise, but for WELS and DSD, as there.",
    fields={
        "data.draws": "per_seed",
        "data.warm_generations": 1,
        "data.warm_share": 0.5,
        "optimizer.label_smoothing": 0.0,
        "train.batch_size": 32,
        "train.generations": 2,
        "train.epochs_per_generation": 60,
    },
    settings={
        "mlp_digits": {
            "data.name": "digits",
            "data.validation_fraction": 0.2,
            "data.train_count": 50,
            **MLP,
        },
        "mlp_fashion": {
            "data.name": "fashion_mnist",
            "data.validation_fraction": 0.02,
            "data.test_split": "test[:20%]",
            "data.train_count": 100,
            **MLP,
        },
    },
    conditions={key: LABEL_NOISE[key] for key in ("clean", "noise20")},
    names={
        **NAMES,
        "mlp_digits": "MLP on 500 images of digits",
        "mlp_fashion": "MLP on 1,000 images of Fashion-MNIST",
    },
    systems=SYSTEMS,
    adapt=for_network,
    some={
        "mlp_fashion": (
            ("scratch", "warm", "shrink_perturb", "dash", "fire", "hare_tortoise"),
            ("clean",),
        )
    },
    claims=(
        Claim(
            "A warm start is worse than scratch",
            "Ash & Adams 2020",
            "scratch",
            "warm",
            said_of=["clean"],
        ),
        *(
            Claim(
                f"{SYSTEMS[key].name} beats a plain warm start",
                source,
                key,
                "warm",
                said_of=["clean"],
            )
            for key, source in {
                "shrink_perturb": "Ash & Adams 2020",
                "dash": "Shin et al. 2024",
                "fire": "Han et al. 2026",
                "hare_tortoise": "Lee et al. 2024",
                "l2_init": OURS,
                "llf": OURS,
                "seal": OURS,
            }.items()
        ),
    ),
)
VARIANTS = STUDY.variants


def get_config(variant=VARIANTS[-1]):
    return STUDY.config(variant)
