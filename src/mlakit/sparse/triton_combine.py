"""Merging the partial results of a token's pieces, weighted by their softmax denominators."""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit(do_not_specialize=["q_len", "splits"])
def _mla_sparse_combine_kernel(
    partial_ptr,  # [tokens, splits, heads, RANK] float32
    partial_lse_ptr,  # [tokens, splits, heads] float32, base 2
    sink_ptr,
    out_ptr,
    lse_ptr,
    stride_ob,
    stride_os,
    stride_oh,
    q_len,
    heads,
    splits,
    RANK: tl.constexpr,
    SINK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program merges BLOCK_C columns of one head of one token; all pieces are loaded at once, so that latency is
    paid once.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    token = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    piece = tl.arange(0, BLOCK_P)
    at = (token * splits + piece) * heads + head
    if DEPENDENT:
        gdc_wait()
    part_lse = tl.load(partial_lse_ptr + at, mask=piece < splits, other=-float("inf"))
    part = tl.load(partial_ptr + at[:, None] * RANK + cols[None, :], mask=(piece < splits)[:, None], other=0.0)
    m = tl.max(part_lse, 0)
    shift = tl.where(m == -float("inf"), 0.0, m)  # a row that has no key: 0 instead of inf - inf
    weight = tl.exp2(part_lse - shift)
    l = tl.sum(weight, 0)
    lse = tl.where(l == 0.0, -float("inf"), m + tl.log2(l))
    scale = tl.where(l == 0.0, 0.0, 1.0 / l)
    if SINK:
        scale = tl.where(l == 0.0, 0.0, scale / (1.0 + tl.exp2(tl.load(sink_ptr + head) * LOG2E - lse)))
    out = tl.sum(part * weight[:, None], 0) * scale
    base = out_ptr + token // q_len * stride_ob + token % q_len * stride_os + head.to(tl.int64) * stride_oh
    tl.store(base + cols, out.to(out_ptr.dtype.element_ty))
    if tl.program_id(1) == 0:
        tl.store(lse_ptr + token * heads + head, lse * LN2)
