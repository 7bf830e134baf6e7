"""Learning rates of the papers, constant within an epoch, and the two presets of SEAL."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from seal_jax.errors import UsageError, check_integer, check_number, positive
from seal_jax.generations import Schedule, Step


def cosine(
    learning_rate: float, *, epochs: int, steps_per_epoch: int, warmup_epochs: int = 0
) -> Schedule:
    r"""Return the staircase cosine of the released SEAL and LLF code, constant within an epoch.

    With the epoch :math:`e = \lfloor t / S \rfloor`, W warm-up epochs and E epochs in all,

    .. math:: \eta_t = \eta (e + 1) / W \ \text{for } e < W, \quad
              \eta \tfrac12 (1 + \cos(\pi (e - W) / (E - W))) \ \text{afterwards.}

    Args:
      learning_rate: :math:`\eta`, the peak.
      epochs: E, the length of the cosine with its warm-up: one generation, or all of them.
      steps_per_epoch: S.
      warmup_epochs: W; 0 for the paper's schedule.

    >>> schedule = cosine(0.1, epochs=4, steps_per_epoch=10, warmup_epochs=2)
    >>> [round(float(schedule(step)), 3) for step in (0, 10, 20, 30)]
    [0.05, 0.1, 0.1, 0.05]
    """
    check_integer("epochs", epochs, 1)
    check_integer("steps_per_epoch", steps_per_epoch, 1)
    check_integer("warmup_epochs", warmup_epochs, 0)
    if warmup_epochs >= epochs:
        raise UsageError(
            f"warmup_epochs = {warmup_epochs} must lie in [0, {epochs}), under the epochs"
        )
    check_number("learning_rate", learning_rate, positive, "be positive and finite")

    def schedule(step: Step) -> Any:
        epoch = jnp.asarray(step) // steps_per_epoch
        # (1 + cos x) / 2 loses every digit as x approaches pi; sin^2((pi - x) / 2) keeps them.
        # left = 1 - x / pi, x being the argument of the cosine above.
        left = (epochs - epoch) / (epochs - warmup_epochs)
        decay = jnp.sin(0.5 * jnp.pi * left) ** 2
        # Both branches are computed: without a warm-up this one must not divide by 0.
        warmup = (epoch + 1) / max(warmup_epochs, 1)
        rate = learning_rate * jnp.where(epoch < warmup_epochs, warmup, decay)
        return rate.astype(jnp.float32)

    return schedule


def boundaries(decay_epochs: str, field: str = "decay_epochs") -> list[int]:
    """Return the epochs at which :func:`steps` falls, in ascending order; messages name the ``field``.

    >>> boundaries("60,120")
    [60, 120]
    """
    try:
        epochs = sorted(int(part) for part in decay_epochs.split(","))
    except ValueError:
        epochs = []
    if not epochs or min(epochs) < 1:
        raise UsageError(
            f"{field} = {decay_epochs!r} must be epochs separated by commas: 60,120,160"
        )
    return epochs


def steps(
    learning_rate: float, decay_epochs: str, *, factor: float, steps_per_epoch: int
) -> Schedule:
    """Return a learning rate that falls at given epochs, as in the training of wide ResNets.

    Args:
      learning_rate: the first.
      decay_epochs: epochs separated by commas; from each on the rate is multiplied by ``factor``.
      factor: in (0, 1).
      steps_per_epoch: S.

    References:
      Sato et al. 2022, section 4.1: 0.1, times 0.2 at epochs 60, 120, 160 and 200.

    >>> schedule = steps(0.1, "60,120", factor=0.2, steps_per_epoch=10)
    >>> [round(float(schedule(step)), 3) for step in (0, 599, 600, 1200)]
    [0.1, 0.1, 0.02, 0.004]
    """
    check_number("learning_rate", learning_rate, positive, "be positive and finite")
    check_integer("steps_per_epoch", steps_per_epoch, 1)
    epochs = boundaries(decay_epochs)
    check_number("factor", factor, lambda value: 0 < value < 1, "lie in (0, 1)")

    def schedule(step: Step) -> Any:
        epoch = jnp.asarray(step) // steps_per_epoch
        # "right": the rate falls with the first step of the epoch that is named, as PyTorch's MultiStepLR does.
        passed = jnp.searchsorted(jnp.asarray(epochs), epoch, side="right")
        return jnp.asarray(learning_rate * factor**passed, jnp.float32)

    return schedule


@dataclasses.dataclass(frozen=True)
class Preset:
    """Hyper-parameters of a SEAL training, by the names of :func:`seal_jax.make_seal_tx`."""

    learning_rate: float
    warmup_epochs: int
    ascent_weight_decay_factor: float
    ascent_scale: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    batch_size: int = 32
    epochs_per_generation: int = 160
    generations: int = 10

    def arguments(self, steps_per_epoch: int) -> dict[str, Any]:
        """Return keyword arguments for :func:`seal_jax.make_seal_tx`.

        >>> sorted(PRESETS["paper"].arguments(3125))[:3]
        ['ascent_scale', 'ascent_weight_decay_factor', 'epochs_per_generation']
        """
        names = ("ascent_scale", "ascent_weight_decay_factor", "momentum", "weight_decay")
        return {
            "learning_rate": cosine(
                self.learning_rate,
                epochs=self.epochs_per_generation,
                steps_per_epoch=steps_per_epoch,
                warmup_epochs=self.warmup_epochs,
            ),
            "steps_per_epoch": steps_per_epoch,
            "epochs_per_generation": self.epochs_per_generation,
            **{name: getattr(self, name) for name in names},
        }


PRESETS = {
    # SEAL paper, section 4.1; the sign of the weight decay is "adjusted" in ascent (section 3).
    "paper": Preset(learning_rate=0.01, warmup_epochs=0, ascent_weight_decay_factor=-1.0),
    # The authors' released code.
    "reference": Preset(learning_rate=0.1, warmup_epochs=20, ascent_weight_decay_factor=0.0),
}
