"""Where the cycles go: the compiler's estimates, weighted by how often each instruction runs."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

from seal_jax.preflight.hlo import Instruction, Module, array_bytes
from seal_jax.preflight.trips import trip_count

# Instructions that cost nothing, or whose cost is that of what they wrap.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "while",
    "conditional",
    "call",
    "async-start",
    "async-update",
    "partition-id",
    "replica-id",
}


@dataclasses.dataclass(frozen=True)
class Visit:
    """One instruction where the program runs it.

    Attributes:
        instruction: the instruction.
        runs: how often a call runs it; a loop of unknown length counts as one run.
        loops: names of the ``while`` loops around it, outermost first.
        fused: it lies inside a fusion, whose own estimate covers it.
        taken: it lies on the costliest branch of every conditional around it.
    """

    instruction: Instruction
    runs: int
    loops: tuple[str, ...]
    fused: bool
    taken: bool


@dataclasses.dataclass(frozen=True)
class Loop:
    """A ``while`` loop: ``trips`` is ``None`` if unknown; cycles are those of a whole call."""

    name: str
    trips: int | None
    runs: int
    cycles: int
    op_name: str
    source: str
    around: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Costly:
    """An instruction's cycles over a whole call."""

    name: str
    cycles: int
    runs: int
    op_name: str
    source: str


@dataclasses.dataclass(frozen=True)
class Cycles:
    """The compiler's estimates, added up over one call.

    Attributes:
        total: cycles; a lower bound if ``unknown`` is not empty.
        loops: every ``while`` loop.
        costliest: the ten costliest instructions.
        unestimated: how often a call runs instructions that carry no estimate, by opcode and, for
            fusions, the primitive. Gathers of rows, sorts and collectives are among them.
        conditionals: how many conditionals there are; the costliest branch of each counts.
    """

    total: int
    loops: tuple[Loop, ...]
    costliest: tuple[Costly, ...]
    unestimated: dict[str, int]
    conditionals: int

    @property
    def unknown(self) -> tuple[Loop, ...]:
        """The loops of unknown length, each counted as if it ran once."""
        return tuple(loop for loop in self.loops if loop.trips is None)

    def step_loop(self, steps: int | None) -> Loop | None:
        """Return the scan over training steps: the costliest loop whose body runs ``steps`` times.

        Without ``steps`` it is the costliest loop that no other loop contains.
        """
        candidates = [
            loop
            for loop in self.loops
            if (not loop.around if steps is None else loop.runs * (loop.trips or 0) == steps)
        ]
        return max(candidates, key=lambda loop: loop.cycles, default=None)

    def serial_loops(self, steps: int | None) -> tuple[Loop, ...]:
        """Return the loops other than the step scan and those around it."""
        scan = self.step_loop(steps)
        spared = (scan.name, *scan.around) if scan else ()
        return tuple(loop for loop in self.loops if loop.name not in spared)


def walk(module: Module) -> Iterator[Visit]:
    """Yield every instruction that a call reaches, once for each place that reaches it."""
    yield from _walk(module, module.entry, Visit(_NOTHING, 1, (), False, True))


def add_up(module: Module) -> Cycles:
    """Add the estimates up.

    Only instructions that the program schedules count: a fusion brings its own estimate, and what
    it contains is not counted again.
    """
    costs: dict[str, list[int]] = {}
    places: dict[str, Instruction] = {}
    inside: collections.Counter[str] = collections.Counter()
    unestimated: collections.Counter[str] = collections.Counter()
    found: dict[str, Visit] = {}
    conditionals = 0
    for visit in walk(module):
        made = visit.instruction
        if visit.fused:
            continue
        conditionals += made.opcode == "conditional"
        if made.opcode == "while":
            found[made.name] = visit
        if not visit.taken:
            continue
        if made.cycles is None:
            if not _is_free(made):
                unestimated[_kind(made)] += visit.runs
            continue
        places[made.name] = made
        cost = costs.setdefault(made.name, [0, 0])
        cost[0] += made.cycles * visit.runs
        cost[1] += visit.runs
        for loop in visit.loops:
            inside[loop] += made.cycles * visit.runs
    ranked = sorted(costs.items(), key=lambda item: -item[1][0])
    return Cycles(
        total=sum(cost for cost, _ in costs.values()),
        loops=tuple(
            Loop(
                name,
                _trips(module, name),
                visit.runs,
                inside[name],
                visit.instruction.op_name,
                visit.instruction.source,
                visit.loops,
            )
            for name, visit in found.items()
        ),
        costliest=tuple(
            Costly(name, cost, runs, places[name].op_name, places[name].source)
            for name, (cost, runs) in ranked[:10]
        ),
        unestimated=dict(unestimated.most_common()),
        conditionals=conditionals,
    )


_NOTHING = Instruction("", "", "", "", "", "", "", None)


def _walk(module: Module, name: str, around: Visit) -> Iterator[Visit]:
    for made in module.computations[name].instructions.values():
        here = dataclasses.replace(around, instruction=made)
        yield here
        if made.opcode == "while":
            inner = dataclasses.replace(
                here,
                runs=here.runs * _or_once(_trips(module, made.name)),
                loops=(*here.loops, made.name),
            )
            for called in made.called("condition", "body"):
                yield from _walk(module, called, inner)
        elif made.opcode == "conditional":
            branches = made.called("branch_computations", "true_computation", "false_computation")
            costs = [_cycles_of(module, branch) for branch in branches]
            for index, branch in enumerate(branches):
                taken = here.taken and index == costs.index(max(costs))
                yield from _walk(module, branch, dataclasses.replace(here, taken=taken))
        elif made.opcode in ("call", "async-start"):
            for called in made.called("to_apply", "calls", "called_computations"):
                # An async operation that carries its own estimate covers what it wraps.
                covered = here.fused or made.cycles is not None
                yield from _walk(module, called, dataclasses.replace(here, fused=covered))
        elif made.opcode == "fusion":
            for called in made.called("calls"):
                yield from _walk(module, called, dataclasses.replace(here, fused=True))


def _cycles_of(module: Module, name: str) -> int:
    start = Visit(_NOTHING, 1, (), False, True)
    return sum(
        (visit.instruction.cycles or 0) * visit.runs
        for visit in _walk(module, name, start)
        if not visit.fused and visit.taken
    )


def _trips(module: Module, name: str) -> int | None:
    for computation in module.computations.values():
        if name in computation.instructions:
            return trip_count(module, computation, computation.instructions[name])
    return None


def _or_once(trips: int | None) -> int:
    return 1 if trips is None else trips


def _kind(made: Instruction) -> str:
    if made.opcode not in ("fusion", "custom-call"):
        return made.opcode
    primitive = made.op_name.rpartition("/")[2]
    return f"{made.opcode} ({primitive})" if primitive else made.opcode


def _is_free(made: Instruction) -> bool:
    # A few bytes are a loop's bookkeeping, on the scalar core; the start stands for its done.
    done = made.opcode.endswith("-done")
    return made.opcode in _FREE or done or sum(array_bytes(made.shape)) <= 16
