"""Forward pass of `mla_prefill` in portable Triton."""

# Kernel arguments have no Python type; only the constexprs among them are annotated.
# mypy: disallow-incomplete-defs=False

from typing import Any

import torch
import triton
import triton.language as tl

from mlakit.prefill.config import PrefillConfig, split_head_dim, value_width
from mlakit.triton_launch import LOG2E
from mlakit.triton_ragged import head_and_tile, heads_in_l2, load_rows, locate_tile


@triton.jit
def _attend_block(acc, m, l, q0, q1, k0, k1, v, scale_log2, limit, cols, apply_mask, D1: tl.constexpr):
    """One block of keys: update the accumulator, the running maximum (in units of log2) and the running sum."""
    s = tl.dot(q0, tl.trans(k0))
    if D1 > 0:
        s = tl.dot(q1, tl.trans(k1), s)
    if apply_mask:
        s = tl.where(cols[None, :] < limit[:, None], s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    # A row that has seen no key yet: exp2(-inf - 0) is 0 where exp2(-inf - -inf) would be NaN.
    shift = tl.where(m_new == -float("inf"), 0.0, m_new)
    p = tl.exp2(s * scale_log2 - shift[:, None])
    alpha = tl.exp2(m - shift)
    l = l * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, m_new, l


# Nothing that changes with a batch's lengths may specialize the kernel: a new length must not recompile.
@triton.jit(do_not_specialize=["total_q", "batch", "tiles", "heads_at_once"])
def _prefill_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    k0_desc,
    k1_desc,
    v_desc,
    cu_q_ptr,
    cu_k_ptr,
    total_q,
    batch,
    tiles,
    num_heads,
    heads_at_once,
    scale_log2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    qk_dim,
    v_dim,
    GROUPS: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DV: tl.constexpr,
    PAD_QK: tl.constexpr,
    PAD_V: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
):
    head, tile = head_and_tile(tl.program_id(0), tiles, num_heads, heads_at_once)
    if CAUSAL:  # the longest first
        tile = tiles - 1 - tile
    seq, q_start, q_end, m0 = locate_tile(tile, cu_q_ptr, batch, total_q, BLOCK_M)
    q_len = q_end - q_start
    if m0 >= q_len:
        return
    k_start = tl.load(cu_k_ptr + seq)
    k_len = tl.load(cu_k_ptr + seq + 1, mask=seq < batch, other=k_start) - k_start
    kv_head = head // GROUPS

    rows = m0 + tl.arange(0, BLOCK_M)
    d0 = tl.arange(0, D0)
    dv = tl.arange(0, DV)
    q_row = (q_start + m0).to(tl.int64)
    k_row = k_start.to(tl.int64)
    q_base = q_ptr + q_row * stride_qt + head.to(tl.int64) * stride_qh
    k_base = k_ptr + kv_head.to(tl.int64) * stride_kh
    v_base = v_ptr + kv_head.to(tl.int64) * stride_vh
    m_rows = tl.arange(0, BLOCK_M)
    n_rows = tl.arange(0, BLOCK_N)
    q0 = load_rows(q_base, m_rows, stride_qt, d0, q_len - m0, qk_dim, True, PAD_QK and D1 == 0)
    q1 = q0
    d1 = d0
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        q1 = load_rows(q_base, m_rows, stride_qt, d1, q_len - m0, qk_dim, True, PAD_QK)

    # Row r sees the keys before limit[r]. All rows see those before `full`, none sees `seen` or later.
    if CAUSAL:
        offset = k_len - q_len + 1
        limit = tl.minimum(offset + rows, k_len)
        full = tl.minimum(offset + m0, k_len)
        seen = tl.maximum(0, tl.minimum(offset + m0 + BLOCK_M - 1, k_len))
    else:
        limit = tl.zeros([BLOCK_M], tl.int32) + k_len
        full = k_len
        seen = k_len
    # Blocks that lie wholly within the sequence need no mask on their loads; the one that may not comes after the loop.
    whole = tl.minimum(k_len // BLOCK_N, tl.cdiv(seen, BLOCK_N)) * BLOCK_N

    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    for n in tl.range(0, whole, BLOCK_N, num_stages=STAGES):
        if TMA:
            k0 = k0_desc.load([k_start + n, kv_head * stride_kh])
            v = v_desc.load([k_start + n, kv_head * stride_vh])
        else:
            k_block = k_base + (k_row + n) * stride_kt
            v_block = v_base + (k_row + n) * stride_vt
            k0 = load_rows(k_block, n_rows, stride_kt, d0, 0, qk_dim, False, PAD_QK and D1 == 0)
            v = load_rows(v_block, n_rows, stride_vt, dv, 0, v_dim, False, PAD_V)
        k1 = k0
        if D1 > 0:
            if TMA:
                k1 = k1_desc.load([k_start + n, kv_head * stride_kh + D0])
            else:
                k1 = load_rows(k_block, n_rows, stride_kt, d1, 0, qk_dim, False, PAD_QK)
        cols = n + n_rows
        # Without causal this is never true here. A branch that the compiler cannot remove keeps it from hoisting the
        # queries' operands out of the loop into registers, which on sm_80 costs up to 600 spills.
        diagonal = n + BLOCK_N > full
        acc, m, l = _attend_block(acc, m, l, q0, q1, k0, k1, v, scale_log2, limit, cols, diagonal, D1)
    if whole < seen:
        k_block = k_base + (k_row + whole) * stride_kt
        v_block = v_base + (k_row + whole) * stride_vt
        left = k_len - whole
        k0 = load_rows(k_block, n_rows, stride_kt, d0, left, qk_dim, True, PAD_QK and D1 == 0)
        v = load_rows(v_block, n_rows, stride_vt, dv, left, v_dim, True, PAD_V)
        k1 = k0
        if D1 > 0:
            k1 = load_rows(k_block, n_rows, stride_kt, d1, left, qk_dim, True, PAD_QK)
        acc, m, l = _attend_block(acc, m, l, q0, q1, k0, k1, v, scale_log2, limit, whole + n_rows, True, D1)

    empty = l == 0.0
    acc = acc * tl.where(empty, 0.0, 1.0 / l)[:, None]
    lse = tl.where(empty, -float("inf"), (m + tl.log2(l)) * 0.6931471805599453)
    row_mask = m_rows < q_len - m0
    out_base = out_ptr + q_row * stride_ot + head.to(tl.int64) * stride_oh
    out_mask = row_mask[:, None] & (dv[None, :] < v_dim) if PAD_V else row_mask[:, None]
    tl.store(out_base + m_rows[:, None] * stride_ot + dv[None, :], acc.to(out_ptr.dtype.element_ty), mask=out_mask)
    tl.store(lse_ptr + q_row * num_heads + m_rows * num_heads + head, lse, mask=row_mask)


def _launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    config: PrefillConfig,
    heads_at_once: int | None = None,
) -> None:
    """Fill `out` and `lse`. Inputs are as `mla_prefill` has checked them. `heads_at_once` is there for measuring."""
    total_q, num_heads, qk_dim = q.shape
    v_dim = v.shape[-1]
    if total_q == 0:
        return
    batch = cu_seqlens_q.numel() - 1
    groups = num_heads // k.shape[1]
    split = split_head_dim(qk_dim)
    width_v = value_width(v_dim)
    tiles = total_q // config.block_m + batch + 1
    tma = config.tma and _tma_fits(k, v)
    k0_desc: Any = None
    k1_desc: Any = None
    v_desc: Any = None
    if tma:
        k0_desc = _descriptor(k, config.block_n, split.main)
        k1_desc = _descriptor(k, config.block_n, split.rest) if split.rest else None
        v_desc = _descriptor(v, config.block_n, width_v)
    _prefill_forward_kernel[(tiles * num_heads,)](
        q,
        k,
        v,
        out,
        lse,
        k0_desc,
        k1_desc,
        v_desc,
        cu_seqlens_q,
        cu_seqlens_k,
        total_q,
        batch,
        tiles,
        num_heads,
        heads_at_once or groups * heads_in_l2(k.shape[1], k.shape[0], batch, (qk_dim + v_dim) * k.element_size()),
        softmax_scale * LOG2E,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        out.stride(0),
        out.stride(1),
        qk_dim,
        v_dim,
        GROUPS=groups,
        CAUSAL=causal,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        D0=split.main,
        D1=split.rest,
        DV=width_v,
        PAD_QK=split.padded,
        PAD_V=width_v != v_dim,
        TMA=tma,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _tma_fits(k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether descriptors can describe these tensors: 16-byte steps, no padded columns, 32-bit column numbers."""
    if split_head_dim(k.shape[-1]).padded or value_width(v.shape[-1]) != v.shape[-1] or k.shape[0] == 0:
        return False
    for x in (k, v):
        size = x.element_size()
        if x.data_ptr() % 16 or x.stride(0) * size % 16 or x.stride(1) * size % 16 or x.stride(0) <= 0:
            return False
        if (x.shape[1] - 1) * x.stride(1) + x.shape[2] >= 2**31 or x.stride(0) * size >= 2**40:
            return False
    return True


def _descriptor(x: torch.Tensor, rows: int, cols: int) -> Any:
    # Heads lie along the columns, whatever their stride: head h starts at column h * stride(1).
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(
        x, [x.shape[0], (x.shape[1] - 1) * x.stride(1) + x.shape[2]], [x.stride(0), 1], [rows, cols]
    )
