"""Backward pass of `mla_prefill` in portable Triton: one kernel a gradient's side, no atomics, so results are
reproducible.

With P = exp(S * scale - lse): dV = P^T dO, dS = P * (dO V^T - delta), dQ = scale * dS K, dK = scale * dS^T Q, where
delta = sum(dO * O) - dlse per row. (FlashAttention-2, arXiv:2307.08691; the lse term because d lse / d S = P.)
"""

# Kernel arguments have no Python type; only the constexprs among them are annotated.
# mypy: disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl

from mlakit.prefill.config import PrefillConfig, split_head_dim, value_width
from mlakit.triton_ragged import head_and_tile, heads_in_l2, load_rows, locate_tile

_ROWS_AT_ONCE = 32


@triton.jit(do_not_specialize=["total_q"])
def _prefill_delta_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    lse2_ptr,
    delta_ptr,
    total_q,
    num_heads,
    stride_ot,
    stride_oh,
    stride_dt,
    stride_dh,
    v_dim,
    HAS_DLSE: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
):
    """delta, and lse in units of log2, both as [heads, tokens]: the other kernels read them along the tokens."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < total_q
    wide = row.to(tl.int64)
    cols = tl.arange(0, DV)
    mask = inside[:, None] & (cols[None, :] < v_dim)
    out = tl.load(out_ptr + wide[:, None] * stride_ot + head * stride_oh + cols[None, :], mask=mask, other=0.0)
    dout = tl.load(dout_ptr + wide[:, None] * stride_dt + head * stride_dh + cols[None, :], mask=mask, other=0.0)
    lse = tl.load(lse_ptr + wide * num_heads + head, mask=inside, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + wide * num_heads + head, mask=inside, other=0.0)
    # A row without keys gets +inf, and so P = exp2(S - inf) = 0 whatever S is.
    lse2 = tl.where(lse == -float("inf"), float("inf"), lse * 1.4426950408889634)
    tl.store(lse2_ptr + head * total_q + row, lse2, mask=inside)
    tl.store(delta_ptr + head * total_q + row, delta, mask=inside)


@triton.jit(do_not_specialize=["total_q", "total_k", "batch", "tiles", "heads_at_once"])
def _prefill_backward_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    cu_q_ptr,
    cu_k_ptr,
    total_q,
    total_k,
    batch,
    tiles,
    num_kv_heads,
    heads_at_once,
    scale,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dt,
    stride_dh,
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
    STAGES: tl.constexpr,
):
    """Gradients of one tile of keys and values: all transposed, so that P^T and dS^T come out as left operands."""
    # A sequence's first keys are seen by the most queries, and already come first.
    kv_head, tile = head_and_tile(tl.program_id(0), tiles, num_kv_heads, heads_at_once)
    seq, k_start, k_end, n0 = locate_tile(tile, cu_k_ptr, batch, total_k, BLOCK_N)
    k_len = k_end - k_start
    if n0 >= k_len:
        return
    q_start = tl.load(cu_q_ptr + seq)
    q_len = tl.load(cu_q_ptr + seq + 1, mask=seq < batch, other=q_start) - q_start

    d0 = tl.arange(0, D0)
    dv_cols = tl.arange(0, DV)
    n_rows = tl.arange(0, BLOCK_N)
    m_rows = tl.arange(0, BLOCK_M)
    k_base = k_ptr + (k_start + n0).to(tl.int64) * stride_kt + kv_head.to(tl.int64) * stride_kh
    v_base = v_ptr + (k_start + n0).to(tl.int64) * stride_vt + kv_head.to(tl.int64) * stride_vh
    k0 = load_rows(k_base, n_rows, stride_kt, d0, k_len - n0, qk_dim, True, PAD_QK and D1 == 0)
    v = load_rows(v_base, n_rows, stride_vt, dv_cols, k_len - n0, v_dim, True, PAD_V)
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dv = tl.zeros([BLOCK_N, DV], tl.float32)
    k1 = k0
    d1 = d0
    dk1 = dk0
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        k1 = load_rows(k_base, n_rows, stride_kt, d1, k_len - n0, qk_dim, True, PAD_QK)
        dk1 = tl.zeros([BLOCK_N, D1], tl.float32)

    # Query i sees key j if j <= offset + i.
    offset = k_len - q_len
    q_row = q_start.to(tl.int64)
    first = 0
    if CAUSAL:
        first = tl.maximum(0, n0 - offset) // BLOCK_M * BLOCK_M
    scale_log2 = scale * 1.4426950408889634
    for g in range(GROUPS):
        head = (kv_head * GROUPS + g).to(tl.int64)
        q_base = q_ptr + head * stride_qh
        do_base = dout_ptr + head * stride_dh
        row_base = head * total_q + q_start
        for m in tl.range(first, q_len, BLOCK_M, num_stages=STAGES):
            left = q_len - m
            q_block = q_base + (q_row + m) * stride_qt
            do_block = do_base + (q_row + m) * stride_dt
            q0 = load_rows(q_block, m_rows, stride_qt, d0, left, qk_dim, True, PAD_QK and D1 == 0)
            q1 = q0
            if D1 > 0:
                q1 = load_rows(q_block, m_rows, stride_qt, d1, left, qk_dim, True, PAD_QK)
            do = load_rows(do_block, m_rows, stride_dt, dv_cols, left, v_dim, True, PAD_V)
            # Rows past the sequence's end get P = 0.
            lse2 = tl.load(lse2_ptr + row_base + m + m_rows, mask=m_rows < left, other=float("inf"))
            delta = tl.load(delta_ptr + row_base + m + m_rows, mask=m_rows < left, other=0.0)
            s = tl.dot(k0, tl.trans(q0))
            if D1 > 0:
                s = tl.dot(k1, tl.trans(q1), s)
            # Not needed yet: the tensor cores work on it while P is computed.
            dp = tl.dot(v, tl.trans(do))
            p = tl.exp2(s * scale_log2 - lse2[None, :])
            if CAUSAL:  # noqa: SIM102 - decided at compile time, the other one at run time
                if m + offset < n0 + BLOCK_N - 1:
                    p = tl.where(n0 + n_rows[:, None] <= offset + m + m_rows[None, :], p, 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv)
            ds = (p * (dp - delta[None, :])).to(q0.dtype)
            dk0 = tl.dot(ds, q0, dk0)
            if D1 > 0:
                dk1 = tl.dot(ds, q1, dk1)

    # dk and dv are contiguous.
    dk_base = dk_ptr + ((k_start + n0).to(tl.int64) * num_kv_heads + kv_head) * qk_dim
    dv_base = dv_ptr + ((k_start + n0).to(tl.int64) * num_kv_heads + kv_head) * v_dim
    inside = n_rows[:, None] < k_len - n0
    dk_rows = dk_base + n_rows[:, None] * (num_kv_heads * qk_dim)
    dv_rows = dv_base + n_rows[:, None] * (num_kv_heads * v_dim)
    grad_type = dk_ptr.dtype.element_ty
    tl.store(dk_rows + d0[None, :], (dk0 * scale).to(grad_type), mask=inside & (d0[None, :] < qk_dim))
    if D1 > 0:
        tl.store(dk_rows + d1[None, :], (dk1 * scale).to(grad_type), mask=inside & (d1[None, :] < qk_dim))
    tl.store(dv_rows + dv_cols[None, :], dv.to(grad_type), mask=inside & (dv_cols[None, :] < v_dim))


@triton.jit(do_not_specialize=["total_q", "batch", "tiles", "heads_at_once"])
def _prefill_backward_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    dq_ptr,
    cu_q_ptr,
    cu_k_ptr,
    total_q,
    batch,
    tiles,
    num_heads,
    heads_at_once,
    scale,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dt,
    stride_dh,
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
    STAGES: tl.constexpr,
):
    """Gradient of one tile of queries."""
    head, tile = head_and_tile(tl.program_id(0), tiles, num_heads, heads_at_once)
    if CAUSAL:
        tile = tiles - 1 - tile
    seq, q_start, q_end, m0 = locate_tile(tile, cu_q_ptr, batch, total_q, BLOCK_M)
    q_len = q_end - q_start
    if m0 >= q_len:
        return
    k_start = tl.load(cu_k_ptr + seq)
    k_len = tl.load(cu_k_ptr + seq + 1, mask=seq < batch, other=k_start) - k_start
    kv_head = (head // GROUPS).to(tl.int64)
    wide_head = head.to(tl.int64)

    d0 = tl.arange(0, D0)
    dv_cols = tl.arange(0, DV)
    m_rows = tl.arange(0, BLOCK_M)
    n_rows = tl.arange(0, BLOCK_N)
    rows = m0 + m_rows
    left = q_len - m0
    q_base = q_ptr + (q_start + m0).to(tl.int64) * stride_qt + wide_head * stride_qh
    do_base = dout_ptr + (q_start + m0).to(tl.int64) * stride_dt + wide_head * stride_dh
    k_row = k_start.to(tl.int64)
    k_base = k_ptr + kv_head * stride_kh
    v_base = v_ptr + kv_head * stride_vh
    q0 = load_rows(q_base, m_rows, stride_qt, d0, left, qk_dim, True, PAD_QK and D1 == 0)
    do = load_rows(do_base, m_rows, stride_dt, dv_cols, left, v_dim, True, PAD_V)
    dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
    q1 = q0
    d1 = d0
    dq1 = dq0
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        q1 = load_rows(q_base, m_rows, stride_qt, d1, left, qk_dim, True, PAD_QK)
        dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    row_base = wide_head * total_q + q_start + m0
    lse2 = tl.load(lse2_ptr + row_base + m_rows, mask=m_rows < left, other=float("inf"))
    delta = tl.load(delta_ptr + row_base + m_rows, mask=m_rows < left, other=0.0)

    if CAUSAL:
        offset = k_len - q_len + 1
        limit = tl.minimum(offset + rows, k_len)
        full = tl.minimum(offset + m0, k_len)
        seen = tl.maximum(0, tl.minimum(offset + m0 + BLOCK_M - 1, k_len))
    else:
        limit = tl.zeros([BLOCK_M], tl.int32) + k_len
        full = k_len
        seen = k_len
    scale_log2 = scale * 1.4426950408889634
    for n in tl.range(0, seen, BLOCK_N, num_stages=STAGES):
        k_block = k_base + (k_row + n) * stride_kt
        v_block = v_base + (k_row + n) * stride_vt
        k0 = load_rows(k_block, n_rows, stride_kt, d0, k_len - n, qk_dim, True, PAD_QK and D1 == 0)
        v = load_rows(v_block, n_rows, stride_vt, dv_cols, k_len - n, v_dim, True, PAD_V)
        k1 = k0
        if D1 > 0:
            k1 = load_rows(k_block, n_rows, stride_kt, d1, k_len - n, qk_dim, True, PAD_QK)
        s = tl.dot(q0, tl.trans(k0))
        if D1 > 0:
            s = tl.dot(q1, tl.trans(k1), s)
        dp = tl.dot(do, tl.trans(v))
        p = tl.exp2(s * scale_log2 - lse2[:, None])
        # Keys past the end are zeros here and would still get P = exp2(-lse), which may be inf.
        if n + BLOCK_N > full:
            p = tl.where(n + n_rows[None, :] < limit[:, None], p, 0.0)
        ds = (p * (dp - delta[:, None])).to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0)
        if D1 > 0:
            dq1 = tl.dot(ds, k1, dq1)

    # dq is contiguous.
    inside = m_rows[:, None] < left
    dq_rows = (
        dq_ptr + ((q_start + m0).to(tl.int64) * num_heads + head) * qk_dim + m_rows[:, None] * (num_heads * qk_dim)
    )
    grad_type = dq_ptr.dtype.element_ty
    tl.store(dq_rows + d0[None, :], (dq0 * scale).to(grad_type), mask=inside & (d0[None, :] < qk_dim))
    if D1 > 0:
        tl.store(dq_rows + d1[None, :], (dq1 * scale).to(grad_type), mask=inside & (d1[None, :] < qk_dim))


def _launch_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    config_kv: PrefillConfig,
    config_q: PrefillConfig,
) -> None:
    """Fill the contiguous gradients `dq`, `dk`, `dv`. `dlse` may be None; the last dim of `dout` has stride 1."""
    total_q, num_heads, qk_dim = q.shape
    total_k, num_kv_heads, v_dim = v.shape
    batch = cu_seqlens_q.numel() - 1
    split = split_head_dim(qk_dim)
    width_v = value_width(v_dim)
    lse2 = torch.empty((num_heads, total_q), dtype=torch.float32, device=q.device)
    delta = torch.empty_like(lse2)
    shared = {
        "GROUPS": num_heads // num_kv_heads,
        "CAUSAL": causal,
        "D0": split.main,
        "D1": split.rest,
        "DV": width_v,
        "PAD_QK": split.padded,
        "PAD_V": width_v != v_dim,
    }
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2])
    if total_q:
        _prefill_delta_kernel[(triton.cdiv(total_q, _ROWS_AT_ONCE), num_heads)](
            out,
            dout,
            lse,
            dlse,
            lse2,
            delta,
            total_q,
            num_heads,
            *out.stride()[:2],
            *dout.stride()[:2],
            v_dim,
            HAS_DLSE=dlse is not None,
            DV=width_v,
            ROWS=_ROWS_AT_ONCE,
        )
    if total_k:
        tiles = total_k // config_kv.block_n + batch + 1
        _prefill_backward_kv_kernel[(tiles * num_kv_heads,)](
            q,
            k,
            v,
            dout,
            lse2,
            delta,
            dk,
            dv,
            cu_seqlens_q,
            cu_seqlens_k,
            total_q,
            total_k,
            batch,
            tiles,
            num_kv_heads,
            heads_in_l2(num_kv_heads, total_q, batch, num_heads // num_kv_heads * (qk_dim + v_dim) * q.element_size()),
            softmax_scale,
            *strides,
            qk_dim,
            v_dim,
            BLOCK_M=config_kv.block_m,
            BLOCK_N=config_kv.block_n,
            STAGES=config_kv.num_stages,
            num_warps=config_kv.num_warps,
            num_stages=config_kv.num_stages,
            **shared,
        )
    if total_q:
        tiles = total_q // config_q.block_m + batch + 1
        groups = num_heads // num_kv_heads
        _prefill_backward_q_kernel[(tiles * num_heads,)](
            q,
            k,
            v,
            dout,
            lse2,
            delta,
            dq,
            cu_seqlens_q,
            cu_seqlens_k,
            total_q,
            batch,
            tiles,
            num_heads,
            groups * heads_in_l2(num_kv_heads, total_k, batch, (qk_dim + v_dim) * k.element_size()),
            softmax_scale,
            *strides,
            qk_dim,
            v_dim,
            BLOCK_M=config_q.block_m,
            BLOCK_N=config_q.block_n,
            STAGES=config_q.num_stages,
            num_warps=config_q.num_warps,
            num_stages=config_q.num_stages,
            **shared,
        )
