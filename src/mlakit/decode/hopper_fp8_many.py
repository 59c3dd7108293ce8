"""Dense MLA decode from e4m3 caches for many heads on Hopper: 64 query rows a program, two warpgroups in turns.

Scores of a tile of 64 keys, e4m3 by e4m3, are computed by one warpgroup, of the next tile by the other; weights and the
running maximum go through shared memory. The output is kept transposed, and each warpgroup has half of its rows: values
are the left operand, from registers (`hopper_fp8_few` tells how). A warpgroup's turn: scores of its own tile; their
weights; values of the tile before, whose weights the other one has made; values of its own. While one computes weights
the other multiplies, and to make weights nothing but the maximum so far is waited for.

Each warpgroup refills its own half of a tile as soon as it has multiplied it, four tiles ahead.
"""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mlakit.decode.hopper_fp8_parts import BASE, _add_values, _fill, _kept_maximum, _rescale, _words
from mlakit.decode.hopper_parts import (
    VARYING,
    _barrier,
    _barriers,
    _finite,
    _inverse,
    _late,
    _load_lengths,
    _lse,
    _own_share,
    _same_for_warp,
    _sight,
    _tile_rows,
    _zero_tail,
)
from mlakit.decode.hopper_results import _answer_without_keys, _merge_own_pieces, _store_rows
from mlakit.decode.hopper_schedule import _piece


@gluon.jit
def _scores(queries, q_rope, left, right, rope, z, layout: gl.constexpr):
    """Q K^T of a tile, in one sum of 576 e4m3 products: matrix instructions add those in some 14 bits, and scores are
    wrong by 0.0006 (standard deviation, at a softmax scale of 192^-0.5). In two sums, by 0.0004, and 1% slower.
    """
    s = gl.zeros([64, 64], gl.float32, layout)
    s = warpgroup_mma(q_rope.index(z), rope.permute((1, 0)), s, use_acc=False, is_async=True)
    s = warpgroup_mma(queries.index(z), left.permute((1, 0)), s, is_async=True)
    s = warpgroup_mma(queries.index(z + 1), right.permute((1, 0)), s, is_async=True)
    return warpgroup_mma_wait(0, [s])


@gluon.jit
def _weigh(
    s, m, own_m, l, first_key, key, sight, shortest, scale_log2, weights, maximum, factor, told,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """Weights of this warpgroup's tile; m: the maximum that those of the tile before are relative to, own_m: that to
    which the sum l of this warpgroup's tiles is.
    """
    if first_key + 64 > shortest:
        s = gl.where((first_key + key)[None, :] < sight[:, None], s, -float("inf"))
    m_new = _kept_maximum(m, gl.max(s, 1) * scale_log2)
    shift = _finite(m_new, CAUSAL)
    maximum.store(m_new)
    factor.store(gl.exp2(m - shift))
    p = gl.exp2(s * scale_log2 - (shift - BASE)[:, None])
    weights.store(p.to(gl.float16))
    fence_async_shared()
    mbarrier.arrive(told, count=1)
    l = l * gl.exp2(own_m - shift) + gl.sum(p, 1)
    return m_new, l


@gluon.jit
def _turn(
    W: gl.constexpr, pair, passed, zero, m, own_m, l, o0, o1, o2, o3, next_own, next_other, first, last, valid,
    last_key, table, k_desc, r_desc, queries, q_rope, keys, ropes, weights, maxima, factors, full, told_p, key, sight,
    shortest, scale_log2, operand: gl.constexpr, score: gl.constexpr, CAUSAL: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Scores and weights of this warpgroup's tile of a pair; values of the tile before, and of its own."""
    of_row: gl.constexpr = gl.SliceLayout(1, score)
    of_column: gl.constexpr = gl.SliceLayout(0, operand.parent)
    pairs = keys._reinterpret(gl.int16, [8, 64, 128], gl.NVMMASharedLayout(128, 16, rank=2))
    as_words = keys._reinterpret(gl.int32, [8, 64, 64], gl.NVMMASharedLayout(128, 32, rank=2))
    parity = passed & 1
    other_parity = (passed + 1 - W) & 1
    own_buffer = _same_for_warp(pair * zero + 2 * W + parity)
    other_buffer = _same_for_warp(pair * zero + 2 - 2 * W + other_parity)
    z = _same_for_warp(pair * zero)
    own = (2 * passed + W) % 4
    other = (own + 3) % 4
    own_stage = _same_for_warp(pair * zero + own)
    other_stage = _same_for_warp(pair * zero + other)
    first_key = pair * 128 + W * 64
    # The tile before this one's: of the pair before (left) or of this pair (right).
    other_pair = pair - 1 + W
    then_other = _tile_rows(table, 2 * (other_pair + 3) + 1 - W, last_key, PAGE)
    then_own = _tile_rows(table, 2 * (pair + 3) + W, last_key, PAGE)
    mbarrier.wait(full.index(own), passed // 2 & 1)
    if first_key + 64 > valid:
        _zero_tail(as_words.index(own_stage), valid - first_key)
        _zero_tail(as_words.index(own_stage + 4), valid - first_key)
        fence_async_shared()
        _barrier()
    s = _scores(queries, q_rope, keys.index(own_stage), keys.index(own_stage + 4), ropes.index(own_stage), z, score)
    mbarrier.wait(told_p.index(1 - W), other_parity)
    m = maxima.index(1 - W).load(of_row)
    own_m, l = _weigh(
        s, m, own_m, l, first_key, key, sight, shortest, scale_log2, weights.index(own_buffer), maxima.index(W),
        factors.index(2 * W + parity), told_p.index(W), CAUSAL,
    )  # fmt: skip
    o0, o1, o2, o3 = _rescale(factors.index(2 - 2 * W + other_parity).load(of_column), o0, o1, o2, o3)
    o0, o1, o2, o3 = _add_values(
        pairs.index(other_stage + 4 * W), weights.index(other_buffer).permute((1, 0)), o0, o1, o2, o3, operand
    )
    _barrier()
    _fill(
        k_desc, r_desc, next_other, keys.index(other_stage + 4 * W), ropes.index(other_stage), full.index(other),
        W * 256, W == 0, other_pair + 2 < last, PAGE,
    )  # fmt: skip
    o0, o1, o2, o3 = _rescale(factors.index(2 * W + parity).load(of_column), o0, o1, o2, o3)
    o0, o1, o2, o3 = _add_values(
        pairs.index(own_stage + 4 * W), weights.index(own_buffer).permute((1, 0)), o0, o1, o2, o3, operand
    )
    _barrier()
    _fill(
        k_desc, r_desc, next_own, keys.index(own_stage + 4 * W), ropes.index(own_stage), full.index(own),
        W * 256, W == 0, pair + 2 < last, PAGE,
    )  # fmt: skip
    return m, own_m, l, o0, o1, o2, o3, then_own, then_other


@gluon.jit
def _attend(
    W: gl.constexpr, q_desc, q_rope_desc, k_desc, r_desc, table_ptr, seq_lens_ptr, out_ptr, lse_ptr,
    partial_ptr, partial_lse_ptr, counter_ptr, scale_log2, kv_scale, stride_tb, stride_ob, stride_os, stride_oh,
    batch, q_len, heads, capacity, tile, row_tiles, slot, slots, begin, end, aligned, pieces, share, before, zero,
    queries, q_rope, keys, ropes, weights, maxima, factors, sums, full, full_q, told_p, told_l,
    CAUSAL: gl.constexpr, FLAT: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """One warpgroup, W = 0 the left half of the output, 1 the right one, over all pieces of its slot."""
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    BF16: gl.constexpr = DTYPE == gl.bfloat16  # noqa: SIM300 - the constant is DTYPE to ruff
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, output, 2)
    of_row: gl.constexpr = gl.SliceLayout(1, score)
    of_column: gl.constexpr = gl.SliceLayout(0, output)  # query rows, which are columns of the output's transpose
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    rows = q_len * heads
    local = gl.arange(0, 64, of_row)
    key = gl.arange(0, 64, gl.SliceLayout(0, score))
    pairs = keys._reinterpret(gl.int16, [8, 64, 128], gl.NVMMASharedLayout(128, 16, rank=2))
    as_words = keys._reinterpret(gl.int32, [8, 64, 64], gl.NVMMASharedLayout(128, 32, rank=2))
    passed = begin * 0  # pairs so far: the parity of every barrier
    done = begin * 0  # pieces so far
    start_before = before

    for item in range(begin, end):
        request, length, steps, first, last, number, count, base = _piece(
            item, before, slot, aligned, pieces, share, seq_lens_ptr, capacity, 128
        )
        if first < last:
            own_tile = _late(tile, length)
            q_row = request * rows + own_tile * 64
            if W == 0:
                mbarrier.expect(full_q, 64 * 576)
                tma.async_copy_global_to_shared(q_desc, [q_row, 0], full_q, queries.index(0))
                tma.async_copy_global_to_shared(q_desc, [q_row, 256], full_q, queries.index(1))
                tma.async_copy_global_to_shared(q_rope_desc, [q_row, 512], full_q, q_rope.index(0))
            valid = gl.minimum(length, capacity)
            last_key = valid - 1
            table = table_ptr + request.to(gl.int64) * stride_tb
            for i in gl.static_range(4):
                now = _tile_rows(table, 2 * first + i, last_key, PAGE)
                stage = (2 * passed + i) % 4
                _fill(
                    k_desc, r_desc, now, keys.index(4 * W + stage), ropes.index(stage), full.index(stage), W * 256,
                    W == 0, first + i // 2 < last, PAGE,
                )  # fmt: skip
            sight, shortest = _sight(valid, q_len, heads, own_tile * 64 + local, own_tile * 64, CAUSAL)
            m = gl.full([64], -float("inf"), gl.float32, of_row)
            l = gl.zeros([64], gl.float32, of_row)
            o0 = gl.zeros([64, 64], gl.float32, output)
            o1 = gl.zeros([64, 64], gl.float32, output)
            o2 = gl.zeros([64, 64], gl.float32, output)
            o3 = gl.zeros([64, 64], gl.float32, output)
            next_own = _tile_rows(table, 2 * first + 4 + W, last_key, PAGE)
            next_other = _tile_rows(table, 2 * first + 5 - W, last_key, PAGE)
            mbarrier.wait(full_q, done & 1)
            if W == 0:
                # The first tile's scores, before which there is nothing to do.
                z = _same_for_warp(first * zero)
                own_stage = _same_for_warp(first * zero + (2 * passed) % 4)
                own_buffer = _same_for_warp(first * zero + (passed & 1))
                mbarrier.wait(full.index((2 * passed) % 4), passed // 2 & 1)
                if first * 128 + 64 > valid:
                    _zero_tail(as_words.index(own_stage), valid - first * 128)
                    _zero_tail(as_words.index(own_stage + 4), valid - first * 128)
                    fence_async_shared()
                    _barrier()
                s = _scores(
                    queries, q_rope, keys.index(own_stage), keys.index(own_stage + 4), ropes.index(own_stage), z, score
                )
                own_m, l = _weigh(
                    s, m, m, l, first * 128, key, sight, shortest, scale_log2, weights.index(own_buffer),
                    maxima.index(W), factors.index(passed & 1), told_p.index(W), CAUSAL,
                )  # fmt: skip
                o0, o1, o2, o3 = _add_values(
                    pairs.index(own_stage), weights.index(own_buffer).permute((1, 0)), o0, o1, o2, o3, operand
                )
                _barrier()
                _fill(
                    k_desc, r_desc, next_own, keys.index(own_stage), ropes.index(own_stage),
                    full.index((2 * passed) % 4), 0, True, first + 2 < last, PAGE,
                )  # fmt: skip
                next_own = _tile_rows(table, 2 * first + 6, last_key, PAGE)
                passed += 1
            else:
                own_m = m
            for pair in range(first + 1 - W, last):
                m, own_m, l, o0, o1, o2, o3, next_own, next_other = _turn(
                    W, pair, passed, zero, m, own_m, l, o0, o1, o2, o3, next_own, next_other, first, last, valid,
                    last_key, table, k_desc, r_desc, queries, q_rope, keys, ropes, weights, maxima, factors, full,
                    told_p, key, sight, shortest, scale_log2, operand, score, CAUSAL, PAGE,
                )  # fmt: skip
                passed += 1
            if W == 0:
                # The last tile's values.
                z = _same_for_warp(last * zero)
                other_stage = _same_for_warp(last * zero + (2 * passed + 3) % 4)
                mbarrier.wait(told_p.index(1), (passed + 1) & 1)
                m = maxima.index(1).load(of_row)
                other_buffer = _same_for_warp(last * zero + 2 + ((passed + 1) & 1))
                o0, o1, o2, o3 = _rescale(factors.index(2 + ((passed + 1) & 1)).load(of_column), o0, o1, o2, o3)
                o0, o1, o2, o3 = _add_values(
                    pairs.index(other_stage), weights.index(other_buffer).permute((1, 0)), o0, o1, o2, o3, operand
                )
            else:
                m = own_m

            l = l * gl.exp2(own_m - _finite(m, CAUSAL))
            sums.index(W).store(l)
            mbarrier.arrive(told_l.index(W), count=1)
            mbarrier.wait(told_l.index(1 - W), done & 1)
            done += 1
            l = l + sums.index(1 - W).load(of_row)
            inverse = _inverse(l, kv_scale, length, capacity)
            lse = _lse(m - BASE, l)
            factors.index(2 * W).store(inverse)
            _barrier()
            factor = factors.index(2 * W).load(of_column)[None, :]
            # Through the keys' memory, a part that this warpgroup alone has read as values, so that rows are written
            # whole.
            wide = keys._reinterpret(gl.int32, [4, 64, 128], gl.NVMMASharedLayout(128, 32, rank=2)).index(2 * W)
            wide.slice(0, 64, 1).permute((1, 0)).store(_words(o0 * factor, o1 * factor, BF16))
            wide.slice(64, 64, 1).permute((1, 0)).store(_words(o2 * factor, o3 * factor, BF16))
            _barrier()
            o_part = (
                keys._reinterpret(DTYPE, [4, 64, 256], gl.NVMMASharedLayout(128, 16, rank=2)).index(2 * W).load(plain)
            )
            fence_async_shared()
            out_local = gl.arange(0, 64, gl.SliceLayout(1, plain))
            out_col = W * 256 + gl.arange(0, 256, gl.SliceLayout(0, plain))
            _store_rows(
                o_part, lse, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, counter_ptr, request, length, capacity,
                number, count, base, aligned, own_tile, row_tiles, rows, heads, stride_ob, stride_os, stride_oh,
                out_local, own_tile * 64 + out_local, out_col, own_tile * 64 + local, W * 256, 64, FLAT,
            )  # fmt: skip
        before += steps

    if W == 1:
        _answer_without_keys(
            seq_lens_ptr, out_ptr, lse_ptr, slot, slots, batch, capacity, tile, rows, heads, stride_ob, stride_os,
            stride_oh, 64, 512, plain, of_row, FLAT,
        )  # fmt: skip

    _merge_own_pieces(
        begin, end, start_before, slot, aligned, pieces, share, seq_lens_ptr, out_ptr, lse_ptr, partial_ptr,
        partial_lse_ptr, counter_ptr, capacity, tile, row_tiles, rows, heads, stride_ob, stride_os, stride_oh,
        128, W * 256, 256, 64, FLAT,
    )  # fmt: skip


@gluon.jit
def _left(args, CAUSAL: gl.constexpr, FLAT: gl.constexpr, PAGE: gl.constexpr):
    _attend(0, *args, CAUSAL, FLAT, PAGE)


@gluon.jit
def _right(args, CAUSAL: gl.constexpr, FLAT: gl.constexpr, PAGE: gl.constexpr):
    _attend(1, *args, CAUSAL, FLAT, PAGE)


@gluon.jit(do_not_specialize=VARYING)
def _mla_decode_e4m3_many_kernel(
    q_desc, q_rope_desc, k_desc, r_desc,
    table_ptr, seq_lens_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, counter_ptr,
    scale_log2, kv_scale, stride_tb, stride_ob, stride_os, stride_oh,
    batch, q_len, heads, capacity, row_tiles, slots, splits, most_pieces, slot_items, zero,
    CAUSAL: gl.constexpr, FLAT: gl.constexpr, PAGE: gl.constexpr, BLOCK_B: gl.constexpr, LEAST: gl.constexpr,
    WORKER_REGISTERS: gl.constexpr,
):  # fmt: skip
    CODE: gl.constexpr = k_desc.dtype
    requests, lens = _load_lengths(seq_lens_ptr, table_ptr, batch, capacity, PAGE, BLOCK_B)
    tile = gl.program_id(0) % row_tiles  # the tiles of one slot run side by side and share its keys in L2
    slot = gl.program_id(0) // row_tiles
    codes: gl.constexpr = gl.NVMMASharedLayout(128, 8, rank=2)
    rope_codes: gl.constexpr = gl.NVMMASharedLayout(64, 8, rank=2)
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    queries = gl.allocate_shared_memory(CODE, [2, 64, 256], codes)
    q_rope = gl.allocate_shared_memory(CODE, [1, 64, 64], rope_codes)
    keys = gl.allocate_shared_memory(CODE, [8, 64, 256], codes)  # left halves of four tiles, right halves
    ropes = gl.allocate_shared_memory(CODE, [4, 64, 64], rope_codes)
    weights = gl.allocate_shared_memory(gl.float16, [4, 64, 64], gl.NVMMASharedLayout(128, 16, rank=2))
    maxima = gl.allocate_shared_memory(gl.float32, [2, 64], vector)
    factors = gl.allocate_shared_memory(gl.float32, [4, 64], vector)
    sums = gl.allocate_shared_memory(gl.float32, [2, 64], vector)
    full = _barriers(4, 2)
    full_q = _barriers(1, 1).index(0)
    told_p = _barriers(2, 1)
    told_l = _barriers(2, 1)
    fence_async_shared()
    begin, end, aligned, pieces, share, before = _own_share(
        requests, lens, slot, slots, batch, splits, most_pieces, slot_items, capacity, 128, LEAST, BLOCK_B
    )
    args = (
        q_desc, q_rope_desc, k_desc, r_desc, table_ptr, seq_lens_ptr, out_ptr, lse_ptr,
        partial_ptr, partial_lse_ptr, counter_ptr, scale_log2, kv_scale, stride_tb, stride_ob, stride_os, stride_oh,
        batch, q_len, heads, capacity, tile, row_tiles, slot, slots, begin, end, aligned, pieces, share, before, zero,
        queries, q_rope, keys, ropes, weights, maxima, factors, sums, full, full_q, told_p, told_l,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_left, (args, CAUSAL, FLAT, PAGE)),
            (_right, (args, CAUSAL, FLAT, PAGE)),
        ],
        [4],
        [WORKER_REGISTERS],
    )
