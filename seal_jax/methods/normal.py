"""Normal: plain training, over generations in which nothing is forgotten."""

from __future__ import annotations

import dataclasses

from seal_jax.methods.method import Context, Method
from seal_jax.transforms import make_normal_tx

SOURCE = "SEAL paper, section 4.1"


@dataclasses.dataclass(frozen=True)
class Options:
    """Plain training has none: see ``optimizer.schedule`` and ``train.generations``."""


def build(options: Options, context: Context) -> Method:
    """Return plain training: one cosine over everything, or one in each generation.

    The paper's "Normal" has one generation; "Normal (long)" has several, with ``optimizer.schedule``
    "restart" (cosine and momentum start anew in each) or "single" (one cosine over all of them).
    """
    del options
    arguments = context.arguments()
    return Method(tx=make_normal_tx(**arguments), loss=context.loss)
