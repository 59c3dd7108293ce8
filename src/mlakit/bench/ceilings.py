"""The yardstick of every row: what a device reached at best. No torch here; `bench.limits` measures it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of a device, each from the fastest of many samples, on random data.

    `copy_bytes_per_s` counts bytes read and written, `read_bytes_per_s` a reduction's bytes, `flops_per_s` a large
    matrix product's operations in `dtype`.
    """

    device: str
    dtype: str
    copy_bytes_per_s: float
    read_bytes_per_s: float
    flops_per_s: float

    @property
    def bytes_per_s(self) -> float:
        """The better of the two memory rates: no job of either kind moves its bytes faster."""
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)

    def limit(self, flops: float, bytes_: float) -> tuple[float, Literal["compute", "memory"]]:
        """Least seconds for a job, and what binds it: "compute" or "memory"."""
        compute, memory = flops / self.flops_per_s, bytes_ / self.bytes_per_s
        return (compute, "compute") if compute > memory else (memory, "memory")
