"""Normal: plain training, over generations in which nothing is forgotten."""

from __future__ import annotations

import dataclasses

from seal_jax.methods.method import Context, Method, Variant

ORDER = 10
VARIANTS = {
    "normal": Variant(
        "Normal",
        "SEAL paper, section 4.1",
        "seal_tiny_imagenet.py:normal_paper",
        # The paper's Normal (long).
        also=(
            "seal_tiny_imagenet.py:long_restart_paper,long_single_paper",
            "warm_start_cifar10.py:scratch,warm",
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Plain training has none: see ``optimizer.schedule`` and ``train.generations``."""


def build(options: Options, context: Context) -> Method:
    """Return plain training: one cosine over everything, or one in each generation.

    The paper's "Normal" has one generation; "Normal (long)" has several, with ``optimizer.schedule``
    "restart" (cosine and momentum restart in each) or "single" (one cosine over all of them).
    """
    del options
    return context.plain()
