"""The systems of the studies, each with as many points to be tuned on."""

from __future__ import annotations

from ml_collections import ConfigDict

from studies.design import System

RATES = {"optimizer.learning_rate": (0.005, 0.02, 0.08)}
PLAIN = RATES | {"optimizer.weight_decay": (0.0, 5e-4, 5e-3)}


def systems(generations: int, epochs: int) -> dict[str, System]:
    """Return all systems, by key, for trainings in so many generations of so many epochs.

    Those that forget nothing train as many epochs in all; LW in three generations, one for each block.
    """
    whole = generations * epochs
    long = {"train.generations": 1, "train.epochs_per_generation": whole}
    return {
        "short": System(
            f"Plain, {epochs} epochs, best by validation",
            fields={"train.generations": 1},
            grid=PLAIN,
            weights="best",
        ),
        "long": System(f"Plain, {whole} epochs", fields=long, grid=PLAIN),
        "restarts": System("Plain, restarts", grid=PLAIN),
        "smoothing": System(
            f"Label smoothing, {whole} epochs",
            fields=long,
            grid=RATES | {"optimizer.label_smoothing": (0.1, 0.3, 0.6)},
        ),
        "sam": System(f"SAM, {whole} epochs", "sam", long, RATES | {"rho": (0.02, 0.1, 0.5)}),
        "llf": System("LLF", "llf", {}, PLAIN),
        "seal": System("SEAL", "seal", {}, RATES | {"ascent_scale": (0.03, 0.3, 1.0)}),
        "lw": System(
            "LW",
            "lw",
            {"train.generations": 3, "train.epochs_per_generation": round(whole / 3)},
            PLAIN,
        ),
        "wels": System("WELS", "wels", {"fraction": 0.5}, PLAIN),
        "kels": System("KELS", "kels", {"keep": 0.5}, PLAIN),
        "dsd": System("DSD", "dsd", {"fraction": 0.5}, PLAIN),
        "imp": System("IMP", "imp", {"fraction": 0.4}, PLAIN),
        "born_again": System("Born-again", "born_again", {}, RATES | {"weight": (0.3, 0.6, 0.9)}),
        "shrink_perturb": System(
            "Shrink and perturb", "shrink_perturb", {}, RATES | {"shrink": (0.2, 0.4, 0.8)}
        ),
        "l2_init": System(
            "L2-Init", "l2_init", {}, RATES | {"optimizer.weight_decay": (5e-4, 5e-3, 5e-2)}
        ),
        "dash": System("DASH", "dash", {}, RATES | {"least": (0.1, 0.3, 0.6)}),
        "fire": System("FIRE", "fire", {}, PLAIN),
        "hare_tortoise": System(
            "Hare & Tortoise",
            "hare_tortoise",
            {"every_epochs": 2},
            RATES | {"decay": (0.9, 0.99, 0.999)},
        ),
        "redo": System("ReDo", "redo", {"every": 100}, RATES | {"threshold": (0.025, 0.1, 0.3)}),
        "continual_backprop": System(
            "Continual backpropagation",
            "continual_backprop",
            grid=RATES | {"replacement_rate": (1e-5, 1e-4, 1e-3)},
        ),
        "zapping": System(
            "Zapping", "zapping", {"every": 5, "optimizer.schedule": "constant"}, PLAIN
        ),
        "msam": System(
            f"Momentum-SAM, {whole} epochs", "msam", long, RATES | {"rho": (0.1, 0.5, 2.0)}
        ),
        "looksam": System(
            f"LookSAM, {whole} epochs",
            "looksam",
            {**long, "alpha": 0.2, "every": 2},
            RATES | {"rho": (0.02, 0.1, 0.5)},
        ),
        "late_sam": System(
            f"SAM in the last eighth of {whole} epochs",
            "sam",
            {**long, "last_epochs": whole // 8},
            RATES | {"rho": (0.02, 0.1, 0.5)},
        ),
    }


def thresholds(config: ConfigDict) -> ConfigDict:
    """Return the settings of a variant with the blocks that LLF and SEAL forget in its network.

    LLF reinitialises all blocks but the lowest, and SEAL ascends in the lower two.
    """
    blocks = {"mlp": ("dense2", "dense3"), "resnet8": ("layer2", "layer3")}[config.model.name]
    if config.method.name in ("llf", "seal"):
        config.method.threshold = blocks[config.method.name == "seal"]
    return config
