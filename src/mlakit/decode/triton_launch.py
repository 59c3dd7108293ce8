"""Launch configurations of the Triton decode kernels, chosen by one function, and the launcher."""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from mlakit.decode.triton_combine import _mla_decode_combine_kernel
from mlakit.decode.triton_decode import _mla_decode_kernel
from mlakit.decode.triton_fp8 import AS_QUERY, E4M3, E4M3_ROWS
from mlakit.hardware import DeviceInfo, device_info, shared_limit
from mlakit.triton_launch import LOG2E, Launches, Remembered
from mlakit.triton_pieces import plan_slots

_FORMATS = {torch.float8_e4m3fn: E4M3, torch.uint8: E4M3_ROWS}
# A piece of fewer keys costs more to start and to merge than its keys cost to read.
MIN_PIECE_KEYS = 64


@dataclass(frozen=True)
class DecodeConfig:
    """How the decode kernel is launched."""

    block_m: int  # query rows (new tokens x heads) a program
    block_n: int  # keys a step
    num_warps: int
    num_stages: int
    resident: int  # programs that fit a multiprocessor at once

    def shared_bytes(self, kv_lora_rank: int, rope_dim: int, item_bytes: int, row_bytes: int | None = None) -> int:
        """An upper estimate of the shared memory of a program: key stages, the queries, the weights, and 2 KiB for
        reductions. Keys that take `row_bytes` in the cache are kept as they are, and once more as `item_bytes` have it.
        """
        buffers = self.num_stages if self.uses_wgmma else max(self.num_stages - 1, 1)
        latent_dim = kv_lora_rank + rope_dim
        keys = buffers * self.block_n * (row_bytes or item_bytes * latent_dim)
        if row_bytes:
            keys += self.block_n * latent_dim * item_bytes
        return keys + item_bytes * self.block_m * (latent_dim + self.block_n) + 2048

    @property
    def uses_wgmma(self) -> bool:
        """True if the shapes suit Hopper's warpgroup instructions, whose operands Triton keeps one stage longer."""
        return self.block_m >= 64


def choose_config(
    *,
    batch: int,
    rows: int,
    capacity: int,
    page_size: int,
    kv_lora_rank: int,
    rope_dim: int,
    item_bytes: int,
    capability: tuple[int, int] | None,
    row_bytes: int | None = None,
) -> DecodeConfig:
    """The launch configuration for `batch` requests of `rows` query rows each, and room for `capacity` keys in each
    one's table, of `row_bytes` each where they are float8; None as capability is the interpreter.
    """
    capability = capability or (8, 0)
    if row_bytes:
        config = _preferred_fp8(rows, capability)
    else:
        config = _preferred(batch, rows, capacity, page_size, capability)
    if config.block_m * kv_lora_rank > 4096 * config.num_warps:  # 128 accumulators a thread
        config = DecodeConfig(16, 32, 8, 3, 1)
    limit = shared_limit(capability)
    while config.shared_bytes(kv_lora_rank, rope_dim, item_bytes, row_bytes) * config.resident > limit - 1024 * (
        config.resident - 1
    ):
        config = _smaller(config)
    return config


def _preferred(batch: int, rows: int, capacity: int, page_size: int, capability: tuple[int, int]) -> DecodeConfig:
    # Measured on an H200 (benchmarks/h200/dense_decode.py --tune), requests x heads x keys, in microseconds. Elsewhere
    # by arithmetic on shared memory.
    large = shared_limit(capability) > 200 * 1024
    if rows <= 16 or shared_limit(capability) < 128 * 1024:
        # One program of (16, 64, 4, 3) and two of (16, 32, 4, 3): 1x16x8192 15.0 and 16.0, 16x16x1024 22.3 and 24.6,
        # 128x16x2048 91.7 and 97.2, 32x16x8192 98.7 and 100.8, 128x16x8192 305.7 and 306.1; but 512x16x512 115.5 and
        # 107.7, and 128x16x4096 of very different lengths 177.1 and 172.8.
        if large and capacity >= 1024 and batch * capacity <= 2**19:
            return DecodeConfig(16, 64, 4, 3, 1)
        return DecodeConfig(16, 32, 4, 3, 2 if large else 1)
    if rows <= 32 or capability[0] != 9:
        if not large:
            return DecodeConfig(32, 32, 8, 3, 1)
        # 4 and 8 warps: 64x32x4096 108.8 and 123.1, 128x32x8192 367.5 and 423.6, 16x32x1024 29.5 and 31.0. With 4 no
        # register is left: where a tile gathers several pages, or on sm_100, they spill.
        return DecodeConfig(32, 64, 4 if capability[0] == 9 and page_size >= 64 else 8, 3, 1)
    # 128x128x8192: (64, 64, 8, 2) 1023, (64, 32, 8, 4) 1286. 128x128x2048: 309, two tiles of (32, 64, 4, 3) 372.
    return DecodeConfig(64, 64, 8, 2, 1)


def _preferred_fp8(rows: int, capability: tuple[int, int]) -> DecodeConfig:
    # Keys pass through registers on their way to 16 bits: with more of them, or of rows, registers spill.
    if rows <= 16 or shared_limit(capability) < 128 * 1024:
        return DecodeConfig(16, 32, 8, 3, 1)
    return DecodeConfig(64, 64, 8, 3, 1) if capability[0] == 9 else DecodeConfig(32, 32, 8, 3, 1)


def _smaller(config: DecodeConfig) -> DecodeConfig:
    """The next smaller configuration where one does not fit: fewer resident programs, then stages, then keys, then
    rows.
    """
    m, n, stages, resident = config.block_m, config.block_n, config.num_stages, config.resident
    if resident > 1:
        resident -= 1
    elif stages > 2:
        stages -= 1
    elif n > 16:
        n //= 2
    elif m > 16:
        m //= 2
    else:
        raise ValueError("no launch configuration of mla_decode fits this GPU's shared memory at these dimensions")
    return DecodeConfig(m, n, config.num_warps, stages, resident)


@dataclass(frozen=True)
class _CallPlan:
    """All of a call that follows from shapes, options and device."""

    grid: tuple[int, int, int]
    counts: tuple[int, ...]  # batch, q_len, heads, row_tiles, slots, splits, capacity
    constants: dict[str, Any]
    num_warps: int
    partials: tuple[int, int]  # partial results, rows of each
    combine_grid: tuple[int, int, int] | None
    combine_counts: tuple[int, ...]
    combine_constants: dict[str, Any]
    dependent: bool


_ATTENTION, _COMBINE = Launches(_mla_decode_kernel), Launches(_mla_decode_combine_kernel)
_PLANS: Remembered[_CallPlan] = Remembered()


def _plan_call(
    shape: torch.Size,
    max_pages: int,
    causal: bool,
    kv_lora_rank: int,
    num_splits: int | None,
    q_dtype: torch.dtype,
    cache: torch.Tensor,
    config: DecodeConfig | None,
    device: DeviceInfo,
) -> _CallPlan:
    batch, q_len, heads, latent_dim = shape
    page_size, key_stride = cache.shape[1], cache.stride(1)
    rows, rope_dim, capacity = q_len * heads, latent_dim - kv_lora_rank, max_pages * page_size
    config = config or choose_config(
        batch=batch,
        rows=rows,
        capacity=capacity,
        page_size=page_size,
        kv_lora_rank=kv_lora_rank,
        rope_dim=rope_dim,
        item_bytes=2,
        capability=device.capability,
        row_bytes=cache.shape[2] if cache.element_size() == 1 else None,
    )
    row_tiles = triton.cdiv(rows, config.block_m)
    min_tiles = max(1, MIN_PIECE_KEYS // config.block_n)
    plan = plan_slots(
        batch=batch,
        programs=row_tiles,
        capacity=capacity,
        block_n=config.block_n,
        resident=device.units * config.resident,
        min_tiles=min_tiles,
        num_splits=num_splits,
    )
    # From sm_90 on the combine grid may be brought up while the attention grid drains.
    dependent = plan.is_split and device.capability is not None and device.capability[0] >= 9
    balanced = plan.splits is None
    shared = {
        "BALANCED": balanced,
        # At least as many as make sums over the batch meet in shared memory: only then does ptxas see that the bounds
        # of loops are the same for all threads, and keeps wgmma's descriptors out of vector registers (1279
        # instructions a key tile instead of 869, and spills, where a warp summed 16 requests by itself).
        # (256 and not 128: by luck, ptxas then finds a register more for 32 rows with Triton 3.6.)
        "BLOCK_B": (1 if batch == 1 else max(256, triton.next_power_of_2(batch))) if balanced else 1,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "MIN_TILES": min_tiles,
        "RANK": kv_lora_rank,
        "DEPENDENT": dependent,
    }
    # Most partial results that a request is likely to have: loaded at once, so that latency is paid once. Where there
    # are rows enough to fill the device, a program takes a whole one, and its start is paid less often.
    pieces = plan.splits or triton.cdiv(plan.slots, max(batch, 1)) + 1
    whole_rows = batch * rows >= 8 * device.units and pieces <= 8
    block_p = min(64, max(2, triton.next_power_of_2(pieces)))
    block_c = 512 if whole_rows else 128
    if pieces > 96 and batch * rows * (kv_lora_rank // 64) <= device.units:  # 1x16x8192: up to 1 us less
        block_p, block_c = 128, 64
    block_c = min(block_c, kv_lora_rank)
    return _CallPlan(
        grid=(plan.slots * row_tiles, 1, 1),
        counts=(batch, q_len, heads, row_tiles, plan.slots, plan.splits or 0, capacity),
        constants={
            "CAUSAL": causal and q_len > 1,
            "PAGE_SIZE": page_size,
            "ROPE": rope_dim,
            "SPLIT": plan.is_split,
            "STAGES": config.num_stages,
            "WIDE": page_size * key_stride >= 2**31,
            "FORMAT": _FORMATS.get(cache.dtype, AS_QUERY).value,
            "Q_E4M3": q_dtype == torch.float8_e4m3fn,
            "NATIVE": device.capability is not None and device.capability >= (8, 9),
            **shared,
        },
        num_warps=config.num_warps,
        partials=(plan.partials, row_tiles * config.block_m),
        combine_grid=(batch * rows, kv_lora_rank // block_c, 1) if plan.is_split else None,
        combine_counts=(batch, heads, rows, row_tiles, plan.slots, plan.splits or 0, capacity),
        combine_constants={
            "BLOCK_P": block_p,
            "BLOCK_C": block_c,
            **shared,
        },
        dependent=dependent,
    )


def _launch_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    kv_lora_rank: int,
    num_splits: int | None,
    q_scale: float = 1.0,
    kv_scale: float = 1.0,
    config: DecodeConfig | None = None,
) -> None:
    """Fill `out` and `lse`. Inputs are valid already; the workspace comes from the caching allocator, so that a CUDA
    graph owns its own.
    """
    if q.shape[0] == 0:
        return
    device, q_strides, cache_strides, table_stride = q.device, q.stride(), cache.stride(), block_table.stride(0)
    out_strides = out.stride()[:3]
    pages, options = block_table.shape[1], (softmax_scale, causal, kv_lora_rank, num_splits, q_scale, kv_scale, config)
    key = (
        q.shape,
        q_strides,
        cache.shape[1],
        cache_strides,
        pages,
        table_stride,
        out_strides,
        q.dtype,
        cache.dtype,
        out.dtype,
        options,
        device,
    )
    plan = _PLANS.get(key)
    if plan is None:
        plan = _plan_call(
            q.shape,
            pages,
            causal,
            kv_lora_rank,
            num_splits,
            q.dtype,
            cache,
            config,
            device_info(device),
        )
        if device.type == "cuda":
            _PLANS[key] = plan
    partial, partial_lse = out, lse  # never touched if nothing is split; a kernel argument needs some pointer
    if plan.combine_grid is not None:
        partials, rows = plan.partials
        partial = torch.empty((partials, rows, kv_lora_rank), dtype=torch.float32, device=device)
        partial_lse = torch.empty((partials, rows), dtype=torch.float32, device=device)
    # Triton refuses e4m3 pointers below compute capability 8.9.
    if q.dtype == torch.float8_e4m3fn:
        q = q.view(torch.uint8)
    if cache.dtype == torch.float8_e4m3fn:
        cache = cache.view(torch.uint8)
    tensors = (q, cache, block_table, seq_lens, out, lse, partial, partial_lse)
    if device.type != "cuda" or not _ATTENTION.again(key, device, tensors):
        strides = (*q_strides[:3], *cache_strides[:2], table_stride, *out_strides)
        numbers = (softmax_scale * q_scale * kv_scale * LOG2E, *strides, *plan.counts, kv_scale)
        _ATTENTION.first(key, device, plan.grid, tensors, numbers, plan.constants, num_warps=plan.num_warps)
    if plan.combine_grid is None:
        return
    merged = (partial, partial_lse, seq_lens, out, lse)
    if device.type != "cuda" or not _COMBINE.again(key, device, merged):
        numbers = (*out_strides, *plan.combine_counts)
        pdl = {"launch_pdl": True} if plan.dependent else {}
        _COMBINE.first(key, device, plan.combine_grid, merged, numbers, plan.combine_constants, num_warps=4, **pdl)
