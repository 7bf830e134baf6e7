"""Flops and bytes of a compiled program, from the shapes in its text, and what its cycles are spent on."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from tools.preflight.chips import Chip
from tools.preflight.costs import FREE, Collective, walk
from tools.preflight.hlo import Computation, Instruction, Module, arrays

# What an operation's cycles may be spent on, and what to do about it.
ADVICE = {
    "convolutions and products": "more channels or images at a time fill the multipliers better",
    "memory bandwidth": "fewer bytes a step help: bfloat16, fusions, a larger batch for the optimizer's share",
    "latency of small operations": "more work per chip costs little: a larger batch, or more seeds per chip",
    "collectives": "fewer chips along the data axis, or seeds across them, communicate less",
    "vector arithmetic": "element-wise work, transposes and reductions outside the multipliers",
}
# Custom calls that are notes to the compiler.
_NO_KERNEL = re.compile(r'custom_call_target="(?:AllocateBuffer|ConcatBitcast|Assume\w+)"')
_SLICES = {"dynamic-slice", "slice", "gather"}
# Which operand is what replaces a part of the first.
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction that the program schedules; flops and bytes are those of one of its runs.

    Attributes:
      cycles: the compiler's estimate, or ``None``.
      runs: how often a call runs it.
      flops: of the convolutions and matrix products in it.
      bytes: that it reads from HBM and writes there.
    """

    cycles: int | None
    runs: int
    flops: int
    bytes: int


def operations(module: Module) -> list[Operation]:
    """Return what a call schedules, of conditionals the costliest branch; unknown trip counts are one trip."""
    found: list[Operation] = []
    for visit in walk(module):
        if not visit.taken:
            continue
        flops = instruction_flops(visit.computation, visit.instruction)
        if visit.fused:
            # `walk` yields the contents of a fusion right after it.
            found[-1] = dataclasses.replace(found[-1], flops=found[-1].flops + flops)
            continue
        moved = instruction_bytes(module, visit.computation, visit.instruction)
        found.append(Operation(visit.instruction.cycles, visit.runs, flops, moved))
    return found


def instruction_flops(computation: Computation, instruction: Instruction) -> int:
    """Return the flops of a convolution or matrix product, 0 for any other instruction.

    A product with a zero of the padding, or of the holes of a dilation, is none: the compiler writes batched
    products as convolutions that are mostly such zeros.
    """
    if instruction.opcode not in ("dot", "convolution"):
        return 0
    (result,) = arrays(instruction.shape)
    left, right = (
        arrays(computation.instructions[name].shape)[0].dims for name in instruction.operands[:2]
    )
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        sizes = [left[int(axis)] for axis in contracted[1].split(",") if axis] if contracted else []
        return 2 * math.prod(result.dims) * math.prod(sizes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"no dim_labels in the HLO line of {instruction.name!r}")
    images, kernel, output = labels.groups()
    # The kernel's input features are those of one group already, and so is the result's batch.
    total = 2 * right[kernel.index("i")]
    total *= result.dims[output.index("b")] * result.dims[output.index("f")]
    window = dict(
        re.findall(r"(\w+)=([\dx_\-]+)", _first(r"window=\{([^}]*)\}", instruction.attributes))
    )
    for axis in range(len(images) - 2):
        place = str(axis)
        total *= _products(
            left[images.index(place)],
            right[kernel.index(place)],
            result.dims[output.index(place)],
            {name: text.split("x")[axis] for name, text in window.items()},
        )
    return total


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""


def _products(inputs: int, kernel: int, outputs: int, window: Mapping[str, str]) -> int:
    """Count the pairs of an output and a place in the kernel, along one axis, that meet an input."""
    low = int(window.get("pad", "0_0").split("_")[0])
    stride, holes, spread = (
        int(window.get(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate")
    )
    place = np.arange(outputs)[:, None] * stride + np.arange(kernel) * spread - low
    return int(np.sum((place % holes == 0) & (place >= 0) & (place // holes < inputs)))


def instruction_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Return the bytes that an instruction reads from HBM and writes there, without the padding of tiles.

    Of an array that is only sliced the slice counts, and of one that is updated in place the update.
    """
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith("-done") or _NO_KERNEL.search(instruction.attributes):
        return 0
    results = arrays(instruction.shape)
    operands = [
        arrays(computation.instructions[name].shape)
        for name in instruction.operands
        if name in computation.instructions
    ]
    read = [sum(array.bytes for array in operand if array.in_hbm) for operand in operands]
    if opcode == "copy-start":  # (destination, source, context)
        results = results[:1]
    elif opcode.endswith("-start"):  # (sources, destinations, contexts)
        results = results[len(operands) : 2 * len(operands)]
    written = [array.bytes for array in results]
    if opcode == "fusion":
        body = module.computations[instruction.called("calls")[0]]
        parameters = _parameters(body)
        read = [
            min(size, _read(module, body, parameters[index])) for index, size in enumerate(read)
        ]
        written = _written(module, body, body.root)
    elif opcode in _SLICES or opcode == "slice-start":
        read[0] = min(read[0], sum(written))
    elif opcode in _UPDATES:
        # Only what is replaced; the rest stays where it is.
        read[0], written = 0, [sum(array.bytes for array in operands[_UPDATES[opcode]])]
    return sum(read) + sum(
        size for array, size in zip(results, written, strict=False) if array.in_hbm
    )


def _parameters(body: Computation) -> dict[int, str]:
    return {
        int(instruction.argument): name
        for name, instruction in body.instructions.items()
        if instruction.opcode == "parameter"
    }


def _size(instruction: Instruction) -> int:
    return sum(array.bytes for array in arrays(instruction.shape))


def _read(module: Module, body: Computation, name: str) -> int:
    """Return how many bytes of the array ``name`` a fusion's ``body`` reads."""
    total = 0
    for user in body.instructions.values():
        if name not in user.operands:
            continue
        first = user.operands[0] == name
        if user.opcode == "bitcast":
            total += _read(module, body, user.name)
        elif user.opcode in _SLICES and first:
            total += _size(user)
        elif user.opcode in _UPDATES and first:
            continue  # in place
        elif user.opcode == "fusion":
            inner = module.computations[user.called("calls")[0]]
            total += _read(module, inner, _parameters(inner)[user.operands.index(name)])
        else:
            total += _size(body.instructions[name])
    return total


def _written(module: Module, body: Computation, name: str) -> list[int]:
    """Return the bytes that a fusion writes of each array of its result, the value ``name`` of ``body``."""
    value = body.instructions[name]
    if value.opcode == "tuple":
        return [size for part in value.operands for size in _written(module, body, part)]
    if value.opcode == "bitcast" and value.operands:
        return _written(module, body, value.operands[0])
    if value.opcode in _UPDATES:
        return [_size(body.instructions[value.operands[_UPDATES[value.opcode]]])]
    if value.opcode == "fusion":
        inner = module.computations[value.called("calls")[0]]
        return _written(module, inner, inner.root)
    return [array.bytes for array in arrays(value.shape)]


def collective_seconds(
    groups: Sequence[Collective], axes: Mapping[str, int] | None, chip: Chip
) -> float:
    """Return the least seconds of the collectives of a call: rings over all links, nothing overlapped."""
    total = 0.0
    for group in groups:
        members = math.prod(
            size for name, size in (axes or {}).items() if group.axis in (name, "both", "unknown")
        )
        # In a ring each chip sends all parts but its own, and for a sum once more to hand it round.
        share = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}.get(group.operation)
        sent = group.bytes * (share * (members - 1) / members if share else 1)
        runs = group.runs / group.count
        total += max(runs * sent / chip.interconnect, group.runs * chip.floor / chip.clock)
    return total


def spent(found: Sequence[Operation], chip: Chip) -> dict[str, int]:
    """Return the cycles of a call by what they are spent on, a key of ``ADVICE``; the most first.

    Of operations close to the chip's ``floor`` it is latency; of others that move, at the memory's peak,
    for at least half of their cycles it is bandwidth; of the rest with a convolution or matrix product the
    multipliers.
    """
    bytes_per_cycle = chip.bandwidth / chip.clock
    total: collections.Counter[str] = collections.Counter()
    for operation in found:
        cycles = operation.cycles or 0
        moving = operation.bytes / bytes_per_cycle
        multiplying = operation.flops / chip.flops_per_cycle
        if cycles <= 1.25 * chip.floor:
            reason = "latency of small operations"
        elif moving >= multiplying and moving >= cycles / 2:
            reason = "memory bandwidth"
        else:
            reason = "convolutions and products" if operation.flops else "vector arithmetic"
        total[reason] += cycles * operation.runs
    return {reason: cycles for reason, cycles in total.most_common() if cycles}
