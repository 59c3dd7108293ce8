# mypy: disallow-incomplete-defs=False
# (kernel arguments are pointers and numbers of the GPU, which have no Python type)
"""The product of blockwise scaled float8 matrices."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from mlakit.hardware import device_info
from mlakit.triton_e4m3 import e4m3_to_fp16, has_e4m3
from mlakit.triton_launch import Launches


@dataclass(frozen=True)
class GemmConfig:
    """Tile, warps and pipeline depth. `group_m` row blocks share the columns they read from L2.

    `descriptors` loads tiles by TMA (compute capability 9.0 and up, and rows that are multiples of 16 bytes).

    Two ideas that lost with the best tile on an H200 (942 TFLOP/s): scaling a product while the tensor cores are at the
    next one (763), and fewer registers, for another program on a multiprocessor (577).
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    descriptors: bool = False


@triton.jit
def _fp8_gemm_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    a_scales_ptr,
    b_scales_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    NATIVE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,  # a_ptr and b_ptr are tensor descriptors
):
    BLOCK_K: tl.constexpr = 128  # the scales' block: one product, one scaling
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    in_group = GROUP_M * blocks_n
    first_m = (pid // in_group) * GROUP_M
    group_m = min(blocks_m - first_m, GROUP_M)
    pid_m = first_m + (pid % in_group) % group_m
    pid_n = (pid % in_group) // group_m

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows past the end read row 0 again instead of being masked in the loop; their results are not stored.
    row_m = tl.where(offs_m < M, offs_m, 0).to(tl.int64)
    row_n = tl.where(offs_n < N, offs_n, 0).to(tl.int64)
    if not DESCRIPTORS:
        a_ptrs = a_ptr + row_m[:, None] * K + offs_k[None, :]
        b_ptrs = b_ptr + row_n[None, :] * K + offs_k[:, None]
    a_scale_ptrs = a_scales_ptr + row_m * blocks_k
    b_scale_ptr = b_scales_ptr + (pid_n * BLOCK_N // BLOCK_K).to(tl.int64) * blocks_k

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(blocks_k):
        if DESCRIPTORS:
            a = a_ptr.load([pid_m * BLOCK_M, k * BLOCK_K])
            b = b_ptr.load([pid_n * BLOCK_N, k * BLOCK_K]).T
        elif EVEN_K:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=offs_k[None, :] < K - k * BLOCK_K, other=0.0)
            b = tl.load(b_ptrs, mask=offs_k[:, None] < K - k * BLOCK_K, other=0.0)
        # A tile is no wider than a block of b's scales, so b's is one number and the two are multiplied before they
        # meet the tile: one multiply-add an element.
        scale = tl.load(a_scale_ptrs) * tl.load(b_scale_ptr)
        if NATIVE:
            product = tl.dot(a, b)
        else:
            product = tl.dot(e4m3_to_fp16(a), e4m3_to_fp16(b))
        total += product * scale[:, None]
        if not DESCRIPTORS:
            a_ptrs += BLOCK_K
            b_ptrs += BLOCK_K
        a_scale_ptrs += 1
        b_scale_ptr += 1

    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    live = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=live)


def gemm_config(m: int, n: int, k: int, units: int, found: tuple[int, int] | None) -> GemmConfig:
    """The tile for m x n sums over k on a device of `units` multiprocessors and a compute capability.

    Speeds are of one run on an H200, beside those of the default before: 64 x 128 or 64 x 64 by pointers.
    """
    native = found is not None and found >= (8, 9)
    if k % 16:
        # Rows that start anywhere are read byte by byte: larger tiles would not fit the registers.
        return GemmConfig(16 if m <= 16 else 32, 32, num_warps=4, num_stages=1)
    if m <= 16:
        return GemmConfig(16, 32, num_warps=4, num_stages=5 if native else 3)
    if m <= 32 or not native:
        return GemmConfig(32, 64, num_warps=4, num_stages=4 if native else 3)
    if found is None or found[0] not in (9, 10):  # no TMA, or (12.0) shared memory for less
        if triton.cdiv(m, 128) * triton.cdiv(n, 128) < units:
            return GemmConfig(64, 64, num_warps=4, num_stages=4)
        return GemmConfig(64, 128, num_warps=4, num_stages=3)
    # A program a multiprocessor: of no use where the last round leaves many of them idle.
    rounds = triton.cdiv(m, 128) * triton.cdiv(n, 128) / units
    if rounds >= 0.75 * math.ceil(rounds):
        # 4096 x 7168 x 7168: 936 TFLOP/s (796 before; 4 stages 942), 8192 x 8192 x 8192: 925 (795; 4 stages 898).
        return GemmConfig(128, 128, num_warps=8, num_stages=6, descriptors=True)
    if triton.cdiv(m, 64) * triton.cdiv(n, 128) >= units:  # by the count of programs, not measured on such shapes
        return GemmConfig(64, 128, num_warps=4, num_stages=3, descriptors=True)
    return GemmConfig(64, 64, num_warps=4, num_stages=6, descriptors=True)  # 128 x 7168 x 16384: 55 us (69 before)


_LAUNCHES = Launches(_fp8_gemm_kernel)


def launch_fp8_gemm(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    out: torch.Tensor,
    config: GemmConfig | None = None,
) -> None:
    """Write a @ b.T to `out`; every tensor is contiguous."""
    key = (a.shape, b.shape, out.dtype, config)
    if a.is_cuda and _LAUNCHES.again(key, a.device, (a, b, out, a_scales, b_scales)):
        return
    n, k = b.shape
    if out.numel() == 0:
        return
    if k == 0:
        out.zero_()
        return
    m = a.numel() // k
    native = has_e4m3(a.device)
    if config is None:
        info = device_info(a.device)
        config = gemm_config(m, n, k, info.units, info.capability)
        if config.descriptors and (a.data_ptr() % 16 or b.data_ptr() % 16):  # TMA reads from multiples of 16 bytes
            config = replace(config, descriptors=False, num_stages=min(config.num_stages, 4))
    if not native:  # as e4m3 where there is e4m3: a cast in the kernel would take the tiles through registers
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n), 1, 1)
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "GROUP_M": config.group_m,
        "EVEN_K": k % 128 == 0,
        "NATIVE": native,
        "DESCRIPTORS": config.descriptors,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if not config.descriptors:
        _LAUNCHES.first(key, a.device, grid, (a, b, out, a_scales, b_scales), (m, n, k), constants, **options)
        return
    with torch.cuda.device(a.device) if a.is_cuda else nullcontext():  # descriptors hold addresses: nothing to remember
        _fp8_gemm_kernel[grid](
            TensorDescriptor(a, [m, k], [k, 1], [config.block_m, 128]),
            TensorDescriptor(b, [n, k], [k, 1], [config.block_n, 128]),
            out,
            a_scales,
            b_scales,
            m,
            n,
            k,
            **constants,
            **options,
        )
