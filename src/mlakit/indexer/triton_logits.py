# mypy: disallow-incomplete-defs=False
# (kernel arguments are pointers and numbers of the GPU, which have no Python type)
"""The lightning indexer's logits: a float8 product whose sum over heads never leaves the registers."""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from mlakit.hardware import device_info
from mlakit.indexer.config import LogitsConfig, logits_config
from mlakit.triton_e4m3 import e4m3_to_fp16, has_e4m3
from mlakit.triton_launch import Launches


@triton.jit
def _weighted_sum(keys, queries, weights, BLOCK_N: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr):
    """Sum over heads of weight * relu(key . query), [BLOCK_N, QUERIES]: two instructions an element."""
    scores = tl.dot(keys, queries)
    scores = tl.maximum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL) * weights[None, :]
    return tl.sum(tl.reshape(scores, (BLOCK_N, QUERIES, HEADS)), axis=2)


@triton.jit
def _fill(out_ptrs, offs_n, dead_below, dead_from, begin, end, BLOCK_N: tl.constexpr):
    """Of columns [begin, end), those below `dead_below` and those from `dead_from` on get -inf, query by query."""
    for first in range(begin, end, BLOCK_N):
        column = (first + offs_n)[:, None]
        dead = ((column < dead_below[None, :]) | (column >= dead_from[None, :])) & (column < end)
        tl.store(out_ptrs[None, :] + column, float("-inf"), mask=dead)


@triton.jit
def _indexer_logits_kernel(
    q_ptr,
    k_ptr,
    scales_ptr,
    weights_ptr,
    start_ptr,
    end_ptr,
    table_ptr,
    out_ptr,
    s_q,  # PAGED: queries of a request
    s_kv,
    heads,
    q_blocks,  # PAGED: of a request
    programs_q,
    split,
    stride_qt,
    stride_qh,
    stride_k,  # PAGED: of a page
    stride_w,
    stride_out,
    stride_table,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,  # heads rounded up to a power of two
    PAGE_SIZE: tl.constexpr,  # 0: keys in a row
    BOUND: tl.constexpr,  # whether start_ptr and end_ptr are given; PAGED: end_ptr holds the context lengths
    NATIVE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,  # k_ptr is a tensor descriptor
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    begin = (pid // programs_q) * split
    end = min(begin + split, s_kv)
    # The last queries first: under causal limits they take the longest.
    block = programs_q - 1 - pid % programs_q
    if PAGE_SIZE:
        request = block // q_blocks
        base_q = request * s_q
        first_q = base_q + (block % q_blocks) * BLOCK_Q
    else:
        base_q = 0
        first_q = block * BLOCK_Q
    end_q = base_q + s_q
    offs_d = tl.arange(0, DIM)
    offs_n = tl.arange(0, BLOCK_N)

    # Rows of the product's right side: all heads of a query, then those of the next one.
    row = tl.arange(0, BLOCK_Q * HEADS)
    token = first_q + row // HEADS
    head = row % HEADS
    live = (token < end_q) & (head < heads)
    q_offset = tl.where(live, token, first_q).to(tl.int64) * stride_qt + tl.where(live, head, 0) * stride_qh
    queries = tl.load(q_ptr + q_offset[:, None] + offs_d[None, :])
    if not NATIVE:
        queries = e4m3_to_fp16(queries)
    queries = tl.trans(queries)
    weights = tl.load(weights_ptr + token.to(tl.int64) * stride_w + head, mask=live, other=0.0)

    offs_q = first_q + tl.arange(0, BLOCK_Q)
    live_q = offs_q < end_q
    out_ptrs = out_ptr + offs_q.to(tl.int64) * stride_out
    lowest = begin
    highest = end
    if BOUND:
        # Keys that no query of the tile sees are not read. The others are scored for all of them, and what a query does
        # not see is overwritten in the end: limits in the loop would cost it 20 registers a thread. Loaded one by one:
        # ptxas must see that these are uniform, or the product's descriptors go through vector registers.
        lowest = end
        highest = begin
        for i in tl.static_range(BLOCK_Q):
            if PAGE_SIZE:
                lowest = begin
                highest = tl.load(end_ptr + request) - (end_q - 1) + min(first_q + BLOCK_Q, end_q) - 1
            else:
                lowest = min(lowest, tl.load(start_ptr + min(first_q + i, end_q - 1)))
                highest = max(highest, tl.load(end_ptr + min(first_q + i, end_q - 1)))
        lowest = begin + (max(lowest, begin) - begin) // BLOCK_N * BLOCK_N
        highest = min(highest, end)

    for first in tl.range(lowest, highest, BLOCK_N, num_stages=NUM_STAGES):
        column = first + offs_n
        # Rows past the end read the last one again instead of being masked; their results are not kept.
        safe = tl.minimum(column, highest - 1)
        if PAGE_SIZE:
            page = tl.load(table_ptr + request.to(tl.int64) * stride_table + safe // PAGE_SIZE).to(tl.int64)
            within = safe % PAGE_SIZE
            keys = tl.load(k_ptr + (page * stride_k + within * DIM)[:, None] + offs_d[None, :])
            scale = tl.load(scales_ptr + (page * stride_k + PAGE_SIZE * DIM) // 4 + within)
        else:
            if DESCRIPTORS:
                keys = k_ptr.load([first, 0])
            else:
                keys = tl.load(k_ptr + safe.to(tl.int64)[:, None] * stride_k + offs_d[None, :])
            scale = tl.load(scales_ptr + safe)
        if not NATIVE:
            keys = e4m3_to_fp16(keys)
        logits = _weighted_sum(keys, queries, weights, BLOCK_N, BLOCK_Q, HEADS) * scale[:, None]
        tl.store(out_ptrs[None, :] + column[:, None], logits, mask=(column < end)[:, None] & live_q[None, :])

    if BOUND:
        tl.debug_barrier()  # other threads wrote what is overwritten now
        if PAGE_SIZE:
            starts = tl.zeros_like(offs_q)
            ends = tl.load(end_ptr + request) - (end_q - 1) + offs_q
        else:
            starts = tl.load(start_ptr + offs_q, mask=live_q, other=0)
            ends = tl.load(end_ptr + offs_q, mask=live_q, other=2147483647)
        ends = tl.where(live_q, ends, 2147483647)
        up_to = max(min(tl.max(starts), end), begin)
        _fill(out_ptrs, offs_n, starts, ends, begin, up_to, BLOCK_N)
        _fill(out_ptrs, offs_n, starts, ends, max(min(tl.min(ends), end), up_to), end, BLOCK_N)


_LOGITS = Launches(_indexer_logits_kernel)


def launch_indexer_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scales: torch.Tensor,
    weights: torch.Tensor,
    k_start: torch.Tensor | None,
    k_end: torch.Tensor | None,
    out: torch.Tensor,
    config: LogitsConfig | None = None,
) -> None:
    """Write the logits of every query and key to `out` [s_q, s_kv], contiguous. Both limits are given, or none."""
    bound = k_start is not None and k_end is not None
    start, end = (k_start, k_end) if k_start is not None and k_end is not None else (k_scales, k_scales)
    key = (q.shape, q.stride(), k.shape, k.stride(), weights.stride(), bound, config)
    tensors = (q, k, k_scales, weights, start, end, k_scales, out)
    if q.is_cuda and _LOGITS.again(key, q.device, tensors):
        return
    if out.numel() == 0:
        return
    s_q, heads, dim = q.shape
    s_kv = k.shape[0]
    if config is None:
        config = logits_config(s_q, s_kv, heads, device_info(q.device))
    native = has_e4m3(q.device)
    descriptors = config.descriptors and native and k.stride(0) % 16 == 0 and k.data_ptr() % 16 == 0
    q_blocks = -(-s_q // config.block_q)
    numbers = (s_q, s_kv, heads, q_blocks, q_blocks, config.split)
    strides = (q.stride(0), q.stride(1), k.stride(0), weights.stride(0), out.stride(0), 0)
    if not native:
        q, k = q.view(torch.uint8), k.view(torch.uint8)
    grid = (q_blocks * -(-s_kv // config.split), 1, 1)
    constants = _constants(config, dim, heads, 0, bound, native, descriptors)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": config.max_registers}
    if not descriptors:
        tensors = (q, k, *tensors[2:])
        _LOGITS.first(key, q.device, grid, tensors, (*numbers, *strides), constants, **options)
        return
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():  # descriptors hold addresses: nothing to remember
        described = TensorDescriptor(k, [s_kv, dim], [k.stride(0), 1], [config.block_n, dim])
        _indexer_logits_kernel[grid](q, described, *tensors[2:], *numbers, *strides, **constants, **options)


def launch_indexer_logits_paged(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    config: LogitsConfig | None = None,
) -> None:
    """Write the logits of requests whose keys lie in pages to `out` [batch * q_len, max_context_len], contiguous.

    q [batch, q_len, heads, dim] and weights [batch, q_len, heads] are contiguous.
    """
    key = (q.shape, cache.shape, cache.stride(0), block_table.stride(0), out.shape, config)
    codes = cache.view(torch.float8_e4m3fn)
    tensors = (q, codes, cache.view(torch.float32), weights, context_lens, context_lens, block_table, out)
    if q.is_cuda and _LOGITS.again(key, q.device, tensors):
        return
    if out.numel() == 0:
        return
    batch, q_len, heads, dim = q.shape
    columns = out.shape[1]
    if config is None:
        config = logits_config(batch * q_len, columns, heads, device_info(q.device), q_len=q_len)
    native = has_e4m3(q.device)
    if not native:
        tensors = (q.view(torch.uint8), cache, *tensors[2:])
    q_blocks = -(-q_len // config.block_q)
    programs_q = batch * q_blocks
    numbers = (q_len, columns, heads, q_blocks, programs_q, config.split)
    strides = (heads * dim, dim, cache.stride(0), heads, out.stride(0), block_table.stride(0))
    grid = (programs_q * -(-columns // config.split), 1, 1)
    constants = _constants(config, dim, heads, cache.shape[1], True, native, False)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": config.max_registers}
    _LOGITS.first(key, q.device, grid, tensors, (*numbers, *strides), constants, **options)


def _constants(
    config: LogitsConfig, dim: int, heads: int, page_size: int, bound: bool, native: bool, descriptors: bool
) -> dict[str, int | bool]:
    return {
        "DIM": dim,
        "HEADS": max(1 << (heads - 1).bit_length(), 16),
        "PAGE_SIZE": page_size,
        "BOUND": bound,
        "NATIVE": native,
        "DESCRIPTORS": descriptors,
        "BLOCK_Q": config.block_q,
        "BLOCK_N": config.block_n,
        "NUM_STAGES": config.num_stages,
    }
