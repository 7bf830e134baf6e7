"""How far from the paper each answer to its open questions ends."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from seal_jax.reproduce import lw_plans, lw_synthetic, lw_tables

# Table 1: one departure from the given choices at a time.
DEPARTURES: tuple[dict[str, Any], ...] = (
    {},
    {"first_round": "algorithm"},
    {"head": "normalised"},
    {"normaliser": "before"},
    {"fc": "one"},
    {"dsd": "global"},
    {"share": 0.3},
    {"share": 0.3, "dsd": "global"},
    {"data": "shared"},
)
# Table 4: gradient descent as in Table 1, and Adam, each with every choice of CHOICES_4.
TRAININGS: tuple[dict[str, Any], ...] = (
    {"optimiser": "gd", "learning_rate": 0.05, "steps": 360},
    *(
        {"optimiser": "adam", "learning_rate": rate, "steps": steps}
        for rate, steps in (
            (0.001, 360),
            (0.003, 360),
            (0.01, 40),
            (0.01, 100),
            (0.01, 360),
            (0.03, 100),
            (0.03, 360),
        )
    ),
)
CHOICES_4: tuple[dict[str, Any], ...] = tuple(
    dict(zip(("penalty", "first_round"), values, strict=True))
    for values in itertools.product(("half", "sum"), ("algorithm", "train"))
)


def table1(
    settings: lw_synthetic.Settings,
    choices: lw_plans.Choices,
    initialisers: Sequence[str],
    seeds: int,
) -> Iterator[str]:
    """Yield a line for each departure: for each initialiser, the cells that agree, and the pairs."""
    yield "Cells within two of the paper's standard deviations; pairs of methods in its order"
    for departure in DEPARTURES:
        trained = lw_synthetic.train_all(
            _replace(settings, departure),
            lw_plans.table1(initialisers, _replace(choices, departure)),
            seeds,
        )
        cells = lw_tables.cells1(trained.test, initialisers)
        counts = [
            f"{initialiser} {sum(cell.within for cell in own)} of 17, "
            f"{lw_tables.pairs_in_order(own)} of 40 pairs"
            for initialiser, own in lw_tables.by_initialiser(cells)
        ]
        either = {(cell.row, cell.method) for cell in cells if cell.within}
        yield f"{_shown(departure) or 'as given':24} {'; '.join(counts)}; either {len(either)}"


def table4(
    settings: lw_synthetic.Settings,
    choices: lw_plans.Choices,
    initialisers: Sequence[str],
    seeds: int,
) -> Iterator[str]:
    """Yield a line for each setting as it is done, then the closest of them."""
    found = []
    yield "Root mean square difference from Table 4, and of each of its columns"
    for training in TRAININGS:
        # One program for all choices: plans are data.
        variants = [_replace(choices, departure) for departure in CHOICES_4]
        plans = [lw_plans.table4(initialisers, variant) for variant in variants]
        trained = lw_synthetic.train_all(
            _replace(settings, training), lw_plans.concatenate(plans), seeds
        )
        size = trained.test.shape[1] // len(variants)
        for index, departure in enumerate(CHOICES_4):
            test = trained.test[:, size * index : size * (index + 1)]
            cells = lw_tables.cells4(test, initialisers)
            for initialiser, own in lw_tables.by_initialiser(cells):
                columns = ", ".join(
                    f"{lw_tables.distance4(cell for cell in own if cell.method == method):.1f}"
                    for method in lw_plans.PENALTY_METHODS
                )
                line = f"({columns})  {_shown({**training, **departure})} initialiser={initialiser}"
                found.append((lw_tables.distance4(own), line))
                yield f"{found[-1][0]:5.1f} {line}"
    yield "Closest:"
    for distance, line in sorted(found)[:10]:
        yield f"{distance:5.1f} {line}"


def _replace(given: Any, departure: dict[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(given)}
    return dataclasses.replace(
        given, **{name: value for name, value in departure.items() if name in names}
    )


def _shown(departure: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in departure.items())
