"""SA-GD: gradient descent that now and then ascends (Cai 2021; baseline of the SEAL paper)."""

from __future__ import annotations

import dataclasses
import math

from seal_jax.errors import check_number
from seal_jax.methods.method import Context, Method
from seal_jax.transforms.sa_gd import make_sa_gd_tx

SOURCE = "Cai 2021; SEAL paper, section 2"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of SA-GD: descent has probability exp(-|dL|^q / (T0 epsilon ln(n + 1))).

    Attributes:
      temperature: T0.
      epsilon: its factor.
      q: power of the change of the loss since the last step.
      ascent_cap: the most that the probability of ascent can be.
    """

    temperature: float = 10.0
    epsilon: float = 1.0
    q: float = 1.0
    ascent_cap: float = 0.33


def build(options: Options, context: Context) -> Method:
    """Return SA-GD over the whole network."""
    for field in ("temperature", "epsilon", "q"):
        value = getattr(options, field)
        check_number(f"method.{field}", value, lambda v: 0 < v < math.inf, "be positive")
    check_number("method.ascent_cap", options.ascent_cap, lambda v: 0 <= v <= 1, "lie in [0, 1]")
    tx = make_sa_gd_tx(**dataclasses.asdict(options), **context.arguments())
    return Method(tx=tx, loss=context.loss, random=True)
