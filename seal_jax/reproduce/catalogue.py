"""Every table and figure of the four papers, and the commands that make its counterpart.

The commands are for small data, so that all of them run anywhere in minutes; ``paper`` names what
to put in for the paper's own size.
"""

from __future__ import annotations

from typing import NamedTuple

# The runs in ``runs/digits`` that most items look at.
RUNS = "sweep --config=configs/results.py --workdir=runs/digits"
FLIPPED = (
    "sweep --config=configs/results.py --workdir=runs/flipped --config.data.flip=true "
    "--config.data.crop_padding=1"
)
SHORT = (
    "sweep --config=configs/results.py --workdir=runs/short --config.train.epochs_per_generation=5"
)
SYSTEMS = "sweep --config=configs/digits.py --workdir=runs/systems"
SEAL, NORMAL = "--checkpoint=runs/digits/seal", "--checkpoint=runs/digits/normal"
TINY = "configs/seal_tiny_imagenet.py"
SMALL = "--config.data.name=digits --config.model.name=resnet8 --config.train.generations=2"


class Item(NamedTuple):
    """A table or figure.

    Attributes:
      paper: SEAL, LW, PoF or FAST.
      name: the paper's.
      shows: what it shows.
      commands: of ``python -m seal_jax`` on small data, in order; none for a drawing of an idea.
      paper_size: the config, or what else to put in for the paper's own size.
    """

    paper: str
    name: str
    shows: str
    commands: tuple[str, ...] = ()
    paper_size: str = ""


def _evaluate(kind: str, checkpoint: str = SEAL, options: str = "") -> str:
    return f"evaluate --kind={kind} {checkpoint} {options}".strip()


def _compare(*runs: str, output: str) -> str:
    return " ".join(["compare", *runs, f"--output={output}"])


_ANYTIME = _evaluate("anytime", NORMAL, "--max-steps=89")
_FAST = "configs/fast_cifar100.py, then evaluate --kind=anytime on each run"
_LW_RUNS = tuple(f"runs/systems/{name}" for name in ("normal", "welsr", "dsd", "wels", "fc", "lw"))
_LW = "configs/lw_cifar10.py"

ITEMS = (
    Item("SEAL", "Figure 1", "the method, drawn"),
    Item(
        "SEAL",
        "Tables 1, 12",
        "transfer by linear probe",
        (_evaluate("linear_probe", options="--datasets=digits"),),
        f"{TINY}; leave out --datasets",
    ),
    Item(
        "SEAL",
        "Figure 2",
        "k-NN accuracy by block",
        (
            _evaluate("prediction_depth"),
            _evaluate("prediction_depth", NORMAL),
        ),
        TINY,
    ),
    Item(
        "SEAL",
        "Figure 3",
        "k-NN accuracy over training",
        (_evaluate("prediction_depth", options="--steps=all --output=runs/seal_course"),),
        f"{TINY} with run.keep_checkpoints",
    ),
    Item(
        "SEAL",
        "Tables 2, 8",
        "accuracy by generation",
        (_compare("runs/digits/normal", "runs/digits/llf", "runs/digits/seal", output="runs"),),
        TINY,
    ),
    Item("SEAL", "Table 3", "the data sets", ("datasets",)),
    Item(
        "SEAL",
        "Table 4",
        "few-shot, 1 and 5 shots",
        (_evaluate("few_shot", options="--datasets=digits --shots=1,5"),),
        f"{TINY}; leave out --datasets, --image-size=224 --normalisation=imagenet",
    ),
    Item(
        "SEAL",
        "Table 5",
        "few-shot, 20 and 50 shots",
        (_evaluate("few_shot", options="--datasets=digits --shots=20,50 --output=runs/shots"),),
        "as Table 4",
    ),
    Item(
        "SEAL",
        "Table 6",
        "eigenvalues of the Hessian",
        (_evaluate("hessian"),),
        TINY,
    ),
    Item(
        "SEAL",
        "Table 7",
        "what the upper layers do meanwhile",
        (f"sweep --config=configs/seal_ablations.py --workdir=runs/ablations {SMALL}",),
        "configs/seal_ablations.py",
    ),
    Item(
        "SEAL",
        "Tables 9, 10",
        "self-distillation",
        (SYSTEMS, _compare("runs/systems/born_again", "runs/systems/seal", output="runs/born")),
        "configs/born_again_cifar100.py, configs/seal_cifar100.py",
    ),
    Item(
        "SEAL",
        "Table 11",
        "how often to forget",
        (f"sweep --config=configs/seal_frequency.py --workdir=runs/frequency {SMALL}",),
        "configs/seal_frequency.py",
    ),
    Item("LW", "Figure 1", "the method, drawn"),
    Item("LW", "Table 1", "synthetic data", ("reproduce lw-synthetic --table=1",), "the same"),
    Item("LW", "Table 4", "L2 penalties", ("reproduce lw-synthetic --table=4",), "the same"),
    Item(
        "LW",
        "Tables 2, 6, 7",
        "test accuracy of the six methods",
        (SYSTEMS, _compare(*_LW_RUNS, output="runs/lw")),
        f"{_LW}; data.flip, data.crop_padding and model.dropout set the three tables apart",
    ),
    Item(
        "LW",
        "Table 3, Figures 2, 3",
        "who wins, significance, scatter; from fourteen settings on, decision tree",
        (
            FLIPPED,
            _compare("runs/digits/*/", "runs/flipped/*/", output="runs/settings"),
        ),
        f"{_LW} once for each setting",
    ),
    Item("LW", "Table 5", "the data sets", ("datasets",)),
    Item(
        "LW",
        "Figures 4, 9",
        "accuracy against compute",
        (
            SHORT,
            _compare("runs/digits/*/", "runs/short/*/", output="runs/budget"),
        ),
        f"{_LW} with several train.epochs_per_generation",
    ),
    Item(
        "LW",
        "Figures 5, 12",
        "flatness under noise",
        (_evaluate("flatness", "--checkpoint=runs/digits/lw"),),
        _LW,
    ),
    Item(
        "LW",
        "Figures 6, 10, 11",
        "smallest margins",
        (_evaluate("margins", "--checkpoint=runs/digits/lw"),),
        _LW,
    ),
    Item(
        "LW",
        "Figure 7",
        "size of the weights over the baseline's",
        (
            _evaluate("margins", "--checkpoint=runs/digits/lw"),
            _evaluate("margins", NORMAL),
            _compare("runs/digits/lw", "runs/digits/normal", output="runs/size"),
        ),
        _LW,
    ),
    Item(
        "LW",
        "Figure 8",
        "training speed by round",
        (_compare("runs/digits/lw", "runs/digits/normal", output="runs/speed"),),
        _LW,
    ),
    Item(
        "PoF",
        "Figure 1",
        "loss along eigenvectors of each layer (c, d); a, b are drawn",
        (_evaluate("landscape", NORMAL),),
        "configs/pof_cifar10.py:sgd",
    ),
    Item(
        "PoF",
        "Figure 2",
        "gradients and eigenvectors, xi*",
        (_evaluate("gradients", "--checkpoint=runs/digits/sam"),),
        "configs/pof_cifar10.py:sgd",
    ),
    Item("PoF", "Figure 3", "the method, drawn"),
    Item(
        "PoF",
        "Table 1, Figure 4",
        "test error and its course",
        (_compare("runs/digits/sam", "runs/digits/pof", output="runs/pof"),),
        "configs/pof_cifar10.py",
    ),
    Item(
        "PoF",
        "Figure 5",
        "curvature along mini-batch gradients",
        (
            _evaluate("gradients", "--checkpoint=runs/digits/sam"),
            _evaluate("gradients", "--checkpoint=runs/digits/pof"),
            _compare("runs/digits/sam", "runs/digits/pof", output="runs/pof"),
        ),
        "configs/pof_cifar10.py:sam and pof",
    ),
    Item(
        "PoF",
        "Figure 6",
        "sizes of the perturbations",
        (_evaluate("perturbations", "--checkpoint=runs/digits/pof"),),
        "configs/pof_cifar10.py:pof",
    ),
    Item("PoF", "Table 2", "time of an epoch", (), "python -m benchmarks.methods"),
    Item("FAST", "Figures 1, 2", "the idea, drawn"),
    Item(
        "FAST",
        "Figures 3, 4, 5",
        "forgetting, by the size of the new head",
        (
            f"{_ANYTIME} --systems=gaussian --sigma=1.0 --output=runs/sigma1",
            f"{_ANYTIME} --systems=gaussian,fast --sigma=0.01 --output=runs/sigma2",
        ),
        _FAST,
    ),
    Item(
        "FAST",
        "Figure 6",
        "a head that does not learn",
        (f"{_ANYTIME} --systems=frozen_head,gaussian --output=runs/frozen",),
        _FAST,
    ),
    Item(
        "FAST",
        "Figure 7",
        "classifier warm-up",
        (f"{_ANYTIME} --systems=warmup,kaiming_fan_out,kaiming_fan_in --output=runs/warmup",),
        _FAST,
    ),
    Item(
        "FAST",
        "Figures 8, 9",
        "unequal learning rates",
        (
            f"{_ANYTIME} --systems=fast --alpha=0.01 --beta=0.01 --output=runs/equal",
            f"{_ANYTIME} --systems=fast --alpha=0.01 --beta=0.001 --output=runs/unequal",
        ),
        _FAST,
    ),
    Item(
        "FAST",
        "Figures 10 to 13",
        "FAST and baselines, by optimizer",
        (f"{_ANYTIME} --systems=fast,kaiming_fan_in,fast_adam,fast_radam --output=runs/adam",),
        f"{_FAST}; VGG-19 is --config.model.name=vgg19",
    ),
    Item(
        "FAST",
        "Table 1, Figures 14, 15",
        "where training ends, and how far from the start",
        (f"{_ANYTIME} --systems=fast,kaiming_fan_in --output=runs/far",),
        _FAST,
    ),
)


def as_text() -> str:
    """Return the items for a terminal, each with its commands below."""
    lines = ["First, for everything that looks at runs/digits:", f"    python -m seal_jax {RUNS}"]
    for item in ITEMS:
        lines.append(f"{item.paper}, {item.name}: {item.shows}")
        lines += [f"    python -m seal_jax {command}" for command in item.commands]
        if item.paper_size:
            lines.append(f"    at the paper's size: {item.paper_size}")
    return "\n".join(lines)


def as_markdown() -> str:
    """Return the items as the list in ``docs/reproduce.md``."""
    lines = []
    for paper in dict.fromkeys(item.paper for item in ITEMS):
        lines += [f"### {paper}", "", "| item | shows | commands | at the paper's size |"]
        lines.append("| --- | --- | --- | --- |")
        for item in ITEMS:
            if item.paper != paper:
                continue
            commands = "<br>".join(f"`{command}`" for command in item.commands) or "-"
            lines.append(f"| {item.name} | {item.shows} | {commands} | {item.paper_size or '-'} |")
        lines.append("")
    return "\n".join(lines)
