"""Attention over keys that indices name, on Hopper: 64 heads a program, two warpgroups that multiply, one that gathers.

Keys come in pairs of tiles of 64. The left warpgroup computes the scores of the first tile and owns the left half of
the output, the right one those of the second tile and the right half. Each multiplies its own weights, from registers,
with its half of its own tile, then the other's, from shared memory, with its half of the other's. The running maximum
travels through shared memory, from the left to the right one and back.

The gathering warpgroup fills half a tile as soon as the one warpgroup that reads it as values is done with it, and runs
ahead into the next token's keys. Weights lie where the tile's rope part was, which has been multiplied by then.
"""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mlakit.hopper_counters import arrive, await_all
from mlakit.sparse.hopper_gather import gather
from mlakit.sparse.hopper_gather_fp8 import gather_fp8
from mlakit.sparse.hopper_merge import merge
from mlakit.sparse.hopper_work import item_of


@gluon.constexpr_function
def _output_layout():
    """Each thread holds 8 neighbouring columns of [64, 256], so that it stores 16 bytes at once; from the product's
    layout it is an exchange within each warp.
    """
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    registers = [[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [0, 128], [8, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, 256])


@gluon.jit
def _same_for_warp(value):
    """`value`, which all threads of a warp have in common, so that the compiler knows that they do."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _finite(m):
    """What to subtract from scores whose maximum is m, which is -inf where a row has not seen a key yet."""
    return gl.where(m == -float("inf"), 0.0, m)


@gluon.jit
def _sum(p, numbers, kept, W: gl.constexpr, of_key: gl.constexpr, FP8: gl.constexpr):
    if FP8:
        p = p * numbers.index(kept + 4 + W).load(of_key)[None, :]
    return gl.sum(p, 1)


@gluon.jit
def _part_of_scores(
    s, queries, keys, full, phase, zero, TILE: gl.constexpr, HALF: gl.constexpr, PART: gl.constexpr,
    PARTS: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    WIDTH: gl.constexpr = 256 // PARTS
    mbarrier.wait(full.index((2 * TILE + HALF) * PARTS + PART), phase)
    q = queries.index(zero + HALF)
    k = keys.index(zero + 2 * TILE + HALF)
    if PARTS > 1:
        q = q.slice(PART * WIDTH, WIDTH, 1)
        k = k.slice(PART * WIDTH, WIDTH, 1)
    return warpgroup_mma(q, k.permute((1, 0)), s, use_acc=ADD, is_async=True)


@gluon.jit
def _scores(
    queries, q_rope, keys, ropes, full, phase, zero, layout: gl.constexpr, TILE: gl.constexpr, ROPE: gl.constexpr,
    PARTS: gl.constexpr,
):  # fmt: skip
    """Q K^T of a tile: the half of the columns that is filled first, then the other one and the rope part."""
    s = gl.zeros([64, 64], gl.float32, layout)
    for i in gl.static_range(PARTS):
        s = _part_of_scores(s, queries, keys, full, phase, zero, TILE, TILE, i, PARTS, i > 0)
    for i in gl.static_range(PARTS):
        if ROPE and i == 0:
            mbarrier.wait(full.index((2 * TILE + 1 - TILE) * PARTS), phase)
            s = warpgroup_mma(q_rope.index(zero), ropes.index(zero + TILE).permute((1, 0)), s, is_async=True)
        s = _part_of_scores(s, queries, keys, full, phase, zero, TILE, 1 - TILE, i, PARTS, True)
    return warpgroup_mma_wait(0, [s])


@gluon.jit
def _exponent(largest):
    """What power of two is taken out of a row of queries, so that its largest is from 2^14 to 2^15."""
    return gl.maximum((largest.to(gl.int32, bitcast=True) >> 23) - 127, -30) - 14


@gluon.jit
def _power(exponent):
    """2^exponent, from -126 to 127."""
    return ((exponent + 127) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _convert_queries(
    queries, q_rope, peaks, told_q, told_c, phase, live, zero, of_row: gl.constexpr, W: gl.constexpr,
    SPLIT: gl.constexpr,
):  # fmt: skip
    """Turn bfloat16 queries into float16 where they lie, each warpgroup its half; what was taken out of rows.

    Where programs have few keys, in loops that stay loops: they wait for instructions that come from memory, and a
    quarter of them takes 7000 clocks instead of 11000. Instructions that are there take 1500 more.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    of_query: gl.constexpr = gl.SliceLayout(1, layout)
    STEPS: gl.constexpr = 4 if SPLIT else 1
    given = queries._reinterpret(q_rope.dtype, [2 * STEPS, 64, 256 // STEPS], queries.layout)
    taken = queries._reinterpret(gl.float16, [2 * STEPS, 64, 256 // STEPS], queries.layout)
    r = gl.arange(0, 64, of_query)
    x = given.index(W * STEPS).load(layout).to(gl.float32)
    peak = gl.max(gl.abs(x), 1)
    if SPLIT:
        for i in range(W * STEPS + 1, W * STEPS + STEPS + zero):
            peak = gl.maximum(peak, gl.max(gl.abs(given.index(i).load(layout).to(gl.float32)), 1))
    peak = gl.where(r < live, peak, 0.0)
    peaks.index(W).store(peak)
    mbarrier.arrive(told_q.index(W), count=1)
    mbarrier.wait(told_q.index(1 - W), phase)
    factor = _power(-_exponent(gl.maximum(peak, peaks.index(1 - W).load(of_query))))
    unit = _power(_exponent(gl.maximum(peaks.index(0).load(of_row), peaks.index(1).load(of_row))))
    if SPLIT:
        for i in range(W * STEPS, W * STEPS + STEPS + zero):
            taken.index(i).store((given.index(i).load(layout).to(gl.float32) * factor[:, None]).to(gl.float16))
    else:
        taken.index(W).store((x * factor[:, None]).to(gl.float16))
    if W == 0:
        x = q_rope.index(0).load(layout).to(gl.float32)
        q_rope.index(0).store((x * factor[:, None]).to(q_rope.dtype))
    fence_async_shared()
    mbarrier.arrive(told_c.index(W), count=1)
    mbarrier.wait(told_c.index(1 - W), phase)
    return unit


@gluon.jit
def _attend(
    W: gl.constexpr, length_ptr, sink_ptr, out_ptr, max_ptr, lse_ptr, partial_ptr, partial_lse_ptr, counter_ptr,
    scale_log2, stride_lb, stride_ls, stride_ob, stride_os, stride_oh, items, q_len, heads, group, row_tiles, topk,
    splits, zero, queries, q_rope, keys, ropes, weights, numbers, maxima, factors, sums,
    full, empty, full_q, empty_q, full_b, told_m, told_s, told_p, told_l, peaks, told_q, told_c,
    ROPE: gl.constexpr, SINK: gl.constexpr, LENGTH: gl.constexpr, MAX_LOGITS: gl.constexpr, SPLIT: gl.constexpr,
    FP8: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """One warpgroup, W = 0 the left one and 1 the right one, over all items of its program."""
    DTYPE: gl.constexpr = keys.dtype
    LN2: gl.constexpr = 0.6931471805599453
    LOG2E: gl.constexpr = 1.4426950408889634
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, output, 2)
    of_row: gl.constexpr = gl.SliceLayout(1, score)
    of_key: gl.constexpr = gl.SliceLayout(0, score)
    of_out_row: gl.constexpr = gl.SliceLayout(1, output)
    stored: gl.constexpr = _output_layout()
    passed = gl.program_id(0) * 0  # pairs so far: the parity of every barrier that turns once a pair
    done = gl.program_id(0) * 0  # items so far

    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        token, piece, _kv_head, head, live, first, last, _end = item_of(
            item, length_ptr, stride_lb, stride_ls, q_len, group, row_tiles, topk, splits, LENGTH, SPLIT
        )
        m = gl.full([64], -float("inf"), gl.float32, of_row)
        l = gl.zeros([64], gl.float32, of_row)
        o = gl.zeros([64, 256], gl.float32, output)
        mbarrier.wait(full_q, done & 1)
        if FP8:
            unit = _convert_queries(queries, q_rope, peaks, told_q, told_c, done & 1, live, zero, of_row, W, SPLIT)
        for pair in range(first, last):
            phase = passed & 1
            passed += 1
            z = _same_for_warp(pair * zero)
            k_al = keys.index(z)
            k_ar = keys.index(z + 1)
            k_bl = keys.index(z + 2)
            k_br = keys.index(z + 3)
            s = _scores(queries, q_rope, keys, ropes, full, phase, z, score, W, ROPE, PARTS)
            if pair == last - 1:
                mbarrier.arrive(empty_q, count=1)
            kept = phase * 6
            if FP8:  # the key's power of two counts as a part of its score, and is taken out of its weight below
                power = numbers.index(kept + 2 + W).load(of_key)[None, :]
                s = s * unit[:, None] * power + numbers.index(kept + W).load(of_key)[None, :]
            else:
                mbarrier.wait(full_b.index(W), phase)
                s = s * scale_log2 + numbers.index(W).load(of_key)[None, :]
            if W == 0:
                m_new = gl.maximum(m, gl.max(s, 1))
                shift = _finite(m_new)
                factor = gl.exp2(m - shift)
                maxima.index(0).store(m_new)
                factors.index(0).store(factor)
                mbarrier.arrive(told_m, count=1)
                p = gl.exp2(s - shift[:, None])
                l = l * factor + _sum(p, numbers, kept, W, of_key, FP8)
                o = o * gl.convert_layout(factor, of_out_row)[:, None]
                own = gl.convert_layout(p.to(DTYPE), operand)
                o = warpgroup_mma(own, k_al, o, is_async=True)
                mbarrier.wait(told_s, phase)
                m = maxima.index(1).load(of_row)
                later = factors.index(1).load(of_row)
                weights.index(0).store((p * later[:, None]).to(DTYPE))
                fence_async_shared()
                mbarrier.arrive(told_p.index(0), count=1)
                l = l * later
                o, own = warpgroup_mma_wait(0, [o, own])
                mbarrier.arrive(empty.index(0), count=1)
                o = o * gl.convert_layout(later, of_out_row)[:, None]
                mbarrier.wait(told_p.index(1), phase)
                o = warpgroup_mma(weights.index(z + 1), k_bl, o, is_async=True)
                o = warpgroup_mma_wait(0, [o])
                mbarrier.arrive(empty.index(2), count=1)
            else:
                own_max = gl.max(s, 1)
                mbarrier.wait(told_m, phase)
                m = maxima.index(0).load(of_row)
                earlier = factors.index(0).load(of_row)
                m_new = gl.maximum(m, own_max)
                shift = _finite(m_new)
                factor = gl.exp2(m - shift)
                maxima.index(1).store(m_new)
                factors.index(1).store(factor)
                mbarrier.arrive(told_s, count=1)
                p = gl.exp2(s - shift[:, None])
                rounded = p.to(DTYPE)
                weights.index(1).store(rounded)
                fence_async_shared()
                mbarrier.arrive(told_p.index(1), count=1)
                factor = factor * earlier
                l = l * factor + _sum(p, numbers, kept, W, of_key, FP8)
                o = o * gl.convert_layout(factor, of_out_row)[:, None]
                own = gl.convert_layout(rounded, operand)
                o = warpgroup_mma(own, k_br, o, is_async=True)
                mbarrier.wait(told_p.index(0), phase)
                o = warpgroup_mma(weights.index(z), k_ar, o, is_async=True)
                o, own = warpgroup_mma_wait(1, [o, own])
                mbarrier.arrive(empty.index(3), count=1)
                o = warpgroup_mma_wait(0, [o])
                mbarrier.arrive(empty.index(1), count=1)
                m = m_new

        sums.index(W).store(l)
        mbarrier.arrive(told_l.index(W), count=1)
        mbarrier.wait(told_l.index(1 - W), done & 1)
        done += 1
        l = l + sums.index(1 - W).load(of_row)
        lse = gl.where(l == 0.0, -float("inf"), m + gl.log2(l))
        inverse = gl.where(l == 0.0, 0.0, 1.0 / l)
        row = gl.arange(0, 64, of_row)
        if SINK and not SPLIT:  # with pieces the sink comes when they are merged
            sink = gl.load(sink_ptr + head + row, mask=row < live, other=0.0) * LOG2E
            inverse = gl.where(l == 0.0, 0.0, inverse / (1.0 + gl.exp2(sink - lse)))
        o = o * gl.convert_layout(inverse, of_out_row)[:, None]
        if SPLIT:
            at = (token.to(gl.int64) * splits + piece) * heads + head
            result = gl.convert_layout(o.to(partial_ptr.dtype.element_ty), stored)
            r = gl.arange(0, 64, gl.SliceLayout(1, stored))
            c = W * 256 + gl.arange(0, 256, gl.SliceLayout(0, stored))
            gl.store(partial_ptr + at * 512 + (r[:, None] * 512 + c[None, :]), result, mask=(r < live)[:, None])
            if W == 0:
                gl.store(partial_lse_ptr + at + row, lse, mask=row < live)
            counter = token * row_tiles + item % row_tiles
            arrive(counter_ptr + counter, (piece == 0) & (W == 0), 2 * splits)
        else:
            result = gl.convert_layout(o.to(out_ptr.dtype.element_ty), stored)
            r = gl.arange(0, 64, gl.SliceLayout(1, stored))
            c = W * 256 + gl.arange(0, 256, gl.SliceLayout(0, stored))
            base = out_ptr + (token // q_len) * stride_ob + (token % q_len) * stride_os + head * stride_oh
            gl.store(base + (r[:, None] * stride_oh.to(gl.int32) + c[None, :]), result, mask=(r < live)[:, None])
            if W == 0:
                at = token.to(gl.int64) * heads + head
                gl.store(lse_ptr + at + row, lse * LN2, mask=row < live)
                if MAX_LOGITS:
                    gl.store(max_ptr + at + row, m * LN2, mask=row < live)
    if SPLIT:  # pieces are merged by the programs that computed them, each some rows
        for item in range(gl.program_id(0), items, gl.num_programs(0)):
            token, piece, _kv_head, head, live, first, last, _end = item_of(
                item, length_ptr, stride_lb, stride_ls, q_len, group, row_tiles, topk, splits, LENGTH, SPLIT
            )
            await_all(counter_ptr + (token * row_tiles + item % row_tiles))
            at = token.to(gl.int64) * splits * heads + head
            base = out_ptr + (token // q_len) * stride_ob + (token % q_len) * stride_os + head * stride_oh
            merge(
                partial_ptr + at * 512, partial_lse_ptr + at, sink_ptr + head, base,
                lse_ptr + (token.to(gl.int64) * heads + head), gl.minimum(live, 64), piece, splits, heads, stride_oh,
                W * 256, SINK,
            )  # fmt: skip


# What changes from batch to batch must not recompile; `zero` must stay unknown.
@gluon.jit(
    do_not_specialize=[
        "stride_qb", "stride_qs", "stride_qh", "stride_kp", "stride_kh", "stride_ib", "stride_is", "stride_ih",
        "stride_lb", "stride_ls", "items", "q_len", "heads", "group", "row_tiles", "topk", "s_kv", "splits", "zero",
    ]
)  # fmt: skip
def _mla_sparse_hopper_kernel(
    q_ptr, kv_ptr, indices_ptr, length_ptr, sink_ptr, out_ptr, max_ptr, lse_ptr,
    partial_ptr,  # [tokens, splits, heads, 512], out's dtype
    partial_lse_ptr,  # [tokens, splits, heads] float32, base 2
    counter_ptr,  # [tokens * row_tiles], `hopper_counters`
    scale_log2, stride_qb: gl.int64, stride_qs: gl.int64, stride_qh: gl.int64, stride_kp: gl.int64, stride_kh: gl.int64,
    stride_ib: gl.int64, stride_is: gl.int64, stride_ih: gl.int64,
    stride_lb: gl.int64, stride_ls: gl.int64, stride_ob: gl.int64, stride_os: gl.int64, stride_oh: gl.int64,
    items, q_len, heads, group, row_tiles, topk, s_kv, splits, zero,
    STRIDE_KT: gl.constexpr, ROPE: gl.constexpr, PAGE_SIZE: gl.constexpr, FP8: gl.constexpr,
    SINK: gl.constexpr, LENGTH: gl.constexpr, MAX_LOGITS: gl.constexpr, SPLIT: gl.constexpr,
    PARTS: gl.constexpr, CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = gl.float16 if FP8 else q_ptr.dtype.element_ty
    matrix: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    queries = gl.allocate_shared_memory(DTYPE, [2, 64, 256], matrix)
    keys = gl.allocate_shared_memory(DTYPE, [4, 64, 256], matrix)  # first tile: left, right; second: left, right
    ropes = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [2, 64, 64], matrix)
    weights = ropes
    if FP8:
        weights = ropes._reinterpret(DTYPE, [2, 64, 64], matrix)
    q_rope = queries
    if ROPE:
        q_rope = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [1, 64, 64], matrix)
    # Of each tile's keys: what is added to scores; with the float8 cache also factors of scores and of weights, all
    # twice, so that a pair's can be told before those of the pair before are read.
    numbers = gl.allocate_shared_memory(gl.float32, [12 if FP8 else 2, 64], vector)
    maxima = gl.allocate_shared_memory(gl.float32, [2, 64], vector)
    factors = gl.allocate_shared_memory(gl.float32, [2, 64], vector)
    sums = gl.allocate_shared_memory(gl.float32, [2, 64], vector)
    full = gl.allocate_shared_memory(gl.int64, [4 * PARTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    full_b = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    told_p = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    told_l = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    peaks = sums
    told_q = told_l
    told_c = told_l
    if FP8:
        peaks = gl.allocate_shared_memory(gl.float32, [2, 64], vector)
        told_q = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        told_c = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(told_q.index(i), count=1)
            mbarrier.init(told_c.index(i), count=1)
    full_q = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty_q = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    told_m = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    told_s = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4 * PARTS):
        mbarrier.init(full.index(i), count=1 if FP8 else 128)  # or every thread of the gathering warpgroup
    for i in gl.static_range(4):
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(full_b.index(i), count=1)
        mbarrier.init(told_p.index(i), count=1)
        mbarrier.init(told_l.index(i), count=1)
    mbarrier.init(full_q, count=128)
    mbarrier.init(empty_q, count=2)
    mbarrier.init(told_m, count=1)
    mbarrier.init(told_s, count=1)
    fence_async_shared()
    # Constants keep being constants only in tuples that are written where they are used.
    if FP8:
        gl.warp_specialize(
            [
                (_attend, (
                    0, length_ptr, sink_ptr, out_ptr, max_ptr, lse_ptr, partial_ptr, partial_lse_ptr, counter_ptr,
                    scale_log2, stride_lb, stride_ls, stride_ob, stride_os, stride_oh, items, q_len, heads, group,
                    row_tiles, topk, splits, zero, queries, q_rope, keys, ropes, weights, numbers, maxima, factors,
                    sums, full, empty, full_q, empty_q, full_b, told_m, told_s, told_p, told_l, peaks, told_q, told_c,
                    ROPE, SINK, LENGTH, MAX_LOGITS, SPLIT, FP8, PARTS,
                )),
                (_attend, (
                    1, length_ptr, sink_ptr, out_ptr, max_ptr, lse_ptr, partial_ptr, partial_lse_ptr, counter_ptr,
                    scale_log2, stride_lb, stride_ls, stride_ob, stride_os, stride_oh, items, q_len, heads, group,
                    row_tiles, topk, splits, zero, queries, q_rope, keys, ropes, weights, numbers, maxima, factors,
                    sums, full, empty, full_q, empty_q, full_b, told_m, told_s, told_p, told_l, peaks, told_q, told_c,
                    ROPE, SINK, LENGTH, MAX_LOGITS, SPLIT, FP8, PARTS,
                )),
                (gather_fp8, (
                    q_ptr, kv_ptr, indices_ptr, length_ptr, scale_log2, stride_qb, stride_qs, stride_qh, stride_kp,
                    stride_ib, stride_is, stride_lb, stride_ls, items, q_len, heads, group, row_tiles, topk, s_kv,
                    splits, queries, q_rope, keys, ropes, numbers, full, empty, full_q, empty_q,
                    STRIDE_KT, PAGE_SIZE, LENGTH, SPLIT,
                )),
            ],
            [4, 4],
            [CONSUMER_REGS, PRODUCER_REGS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_attend, (
                    0, length_ptr, sink_ptr, out_ptr, max_ptr, lse_ptr, partial_ptr, partial_lse_ptr, counter_ptr,
                    scale_log2, stride_lb, stride_ls, stride_ob, stride_os, stride_oh, items, q_len, heads, group,
                    row_tiles, topk, splits, zero, queries, q_rope, keys, ropes, weights, numbers, maxima, factors,
                    sums, full, empty, full_q, empty_q, full_b, told_m, told_s, told_p, told_l, peaks, told_q, told_c,
                    ROPE, SINK, LENGTH, MAX_LOGITS, SPLIT, FP8, PARTS,
                )),
                (_attend, (
                    1, length_ptr, sink_ptr, out_ptr, max_ptr, lse_ptr, partial_ptr, partial_lse_ptr, counter_ptr,
                    scale_log2, stride_lb, stride_ls, stride_ob, stride_os, stride_oh, items, q_len, heads, group,
                    row_tiles, topk, splits, zero, queries, q_rope, keys, ropes, weights, numbers, maxima, factors,
                    sums, full, empty, full_q, empty_q, full_b, told_m, told_s, told_p, told_l, peaks, told_q, told_c,
                    ROPE, SINK, LENGTH, MAX_LOGITS, SPLIT, FP8, PARTS,
                )),
                (gather, (
                    q_ptr, kv_ptr, indices_ptr, length_ptr, stride_qb, stride_qs, stride_qh, stride_kp, stride_kh,
                    stride_ib, stride_is, stride_ih, stride_lb, stride_ls, items, q_len, heads, group, row_tiles, topk,
                    s_kv, splits, queries, q_rope, keys, ropes, numbers, full, empty, full_q, empty_q, full_b,
                    STRIDE_KT, ROPE, PAGE_SIZE, LENGTH, SPLIT, PARTS,
                )),
            ],
            [4, 4],
            [CONSUMER_REGS, PRODUCER_REGS],
        )  # fmt: skip
