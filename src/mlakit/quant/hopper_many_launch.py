"""Launching the Hopper kernel of `fp8_gemm` for many rows."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from mlakit.hardware import device_info
from mlakit.hopper_compile import warps_together
from mlakit.hopper_descriptors import descriptor_of_rows
from mlakit.quant.hopper_gemm_many import _fp8_gemm_hopper_kernel
from mlakit.quant.triton_gemm import gemm_config
from mlakit.triton_launch import Launches


@dataclass(frozen=True)
class ManyRowsConfig:
    """How the kernel is run.

    Attributes:
        block_m: rows of a tile: 64 of each of two or three warpgroups, 128 or 192, or 128 of each of two, 256.
        group: rows of tiles that run side by side.
    """

    block_m: int
    group: int = 8

    def stages(self, itemsize: int) -> int:
        """Steps of 128 columns of K that are under way at once: as many as there is room for beside 64 rows of the
        result a warpgroup, of `itemsize` bytes a number.
        """
        return (_SHARED_BYTES - self.warpgroups * 64 * BLOCK_N * itemsize) // ((self.block_m + BLOCK_N) * 128)

    @property
    def warpgroups(self) -> int:
        """How many multiply."""
        return 3 if self.block_m == 192 else 2


BLOCK_N = 128  # columns of a tile: one scale of b a step
_SHARED_BYTES = 226 * 1024  # without the barriers
LEAST_WIDTH = 1024  # of K; not measured below


@lru_cache(1024)
def many_rows_config(m: int, n: int, k: int, units: int) -> ManyRowsConfig | None:
    """The launch for m x n sums over k on a device of `units` multiprocessors; None where the portable kernel is it.

    From the time a step of 128 columns of K takes a tile, one H200, nanoseconds: tiles of 256 rows 806, of 192 rows
    640, of 128 rows 464 (4096 x 2112 x 7168 takes 3, 3 and 5 rounds of them: 136, 112 and 132 us); the portable
    kernel's of 128 rows 573, and its 64 x 128, several of which share a multiprocessor, about 430 for each that a
    multiprocessor has.
    """
    if k < LEAST_WIDTH:
        return None
    tiles_n = -(-n // BLOCK_N)
    costs = {
        ManyRowsConfig(rows): step * -(-(-(-m // rows) * tiles_n) // units)
        for rows, step in ((256, 806), (192, 640), (128, 464))
    }
    best = min(costs, key=costs.__getitem__)
    portable = gemm_config(m, n, k, units, (9, 0))
    if (portable.block_m, portable.block_n) == (128, 128):
        other = 573 * -(-(-(-m // 128) * tiles_n) // units)
    elif (portable.block_m, portable.block_n) == (64, 128):
        other = 430 * -(-m // 64) * tiles_n // units
    else:  # so few tiles that smaller ones keep more of the device at work: 128 x 7168 x 16384 55.9 us, here 61.1
        return None
    return best if costs[best] <= 0.95 * other else None


def why_not_many_rows(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, found: tuple[int, int] | None) -> str | None:
    """Why the kernel cannot run these on a device of compute capability `found`, None if it can."""
    n, k = b.shape
    if found != (9, 0):
        return f"it needs compute capability 9.0, got {found}"
    if k % 16 or (a.data_ptr() | b.data_ptr()) % 16:
        return f"bulk loads need rows that begin at multiples of 16 bytes, got rows of {k}"
    if n * out.itemsize % 16 or out.data_ptr() % 16:
        return f"bulk stores need rows that begin at multiples of 16 bytes, got rows of {n} of {out.dtype}"
    if out.numel() == 0 or k == 0:
        return "there is nothing to sum"
    if a.numel() // k * -(-k // 128) >= 2**31 or -(-n // 128) * -(-k // 128) >= 2**31:
        return f"scales are numbered with 32 bits, got {a.numel() // k} x {n} x {k}"
    return None


_LAUNCHES = Launches(_fp8_gemm_hopper_kernel)


def launch_many_rows(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    out: torch.Tensor,
    config: ManyRowsConfig,
) -> None:
    """Write a @ b.T to `out`; every tensor is contiguous, and `why_not_many_rows` has nothing against them."""
    n, k = b.shape
    a = a.view(-1, k)
    m = a.shape[0]
    rows = config.block_m // config.warpgroups
    tensors = (
        descriptor_of_rows(a, rows, 128),
        descriptor_of_rows(b, BLOCK_N, 128),
        descriptor_of_rows(out.view(m, n), 64, BLOCK_N),
        a_scales,
        b_scales,
    )
    key = (m, n, k, out.dtype, config)
    if a.is_cuda and _LAUNCHES.again(key, a.device, tensors):
        return
    tiles_m, tiles_n = -(-m // config.block_m), -(-n // BLOCK_N)
    grid = (min(tiles_m * tiles_n, device_info(a.device).units), 1, 1)
    stages = config.stages(out.itemsize)
    constants = {
        "WARPGROUPS": config.warpgroups,
        "ROWS": rows,
        "BN": BLOCK_N,
        "STAGES": stages,
        "num_warps": 4,
    }
    numbers = (m, tiles_m, tiles_n, -(-k // 128), config.group)
    with warps_together():
        _LAUNCHES.first(key, a.device, grid, tensors, numbers, constants)
