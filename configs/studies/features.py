"""Study: what do SEAL, LW, SAM and PoF change in the features of networks and in the flatness of their minima?

    python -m seal_jax sweep --config=configs/studies/features.py --workdir=runs/features
    TFDS_DATA_DIR=... python -m studies evaluate --config=configs/studies/features.py --workdir=runs/features
    python -m studies collect --config=configs/studies/features.py --workdir=runs/features
    python -m studies write

Every system has 16 points of its settings, tuned on two seeds by validation accuracy, and then ten other seeds, all
on the same images and wrong labels, so that an evaluation of a run is one program. All train 60 epochs, in four
generations where they forget; LW in one for each block. PoF, and SAM beside it, train 10 further epochs from the
networks of SAM; their tuning starts from the first two of these.
The features are probed on Fashion-MNIST at 8x8 pixels.
"""

import dataclasses

from studies.design import OURS, Claim, Measure, Study, System
from studies.systems import for_network, systems

EPOCHS = 15  # of a generation
WHOLE = 4 * EPOCHS
CHOSEN = ("long", "restarts", "llf", "seal", "lw", "sam", "late_sam")
# Less decay than in the study of label noise, with which networks would not fit their images.
FITTING = {"optimizer.learning_rate": (0.002, 0.2), "optimizer.weight_decay": (1e-6, 1e-3)}
FURTHER = {
    "train.generations": 1,
    "train.epochs_per_generation": 10,
    "optimizer.schedule": "constant",
}
OF_FURTHER = FITTING | {"optimizer.learning_rate": (3e-4, 0.02)}
SYSTEMS = {
    key: dataclasses.replace(system, space={**system.space, **FITTING})
    for key, system in systems(generations=4, epochs=EPOCHS).items()
    if key in CHOSEN
} | {
    "asam": System(
        f"ASAM, {WHOLE} epochs",
        "sam",
        {
            "train.generations": 1,
            "train.epochs_per_generation": WHOLE,
            "adaptive": True,
            "eta": 0.01,
        },
        FITTING | {"rho": (0.1, 5.0)},
    ),
    "pof": System(
        "PoF, 10 epochs after SAM",
        "pof",
        FURTHER,
        OF_FURTHER | {"gamma_high": (0.3, 3.0)},
        continues="sam",
    ),
    "sam_longer": System(
        "SAM, 10 epochs after SAM",
        "sam",
        FURTHER,
        OF_FURTHER | {"rho": (0.01, 1.0)},
        continues="sam",
    ),
}

# What a few minutes for each run allow: a part of the mini-batches and of the Hessian's images. Its decay is left out,
# which is that of the tuning and would move the sign of eigenvalues.
EVALUATIONS = {
    "margins": {},
    "linear_probe": {
        "datasets": ("fashion_mnist",),
        "learning_rates": (0.1, 0.01),
        "epochs": 4,
        "batch_size": 512,
    },
    "few_shot": {
        "datasets": ("fashion_mnist",),
        "heads": ("linear",),
        "shots": (5,),
        "episodes": 100,
    },
    "prediction_depth": {},
    "hessian": {
        "parts": ("trace", "batches"),
        "trace_products": 6,
        "examples": 256,
        "batches": 8,
        "chunk": 8,
        "batch_steps": 16,
        "weight_decay": 0.0,
    },
    "flatness": {"sigmas": (0.02, 0.05), "images": 0},
    "perturbations": {"batches": 64, "gamma": 2.0},
    "gradients": {"batches": 64, "eigenvectors": 1},
    "plasticity": {},
}


def measure(name, kind, field, where=(), *, lower=False, scale=1.0):
    return Measure(name, field, kind, EVALUATIONS[kind], dict(where), lower, scale)


LAYER3 = {"block": "layer3/block0"}
MEASURES = {
    "fitted": measure("training images as labelled, %", "margins", "train_accuracy", scale=100),
    "probe": measure("linear probe on Fashion-MNIST, %", "linear_probe", "accuracy", scale=100),
    "episodes": measure("5-way 5-shot on Fashion-MNIST, %", "few_shot", "accuracy", scale=100),
    "low": measure("k-NN accuracy on layer1, %", "prediction_depth", "accuracies/1", scale=100),
    "depth": measure("mean prediction depth", "prediction_depth", "mean_depth", lower=True),
    "sharpest": measure(
        "Hessian of mini-batches: largest eigenvalue", "hessian", "batch_max", lower=True
    ),
    "negative": measure(
        "Hessian of mini-batches: negative of the five largest, %",
        "hessian",
        "batch_negative",
        lower=True,
        scale=100,
    ),
    "trace": measure("Hessian: trace", "hessian", "trace", lower=True),
    "margin": measure("mean of the 400 smallest margins", "margins", "smallest/mean"),
    "size": measure("size of the weights", "margins", "size_of_weights", lower=True),
    "noise": measure(
        "training images under noise of 0.05, %", "flatness", "accuracies/1", scale=100
    ),
    "sam_step": measure(
        "median perturbation by SAM", "perturbations", "median", {"measure": "sam"}
    ),
    "pof_step": measure(
        "median perturbation by PoF", "perturbations", "median", {"measure": "pof"}
    ),
    **{
        f"{key}_{split}": measure(
            f"{name}, {split}", "gradients", field, {"split": split}, lower=field == "curvature"
        )
        for key, name, field in (
            ("curvature", "g'Hg of the classifier", "curvature"),
            ("valley", "median distance of a mini-batch's minimum", "xi"),
        )
        for split in ("train", "test")
    },
    "dormant": measure(
        "dormant units in layer3, %", "plasticity", "dormant", LAYER3, lower=True, scale=100
    ),
    "rank": measure("effective rank after layer3", "plasticity", "rank", LAYER3),
}


# The papers speak of networks that fit their images. Those that SAM and LLF train on wrong labels, chosen by their
# accuracy on right ones, do not.
FIT = ("clean",)


def claims(measure, *compared, conditions=FIT):
    """Return the claims of a measure, of (text, source, better, worse)."""
    return tuple(
        Claim(*claim, measure=measure, conditions=conditions, said_of=FIT) for claim in compared
    )


STUDY = Study(
    title="Features and flatness",
    question="Do networks differ in their features and in the flatness of their minima as the papers say? Claims of "
    "networks that fit their training images are compared with right labels only, since by their validation accuracy "
    "settings were chosen that do not fit wrong ones. Weight decay is at most 0.001, with which plain training fits "
    "them: accuracies after more of it are in the study of label noise. All seeds share the images and the wrong "
    "labels. Looked at before the settings were fixed: plain training and restarts at one point of their settings with "
    "40 % wrong labels, their accuracies included, for whether they fit and what the evaluations cost; and before the "
    "claims were restricted and SAM's further epochs added, accuracies of four systems.",
    points=16,
    finalists=0,
    seeds=10,
    fields={
        "data.name": "digits",
        "data.draws": "shared",
        # 718 images remain to train on.
        "data.validation_fraction": 0.5,
        "model.name": "resnet8",
        "model.width": 8,
        "optimizer.label_smoothing": 0.0,
        "train.batch_size": 32,
        "train.generations": 4,
        "train.epochs_per_generation": EPOCHS,
    },
    settings={"resnet8": {}},
    conditions={"clean": {}, "noise40": {"data.label_noise": 0.4}},
    names={
        "resnet8": "ResNet-8 of width 8 on 718 images of digits",
        "clean": "right labels",
        "noise40": "40 % wrong",
    },
    systems=SYSTEMS,
    adapt=for_network,
    measures=MEASURES,
    claims=(
        *claims(
            "probe",
            ("SEAL's features transfer better than plain ones", "SEAL Table 1", "seal", "long"),
            ("SEAL's features transfer better than LLF's", "SEAL Table 1", "seal", "llf"),
            ("LLF's features transfer worse than plain ones", "SEAL Table 1", "long", "llf"),
        ),
        *claims(
            "episodes",
            ("SEAL's features serve few shots better", "SEAL Tables 4, 5", "seal", "long"),
            ("LLF's features serve few shots worse", "SEAL Tables 4, 5", "long", "llf"),
        ),
        *claims(
            "low",
            ("SEAL's layer1 predicts better than the plain one", "SEAL Figure 2", "seal", "long"),
            ("SEAL's layer1 predicts better than LLF's", "SEAL Figure 2", "seal", "llf"),
        ),
        *claims(
            "depth",
            ("SEAL predicts at less depth than plain training", "SEAL Figure 3", "seal", "long"),
            ("LLF predicts at less depth than plain training", "SEAL Figure 3", "llf", "long"),
            ("SEAL predicts at less depth than LLF", "SEAL Figure 3", "seal", "llf"),
        ),
        *claims(
            "sharpest",
            ("SEAL's minima are flatter than plain ones", "SEAL Table 6", "seal", "long"),
            ("SEAL's minima are flatter than LLF's", "SEAL Table 6", "seal", "llf"),
        ),
        *claims(
            "negative",
            ("SEAL has fewer negative eigenvalues than LLF", "SEAL Table 6", "seal", "llf"),
        ),
        *claims(
            "trace",
            ("SAM's minima are flatter than plain ones", "Foret et al. 2021", "sam", "long"),
            ("Late SAM's minima are flatter too", "Zhou et al. 2024", "late_sam", "long"),
            conditions=(),
        ),
        *claims(
            "noise",
            ("LW's minima bear more noise than plain ones", "LW Figure 5", "lw", "long"),
            ("LW's minima bear more noise than restarts'", OURS, "lw", "restarts"),
        ),
        *claims(
            "margin",
            ("LW's margins are larger than plain ones", "LW Figure 6", "lw", "long"),
        ),
        *claims("size", ("LW's weights are smaller", OURS, "lw", "long")),
        *claims(
            "accuracy", ("SAM is more accurate than plain training", "PoF Table 1", "sam", "long")
        ),
        *claims(
            "accuracy",
            ("PoF is more accurate than SAM", "PoF Table 1", "pof", "sam"),
            ("PoF is more accurate than SAM as long", "PoF Table 1", "pof", "sam_longer"),
            ("ASAM is more accurate than SAM", "Kwon et al. 2021", "asam", "sam"),
            conditions=(),
        ),
        *claims(
            "curvature_train",
            ("PoF lowers the curvature along gradients", "PoF Figure 5 (a)", "pof", "sam"),
            conditions=(),
        ),
        *claims(
            "curvature_test",
            ("PoF lowers it on test images", "PoF Figure 5 (b)", "pof", "sam"),
            conditions=(),
        ),
        *(
            Claim(text, source, *systems, measure=more, worse_measure=less, said_of=FIT)
            for text, source, systems, more, less in (
                (
                    "PoF perturbs further than SAM",
                    "PoF Figure 6",
                    ("pof", "sam"),
                    "pof_step",
                    "sam_step",
                ),
                (
                    "Minima of test batches are further away",
                    "PoF Figure 2 (b)",
                    ("sam", "sam"),
                    "valley_test",
                    "valley_train",
                ),
            )
        ),
    ),
)
VARIANTS = STUDY.variants


def get_config(variant=VARIANTS[-1]):
    return STUDY.config(variant)
