"""The collectives of a program: what they move, along which mesh axis, and what for."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from seal_jax.preflight.cycles import Visit
from seal_jax.preflight.hlo import Instruction, array_bytes

OPERATIONS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
# The `jax.named_scope`s of the train step; a collective is put down to the innermost of them.
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
# Path elements that say how a program was built up, not what for.
_PLUMBING = re.compile(r"jit\(.*\)|pjit|shard_map|while|body|cond|closed_call|checkpoint|remat")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives alike in operation, axis, cause and being in a loop.

    Attributes:
        operation: such as ``"all-reduce"``; the two halves of an async one count once.
        axis: mesh axis that it runs along: its name, ``"both"``, ``"none"`` or ``"unknown"``.
        cause: innermost known scope, or the rest of the op's path. Where the compiler merged
            several collectives into one, it kept the path of one of them.
        in_loop: it lies inside a ``while`` loop.
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
        visits: what ``cycles.walk`` yields.
        axes: lengths of the mesh axes in order, devices numbered row by row; ``None`` if unknown.
        scopes: names that may be causes.

    Returns:
        Groups, the most bytes a call first.
    """
    known = frozenset(scopes)
    groups: dict[tuple[str, str, str, bool], list[int]] = {}
    for visit in visits:
        made = visit.instruction
        operation = made.opcode.removesuffix("-start")
        if operation not in OPERATIONS:
            continue
        sizes = _payload(made, operation, axes)
        key = (operation, axis_of(made, axes), cause(made.op_name, known), bool(visit.loops))
        total = groups.setdefault(key, [0, 0, 0, 0, 0])
        moved = (1, visit.runs, len(sizes), sum(sizes), sum(sizes) * visit.runs)
        for index, value in enumerate(moved):
            total[index] += value
    ranked = sorted(groups.items(), key=lambda item: -item[1][4])
    return tuple(Collective(*key, *total[:4]) for key, total in ranked)


def cause(op_name: str, scopes: frozenset[str]) -> str:
    """Return the innermost of ``scopes`` in a path, else the path without its plumbing.

    >>> cause("jit(f)/while/body/transpose(jvp(Net))/batch_norm/bn1/psum", frozenset(["batch_norm"]))
    'batch_norm'
    >>> cause("jit(f)/shard_map/while/body/closed_call/eval/psum", frozenset())
    'eval/psum'
    """
    parts = re.split(r"/(?![^(]*\))", op_name)
    for part in reversed(parts):
        # Differentiation wraps a scope: transpose(jvp(name)).
        bare = re.sub(r"^(?:\w+\()+|\)+$", "", part)
        if bare in scopes:
            return bare
    rest = [part for part in parts if not _PLUMBING.fullmatch(part)]
    return "/".join(rest) or op_name or "unnamed"


def axis_of(made: Instruction, axes: Mapping[str, int] | None) -> str:
    """Return the mesh axis along which the members of a group differ."""
    if axes is None:
        return "unknown"
    groups = _groups(made.attributes, math.prod(axes.values()))
    if groups is None:
        return "unknown"
    varying = set()
    for group in groups:
        places = [_place(member, axes) for member in group]
        for index, name in enumerate(axes):
            if len({place[index] for place in places}) > 1:
                varying.add(name)
    if not varying:
        return "none"
    return (
        varying.pop()
        if len(varying) == 1
        else "both"
        if len(axes) == 2
        else "+".join(name for name in axes if name in varying)
    )


def _place(member: int, axes: Mapping[str, int]) -> tuple[int, ...]:
    place = []
    for size in reversed(list(axes.values())):
        member, index = divmod(member, size)
        place.append(index)
    return tuple(reversed(place))


def _mesh_groups(sizes: Mapping[str, int], along: Sequence[str]) -> list[list[int]]:
    """Return the groups that differ along some axes of a mesh, devices numbered row by row."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for device in range(math.prod(sizes.values())):
        place = _place(device, sizes)
        fixed = tuple(index for name, index in zip(sizes, place, strict=True) if name not in along)
        groups.setdefault(fixed, []).append(device)
    return list(groups.values())


def _groups(attributes: str, devices: int) -> list[list[int]] | None:
    listed = re.search(
        r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", attributes
    )
    if listed:
        groups = [
            [int(member) for member in group.split(",") if member]
            for group in re.findall(r"\{([\d,]*)\}", listed[1])
        ]
        return groups or [list(range(devices))]
    named = re.search(r"replica_groups=mesh\[((?:'\w+'=\d+,?)+)\] \{((?:'\w+',?)*)\}", attributes)
    if named:
        return _mesh_groups(
            {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])},
            re.findall(r"'(\w+)'", named[2]),
        )
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if tiled is None:
        return None
    shape, source = ([int(size) for size in tiled[index].split(",")] for index in (1, 2))
    order = [int(axis) for axis in tiled[3].split(",")] if tiled[3] else list(range(len(source)))
    # The members are 0..n-1 laid out in `source`, transposed, and cut into rows of groups.
    strides = [math.prod(source[axis + 1 :]) for axis in range(len(source))]
    members = [
        sum(index * strides[axis] for index, axis in zip(place, order, strict=True))
        for place in itertools.product(*(range(source[axis]) for axis in order))
    ]
    width = math.prod(shape[1:])
    return [members[start : start + width] for start in range(0, len(members), width)]


def _payload(made: Instruction, operation: str, axes: Mapping[str, int] | None) -> list[int]:
    """Return the bytes of each array that one chip contributes or receives, whichever is more."""
    sizes = array_bytes(made.shape)
    if made.opcode in ("all-gather-start", "collective-permute-start"):
        # Operands, results, then 4-byte contexts.
        count = len(made.operands)
        return sizes[count : 2 * count]
    if operation == "reduce-scatter":
        groups = _groups(made.attributes, math.prod(axes.values()) if axes else 1)
        return [size * (len(groups[0]) if groups else 1) for size in sizes]
    return sizes
