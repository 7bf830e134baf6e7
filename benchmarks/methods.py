"""Cost of a step of each method relative to plain training, in time and by the compiler's count.

    python -m benchmarks.methods [--network=wrn10-1] [--only=sam,pof] [--rounds=8]

About three minutes on two CPU cores. Every method trains through its compiled program as in a run:
batches of 256 synthetic images, cropped, flipped and cut out, weak batches of 32 for PoF and FOCA as in
the PoF paper, defaults otherwise. "normal" is momentum SGD with weight decay; "normal again" is the
same, compiled once more, which shows how precise the timing is.

"ratio" is the time of a step over that of "normal" from the fastest rounds, "median" the median of
the rounds' ratios; "cpu" is that of the processor time of all threads, which other work on the machine
disturbs less, and which says nothing about an accelerator. "flops" and "bytes" are the ratios of what
the compiler counts for one step, which do not depend on the machine's load; a loop inside the step,
PoF's line search, counts as one pass. "aim" is the limit that this project sets, "paper" the times that
the PoF paper reports for 16 GPUs. The forgetting events between two steps are in none of them.

Networks are those of ``seal_jax.models``, e.g. resnet8 or wrn28-10; ``--only`` takes names of the
first column, separated by commas, and "normal" is always among them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks import common
from seal_jax import models, papers
from seal_jax.core import settings as settings_lib
from seal_jax.core.settings import Settings
from seal_jax.errors import UsageError, nearest

BATCH, WEAK_BATCH, SIDE, CLASSES = 256, 32, 16, 10
STEPS = 2  # in one call
# The options that differ from the defaults. PoF and FAST start from random weights here: the cost of a step does
# not depend on the weights.
METHODS: dict[str, dict[str, Any]] = {
    "normal": {},
    "normal again": {"name": "normal"},
    "seal": {},
    "llf": {},
    "sa_gd": {},
    "wels": {},
    "imp": {},
    "l2_init": {},
    "hare_tortoise": {},
    "lw": {},
    "sam": {},
    "asam": {"name": "sam", "adaptive": True, "rho": 0.5},
    # Its plain steps.
    "sam late": {"name": "sam", "last_epochs": 1},
    "msam": {},
    # One second gradient in each call.
    "looksam k=2": {"name": "looksam", "every": STEPS},
    "pof": {},
    "foca": {},
    "fast": {},
    "feature extraction": {"name": "fast", "beta": 0.0},
    "born_again": {},
    "redo": {},
    "continual_backprop": {},
}
AIMS = {"seal": 1.03, "fast": 1.03, "sam": 2.05, "pof": 1.25}
PAPER = papers.load("PoF", "Table 2")
QUICK = "normal again,seal,sam,pof,feature extraction"


def settings(label: str, network: str, batch: int, weak: int, side: int) -> Settings:
    """Return the settings of one method; images are padded by an eighth, cropped, and half cut out."""
    method = {"name": label, **METHODS[label]}
    model = models.create(network, num_classes=CLASSES, image_shape=(side, side, 3))
    generations = 10
    if method["name"] in ("seal", "llf"):
        # The default threshold is a stage of ResNets, which other networks do not have.
        staged = any(block.startswith("layer3") for block in model.blocks)
        method["threshold"] = "layer3" if staged else model.round_blocks[-1]
    if method["name"] in ("pof", "foca"):
        method["weak_batch_size"] = weak
    # LW refuses any number of generations except K N.
    if method["name"] == "lw":
        generations = len(model.round_blocks)
    return Settings(
        data=settings_lib.Data(
            name="synthetic",
            validation_fraction=0.0,
            crop_padding=side // 8,
            flip=True,
            cutout=side // 2,
        ),
        model=settings_lib.Model(name=network),
        method=method,
        optimizer=settings_lib.Optimizer(label_smoothing=0.0),
        train=settings_lib.Train(
            generations=generations,
            batch_size=batch,
            # PoF refuses to train from scratch. The folder is never read.
            pretrained="elsewhere" if method["name"] == "pof" else "",
        ),
    )


def compare(names: Sequence[str], network: str, rounds: int, *, quick: bool) -> common.Report:
    batch, weak, side = (20, 10, 8) if quick else (BATCH, WEAK_BATCH, SIDE)
    dataset = common.synthetic(STEPS * batch, side, CLASSES)
    configs = [settings(name, network, batch, weak, side) for name in names]
    with ThreadPoolExecutor(2) as pool:  # compilation has one thread each
        built = pool.map(common.Training, configs, [dataset] * len(configs))
        trainings = dict(zip(names, built, strict=True))
    times = common.interleave({name: each.train for name, each in trainings.items()}, rounds)
    # Without the first call, the warm-up of `interleave`.
    processor = {name: each.processor[1:] for name, each in trainings.items()}
    rows = []
    plain = trainings["normal"].cost
    for name, training in trainings.items():
        fastest, median = common.ratio(times, name, "normal")
        published = PAPER.get(name, column="time")
        rows.append(
            {
                "method": name,
                "ms/step": 1e3 * min(times[name]) / STEPS,
                "ratio": fastest,
                "median": median,
                "cpu": common.ratio(processor, name, "normal")[1],
                "flops": training.cost["flops"] / plain["flops"],
                "bytes": training.cost["bytes accessed"] / plain["bytes accessed"],
                "aim": f"<= {AIMS[name]}" if name in AIMS else "-",
                "paper": f"{published.mean:g}" if published else "-",
            }
        )
    title = (
        f"{network}, {side}x{side}, batch {batch}, weak batch {weak}, {rounds} rounds of {STEPS} "
        f"steps; normal: {plain['flops'] / 1e6:.4g} Mflops, {plain['bytes accessed'] / 1e6:.4g} MB"
    )
    return common.Report(title, rows)


def chosen(only: str) -> list[str]:
    """Return the methods to compare, "normal" first."""
    wanted = only.split(",") if only else list(METHODS)
    for name in wanted:
        if name not in METHODS:
            raise UsageError(f"--only: {name!r} is not a row{nearest(name, METHODS)}")
    return [name for name in METHODS if name == "normal" or name in wanted]


def main(argv: Sequence[str] | None = None) -> None:
    # Options of this benchmark, then those that all have. --help is the latter's, so the docstring names these.
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--network")
    own.add_argument("--only", default="")
    mine, others = own.parse_known_args(argv)
    options = common.arguments(__doc__, rounds=8, argv=others)
    network = mine.network or ("mlp" if options.quick else "wrn10-1")
    names = chosen(mine.only or (QUICK if options.quick else ""))
    report = compare(names, network, options.rounds, quick=options.quick)
    common.publish("methods", [report], options.json)


if __name__ == "__main__":
    main()
