"""Study: does forgetting help where weight decay is not tuned, but the usual 0.0005?

    TFDS_DATA_DIR=... python -m seal_jax sweep --config=configs/studies/usual_decay.py --workdir=runs/usual_decay
    python -m studies collect --config=configs/studies/usual_decay.py --workdir=runs/usual_decay
    python -m studies write

As the study of label noise: 32 points of the settings of a system, of which the best four by validation accuracy have
eight more seeds, and then twenty other seeds; 80 epochs. One system alone is tuned in weight decay too.
"""

import dataclasses

from studies.design import OURS, Claim, Study, System
from studies.settings import LABEL_NOISE, MLP_ON_DIGITS, NAMES
from studies.systems import PLAIN, for_network, systems

DECAY = "optimizer.weight_decay"
CHOSEN = (
    "long",
    "stopped",
    "smoothing",
    "sam",
    "llf",
    "seal",
    "lw",
    "wels",
    "kels",
    "shrink_perturb",
)
ALL = systems(generations=4, epochs=20)
SYSTEMS = {
    key: dataclasses.replace(
        ALL[key], space={field: of for field, of in ALL[key].space.items() if field != DECAY}
    )
    for key in CHOSEN
} | {"tuned": System("Plain, decay tuned too", fields=ALL["long"].fields, space=PLAIN)}
RIGHT = ("clean",)


def beats(better, worse, source=OURS, elsewhere=OURS):
    """Return the claim that a system is more accurate than another one, and who makes it of right labels."""
    name = {"long": "plain training as long"}.get(worse, SYSTEMS[worse].name)
    text = f"{SYSTEMS[better].name} beats {name}"
    return Claim(text, source, better, worse, said_of=RIGHT, elsewhere=elsewhere)


STUDY = Study(
    title="Usual decay",
    question="The papers do not tune weight decay. Do trainings that forget and relearn beat plain training at the "
    "usual 0.0005, do they beat its best epoch, and what is left of that where plain training has its decay tuned? "
    "Looked at before the settings were fixed: the study of label noise, whose settings these are; test accuracies of "
    "plain training, LLF and SEAL at this decay and single learning rates with 40 % wrong labels "
    "(configs/quickstart.py); and those of a ResNet-8 with decays of at most 0.001 in the study of features.",
    fields={
        "data.draws": "per_seed",
        "data.validation_fraction": 0.25,
        "optimizer.label_smoothing": 0.0,
        DECAY: 5e-4,
        "train.batch_size": 64,
        "train.generations": 4,
        "train.epochs_per_generation": 20,
    },
    settings={"mlp_digits": MLP_ON_DIGITS},
    conditions={key: LABEL_NOISE[key] for key in ("clean", "noise20", "noise40")},
    names=NAMES,
    systems=SYSTEMS,
    adapt=for_network,
    claims=(
        beats("llf", "long", "Zhou et al. 2022", "Zaidi et al. 2022"),
        beats("seal", "long", "SEAL Table 2"),
        beats("lw", "long", "LW Table 2", "Zaidi et al. 2022"),
        beats("wels", "long", OURS, "Zaidi et al. 2022"),
        beats("kels", "long", "Taha et al. 2021"),
        beats("shrink_perturb", "long", OURS, "Zaidi et al. 2022"),
        beats("sam", "long", "PoF Table 1", "Foret et al. 2021"),
        beats("smoothing", "long", OURS, "Lukasik et al. 2020"),
        beats("stopped", "long", OURS, "Li et al. 2020"),
        beats("seal", "llf", "SEAL Table 2"),
        beats("lw", "wels", "LW Table 2"),
        *(beats(key, "stopped") for key in ("llf", "seal", "lw", "wels", "sam")),
        *(beats("tuned", key) for key in ("long", "stopped", "llf", "seal", "lw", "sam")),
    ),
)
VARIANTS = STUDY.variants


def get_config(variant=VARIANTS[-1]):
    return STUDY.config(variant)
