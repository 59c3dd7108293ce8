# mypy: disallow-incomplete-defs=False
# (kernel arguments are pointers and numbers of the GPU, which have no Python type)
"""Cached tokens out of their pages, end to end: every row finds its request and page itself, so that nothing is planned
on the host.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mlakit.cache.layout import GROUP
from mlakit.triton_e4m3 import e4m3_to_fp32, has_e4m3


@dataclass(frozen=True)
class GatherConfig:
    """Rows of a program, and its warps."""

    block_tokens: int = 8
    num_warps: int = 4


@triton.jit
def _gather_latent_kernel(
    cache_ptr,
    table_ptr,
    cu_seqlens_ptr,
    starts_ptr,
    out_ptr,
    total,
    batch,
    search_steps,
    page_size,
    stride_page,
    stride_token,
    stride_table,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = row < total
    # The request of a row: how many requests end at or before it (empty ones with them).
    low = tl.zeros((BLOCK_TOKENS,), dtype=tl.int32)
    high = low + batch
    for _ in range(search_steps):
        middle = (low + high) // 2
        open_ = live & (low < high)
        ends = tl.load(cu_seqlens_ptr + middle + 1, mask=open_, other=0)
        low = tl.where(open_ & (ends <= row), middle + 1, low)
        high = tl.where(open_ & (ends > row), middle, high)
    found = live & (low < batch)
    position = row - tl.load(cu_seqlens_ptr + low, mask=found, other=0)
    if HAS_STARTS:
        position += tl.load(starts_ptr + low, mask=found, other=0)
    page = tl.load(table_ptr + low.to(tl.int64) * stride_table + position // page_size, mask=found, other=0)
    token_ptrs = cache_ptr + page.to(tl.int64) * stride_page + (position % page_size) * stride_token
    out_ptrs = out_ptr + row * (RANK + ROPE)
    dtype = out_ptr.dtype.element_ty

    i = tl.arange(0, BLOCK_ROPE)
    if FP8:
        column = tl.arange(0, GROUP)
        scale_ptrs = (token_ptrs + RANK).to(tl.pointer_type(tl.float32), bitcast=True)
        rope_ptrs = (token_ptrs + RANK + 4 * (RANK // GROUP)).to(tl.pointer_type(tl.bfloat16), bitcast=True)
        for group in tl.static_range(RANK // GROUP):
            offs = group * GROUP + column
            codes = tl.load(token_ptrs[:, None] + offs[None, :], mask=found[:, None], other=0)
            scale = tl.load(scale_ptrs + group, mask=found, other=0.0)
            values = e4m3_to_fp32(codes, NATIVE) * scale[:, None]
            tl.store(out_ptrs[:, None] + offs[None, :], values.to(dtype), mask=live[:, None])
    else:
        rope_ptrs = token_ptrs + RANK
        offs = tl.arange(0, BLOCK_RANK)
        inside = offs[None, :] < RANK
        values = tl.load(token_ptrs[:, None] + offs[None, :], mask=found[:, None] & inside, other=0.0)
        tl.store(out_ptrs[:, None] + offs[None, :], values, mask=live[:, None] & inside)
    if ROPE > 0:
        inside_rope = i[None, :] < ROPE
        rope = tl.load(rope_ptrs[:, None] + i[None, :], mask=found[:, None] & inside_rope, other=0.0)
        tl.store(out_ptrs[:, None] + RANK + i[None, :], rope.to(dtype), mask=live[:, None] & inside_rope)


def launch_gather(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    starts: torch.Tensor | None,
    out: torch.Tensor,
    *,
    kv_lora_rank: int,
    config: GatherConfig | None = None,
) -> None:
    """Fill `out`, contiguous, whose width is the latent's; shapes and dtypes are the caller's promise."""
    total, width = out.shape
    batch = block_table.shape[0]
    if total == 0:
        return
    config = config or GatherConfig()
    is_fp8 = cache.dtype == torch.uint8
    # Another cache is copied as it is: then what is latent and what is rope does not matter, only that the wider part
    # be a power of two, so that no lane idles.
    rank = kv_lora_rank if is_fp8 else 1 << (width.bit_length() - 1)
    _gather_latent_kernel[(triton.cdiv(total, config.block_tokens),)](
        cache,
        block_table,
        cu_seqlens,
        cu_seqlens if starts is None else starts,
        out,
        total,
        batch,
        batch.bit_length(),
        cache.shape[1],
        cache.stride(0),
        cache.stride(1),
        block_table.stride(0),
        RANK=rank,
        ROPE=width - rank,
        GROUP=GROUP,
        BLOCK_RANK=triton.next_power_of_2(rank),
        BLOCK_ROPE=triton.next_power_of_2(max(width - rank, 1)),
        BLOCK_TOKENS=config.block_tokens,
        HAS_STARTS=starts is not None,
        FP8=is_fp8,
        NATIVE=has_e4m3(cache.device),
        num_warps=config.num_warps,
    )
