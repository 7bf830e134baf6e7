"""What each method of the layerwise paper does between rounds of training, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from seal_jax.errors import UsageError, check_number, nearest
from seal_jax.reproduce import lw_events as events

LAYERS = 3
# By the paper's names, those of jax.nn.initializers, which draw as Keras's do.
INITIALISERS = {"he": "he_normal", "glorot": "glorot_uniform"}
ALPHAS = (0.5, 1.0, 2.0)
METHODS = ("BL", "WELSR", "DSD", "WELS", "FC", "LW")
PENALTIES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1)
PENALTY_METHODS = ("Baseline", "Rescaling", "LW")
REPEATS = 3  # the paper's N, of Table 1
# The highest layer that is kept in each round of Table 4. "Only the top layer in the last round" is
# reinitialised there, which is what lies above the second.
PENALTY_BLOCKS = (1, 1, 2, 2, 2)

CHOICES = {
    "first_round": ("algorithm", "train"),
    "head": ("bare", "normalised"),
    "fc": ("two", "one"),
    "dsd": ("tensor", "global"),
    "biases": ("reinitialised", "kept"),
    "table4_normaliser": ("none", "hidden", "all"),
    "penalty": ("half", "sum"),
    "penalise": ("kernels", "all"),
}


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the paper leaves open about the methods.

    Attributes:
      first_round: whether LW's first event follows a first round of training ("train", as in section
        1.1) or precedes all training ("algorithm", as in Algorithm 1). The rounds are as many, so
        that with "train" the last event is left out.
      head: whether LW in Table 1 normalises the logits too, the output of its third block.
      fc: how many of the uppermost layers FC reinitialises. "two" is LW with K = 1.
      dsd: whether the smallest magnitudes are those of each tensor or of all kernels together.
      biases: what becomes of the biases of reinitialised layers. Where a method reinitialises parts
        of kernels, biases are kept.
      table4_normaliser: the blocks whose outputs LW normalises in Table 4, where the text has
        rescaling and reinitialisation only.
      penalty: whether the L2 penalty is multiplied by the sum of squares or by half of it.
      penalise: whether that sum includes the biases.
    """

    first_round: str = "train"
    head: str = "bare"
    fc: str = "two"
    dsd: str = "tensor"
    biases: str = "reinitialised"
    table4_normaliser: str = "none"
    penalty: str = "half"
    penalise: str = "kernels"

    def __post_init__(self) -> None:
        for field, choices in CHOICES.items():
            check_choice(field, getattr(self, field), choices)


class Plan(NamedTuple):
    """One training, or many with their fields stacked.

    Attributes:
      alpha: the signal strength.
      initialiser: index into ``INITIALISERS``.
      penalty: what the sum of squares of the weights is multiplied with in the objective.
      penalise_biases: whether that sum includes the biases.
      forget_biases: whether reinitialised layers start with fresh biases.
      events: what happens before each round.
    """

    alpha: Any
    initialiser: Any
    penalty: Any
    penalise_biases: Any
    forget_biases: Any
    events: events.Events


def table1(initialisers: Sequence[str], choices: Choices) -> Plan:
    """Return the plans of Table 1, by initialiser, then signal strength, then method.

    >>> table1(["he"], Choices()).alpha.shape
    (18,)
    """
    rounds = LAYERS * REPEATS
    smallest = events.SMALLEST_OF_ALL if choices.dsd == "global" else events.SMALLEST_OF_TENSOR
    by_method = {
        "BL": nothing(rounds),
        "WELSR": partial(rounds, events.NEW_MASK),
        "DSD": partial(rounds, smallest),
        "WELS": partial(rounds, events.SAME_MASK),
        "FC": upper(rounds, {"two": 2, "one": 1}[choices.fc]),
        "LW": layerwise(
            np.repeat(np.arange(1, LAYERS + 1), REPEATS),
            choices.first_round,
            normalised=LAYERS if choices.head == "normalised" else LAYERS - 1,
        ),
    }
    return _stack(
        _plan(choices, initialiser, alpha, 0.0, by_method[method])
        for initialiser in initialisers
        for alpha in ALPHAS
        for method in METHODS
    )


def table4(initialisers: Sequence[str], choices: Choices) -> Plan:
    """Return the plans of Table 4, by initialiser, then penalty, then method.

    In its rounds all kernels are rescaled; LW reinitialises what lies above ``PENALTY_BLOCKS``.
    """
    lw = layerwise(
        PENALTY_BLOCKS,
        choices.first_round,
        normalised={"none": 0, "hidden": LAYERS - 1, "all": LAYERS}[choices.table4_normaliser],
    )
    lw.rescale[:] = lw.rescale.any(1, keepdims=True)
    by_method = {
        "Baseline": nothing(len(PENALTY_BLOCKS)),
        "Rescaling": nothing(len(PENALTY_BLOCKS))._replace(rescale=lw.rescale),
        "LW": lw,
    }
    half = 0.5 if choices.penalty == "half" else 1.0
    return _stack(
        _plan(choices, initialiser, 0.5, half * penalty, by_method[method])
        for initialiser in initialisers
        for penalty in PENALTIES
        for method in PENALTY_METHODS
    )


def concatenate(plans: Sequence[Plan]) -> Plan:
    """Return the plans of all, one after the other."""
    return jax.tree.map(lambda *fields: np.concatenate(fields), *plans)


def nothing(rounds: int) -> events.Events:
    """Return the events of plain training."""
    rescale, normalise, reinitialise = np.zeros((3, rounds, LAYERS), bool)
    return events.Events(rescale, normalise, reinitialise, np.zeros(rounds, np.int32))


def partial(rounds: int, part: int) -> events.Events:
    """Reinitialise a part of all layers before every round but the first."""
    plan = nothing(rounds)
    plan.part[1:] = part
    return plan


def upper(rounds: int, layers: int) -> events.Events:
    """Reinitialise the uppermost layers before every round but the first."""
    plan = nothing(rounds)
    plan.reinitialise[1:, LAYERS - layers :] = True
    return plan


def layerwise(
    blocks: Sequence[int] | np.ndarray, first_round: str = "algorithm", normalised: int = LAYERS
) -> events.Events:
    """Return the events of LW.

    Args:
      blocks: for each round k, the highest block that is kept, from 1.
      first_round: as in :class:`Choices`.
      normalised: only outputs of blocks up to this one are normalised.

    >>> layerwise([1, 2, 3]).reinitialise.tolist()
    [[False, True, True], [False, False, True], [False, False, False]]

    References:
      Alabdulmohsin et al. (2022), Algorithm 1.
    """
    plan = nothing(len(blocks))
    skipped = 1 if first_round == "train" else 0
    for index, k in enumerate(blocks[: len(blocks) - skipped], start=skipped):
        plan.rescale[index, :k] = True
        plan.normalise[index, k - 1] = k <= normalised
        plan.reinitialise[index, k:] = True
    return plan


def check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise UsageError(
            f"{field} = {value!r} must be one of {', '.join(choices)}{nearest(str(value), choices)}"
        )


def check_least(field: str, value: int) -> None:
    """Raise unless ``value`` is 1 at least."""
    check_number(field, value, lambda value: value >= 1, "be at least 1")


def _plan(
    choices: Choices, initialiser: str, alpha: float, penalty: float, event: events.Events
) -> Plan:
    return Plan(
        np.float32(alpha),
        np.int32(list(INITIALISERS).index(initialiser)),
        np.float32(penalty),
        np.float32(choices.penalise == "all"),
        np.bool_(choices.biases == "reinitialised"),
        event,
    )


def _stack(plans) -> Plan:
    return jax.tree.map(lambda *fields: np.stack(fields), *plans)
