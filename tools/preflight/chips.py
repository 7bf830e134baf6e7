"""What one chip of each kind of TPU can do."""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip, which is one device of JAX.

    Attributes:
      name: as in a topology.
      hbm: bytes of memory.
      peak: bf16 flops a second.
      bandwidth: bytes a second of the memory.
      interconnect: bytes a second to other chips, all links together, one way.
      multipliers: how many matrix multipliers all its cores have.
      size: rows and columns of each, of which every one is a multiplication and an addition a cycle.
      floor: cycles that the compiler estimates for an addition to eight rows of 128 numbers: what any
        operation takes.
    """

    name: str
    hbm: int
    peak: float
    bandwidth: float
    interconnect: float
    multipliers: int
    size: int
    floor: int

    @property
    def flops_per_cycle(self) -> int:
        """Flops of all multipliers in a cycle."""
        return 2 * self.multipliers * self.size**2

    @property
    def clock(self) -> float:
        """Hz at which the multipliers give the published peak."""
        return self.peak / self.flops_per_cycle


# By `jax.Device.device_kind`, with the numbers of https://docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e
# (read in November 2026). The pages give the bandwidth between chips in both directions together; for v4 they give
# none, only 1.1 PB/s of all-reduce for 4096 chips, 268 GB/s each: it has six links of 50 GB/s one way.
# A v4 and a v5p have two cores of four multipliers. The compiler's estimate of a product of two 8192x8192 matrices is
# 90 % of `flops_per_cycle` (88 % on v5e, 93 % on v4), and 70 % on v6e: more than the two multipliers of 256x256 that
# its page says can do, which would also need 3.5 GHz for its peak. So four are assumed.
CHIPS = {
    "TPU v4": Chip("v4", 32 * GIB, 275e12, 1200e9, 300e9, 8, 128, 619),
    "TPU v5 lite": Chip("v5e", 16 * GIB, 197e12, 819e9, 200e9, 4, 128, 1832),
    "TPU v5": Chip("v5p", 95 * GIB, 459e12, 2765e9, 600e9, 8, 128, 2128),
    "TPU v6 lite": Chip("v6e", 32 * GIB, 918e12, 1638e9, 400e9, 4, 256, 2124),
}
