"""Record what a checkout computes and prints, and compare two such recordings: a safety net for refactoring.

    python tools/compare_checkouts.py record CHECKOUT FOLDER   # about ten minutes on two cores
    python tools/compare_checkouts.py compare FOLDER OTHER

Trains small digits variants with the command line of ``CHECKOUT``, runs every evaluation on them at its smallest
size, compares the runs and prints the lists. ``compare`` reports every number that differs (metrics and results are
expected to agree bit for bit) and every line of text that does.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

# One for each way in which a method enters the training, in an order in which pof and fast find the runs that
# they start from.
VARIANTS = (
    "normal",
    "sam",
    "llf",
    "seal",
    "welsr",
    "kels",
    "lw",
    "imp",
    "pof",
    "fast",
    "warmup",
    "born_again",
    "foca",
)
# Two generations have one forgetting event, and a quarter of four epochs, the ascent, is one.
SHORT = "--config.train.generations=2 --config.train.epochs_per_generation=4"
# LW needs K N generations: one round for each of two blocks. IMP rewinds to a later step than the initialisation.
SMALLER = {"lw": "--config.method.rounds=1", "imp": "--config.method.rewind_step=2"}
EVALUATIONS = {
    "linear_probe": "--epochs=2 --datasets=digits",
    "few_shot": "--heads=linear --episodes=2 --epochs=1 --ways=2 --queries=2 --shots=1 --datasets=digits",
    "prediction_depth": "--images=40",
    "hessian": "--examples=60 --batches=1 --eigenvalues=1 --max-products=30",
    "flatness": "--draws=2 --sigmas=0.01",
    "margins": "--sample=20",
    "plasticity": "--examples=60",
    "landscape": "--examples=60 --points=5 --max-products=30",
    "gradients": "--batches=4 --batch-size=20 --examples=60 --eigenvectors=2",
    "perturbations": "--batches=4 --batch-size=20 --weak-batch-size=10",
}
COMMANDS = (
    *(
        f"train --config=configs/digits.py:{name} --workdir=runs/{name} {SHORT} {SMALLER.get(name, '')}"
        for name in VARIANTS
    ),
    f"train --config=configs/digits_resnet8.py:seal --workdir=runs/resnet8 {SHORT} --config.train.seeds=2 "
    "--config.model.width=4",
    f"train --config=configs/digits_resnet8.py:normal --workdir=runs/dropout {SHORT} --config.train.seeds=1 "
    "--config.train.generations=1 --config.model.name=wrn10-1 --config.model.dropout=0.3",
    *(
        f"evaluate --kind={kind} --checkpoint=runs/{run} {options}"
        for kind, options in EVALUATIONS.items()
        for run in ("normal", "seal")
    ),
    "evaluate --kind=hessian --checkpoint=runs/resnet8 --examples=60 --batches=1 --eigenvalues=1 --max-products=20",
    "evaluate --kind=anytime --checkpoint=runs/fast --max-steps=6",
    "compare runs/normal runs/seal runs/llf runs/lw runs/fast --output=runs/report",
    "compare runs/resnet8",
    "slim runs/kels --output=runs/slim",
    # Lists, errors and help.
    "methods",
    "datasets",
    "train --config=configs/digits.py:seal --workdir=runs/x --config.method.threshold=dense9",
    "evaluate --kind=marginz --checkpoint=runs/normal",
    "evaluate --kind=margins --checkpoint=runs/nowhere",
    "methods --help",
    "train --help",
)
# What differs from run to run: times and speeds.
VOLATILE = re.compile(r"\d+(\.\d+)? ?(s|min|h|seconds|minutes|steps/s|it/s)\b")


def record(checkout: Path, folder: Path) -> None:
    """Run all commands with the code of ``checkout``; write their files and output into ``folder``."""
    # Every command runs in `folder` with relative paths: the paths that it prints are the same in all
    # recordings. COLUMNS is the width to which argparse wraps help.
    folder.mkdir(parents=True)
    (folder / "configs").symlink_to(checkout.resolve() / "configs")
    (folder / "printed").mkdir()
    environment = os.environ | {
        "PYTHONPATH": str(checkout.resolve()),
        "TFDS_DATA_DIR": str(folder / "data"),
        "COLUMNS": "100",
    }
    for number, command in enumerate(COMMANDS):
        words = [sys.executable, "-m", "seal_jax", *command.split()]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        # Of a failure the last line: tracebacks name files of the checkout.
        errors = "" if done.returncode == 0 else "\n".join(done.stderr.splitlines()[-1:])
        text = f"$ {command}\n{done.stdout}\n{errors}\nexit {done.returncode}\n"
        (folder / "printed" / f"{number:02}.txt").write_text(VOLATILE.sub("<time>", text))
        print(f"{number + 1}/{len(COMMANDS)}: exit {done.returncode}: {command}", flush=True)


def compare(folder: Path, other: Path) -> int:
    """Print what differs between two recordings and return the number of files that do."""
    names = sorted({path.relative_to(root) for root in (folder, other) for path in _files(root)})
    different = 0
    for name in names:
        a, b = folder / name, other / name
        if not (a.exists() and b.exists()):
            lines = [f"only in {folder if a.exists() else other}"]
        # JSON by value and not by text, so that a difference is named by its place.
        elif name.suffix in (".json", ".jsonl"):
            first, second = ([json.loads(line) for line in _documents(path)] for path in (a, b))
            lines = list(_differences(first, second, ""))
        else:
            before, after = (_plain(path.read_text(errors="replace")) for path in (a, b))
            # The first two lines are the names of the files, which are given none.
            lines = list(difflib.unified_diff(before, after, lineterm="", n=0))[2:]
        if lines:
            different += 1
            print(f"{name}: {len(lines)} difference(s)", *lines[:12], sep="\n    ")
    print(f"{different} of {len(names)} files differ")
    return different


def _files(root: Path) -> list[Path]:
    # Neither pictures nor checkpoints: the numbers that they are made from are in metrics and results.
    wanted = {".json", ".jsonl", ".csv", ".txt", ".html", ".md"}
    skip = {"data", "checkpoints", "configs"}
    return [
        path
        for path in root.rglob("*")
        if path.suffix in wanted and not skip & set(path.relative_to(root).parts)
    ]


def _documents(path: Path) -> list[str]:
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def _plain(text: str) -> list[str]:
    # Pictures within a page, times, and the width of columns that a time widens.
    text = re.sub(r'data:image/png;base64,[^"]+', "<png>", text)
    return [re.sub(r" +", " ", line).strip() for line in VOLATILE.sub("<time>", text).splitlines()]


def _differences(a, b, where: str):
    """Yield a line for every leaf that differs between two JSON values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            if key not in a or key not in b:
                yield f"{where}.{key}: only in the {'first' if key in a else 'second'}"
            else:
                yield from _differences(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, pair in enumerate(zip(a, b, strict=True)):
            yield from _differences(*pair, f"{where}[{index}]")
    elif a != b and not (
        isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    ):
        yield f"{where}: {a!r} -> {b!r}"


if __name__ == "__main__":
    action, *folders = sys.argv[1:]
    first, second = map(Path, folders)
    if action == "record":
        record(first, second)
    else:
        sys.exit(min(compare(first, second), 1))
