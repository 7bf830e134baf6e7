"""The cost of a compiled program and of a whole run: memory, cycles, roofline, collectives, time and money."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from seal_jax.core.tables import aligned
from seal_jax.errors import UsageError
from tools.preflight import roofline
from tools.preflight.chips import CHIPS, Chip
from tools.preflight.costs import SCOPES, Collective, Cycles, Loop, add_up, collect, walk
from tools.preflight.hlo import parse


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
class Run:
    """The work that a program is called for: by default a whole training.

    Attributes:
      steps: all its steps.
      images_per_step: of all seeds together.
      chips: that it takes.
      price: dollars per chip-hour.
      networks: whose work it is, all together.
      work: what it is, a heading.
    """

    steps: int
    images_per_step: float
    chips: int
    price: float | None = None
    networks: int = 1
    work: str = "Whole run, its train steps"


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
      flops: flops of the convolutions and matrix products of a call, on one device.
      bytes_accessed: bytes of a call from and to the memory of one device, not its caches, without the
        padding of tiles.
      spent: cycles of a call by what they are spent on, a key of ``roofline.ADVICE``.
      clock: assumed clock in Hz.
      run: the work that the program is part of.
    """

    collectives: tuple[Collective, ...]
    cycles: Cycles
    flops: int
    bytes_accessed: int
    axes: dict[str, int] | None = None
    steps: int | None = None
    device_kind: str | None = None
    memory: Memory | None = None
    hbm: int | None = None
    spent: dict[str, int] | None = None
    clock: float | None = None
    run: Run | None = None

    @property
    def chip(self) -> Chip | None:
        """The kind of chip, if it is known."""
        return CHIPS.get(self.device_kind or "")

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
        """Estimated seconds of one call; what the compiler gives no estimate for is left out, but for collectives.

        Those are counted at the chip's interconnect, one after the other.
        """
        if self.clock is None:
            return None
        return self.cycles.total / self.clock + (self.collective_seconds or 0.0)

    @property
    def collective_seconds(self) -> float | None:
        """The least seconds of the collectives of one call."""
        if self.chip is None:
            return None
        return roofline.collective_seconds(self.collectives, self.axes, self.chip)

    @property
    def mfu(self) -> float | None:
        """Share of the chip's peak: flops of convolutions and products over ``seconds``."""
        if not self.chip or not self.seconds:
            return None
        return self.flops / self.seconds / self.chip.peak

    @property
    def bandwidth_share(self) -> float | None:
        """Share of the bandwidth of the chip's memory: bytes over ``seconds``."""
        if not self.chip or not self.seconds:
            return None
        return self.bytes_accessed / self.seconds / self.chip.bandwidth

    @property
    def images_per_second(self) -> float | None:
        """Images a second of all chips and seeds."""
        if self.run is None or self.steps is None or not self.seconds:
            return None
        return self.run.images_per_step * self.steps / self.seconds

    @property
    def hours(self) -> float | None:
        """Estimated hours of all steps of the run."""
        if self.run is None or self.steps is None or self.seconds is None:
            return None
        return self.run.steps / self.steps * self.seconds / 3600

    @property
    def dollars(self) -> float | None:
        """Dollars of the whole run on all chips, at its price."""
        if self.run is None or self.run.price is None or self.hours is None:
            return None
        return self.hours * self.run.chips * self.run.price

    @property
    def dominant(self) -> tuple[str, float] | None:
        """What takes most of a call, a key of ``roofline.ADVICE``, and its share of the time."""
        if self.spent is None or not self.seconds or self.clock is None:
            return None
        parts = {reason: cycles / self.clock for reason, cycles in self.spent.items()}
        parts["collectives"] = self.collective_seconds or 0.0
        reason = max(parts, key=lambda part: parts[part])
        return reason, parts[reason] / self.seconds

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
            "collective_seconds": self.collective_seconds,
            "mfu": self.mfu,
            "bandwidth_share": self.bandwidth_share,
            "images_per_second": self.images_per_second,
            "hours": self.hours,
            "dollars": self.dollars,
            "dominant": None if self.dominant is None else self.dominant[0],
            "step_loop": None if step_loop is None else step_loop.name,
            "serial_loops": [dataclasses.asdict(loop) for loop in self.serial_loops],
            "unknown_trip_counts": [loop.name for loop in self.cycles.unknown],
        }

    def as_text(self) -> str:
        """Return the report for a terminal."""
        sections = (
            _memory_text,
            _run_text,
            _compute_text,
            _collectives_text,
            _loops_text,
            _costliest_text,
        )
        return "\n\n".join(text for section in sections if (text := section(self)))


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
    return dataclasses.replace(
        analyse_text(compiled.as_text(), axes=axes, steps=steps, scopes=scopes, kind=kind),
        memory=_memory(compiled.memory_analysis()),
        hbm=chip.hbm if chip else None,
        clock=clock or (chip.clock if chip else None),
    )


def analyse_text(
    text: str,
    *,
    axes: Mapping[str, int] | None = None,
    steps: int | None = None,
    scopes: Iterable[str] = SCOPES,
    kind: str | None = None,
) -> Report:
    """Return the part of the report that follows from optimised HLO text, for a ``kind`` of device."""
    module = parse(text)
    operations = roofline.operations(module)
    chip = CHIPS.get(kind or "")
    return Report(
        collectives=collect(walk(module), axes, scopes),
        cycles=add_up(module),
        flops=sum(operation.flops * operation.runs for operation in operations),
        bytes_accessed=sum(operation.bytes * operation.runs for operation in operations),
        axes=None if axes is None else dict(axes),
        steps=steps,
        device_kind=kind,
        spent=roofline.spent(operations, chip) if chip else None,
        clock=chip.clock if chip else None,
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


def number(value: float) -> str:
    """Return a number with at least three digits that mean something, and no exponent.

    >>> number(1234567.8), number(1.2345), number(0.00012345)
    ('1,234,568', '1.23', '0.000123')
    """
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{max(0, digits)}f}"


def _memory_text(report: Report) -> str:
    chip, memory = report.chip, report.memory
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


def _run_text(report: Report) -> str:
    run, dominant = report.run, report.dominant
    lines = []
    if run is not None and report.hours is not None and report.images_per_second is not None:
        speed, hours = report.images_per_second, report.hours
        unit, amount = ("hours", hours) if hours >= 0.1 else ("seconds", hours * 3600)
        lines += [
            f"{run.work} (the least: see no estimate below)",
            f"  images a second {number(speed)}, {number(speed / run.chips)} a chip",
            f"  {unit:<14}  {number(amount)}: {run.steps:,} steps on {run.chips} chip(s)",
        ]
        if report.dollars is not None:
            lines.append(
                f"  dollars         {number(report.dollars)} at {run.price:g} per chip-hour"
            )
    if dominant is not None and report.chip is not None and report.mfu is not None:
        reason, share = dominant
        chip = report.chip
        lines += [
            f"  MFU             {100 * report.mfu:.1f} % of {chip.peak / 1e12:g} bf16 TFLOP/s",
            f"  bandwidth       {100 * (report.bandwidth_share or 0):.1f} % of {chip.bandwidth / 1e9:g} GB/s",
            f"  most of it      {reason}, {100 * share:.0f} % of the time: {roofline.ADVICE[reason]}",
        ]
    return "\n".join(lines)


def _compute_text(report: Report) -> str:
    cycles = report.cycles
    # A loop of unknown length was counted as one trip.
    bound = "at least " if cycles.unknown else ""

    def with_time(count: float) -> str:
        time = "" if report.clock is None else f" = {count / report.clock * 1e3:,.4g} ms"
        return f"{bound}{count:,.0f}{time}"

    steps = report.steps or 1
    unit = "call" if report.steps is None else "step"
    lines = [
        "Compute of one device (the compiler's estimates; flops and bytes by the shapes)",
        f"  flops a {unit}    {bound}{report.flops / steps:,.0f} of convolutions and matrix products",
        f"  bytes a {unit}    {bound}{human(report.bytes_accessed / steps)} from and to memory",
    ]
    lines.append(f"  cycles a call   {with_time(cycles.total)}")
    if report.cycles_per_step is not None:
        per_step = with_time(report.cycles_per_step)
        lines.append(f"  cycles a step   {per_step}, {report.steps} steps a call")
    if report.clock is None:
        lines.append("  seconds         unknown: no clock is known for this kind of device")
    else:
        lines.append(f"  clock assumed   {report.clock / 1e9:.4g} GHz")
    if report.spent:
        shares = ", ".join(
            f"{reason} {100 * part / max(cycles.total, 1):.0f} %"
            for reason, part in report.spent.items()
        )
        lines.append(f"  spent on        {shares}")
    if report.collective_seconds:
        lines.append(
            f"  collectives     at least {report.collective_seconds / steps * 1e3:,.4g} ms a {unit}"
        )
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
