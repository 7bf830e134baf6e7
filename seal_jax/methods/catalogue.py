"""Every system, those of the four papers first: its method, the options that make it, its configs."""

from __future__ import annotations

from typing import NamedTuple

from seal_jax import methods


class System(NamedTuple):
    """One row of ``python -m seal_jax methods``.

    Attributes:
      name: as the papers call it.
      variant: of ``configs/digits.py``, where it trains in seconds.
      method: the name of its method.
      changes: what sets it apart from the method's defaults.
      source: the section that describes it.
    """

    name: str
    variant: str
    method: str
    changes: str
    source: str

    @property
    def config(self) -> str:
        """A config at the size of its paper, ``file:variant`` in ``configs/``."""
        for file, variants in _CONFIGS.items():
            if self.variant in variants:
                own = variants[self.variant] if isinstance(variants, dict) else self.variant
                return f"{file}:{own}"
        return f"{self.method}_cifar100.py:{self.variant}"


# At the size of their papers: the config, and which of its variants.
_CONFIGS = {
    "seal_tiny_imagenet.py": {
        "normal": "normal_paper",
        "llf": "llf_paper",
        "seal": "seal_paper",
        "sa_gd": "sa_gd",
    },
    "lw_cifar10.py": ("wels", "welsr", "dsd", "fc", "lw"),
    "ke_cifar100.py": ("kels", "shrink_perturb"),
    "imp_cifar10.py": ("imp",),
    "pof_cifar10.py": ("sam", "asam", "pof", "foca"),
    "born_again_cifar100.py": ("born_again", "tolerant_teacher", "smoothed_teacher"),
}
_FAST = "FAST paper, section "
_BAN = "SEAL paper, Tables 9 and 10"

SYSTEMS = (
    System("Normal", "normal", "normal", "", "SEAL paper, section 4.1"),
    System("LLF", "llf", "llf", "", "Zhou et al. 2022, section 4"),
    System("SEAL", "seal", "seal", "", "SEAL paper, section 3"),
    System("SA-GD", "sa_gd", "sa_gd", "", "Cai 2021; SEAL paper, section 2"),
    System("WELS", "wels", "wels", "", "Taha et al. 2021, section 3; LW paper, section 1"),
    System("WELSR", "welsr", "wels", "redraw=True", "LW paper, section 1"),
    System("KELS", "kels", "kels", "", "Taha et al. 2021, section 3"),
    System("DSD", "dsd", "dsd", "", "Han et al. 2017; LW paper, section 1"),
    System("FC", "fc", "fc", "", "LW paper, section 1"),
    System("IMP", "imp", "imp", "", "Frankle & Carbin 2019; Frankle et al. 2020"),
    System("LW", "lw", "lw", "", "LW paper, Algorithm 1"),
    System("SAM", "sam", "sam", "", "Foret et al. 2021; PoF paper, section 4.1"),
    System("ASAM", "asam", "sam", "adaptive=True", "Kwon et al. 2021"),
    System("PoF", "pof", "pof", "", "PoF paper, Algorithm 1"),
    System("FOCA", "foca", "foca", "", "Sato et al. 2019; PoF paper, section 3.1"),
    System("FAST", "fast", "fast", "", "FAST paper, Algorithm 2"),
    System("FAST, Nesterov", "fast_nesterov", "fast", "optimizer.nesterov=True", f"{_FAST}6.6"),
    System("FAST, Adam", "fast_adam", "fast", "optimizer.name=adam", f"{_FAST}6.6"),
    System("FAST, RAdam", "fast_radam", "fast", "optimizer.name=radam", f"{_FAST}6.6"),
    System("Kaiming fan-in", "kaiming_fan_in", "fast", "head=kaiming_fan_in", f"{_FAST}6.6"),
    System("Kaiming fan-out", "kaiming_fan_out", "fast", "head=kaiming_fan_out", f"{_FAST}6.4"),
    System("Xavier", "xavier", "fast", "head=xavier", f"{_FAST}5.1"),
    System("N(0, s^2)", "gaussian", "fast", "head=normal sigma=s", f"{_FAST}6.2"),
    System("Feature extraction", "feature_extraction", "fast", "beta=0", f"{_FAST}3"),
    System("Frozen head", "frozen_head", "fast", "head=normal alpha=0", f"{_FAST}6.3"),
    System("Classifier warm-up", "warmup", "fast", "warmup=True", f"{_FAST}6.4"),
    System("Born-again", "born_again", "born_again", "", f"Furlanello et al. 2018; {_BAN}"),
    System(
        "Tolerant teacher",
        "tolerant_teacher",
        "born_again",
        "tolerance=0.2",
        f"Yang et al. 2019; {_BAN}",
    ),
    System(
        "Label-smoothed teacher",
        "smoothed_teacher",
        "born_again",
        "optimizer.label_smoothing=0.1",
        _BAN,
    ),
    System("Shrink and perturb", "shrink_perturb", "shrink_perturb", "", "Ash & Adams 2020"),
)


def as_text() -> str:
    """Return the table that ``python -m seal_jax methods`` prints."""
    header = ("system", "method.name and options", "configs/", "source")
    rows = [
        (each.name, f"{each.method} {each.changes}".strip(), each.config, each.source)
        for each in SYSTEMS
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, tuple("-" * width for width in widths), *rows)
    ]
    width = max(map(len, methods.NAMES))
    about = [f"  {name:{width}}  {methods.described(name)[0]}" for name in methods.NAMES]
    return "\n".join(
        [
            *table,
            "",
            "All of them train in seconds as variants of configs/digits.py.",
            "What the methods do, one file each in seal_jax/methods/:",
            *about,
        ]
    )
