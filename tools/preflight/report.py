"""The cost of a compiled program, as the compiler reports it: memory, cycles and collectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from seal_jax.core.tables import aligned
from seal_jax.errors import UsageError
from tools.preflight.costs import SCOPES, Collective, Cycles, Loop, add_up, collect, walk
from tools.preflight.hlo import parse

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip: ``hbm`` in bytes, ``clock`` in Hz or ``None`` where it is not known."""

    name: str
    hbm: int
    clock: float | None


# By `jax.Device.device_kind`. The clock of the v5e is the one at which its four 128x128 multipliers give its
# published 197 bf16 TFLOP/s; the others have none here.
CHIPS = {
    "TPU v4": Chip("v4", 32 * GIB, None),
    "TPU v5 lite": Chip("v5e", 16 * GIB, 1.5e9),
    "TPU v5": Chip("v5p", 95 * GIB, None),
    "TPU v6 lite": Chip("v6e", 32 * GIB, None),
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    ``total`` is arguments + outputs - donated + temporaries + code. ``peak`` is the compiler's figure, or
    ``None``.
    """

    arguments: int
    outputs: int
    donated: int
    temporaries: int
    code: int
    peak: int | None

    @property
    def total(self) -> int:
        """The sum of all kinds; a donated argument and its output share their bytes."""
        return self.arguments + self.outputs - self.donated + self.temporaries + self.code

    @property
    def needed(self) -> int:
        """The larger of ``total`` and ``peak``, the bytes that a device must have."""
        return max(self.total, self.peak or 0)


@dataclasses.dataclass(frozen=True)
class Report:
    """The cost of one call of a compiled program; ``None`` is what is unknown.

    Attributes:
      collectives: the collectives, grouped by operation, axis, cause and whether they are in a loop.
      cycles: the compiler's estimate for one call on one device.
      axes: lengths of the mesh axes.
      steps: number of training steps in one call.
      device_kind: such as ``"TPU v5 lite"``.
      memory: bytes that the program takes on one device.
      hbm: bytes of memory that one device has.
      flops: flops of one device, every loop body counted once, as the TPU compiler counts.
      bytes_accessed: bytes read and written, counted likewise.
      clock: assumed clock in Hz.
    """

    collectives: tuple[Collective, ...]
    cycles: Cycles
    axes: dict[str, int] | None = None
    steps: int | None = None
    device_kind: str | None = None
    memory: Memory | None = None
    hbm: int | None = None
    flops: float | None = None
    bytes_accessed: float | None = None
    clock: float | None = None

    @property
    def fits(self) -> bool | None:
        """Whether the program fits into the device's memory; ``None`` if that is not known."""
        if self.memory is None or self.hbm is None:
            return None
        return self.memory.needed <= self.hbm

    @property
    def cycles_per_step(self) -> float | None:
        """Cycles of one call divided by its steps."""
        return None if self.steps is None else self.cycles.total / self.steps

    @property
    def seconds(self) -> float | None:
        """Estimated seconds of one call, collectives and other unestimated work left out."""
        return None if self.clock is None else self.cycles.total / self.clock

    @property
    def serial_loops(self) -> tuple[Loop, ...]:
        """The ``while`` loops other than the scan over steps, such as gathers that became serial."""
        return self.cycles.serial_loops(self.steps)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, fit for JSON."""
        # Properties are no fields; what they compute is added.
        fields = dataclasses.asdict(self)
        if self.memory is not None:
            fields["memory"] |= {"total": self.memory.total, "needed": self.memory.needed}
        step_loop = self.cycles.step_loop(self.steps)
        return fields | {
            "fits": self.fits,
            "cycles_per_step": self.cycles_per_step,
            "seconds": self.seconds,
            "step_loop": None if step_loop is None else step_loop.name,
            "serial_loops": [dataclasses.asdict(loop) for loop in self.serial_loops],
            "unknown_trip_counts": [loop.name for loop in self.cycles.unknown],
        }

    def as_text(self) -> str:
        """Return the report for a terminal."""
        sections = (_memory_text, _compute_text, _collectives_text, _loops_text, _costliest_text)
        return "\n\n".join(section(self) for section in sections)


def analyse(
    compiled: Any,
    *,
    steps: int | None = None,
    scopes: Iterable[str] = SCOPES,
    clock: float | None = None,
) -> Report:
    """Return the cost of a compiled program.

    Args:
      compiled: a ``jax.stages.Compiled``; the mesh is taken from its arguments' shardings.
      steps: training steps in one call, to report cycles a step and to tell the scan over steps from
        other loops; without it the costliest outermost loop is taken for that scan.
      scopes: ``jax.named_scope`` names to which collectives are attributed.
      clock: Hz to turn cycles into seconds; by default that of the kind of chip, where it is known.

    Returns:
      The report, of one device and one call.

    Raises:
      UsageError: ``steps`` or ``clock`` is not positive.
    """
    import jax

    for name, value in (("steps", steps), ("clock", clock)):
        if value is not None and value <= 0:
            raise UsageError(f"{name}={value} must be positive, or None if unknown")
    axes: dict[str, int] | None = None
    devices: list[jax.Device] = []
    # A compiled program does not hold its mesh. A sharding without one still tells the devices.
    for sharding in jax.tree.leaves((compiled.input_shardings, compiled.output_shardings)):
        devices = devices or list(sharding.device_set)
        if isinstance(sharding, jax.sharding.NamedSharding):
            axes = dict(sharding.mesh.shape)
            break
    kind = devices[0].device_kind if devices else None
    chip = CHIPS.get(kind or "")
    # Without megacore the devices of a chip share its memory: places are chips.
    places = {
        (device.process_index, *getattr(device, "coords", (device.id,))) for device in devices
    }
    costs = compiled.cost_analysis() or {}
    return dataclasses.replace(
        analyse_text(compiled.as_text(), axes=axes, steps=steps, scopes=scopes),
        device_kind=kind,
        memory=_memory(compiled.memory_analysis()),
        hbm=chip.hbm * len(places) // len(devices) if chip else None,
        flops=costs.get("flops"),
        bytes_accessed=costs.get("bytes accessed"),
        clock=clock or (chip.clock if chip else None),
    )


def analyse_text(
    text: str,
    *,
    axes: Mapping[str, int] | None = None,
    steps: int | None = None,
    scopes: Iterable[str] = SCOPES,
) -> Report:
    """Return the part of the report that follows from optimised HLO text alone."""
    module = parse(text)
    return Report(
        collectives=collect(walk(module), axes, scopes),
        cycles=add_up(module),
        axes=None if axes is None else dict(axes),
        steps=steps,
    )


def _memory(stats: Any) -> Memory | None:
    if stats is None:
        return None
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        donated=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        peak=getattr(stats, "peak_memory_in_bytes", None),
    )


def human(size: float) -> str:
    """Return a number of bytes in binary units.

    >>> human(512), human(3 * 2**20)
    ('512 B', '3.00 MiB')
    """
    if size < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.2f} {unit}"
    return f"{size / 1024:.2f} TiB"


def _memory_text(report: Report) -> str:
    chip, memory = CHIPS.get(report.device_kind or ""), report.memory
    kind = f"{report.device_kind or 'unknown device'}{f' ({chip.name})' if chip else ''}"
    mesh = ", ".join(f"{name}={size}" for name, size in (report.axes or {}).items()) or "unknown"
    lines = [f"Memory of one device: {kind}, mesh {mesh}"]
    if memory is None:
        return "\n".join([*lines, "  the compiler gives none"])
    donated = f"{'-' if memory.donated else ''}{human(memory.donated)}"
    rows = [
        ("arguments", human(memory.arguments), ""),
        ("outputs", human(memory.outputs), ""),
        ("donated", donated, "outputs that take an argument's place"),
        ("temporaries", human(memory.temporaries), ""),
        ("code", human(memory.code), ""),
        ("total", human(memory.total), ""),
        ("peak", "unknown" if memory.peak is None else human(memory.peak), "the compiler's figure"),
    ]
    lines += [f"  {name:<11}  {size:>11}  {note}".rstrip() for name, size, note in rows]
    if report.hbm is None:
        lines.append("  unknown whether it fits: memory of this kind of device is unknown")
    else:
        verdict = "fits" if report.fits else "does not fit"
        share = 100 * memory.needed / report.hbm
        lines.append(f"  {verdict}: {share:.2f} % of {human(report.hbm)}")
    return "\n".join(lines)


def _compute_text(report: Report) -> str:
    cycles = report.cycles
    # A loop of unknown length was counted as one trip.
    bound = "at least " if cycles.unknown else ""

    def with_time(count: float) -> str:
        time = "" if report.clock is None else f" = {count / report.clock * 1e3:,.4g} ms"
        return f"{bound}{count:,.0f}{time}"

    # XLA's cost analysis multiplies by no trip counts, unlike the cycles below it.
    once = ", each loop body counted once"
    lines = ["Compute of one device (the compiler's estimates)"]
    if report.flops is not None:
        lines.append(f"  flops           {report.flops:,.0f}{once}")
    if report.bytes_accessed is not None:
        lines.append(f"  bytes accessed  {human(report.bytes_accessed)}{once}")
    lines.append(f"  cycles a call   {with_time(cycles.total)}")
    if report.cycles_per_step is not None:
        per_step = with_time(report.cycles_per_step)
        lines.append(f"  cycles a step   {per_step}, {report.steps} steps a call")
    if report.clock is None:
        lines.append("  seconds         unknown: no clock is known for this kind of device")
    else:
        lines.append(f"  clock assumed   {report.clock / 1e9:g} GHz")
    if cycles.conditionals:
        lines.append(
            f"  conditionals    {cycles.conditionals}; the costliest branch of each counts"
        )
    if cycles.unestimated:
        left_out = ", ".join(f"{name} {count:,}x" for name, count in cycles.unestimated.items())
        lines.append(f"  no estimate     {left_out} (runs a call; not in the cycles)")
    return "\n".join(lines)


def _collectives_text(report: Report) -> str:
    if not report.collectives:
        return "Collectives: none"
    header = ["operation", "axis", "in loop", "count", "arrays", "bytes each run", "runs", "cause"]
    rows = [
        [
            group.operation,
            group.axis,
            "yes" if group.in_loop else "no",
            str(group.count),
            str(group.arrays),
            human(group.bytes),
            f"{group.runs:,}",
            group.cause,
        ]
        for group in report.collectives
    ]
    return "\n".join(["Collectives", *aligned([header, *rows], right=range(2, 7))])


def _loops_text(report: Report) -> str:
    step = report.cycles.step_loop(report.steps)
    lines = []
    if step is not None:
        trips = "an unknown number of" if step.trips is None else f"{step.trips:,}"
        lines.append(f"Scan over steps: {step.name}, {trips} trips, {step.cycles:,} cycles")
    elif report.steps is not None:
        lines.append(f"Scan over steps: no loop whose body runs {report.steps} times a call")
    loops = report.serial_loops
    if not loops:
        return "\n".join([*lines, "Other while loops: none"])
    header = ["trips", "runs", "cycles a call", "name", "op_name and source"]
    rows = [
        [
            "unknown" if loop.trips is None else f"{loop.trips:,}",
            f"{loop.runs:,}",
            f"{loop.cycles:,}",
            loop.name,
            f"{loop.op_name} {loop.source}",
        ]
        for loop in loops
    ]
    lines += ["Other while loops, which run serially", *aligned([header, *rows], right=range(3))]
    if report.cycles.unknown:
        lines.append("  a loop of unknown trips is counted as one trip")
    return "\n".join(lines)


def _costliest_text(report: Report) -> str:
    header = ["cycles", "share", "runs", "name", "op_name and source"]
    rows = [
        [
            f"{instruction.cycles:,}",
            f"{100 * instruction.cycles / max(report.cycles.total, 1):.1f} %",
            f"{instruction.runs:,}",
            instruction.name,
            f"{instruction.op_name} {instruction.source}",
        ]
        for instruction in report.cycles.costliest
    ]
    lines = aligned([header, *rows], right=range(3))
    return "\n".join(["Costliest instructions of a call", *lines])
