"""The systems of the studies, each with what it is tuned on."""

from __future__ import annotations

from ml_collections import ConfigDict

from studies.design import System

# On a logarithmic scale.
PLAIN = {"optimizer.learning_rate": (0.002, 0.1), "optimizer.weight_decay": (1e-4, 3e-2)}
RADII = PLAIN | {"rho": (0.01, 1.0)}


def systems(generations: int, epochs: int) -> dict[str, System]:
    """Return all systems, by key, for trainings in so many generations of so many epochs.

    Those that forget nothing train as many epochs in all, and so does LW, in other generations (:func:`for_network`).
    """
    whole = generations * epochs
    constant = {"optimizer.schedule": "constant"}
    long = {"train.generations": 1, "train.epochs_per_generation": whole}
    return {
        "long": System(f"Plain, {whole} epochs", fields=long, space=PLAIN),
        "stopped": System("Plain, best by validation", fields=long, space=PLAIN, weights="best"),
        "restarts": System("Plain, restarts", space=PLAIN),
        "smoothing": System(
            f"Label smoothing, {whole} epochs",
            fields=long,
            space=PLAIN | {"optimizer.label_smoothing": (0.05, 0.8)},
        ),
        "sam": System(f"SAM, {whole} epochs", "sam", long, RADII),
        "llf": System("LLF", "llf", {}, PLAIN),
        "seal": System("SEAL", "seal", {}, PLAIN | {"ascent_scale": (0.01, 2.0)}),
        "lw": System("LW", "lw", {}, PLAIN),
        "wels": System("WELS", "wels", {}, PLAIN),
        "kels": System("KELS", "kels", {"keep": 0.5}, PLAIN),
        "dsd": System("DSD", "dsd", {}, PLAIN),
        "imp": System("IMP", "imp", {"fraction": 0.4}, PLAIN),
        "born_again": System("Born-again", "born_again", {}, PLAIN | {"weight": (0.1, 0.95)}),
        "shrink_perturb": System(
            "Shrink and perturb", "shrink_perturb", {}, PLAIN | {"shrink": (0.1, 0.9)}
        ),
        "l2_init": System("L2-Init", "l2_init", {}, PLAIN),
        "dash": System("DASH", "dash", {}, PLAIN | {"least": (0.05, 0.9)}),
        "fire": System("FIRE", "fire", {}, PLAIN),
        "hare_tortoise": System(
            "Hare & Tortoise",
            "hare_tortoise",
            {"every_epochs": 2},
            PLAIN | {"decay": (0.8, 0.999)},
            weights="ema",  # the tortoise
        ),
        "redo": System("ReDo", "redo", {"every": 100}, PLAIN | {"threshold": (0.005, 0.5)}),
        "continual_backprop": System(
            "Continual backpropagation",
            "continual_backprop",
            space=PLAIN | {"replacement_rate": (1e-6, 1e-2)},
        ),
        # Zapping within a generation needs a rate that does not fall; this is its like without it.
        "constant": System("Plain, constant rate", fields=constant, space=PLAIN),
        "zapping": System("Zapping", "zapping", {"every": 5, **constant}, PLAIN),
        "msam": System(f"Momentum-SAM, {whole} epochs", "msam", long, PLAIN | {"rho": (0.05, 5.0)}),
        "looksam": System(
            f"LookSAM, {whole} epochs",
            "looksam",
            {**long, "alpha": 0.2, "every": 2},
            RADII,
        ),
        "late_sam": System(
            f"SAM in the last eighth of {whole} epochs",
            "sam",
            {**long, "last_epochs": whole // 8},
            RADII,
        ),
    }


def for_network(config: ConfigDict) -> None:
    """Set what LLF, SEAL and LW take from the network of a variant.

    LLF reinitialises all blocks but the lowest, SEAL ascends in the lower two, and LW has a generation for each.
    """
    method, train = config.method, config.train
    second, third, blocks = {
        "mlp": ("dense2", "dense3", 3),
        "resnet8": ("layer2", "layer3", 3),
        "scnn": ("block2", "block3", 4),
    }[config.model.name]
    if method.name in ("llf", "seal"):
        method.threshold = second if method.name == "llf" else third
    if method.name == "lw":
        epochs = train.generations * train.epochs_per_generation
        train.generations, train.epochs_per_generation = blocks, round(epochs / blocks)
