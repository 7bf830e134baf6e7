"""The work of one call of a compiled program: the compiler's estimated cycles, and the collectives."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from tools.preflight.hlo import Computation, Instruction, Module, array_bytes, trip_count

# Instructions that cost nothing, or whose cost is that of the instructions that they wrap.
FREE = {
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
_COLLECTIVES = {
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
}
# The `jax.named_scope`s of the train step; a collective is attributed to the innermost of them.
SCOPES = (
    "gradient_reduce",
    "batch_norm",
    "metrics",
    "gather",
    "augment",
    "shuffle",
    "optimizer",
    "forget",
)
# Elements of an op's path that say how the program was traced, not what an op is for.
_PLUMBING = re.compile(r"jit\(.*\)|pjit|shard_map|while|body|cond|closed_call|checkpoint|remat")


@dataclasses.dataclass(frozen=True)
class Visit:
    """One instruction where the program runs it.

    Attributes:
      instruction: the instruction.
      computation: the computation that it is part of.
      runs: how often a call runs it; a loop of unknown length counts as one run.
      loops: names of the ``while`` loops around it, outermost first.
      fused: whether it is part of a fusion, whose estimate includes it.
      taken: whether it is on the costliest branch of every conditional around it.
      trips: how often a ``while`` loop runs its body; ``None`` if unknown.
    """

    instruction: Instruction
    computation: Computation
    runs: int
    loops: tuple[str, ...]
    fused: bool
    taken: bool
    trips: int | None = None


def walk(module: Module, computation: str | None = None) -> Iterator[Visit]:
    """Yield every instruction that a call reaches, once for each place that reaches it.

    Args:
      module: the program.
      computation: the computation to start from; by default the program's entry.
    """
    name = computation or module.entry
    # The instruction is a placeholder: `_walk` replaces it and hands on what is around.
    nothing = Instruction("", "", "", "", "", "", "", None)
    return _walk(module, name, Visit(nothing, module.computations[name], 1, (), False, True))


def _walk(module: Module, name: str, around: Visit) -> Iterator[Visit]:
    computation = module.computations[name]
    for instruction in computation.instructions.values():
        here = dataclasses.replace(
            around, instruction=instruction, computation=computation, trips=None
        )
        if instruction.opcode == "while":
            trips = trip_count(module, computation, instruction)
            yield dataclasses.replace(here, trips=trips)
            # Nested loops multiply. One of unknown length counts once, and the report says "at least".
            runs = here.runs * (1 if trips is None else trips)
            inner = dataclasses.replace(here, runs=runs, loops=(*here.loops, instruction.name))
            # The condition runs once more than the body; of a compare of two integers that is nothing.
            for called in instruction.called("condition", "body"):
                yield from _walk(module, called, inner)
            continue
        yield here
        if instruction.opcode == "conditional":
            roles = ("branch_computations", "true_computation", "false_computation")
            branches = instruction.called(*roles)
            # Which branch runs is known at run time alone: the costliest is the bound to plan with. Yet all
            # are walked, since collectives on any of them are reported.
            costs = [_cycles_of(module, branch) for branch in branches]
            for index, branch in enumerate(branches):
                taken = here.taken and index == costs.index(max(costs))
                yield from _walk(module, branch, dataclasses.replace(here, taken=taken))
        elif instruction.opcode in ("call", "async-start", "fusion"):
            # The estimate of a fusion, or of an async operation that has one, includes what it wraps.
            estimated = instruction.opcode == "fusion" or instruction.cycles is not None
            inner = dataclasses.replace(here, fused=here.fused or estimated)
            for called in instruction.called("to_apply", "calls", "called_computations"):
                yield from _walk(module, called, inner)


def _cycles_of(module: Module, computation: str) -> int:
    return sum(
        (visit.instruction.cycles or 0) * visit.runs
        for visit in walk(module, computation)
        if not visit.fused and visit.taken
    )


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
      unestimated: how often a call runs instructions without an estimate, by opcode and, for fusions,
        the primitive. Gathers of rows, sorts and collectives are among them.
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
        # How often the body of a loop runs in a call is `runs` times `trips`.
        candidates = [
            loop
            for loop in self.loops
            if (not loop.around if steps is None else loop.runs * (loop.trips or 0) == steps)
        ]
        return max(candidates, key=lambda loop: loop.cycles, default=None)

    def serial_loops(self, steps: int | None) -> tuple[Loop, ...]:
        """Return the loops except the scan over steps and those around it."""
        scan = self.step_loop(steps)
        spared = (scan.name, *scan.around) if scan else ()
        return tuple(loop for loop in self.loops if loop.name not in spared)


def add_up(module: Module) -> Cycles:
    """Add up the estimates.

    Only instructions that the program schedules count: a fusion has an estimate, and what it contains
    is not counted again.
    """
    # By the name of an instruction, since a computation that is called from several places is walked in each.
    costs: collections.Counter[str] = collections.Counter()
    runs: collections.Counter[str] = collections.Counter()
    inside: collections.Counter[str] = collections.Counter()
    unestimated: collections.Counter[str] = collections.Counter()
    instructions: dict[str, Instruction] = {}
    loops: dict[str, Visit] = {}
    conditionals = 0
    for visit in walk(module):
        instruction = visit.instruction
        if visit.fused:
            continue
        conditionals += instruction.opcode == "conditional"
        if instruction.opcode == "while":
            loops[instruction.name] = visit
        if not visit.taken:
            continue
        if instruction.cycles is None:
            if not _is_free(instruction):
                unestimated[_kind(instruction)] += visit.runs
            continue
        cycles = instruction.cycles * visit.runs
        instructions[instruction.name] = instruction
        costs[instruction.name] += cycles
        runs[instruction.name] += visit.runs
        # To every loop around it, so that an outer loop includes the inner ones.
        inside.update(dict.fromkeys(visit.loops, cycles))
    return Cycles(
        total=costs.total(),
        loops=tuple(
            Loop(
                name=name,
                trips=visit.trips,
                runs=visit.runs,
                cycles=inside[name],
                op_name=visit.instruction.op_name,
                source=visit.instruction.source,
                around=visit.loops,
            )
            for name, visit in loops.items()
        ),
        costliest=tuple(
            Costly(name, cycles, runs[name], instructions[name].op_name, instructions[name].source)
            for name, cycles in costs.most_common(10)
        ),
        unestimated=dict(unestimated.most_common()),
        conditionals=conditionals,
    )


def _kind(instruction: Instruction) -> str:
    if instruction.opcode not in ("fusion", "custom-call"):
        return instruction.opcode
    # The opcode of a fusion says nothing; the last element of its path is JAX's primitive.
    primitive = instruction.op_name.rpartition("/")[2]
    return f"{instruction.opcode} ({primitive})" if primitive else instruction.opcode


def _is_free(instruction: Instruction) -> bool:
    # A result of a few bytes is the bookkeeping of a loop, on the scalar core. Of an async pair the start
    # counts.
    done = instruction.opcode.endswith("-done")
    return instruction.opcode in FREE or done or sum(array_bytes(instruction.shape)) <= 16


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives with the same operation, axis and cause, all in a loop or all outside.

    Attributes:
      operation: such as ``"all-reduce"``; the two halves of an async one count once.
      axis: mesh axis that it runs along: its name, ``"both"``, ``"none"`` or ``"unknown"``.
      cause: innermost known scope, or the rest of the op's path. Where the compiler merged several
        collectives into one, it kept the path of one of them.
      in_loop: whether it is inside a ``while`` loop.
      count: how many there are in the program.
      runs: how often a call runs them; loops of unknown length count as one run.
      arrays: how many arrays they carry, once each; more than ``count`` after a merge.
      bytes: payload on one chip of running each once; the gathered side where sizes differ.
    """

    operation: str
    axis: str
    cause: str
    in_loop: bool
    count: int
    runs: int
    arrays: int
    bytes: int


def collect(
    visits: Iterable[Visit], axes: Mapping[str, int] | None, scopes: Iterable[str] = SCOPES
) -> tuple[Collective, ...]:
    """Group the collectives among ``visits``.

    Args:
      visits: from :func:`walk`.
      axes: lengths of the mesh axes in order, devices numbered row by row; ``None`` if unknown.
      scopes: names that may be causes.

    Returns:
      Groups, the most bytes a call first.
    """
    known = frozenset(scopes)
    groups: dict[tuple[str, str, str, bool], np.ndarray] = {}
    channels: set[str] = set()
    for visit in visits:
        instruction = visit.instruction
        operation = instruction.opcode.removesuffix("-start")
        if operation not in _COLLECTIVES:
            continue
        # One that overlaps with other work is written into several fusions: its start, that work, its end.
        channel = re.search(r"channel_id=\d+", instruction.attributes)
        if visit.fused and channel:
            if channel[0] in channels:
                continue
            channels.add(channel[0])
        sizes = _payload(instruction, operation, axes)
        why = cause(instruction.op_name, known)
        key = (operation, axis_of(instruction, axes), why, bool(visit.loops))
        totals = groups.setdefault(key, np.zeros(5, np.int64))
        totals += [1, visit.runs, len(sizes), sum(sizes), sum(sizes) * visit.runs]
    ranked = sorted(groups.items(), key=lambda group: -group[1][4])
    return tuple(Collective(*key, *totals.tolist()[:4]) for key, totals in ranked)


def cause(op_name: str, scopes: frozenset[str]) -> str:
    """Return the innermost of ``scopes`` in a path, else the path without its plumbing.

    >>> cause("jit(f)/while/body/transpose(jvp(Net))/batch_norm/bn1/psum", frozenset(["batch_norm"]))
    'batch_norm'
    >>> cause("jit(f)/shard_map/while/body/closed_call/eval/psum", frozenset())
    'eval/psum'
    """
    # Not at a slash within parentheses: wrapped names may contain paths.
    parts = re.split(r"/(?![^(]*\))", op_name)
    for part in reversed(parts):
        # Differentiation wraps the name of a scope, as in transpose(jvp(name)).
        bare = re.sub(r"^(?:\w+\()+|\)+$", "", part)
        if bare in scopes:
            return bare
    rest = [part for part in parts if not _PLUMBING.fullmatch(part)]
    return "/".join(rest) or op_name or "unnamed"


def axis_of(instruction: Instruction, axes: Mapping[str, int] | None) -> str:
    """Return the mesh axis along which the members of a group differ."""
    if axes is None:
        return "unknown"
    devices = math.prod(axes.values())
    groups = _groups(instruction.attributes, devices)
    if groups is None:
        return "unknown"
    varying = set()
    for group in groups:
        # The coordinates of the group's devices in the mesh, an array for each axis.
        places = np.unravel_index(np.array(group) % devices, tuple(axes.values()))
        varying |= {name for name, place in zip(axes, places, strict=True) if np.ptp(place)}
    if len(varying) == len(axes) == 2:
        return "both"
    return "+".join(name for name in axes if name in varying) or "none"


def _groups(attributes: str, devices: int) -> list[list[int]] | None:
    """Read the groups of devices in any of the forms that HLO writes; ``None`` where it has none."""
    # {{0,1},{2,3}}: listed; {} are all devices in one group.
    listed = re.search(
        r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", attributes
    )
    if listed:
        groups = [_integers(group) for group in re.findall(r"\{([\d,]*)\}", listed[1])]
        return groups or [list(range(devices))]
    # mesh['seed'=2,'data'=4] {'data'}: by the names of a mesh's axes, as the newest compiler writes them.
    named = re.search(r"replica_groups=mesh\[((?:'\w+'=\d+,?)+)\] \{((?:'\w+',?)*)\}", attributes)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        along = re.findall(r"'(\w+)'", named[2])
        # The axes that vary within a group go last. False sorts before True, and the sort is stable.
        order = sorted(range(len(sizes)), key=lambda axis: list(sizes)[axis] in along)
        width = math.prod(sizes[name] for name in along)
        return _tiles(list(sizes.values()), order, width)
    # [2,4]<=[8] or [4,2]<=[2,4]T(1,0): the devices 0, 1, ... laid out in the second shape, transposed, and cut
    # into the rows of the first.
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if tiled is None:
        return None
    shape, source = _integers(tiled[1]), _integers(tiled[2])
    order = _integers(tiled[3]) if tiled[3] else list(range(len(source)))
    return _tiles(source, order, math.prod(shape[1:]))


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _tiles(shape: list[int], order: list[int], width: int) -> list[list[int]]:
    """Return the devices 0, 1, ... laid out in ``shape``, transposed and cut into groups."""
    devices = np.arange(math.prod(shape)).reshape(shape).transpose(order)
    return devices.reshape(-1, width).tolist()


def _payload(instruction: Instruction, operation: str, axes: Mapping[str, int] | None) -> list[int]:
    """Return the bytes of each array that one chip contributes or receives, whichever is more."""
    sizes = array_bytes(instruction.shape)
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        # Operands, results, then 4-byte contexts.
        count = len(instruction.operands)
        return sizes[count : 2 * count]
    # What a chip contributes is larger than its result by the size of the group.
    if operation == "reduce-scatter":
        groups = _groups(instruction.attributes, math.prod(axes.values()) if axes else 1)
        return [size * (len(groups[0]) if groups else 1) for size in sizes]
    return sizes
