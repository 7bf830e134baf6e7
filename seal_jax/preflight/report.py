"""What a compiled program costs, read off the compiler's own figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from seal_jax.errors import UsageError
from seal_jax.preflight import tables
from seal_jax.preflight.chips import CHIPS
from seal_jax.preflight.collectives import SCOPES, Collective, collect
from seal_jax.preflight.cycles import Cycles, Loop, add_up, walk
from seal_jax.preflight.hlo import parse


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    ``total`` is arguments + outputs - donated + temporaries + code. ``peak`` is the compiler's own
    figure, or ``None``.
    """

    arguments: int
    outputs: int
    donated: int
    temporaries: int
    code: int
    peak: int | None

    @property
    def total(self) -> int:
        """All kinds together; a donated argument and its output share their bytes."""
        return self.arguments + self.outputs - self.donated + self.temporaries + self.code

    @property
    def needed(self) -> int:
        """The larger of ``total`` and ``peak``."""
        return max(self.total, self.peak or 0)


@dataclasses.dataclass(frozen=True)
class Report:
    """The cost of one call of a compiled program.

    Attributes:
        device_kind: such as ``"TPU v5 lite"``, or ``None`` if unknown.
        axes: lengths of the mesh axes, or ``None``.
        memory: bytes on one device, or ``None`` where the compiler does not say.
        hbm: bytes of memory of one device, or ``None`` for an unknown kind.
        flops: of one device, every loop body counted once, as the TPU compiler counts.
        bytes_accessed: likewise.
        collectives: by operation, axis, cause and being in a loop.
        cycles: the compiler's estimate for one call of one device.
        steps: training steps in one call, or ``None``.
        clock: Hz assumed, or ``None``.
    """

    device_kind: str | None
    axes: dict[str, int] | None
    memory: Memory | None
    hbm: int | None
    flops: float | None
    bytes_accessed: float | None
    collectives: tuple[Collective, ...]
    cycles: Cycles
    steps: int | None
    clock: float | None

    @property
    def fits(self) -> bool | None:
        """Whether the program fits into the device's memory; ``None`` if that is not known."""
        if self.memory is None or self.hbm is None:
            return None
        return self.memory.needed <= self.hbm

    @property
    def cycles_per_step(self) -> float | None:
        """Cycles of one call over its steps."""
        return None if self.steps is None else self.cycles.total / self.steps

    @property
    def seconds(self) -> float | None:
        """Estimated seconds of one call, collectives and other unestimated work left out."""
        return None if self.clock is None else self.cycles.total / self.clock

    @property
    def serial_loops(self) -> tuple[Loop, ...]:
        """The ``while`` loops other than the scan over steps: they betray serial gathers."""
        return self.cycles.serial_loops(self.steps)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, fit for JSON."""
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
        """Return the report as a table to print."""
        return tables.render(self)


def analyse(
    compiled: Any,
    *,
    steps: int | None = None,
    scopes: Iterable[str] = SCOPES,
    clock: float | None = None,
) -> Report:
    """Read what a compiled program costs.

    Args:
        compiled: a ``jax.stages.Compiled``; the mesh is taken from its arguments' shardings.
        steps: training steps in one call, to report cycles a step and to tell the scan over steps
            from other loops; without it the costliest outermost loop is taken for that scan.
        scopes: ``jax.named_scope`` names to which collectives are put down.
        clock: Hz to turn cycles into seconds; without it the chip kind's, where one is known.

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
    for sharding in jax.tree.leaves((compiled.input_shardings, compiled.output_shardings)):
        devices = devices or list(sharding.device_set)
        if isinstance(sharding, jax.sharding.NamedSharding):
            axes = dict(sharding.mesh.shape)
            break
    kind = devices[0].device_kind if devices else None
    chip = CHIPS.get(kind or "")
    # Without megacore a chip's memory is shared by the devices on it.
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
    """Read the part of the report that optimised HLO text alone gives."""
    module = parse(text)
    return Report(
        device_kind=None,
        axes=None if axes is None else dict(axes),
        memory=None,
        hbm=None,
        flops=None,
        bytes_accessed=None,
        collectives=collect(walk(module), axes, scopes),
        cycles=add_up(module),
        steps=steps,
        clock=None,
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
