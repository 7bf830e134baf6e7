"""SA-GD: gradient descent that now and then ascends (Cai 2021; baseline of the SEAL paper)."""

from __future__ import annotations

import dataclasses

from seal_jax.methods.method import Context, Method, Variant, check_options
from seal_jax.transforms.sa_gd import make_sa_gd_tx

ORDER = 13
VARIANTS = {"sa_gd": Variant("SA-GD", "Cai 2021; SEAL paper, section 2", "seal_tiny_imagenet.py")}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of SA-GD: descent has probability exp(-|dL|^q / (T0 epsilon ln(n + 1))).

    Attributes:
      temperature: T0; ours, as ε and q: the SEAL paper gives none.
      epsilon: ε, a factor of the temperature.
      q: power of the change of the loss since the last step.
      ascent_cap: the largest probability of ascent.
    """

    temperature: float = 10.0
    epsilon: float = 1.0
    q: float = 1.0
    ascent_cap: float = 0.33


def build(options: Options, context: Context) -> Method:
    """Return SA-GD over the whole network."""
    check_options(options, "be positive", "temperature", "epsilon", "q")
    check_options(options, "lie in [0, 1]", "ascent_cap")
    context.require_ascent("sa_gd")
    # The key of the step decides between descent and ascent, the same way on all devices.
    tx = make_sa_gd_tx(**dataclasses.asdict(options), **context.arguments())
    return context.plain(tx=tx, random=True)
