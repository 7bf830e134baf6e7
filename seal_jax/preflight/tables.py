"""The report as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seal_jax.preflight.chips import CHIPS

if TYPE_CHECKING:
    from seal_jax.preflight.report import Report


def render(report: Report) -> str:
    """Return the tables of ``Report.as_text``."""
    sections = (_memory, _compute, _collectives, _loops, _costliest)
    return "\n\n".join("\n".join(section(report)) for section in sections)


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


def columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Align rows: the first ``left`` columns and the last one to the left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if index < left or index == last else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _memory(report: Report) -> list[str]:
    chip = CHIPS.get(report.device_kind or "")
    named = f"{report.device_kind or 'unknown device'}{f' ({chip.name})' if chip else ''}"
    mesh = ", ".join(f"{name}={size}" for name, size in (report.axes or {}).items()) or "unknown"
    lines = [f"Memory of one device: {named}, mesh {mesh}"]
    memory = report.memory
    if memory is None:
        return [*lines, "  the compiler gives none"]
    rows = [
        ("arguments", human(memory.arguments), ""),
        ("outputs", human(memory.outputs), ""),
        (
            "donated",
            human(-memory.donated) if not memory.donated else f"-{human(memory.donated)}",
            "outputs that take an argument's place",
        ),
        ("temporaries", human(memory.temporaries), ""),
        ("code", human(memory.code), ""),
        ("total", human(memory.total), ""),
        ("peak", "unknown" if memory.peak is None else human(memory.peak), "the compiler's figure"),
    ]
    lines += columns(rows)
    if report.hbm is None:
        return [*lines, "  unknown whether it fits: memory of this kind of device is unknown"]
    verdict = "fits" if report.fits else "does not fit"
    share = 100 * memory.needed / report.hbm
    return [*lines, f"  {verdict}: {share:.2f} % of {human(report.hbm)}"]


def _compute(report: Report) -> list[str]:
    cycles = report.cycles
    bound = "at least " if cycles.unknown else ""
    lines = ["Compute of one device (the compiler's estimates)"]
    if report.flops is not None:
        lines.append(f"  flops           {report.flops:,.0f}, each loop body counted once")
    if report.bytes_accessed is not None:
        lines.append(
            f"  bytes accessed  {human(report.bytes_accessed)}, each loop body counted once"
        )
    lines.append(f"  cycles a call   {bound}{cycles.total:,}{_seconds(report, cycles.total)}")
    if report.cycles_per_step is not None:
        per_step = report.cycles_per_step
        lines.append(
            f"  cycles a step   {bound}{per_step:,.0f}{_seconds(report, per_step)}"
            f", {report.steps} steps a call"
        )
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
    return lines


def _seconds(report: Report, cycles: float) -> str:
    return "" if report.clock is None else f" = {cycles / report.clock * 1e3:,.4g} ms"


def _collectives(report: Report) -> list[str]:
    if not report.collectives:
        return ["Collectives: none"]
    rows = [("operation", "axis", "in loop", "count", "arrays", "bytes each run", "runs", "cause")]
    rows += [
        (
            each.operation,
            each.axis,
            "yes" if each.in_loop else "no",
            str(each.count),
            str(each.arrays),
            human(each.bytes),
            f"{each.runs:,}",
            each.cause,
        )
        for each in report.collectives
    ]
    return ["Collectives", *columns(rows, left=2)]


def _loops(report: Report) -> list[str]:
    step = report.cycles.step_loop(report.steps)
    lines = []
    if step is not None:
        trips = "an unknown number of" if step.trips is None else f"{step.trips:,}"
        lines.append(f"Scan over steps: {step.name}, {trips} trips, {step.cycles:,} cycles")
    elif report.steps is not None:
        lines.append(f"Scan over steps: no loop whose body runs {report.steps} times a call")
    loops = report.serial_loops
    if not loops:
        return [*lines, "Other while loops: none"]
    rows = [("trips", "runs", "cycles a call", "name", "op_name and source")]
    rows += [
        (
            "unknown" if loop.trips is None else f"{loop.trips:,}",
            f"{loop.runs:,}",
            f"{loop.cycles:,}",
            loop.name,
            f"{loop.op_name} {loop.source}",
        )
        for loop in loops
    ]
    lines += ["Other while loops, which run serially", *columns(rows, left=0)]
    if report.cycles.unknown:
        lines.append("  a loop of unknown trips is counted as one trip")
    return lines


def _costliest(report: Report) -> list[str]:
    rows = [("cycles", "share", "runs", "name", "op_name and source")]
    rows += [
        (
            f"{each.cycles:,}",
            f"{100 * each.cycles / max(report.cycles.total, 1):.1f} %",
            f"{each.runs:,}",
            each.name,
            f"{each.op_name} {each.source}",
        )
        for each in report.cycles.costliest
    ]
    return ["Costliest instructions of a call", *columns(rows, left=0)]
