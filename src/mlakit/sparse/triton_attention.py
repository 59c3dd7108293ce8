"""Attention over keys that indices name, in Triton, for every GPU from sm_80 up: prefill and decode are one kernel.

A program takes a tile of one token's heads (all of them share the token's keys) and a piece of its indices, BLOCK_N
keys a step. Keys are gathered straight from where they lie; an index that is not valid reads nothing and scores -inf.
Indices are read one step ahead: else every step's copies wait for them.

There are two forms. The plain one is for few heads and for GPUs without warpgroup instructions. The other, WGMMA, is
for 64 rows on Hopper, where Triton makes 225 TFLOP/s of the obvious code and 320 of this; see `_warpgroup_tile`.
"""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from mlakit.triton_e4m3 import e4m3_to_fp32

# Values of the float8 cache that share a scale.
GROUP = tl.constexpr(128)


@triton.jit
def _offsets(index, stride_kp, STRIDE_KT: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Where tokens begin, in elements: 64 bits, as a cache may hold more than 2^31. Of no use if the index is invalid.

    Without a sign and by a constant an address is one instruction, where it was nine and there are 18 a step.
    """
    if PAGE_SIZE == 0:  # pages follow one another
        offset = index.to(tl.uint32).to(tl.int64) * STRIDE_KT
    else:
        page = index // PAGE_SIZE
        offset = page.to(tl.int64) * stride_kp + (index - page * PAGE_SIZE).to(tl.uint32).to(tl.int64) * STRIDE_KT
    return offset


@triton.jit
def _dequantized(kv_ptr, offset, valid, first, RANK: tl.constexpr, WIDTH: tl.constexpr, NATIVE: tl.constexpr):
    """Columns `first` to `first + WIDTH` of a tile's keys out of the float8 cache, float32."""
    scale_ptr = kv_ptr.to(tl.pointer_type(tl.float32), bitcast=True) + (RANK // 4 + first // GROUP)
    if WIDTH < GROUP:
        codes = tl.load(kv_ptr + offset[:, None] + (first + tl.arange(0, WIDTH))[None, :], mask=valid[:, None], other=0)
        scale = tl.load(scale_ptr + offset // 4, mask=valid, other=0.0)
        values = e4m3_to_fp32(codes, NATIVE) * scale[:, None]
    else:
        group = tl.arange(0, WIDTH // GROUP)
        column = first + group[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
        codes = tl.load(kv_ptr + offset[:, None, None] + column, mask=valid[:, None, None], other=0)
        scale = tl.load(scale_ptr + (offset // 4)[:, None] + group[None, :], mask=valid[:, None], other=0.0)
        values = tl.reshape(e4m3_to_fp32(codes, NATIVE) * scale[:, :, None], [offset.shape[0], WIDTH])
    return values


@triton.jit
def _rope(kv_ptr, offset, valid, r, RANK: tl.constexpr, FP8: tl.constexpr):
    """The rope part of a tile's keys."""
    if FP8:
        rope_ptr = kv_ptr.to(tl.pointer_type(tl.bfloat16), bitcast=True) + (RANK // 2 + 2 * (RANK // GROUP))
        part = tl.load(rope_ptr + (offset // 2)[:, None] + r[None, :], mask=valid[:, None], other=0.0)
    else:
        part = tl.load(kv_ptr + RANK + offset[:, None] + r[None, :], mask=valid[:, None], other=0.0)
    return part


@triton.jit
def _plain_tile(
    q_at, live, kv_ptr, indices_ptr, begin, end, s_kv, scale_log2, stride_kp,
    STRIDE_KT: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The largest score (log2), the sum of weights and the two halves of the weighted sum, for any number of rows.

    Two chains of products for the scores, as one of 36 small instructions waits for itself.
    """
    HALF: tl.constexpr = RANK // 2
    c = tl.arange(0, HALF)
    r = tl.arange(0, ROPE if ROPE > 0 else 16)
    n = tl.arange(0, BLOCK_N)
    q_a = tl.load(q_at[:, None] + c[None, :], mask=live[:, None], other=0.0)
    q_b = tl.load(q_at[:, None] + (HALF + c)[None, :], mask=live[:, None], other=0.0)
    q_r = q_a
    if ROPE > 0:
        q_r = tl.load(q_at[:, None] + (RANK + r)[None, :], mask=live[:, None], other=0.0)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_a = tl.zeros([BLOCK_M, HALF], tl.float32)
    acc_b = tl.zeros([BLOCK_M, HALF], tl.float32)
    index = tl.load(indices_ptr + begin + n, mask=begin + n < end, other=-1)
    for i in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        valid = index.to(tl.uint32) < s_kv  # below 0 is far above
        offset = _offsets(index, stride_kp, STRIDE_KT, PAGE_SIZE)
        if FP8:
            k_a = _dequantized(kv_ptr, offset, valid, 0, RANK, HALF, NATIVE).to(q_a.dtype)
            k_b = _dequantized(kv_ptr, offset, valid, HALF, RANK, HALF, NATIVE).to(q_a.dtype)
        else:
            k_a = tl.load(kv_ptr + offset[:, None] + c[None, :], mask=valid[:, None], other=0.0)
            k_b = tl.load(kv_ptr + offset[:, None] + (HALF + c)[None, :], mask=valid[:, None], other=0.0)
        s = tl.dot(q_a, tl.trans(k_a))
        if ROPE > 0:
            k_r = _rope(kv_ptr, offset, valid, r, RANK, FP8).to(q_a.dtype)
            s = tl.dot(q_r, tl.trans(k_r), s)
        index = tl.load(indices_ptr + i + BLOCK_N + n, mask=i + BLOCK_N + n < end, other=-1)
        # Scaled one by one, or Triton would make it one chain again.
        s = s * scale_log2 + tl.dot(q_b, tl.trans(k_b)) * scale_log2
        s = tl.where(valid[None, :], s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)  # no key yet: 0 instead of inf - inf
        alpha = tl.exp2(m - shift)
        p = tl.exp2(s - shift[:, None])
        l = l * alpha[:, None] + p
        m = m_new
        acc_a = tl.dot(p.to(k_a.dtype), k_a, acc_a * alpha[:, None])
        acc_b = tl.dot(p.to(k_b.dtype), k_b, acc_b * alpha[:, None])
    return m, tl.sum(l, 1), acc_a, acc_b


@triton.jit
def _warpgroup_tile(
    q_at, live, kv_ptr, indices_ptr, begin, end, s_kv, scale_log2, stride_kp,
    STRIDE_KT: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same for 64 rows on Hopper: the largest score, the sum of weights, the weighted sum.

    Three things here are for Triton's compiler, and change no result:
    - The product for the scores stands in a branch that is always taken. Where Triton sees a product's result flow into
      another product it gives all warps to rows, and with 64 rows both warpgroups then compute the same scores. LLVM
      removes the branch; the other side holds a product too, so that no layout is converted inside.
    - Scores are keys x heads, and keys are loaded as columns and transposed at both products, once inside the branch
      and once outside. Then the copies of a step are issued two steps ahead into two buffers, and not one step ahead
      (exposed) or into three (too much shared memory).
    - Sums of weights are kept for 8 rows of each warp, to be added up at the end and not across warps in every step.
    """
    c = tl.arange(0, RANK)
    r = tl.arange(0, ROPE if ROPE > 0 else 16)
    n = tl.arange(0, BLOCK_N)
    q_c = tl.trans(tl.load(q_at[:, None] + c[None, :], mask=live[:, None], other=0.0))
    q_r = q_c
    if ROPE > 0:
        q_r = tl.trans(tl.load(q_at[:, None] + (RANK + r)[None, :], mask=live[:, None], other=0.0))
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_N // 16, 8, BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, RANK], tl.float32)
    index = tl.load(indices_ptr + begin + n, mask=begin + n < end, other=-1)
    for i in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        valid = index.to(tl.uint32) < s_kv  # below 0 is far above
        offset = _offsets(index, stride_kp, STRIDE_KT, PAGE_SIZE)
        k_c = tl.load(kv_ptr + offset[None, :] + c[:, None], mask=valid[None, :], other=0.0)
        if ROPE > 0:
            k_r = tl.load(kv_ptr + RANK + offset[None, :] + r[:, None], mask=valid[None, :], other=0.0)
            if i < end:
                s = tl.dot(tl.trans(k_c), q_c) * scale_log2 + tl.dot(tl.trans(k_r), q_r) * scale_log2
            else:
                s = tl.dot(tl.trans(k_r), q_r)
        else:
            if i < end:
                s = tl.dot(tl.trans(k_c), q_c) * scale_log2
            else:
                s = tl.dot(tl.trans(k_c), q_c)
        s = tl.where(valid[:, None], s, -float("inf"))
        index = tl.load(indices_ptr + i + BLOCK_N + n, mask=i + BLOCK_N + n < end, other=-1)
        m_new = tl.maximum(m, tl.max(s, 0))
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        alpha = tl.exp2(m - shift)
        p = tl.exp2(s - shift[None, :])
        l = l * alpha[None, None, :] + tl.sum(tl.reshape(p, [BLOCK_N // 16, 2, 8, BLOCK_M]), 1)
        m = m_new
        acc = tl.dot(tl.trans(p.to(k_c.dtype)), tl.trans(k_c), acc * alpha[:, None])
    return m, tl.sum(tl.sum(l, 0), 0), acc


@triton.jit
def _warpgroup_fp8_tile(
    q_at, live, kv_ptr, indices_ptr, begin, end, s_kv, scale_log2, stride_kp,
    STRIDE_KT: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, NATIVE: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`_warpgroup_tile` for the float8 cache: keys pass through registers, so that scores are heads x keys (the second
    operand is the one that is always read from shared memory, where the dequantized tile lies once for both products).
    """
    c = tl.arange(0, RANK)
    r = tl.arange(0, ROPE if ROPE > 0 else 16)
    n = tl.arange(0, BLOCK_N)
    q_c = tl.load(q_at[:, None] + c[None, :], mask=live[:, None], other=0.0)
    q_r = q_c
    if ROPE > 0:
        q_r = tl.load(q_at[:, None] + (RANK + r)[None, :], mask=live[:, None], other=0.0)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_M, 2], tl.float32)
    acc = tl.zeros([BLOCK_M, RANK], tl.float32)
    index = tl.load(indices_ptr + begin + n, mask=begin + n < end, other=-1)
    for i in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        valid = index.to(tl.uint32) < s_kv  # below 0 is far above
        offset = _offsets(index, stride_kp, STRIDE_KT, PAGE_SIZE)
        k_c = _dequantized(kv_ptr, offset, valid, 0, RANK, RANK, NATIVE).to(q_c.dtype)
        if ROPE > 0:
            k_r = _rope(kv_ptr, offset, valid, r, RANK, True).to(q_c.dtype)
            if i < end:
                s = tl.dot(q_c, tl.trans(k_c)) * scale_log2 + tl.dot(q_r, tl.trans(k_r)) * scale_log2
            else:
                s = tl.dot(q_r, tl.trans(k_r))
        else:
            if i < end:
                s = tl.dot(q_c, tl.trans(k_c)) * scale_log2
            else:
                s = tl.dot(q_c, tl.trans(k_c))
        s = tl.where(valid[None, :], s, -float("inf"))
        index = tl.load(indices_ptr + i + BLOCK_N + n, mask=i + BLOCK_N + n < end, other=-1)
        m_new = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        alpha = tl.exp2(m - shift)
        p = tl.exp2(s - shift[:, None])
        l = l * alpha[:, None] + tl.sum(tl.reshape(p, [BLOCK_M, 2, BLOCK_N // 2]), 2)
        m = m_new
        acc = tl.dot(p.to(k_c.dtype), k_c, acc * alpha[:, None])
    return m, tl.sum(l, 1), acc


@triton.jit
def _finish(m, l, sink_at, live, SINK: tl.constexpr, SPLIT: tl.constexpr):
    """What to multiply the weighted sum by, and the lse (log2). With pieces the sink comes when they are merged."""
    inverse = tl.where(l == 0.0, 0.0, 1.0 / l)
    lse = tl.where(l == 0.0, -float("inf"), m + tl.log2(l))
    if SINK and not SPLIT:
        sink = tl.load(sink_at, mask=live, other=0.0) * 1.4426950408889634
        inverse = tl.where(l == 0.0, 0.0, inverse / (1.0 + tl.exp2(sink - lse)))
    return inverse, lse


# What changes from batch to batch must not recompile; the strides of indices and lengths follow from topk.
@triton.jit(
    do_not_specialize=[
        "q_len", "topk", "s_kv", "splits", "stride_ib", "stride_is", "stride_ih", "stride_lb", "stride_ls",
    ]
)  # fmt: skip
def _mla_sparse_kernel(
    q_ptr,
    kv_ptr,
    indices_ptr,
    sink_ptr,
    length_ptr,
    out_ptr,
    max_ptr,
    lse_ptr,
    partial_ptr,  # [tokens, splits, heads, RANK] float32
    partial_lse_ptr,  # [tokens, splits, heads] float32, base 2
    scale_log2,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kp,
    stride_kh,
    stride_ib,
    stride_is,
    stride_ih,
    stride_lb,
    stride_ls,
    stride_ob,
    stride_os,
    stride_oh,
    q_len,
    heads,
    group,
    row_tiles,
    topk,
    s_kv,
    splits,
    STRIDE_KT: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SINK: tl.constexpr,
    LENGTH: tl.constexpr,
    MAX_LOGITS: tl.constexpr,
    SPLIT: tl.constexpr,
    DEPENDENT: tl.constexpr,
    WGMMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    LN2: tl.constexpr = 0.6931471805599453
    # The tiles of one piece run side by side and share its keys in L2.
    tile = tl.program_id(0) % row_tiles
    rest = tl.program_id(0) // row_tiles
    piece = rest % splits
    token = rest // splits
    request = (token // q_len).to(tl.int64)
    s = (token % q_len).to(tl.int64)
    group_tiles = tl.cdiv(group, BLOCK_M)
    kv_head = tile // group_tiles
    row = (tile % group_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < group
    head = kv_head * group + row

    count = topk
    if LENGTH:
        count = tl.minimum(tl.maximum(tl.load(length_ptr + request * stride_lb + s * stride_ls), 0), topk)
    begin = 0
    end = count
    if SPLIT:
        tiles = tl.cdiv(count, BLOCK_N).to(tl.int64)
        begin = (piece * tiles // splits).to(tl.int32) * BLOCK_N
        end = tl.minimum(((piece + 1) * tiles // splits).to(tl.int32) * BLOCK_N, count)

    q_at = q_ptr + request * stride_qb + s * stride_qs + head.to(tl.int64) * stride_qh
    kv_ptr += kv_head.to(tl.int64) * stride_kh
    indices_ptr += request * stride_ib + s * stride_is + kv_head.to(tl.int64) * stride_ih
    if WGMMA:
        if FP8:
            m, l, acc = _warpgroup_fp8_tile(
                q_at, live, kv_ptr, indices_ptr, begin, end, s_kv, scale_log2, stride_kp,
                STRIDE_KT, RANK, ROPE, NATIVE, PAGE_SIZE, BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
        else:
            m, l, acc = _warpgroup_tile(
                q_at, live, kv_ptr, indices_ptr, begin, end, s_kv, scale_log2, stride_kp,
                STRIDE_KT, RANK, ROPE, PAGE_SIZE, BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
        inverse, lse = _finish(m, l, sink_ptr + head, live, SINK, SPLIT)
        c = tl.arange(0, RANK)
        acc = acc * inverse[:, None]
        if SPLIT:
            part = (token.to(tl.int64) * splits + piece) * heads + head
            tl.store(partial_ptr + part[:, None] * RANK + c[None, :], acc, mask=live[:, None])
        else:
            result = out_ptr + request * stride_ob + s * stride_os + head.to(tl.int64) * stride_oh
            tl.store(result[:, None] + c[None, :], acc.to(out_ptr.dtype.element_ty), mask=live[:, None])
    else:
        m, l, acc_a, acc_b = _plain_tile(
            q_at, live, kv_ptr, indices_ptr, begin, end, s_kv, scale_log2, stride_kp,
            STRIDE_KT, RANK, ROPE, FP8, NATIVE, PAGE_SIZE, BLOCK_M, BLOCK_N, STAGES,
        )  # fmt: skip
        inverse, lse = _finish(m, l, sink_ptr + head, live, SINK, SPLIT)
        acc_a = acc_a * inverse[:, None]
        acc_b = acc_b * inverse[:, None]
        HALF: tl.constexpr = RANK // 2
        h = tl.arange(0, HALF)
        if SPLIT:
            part = (token.to(tl.int64) * splits + piece) * heads + head
            tl.store(partial_ptr + part[:, None] * RANK + h[None, :], acc_a, mask=live[:, None])
            tl.store(partial_ptr + part[:, None] * RANK + (HALF + h)[None, :], acc_b, mask=live[:, None])
        else:
            result = out_ptr + request * stride_ob + s * stride_os + head.to(tl.int64) * stride_oh
            tl.store(result[:, None] + h[None, :], acc_a.to(out_ptr.dtype.element_ty), mask=live[:, None])
            tl.store(result[:, None] + (HALF + h)[None, :], acc_b.to(out_ptr.dtype.element_ty), mask=live[:, None])
    if SPLIT:
        tl.store(partial_lse_ptr + (token.to(tl.int64) * splits + piece) * heads + head, lse, mask=live)
    else:
        at = token.to(tl.int64) * heads + head
        tl.store(lse_ptr + at, lse * LN2, mask=live)
        if MAX_LOGITS:
            tl.store(max_ptr + at, m * LN2, mask=live)
    if DEPENDENT:
        gdc_launch_dependents()
