"""The merge of attention states in portable Triton: reads every state once, writes once."""

# Kernel arguments have no Python type; only the constexprs among them are annotated.
# mypy: disallow-incomplete-defs=False

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class MergeConfig:
    """Rows (a row is one head of one token) that a thread block merges, and its warps."""

    rows: int
    num_warps: int


def merge_config(dim: int, element_size: int) -> MergeConfig:
    """About 4 KiB a state and thread block: four 16-byte loads a thread in flight, and many blocks."""
    width = triton.next_power_of_2(dim) * element_size
    return MergeConfig(rows=max(1, min(32, 4096 // width)), num_warps=4 if width <= 2048 else 8)


@triton.jit
def _row_offsets(row, num_heads, stride_t, stride_h):
    # 64 bits: tokens * heads * dim may pass 2^31.
    token = row // num_heads
    return token * stride_t + (row - token * num_heads) * stride_h


@triton.jit
def _absorb(acc, m, l, out_ptr, lse_ptr, out_offsets, lse_offsets, cols, inside, col_mask):
    """Take one state in: acc, its maximum m and the sum l of weights relative to it."""
    lse = tl.load(lse_ptr + lse_offsets, mask=inside, other=-float("inf"))
    m_new = tl.maximum(m, lse)
    shift = tl.where(m_new == -float("inf"), 0.0, m_new)
    alpha = tl.exp(m - shift)
    weight = tl.exp(lse - shift)
    # An absent state's out may be anything, and is not read.
    present = inside & (lse != -float("inf"))
    x = tl.load(out_ptr + out_offsets[:, None] + cols[None, :], mask=present[:, None] & col_mask[None, :], other=0.0)
    acc = acc * alpha[:, None] + x.to(tl.float32) * weight[:, None]
    return acc, m_new, l * alpha + weight


@triton.jit
def _store_merged(acc, m, l, out_ptr, lse_ptr, row, cols, inside, col_mask, dim):
    empty = m == -float("inf")
    acc = acc * tl.where(empty, 0.0, 1.0 / l)[:, None]
    mask = inside[:, None] & col_mask[None, :]
    tl.store(out_ptr + row[:, None] * dim + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + row, tl.where(empty, -float("inf"), m + tl.log(l)), mask=inside)


@triton.jit(do_not_specialize=["states", "total_rows"])
def _merge_stacked_kernel(
    outs_ptr,
    lses_ptr,
    out_ptr,
    lse_ptr,
    states,
    total_rows,
    num_heads,
    dim,
    stride_os,
    stride_ot,
    stride_oh,
    stride_ls,
    stride_lt,
    stride_lh,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < total_rows
    cols = tl.arange(0, DIM)
    col_mask = cols < dim
    out_offsets = _row_offsets(row, num_heads, stride_ot, stride_oh)
    lse_offsets = _row_offsets(row, num_heads, stride_lt, stride_lh)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    m = tl.full([ROWS], -float("inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    for _ in range(states):
        acc, m, l = _absorb(acc, m, l, outs_ptr, lses_ptr, out_offsets, lse_offsets, cols, inside, col_mask)
        outs_ptr += stride_os
        lses_ptr += stride_ls
    _store_merged(acc, m, l, out_ptr, lse_ptr, row, cols, inside, col_mask, dim)


@triton.jit(do_not_specialize=["total_rows"])
def _merge_separate_kernel(
    out_ptrs,
    lse_ptrs,
    strides_ot,
    strides_oh,
    strides_lt,
    strides_lh,
    out_ptr,
    lse_ptr,
    total_rows,
    num_heads,
    dim,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < total_rows
    cols = tl.arange(0, DIM)
    col_mask = cols < dim
    acc = tl.zeros([ROWS, DIM], tl.float32)
    m = tl.full([ROWS], -float("inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(len(out_ptrs)):
        out_offsets = _row_offsets(row, num_heads, strides_ot[i], strides_oh[i])
        lse_offsets = _row_offsets(row, num_heads, strides_lt[i], strides_lh[i])
        acc, m, l = _absorb(acc, m, l, out_ptrs[i], lse_ptrs[i], out_offsets, lse_offsets, cols, inside, col_mask)
    _store_merged(acc, m, l, out_ptr, lse_ptr, row, cols, inside, col_mask, dim)


def _launch_merge_stacked(outs: torch.Tensor, lses: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Fill the contiguous `out` [tokens, num_heads, dim] and `lse`."""
    states, tokens, num_heads, dim = outs.shape
    total = tokens * num_heads
    if total == 0:
        return
    config = merge_config(dim, outs.element_size())
    _merge_stacked_kernel[(triton.cdiv(total, config.rows),)](
        outs,
        lses,
        out,
        lse,
        states,
        total,
        num_heads,
        dim,
        *outs.stride()[:3],
        *lses.stride(),
        ROWS=config.rows,
        DIM=triton.next_power_of_2(dim),
        num_warps=config.num_warps,
    )


def _launch_merge_separate(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], out: torch.Tensor, lse: torch.Tensor
) -> None:
    """The same for states in tensors of their own."""
    tokens, num_heads, dim = outs[0].shape
    total = tokens * num_heads
    if total == 0:
        return
    config = merge_config(dim, outs[0].element_size())
    _merge_separate_kernel[(triton.cdiv(total, config.rows),)](
        tuple(outs),
        tuple(lses),
        tuple(x.stride(0) for x in outs),
        tuple(x.stride(1) for x in outs),
        tuple(x.stride(0) for x in lses),
        tuple(x.stride(1) for x in lses),
        out,
        lse,
        total,
        num_heads,
        dim,
        ROWS=config.rows,
        DIM=triton.next_power_of_2(dim),
        num_warps=config.num_warps,
    )
