"""What is known of the TPU kinds: memory and clock."""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip: ``hbm`` in bytes, ``clock`` in Hz or ``None`` where none is assumed."""

    name: str
    hbm: int
    clock: float | None


# By `jax.Device.device_kind`. The v5e's clock is the one at which its four 128x128 multipliers make
# its published 197 bf16 TFLOP/s; no clock is assumed of the others.
CHIPS = {
    "TPU v4": Chip("v4", 32 * GIB, None),
    "TPU v5 lite": Chip("v5e", 16 * GIB, 1.5e9),
    "TPU v5": Chip("v5p", 95 * GIB, None),
    "TPU v6 lite": Chip("v6e", 32 * GIB, None),
}
