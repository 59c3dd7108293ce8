"""Dense MLA decode from the float8 cache with scales of its own, on Hopper: 656 bytes a token.

As `hopper_fp8_few`, with two differences. The query is 16 bits, so the keys' codes become float16 in registers for the
scores as well: four codes of a key are two pairs, hence one operand with columns 4 i and 4 i + 1 and one with 4 i + 2
and 4 i + 3, and the query's columns are put in the same order when it is loaded. And every key has a scale for each 128
columns: the scores of each 128 are summed apart and multiplied by it, and the weights of each 128 columns of the value
are the weights times it, in units of a power of two of the key's own (as in `sparse/hopper_gather_fp8.py`).
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

from mlakit.decode.hopper_fp8_parts import _add_halves, _largest, _words
from mlakit.decode.hopper_parts import (
    VARYING,
    _barrier,
    _barriers,
    _copy_page,
    _finite,
    _inverse,
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

# Weights are 2^10 at the maximum, so that few of them are subnormal in float16.
BASE = gl.constexpr(10.0)


@gluon.jit
def _fill(k_desc, s_desc, r_desc, page_rows, keys, scales, rope, full, wanted, PAGE: gl.constexpr):
    """Copy a tile: codes, scales and rope parts."""
    mbarrier.expect(full, 64 * 656, pred=wanted)
    for i in gl.static_range(len(page_rows)):
        _copy_page(k_desc, page_rows[i], 0, keys, i, full, wanted, PAGE)
        _copy_page(s_desc, page_rows[i], 0, scales, i, full, wanted, PAGE)
        _copy_page(r_desc, page_rows[i], 0, rope, i, full, wanted, PAGE)


@gluon.jit
def _fours(pairs):
    """Four neighbouring codes, two numbers of 16 bits, in float16: the first two and the last two."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 first, last;
        mov.b32 {first, last}, $2;
        cvt.rn.f16x2.e4m3x2 $0, first;
        cvt.rn.f16x2.e4m3x2 $1, last;
        }""",
        "=r,=r,r",
        [pairs],
        dtype=(gl.float16, gl.float16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _power(exponent):
    """2^exponent, from -126 to 127."""
    return ((exponent + 127) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _load_query(q_at, live, q_rows, BLOCK_R: gl.constexpr, layout: gl.constexpr):
    """The latent part of the query rows in float16, columns in the order of `_fours`; a power of two is taken out of
    each row, so that none is too large or too small for it, and returned.
    """
    c = gl.arange(0, 512, gl.SliceLayout(0, layout))
    x = gl.load(q_at[:, None] + c[None, :], mask=live[:, None], other=0.0).to(gl.float32)
    peak = gl.max(gl.abs(x), 1)
    exponent = gl.maximum((peak.to(gl.int32, bitcast=True) >> 23) - 127, -30) - 14
    x = (x * _power(-exponent)[:, None]).to(gl.float16)
    x = gl.reshape(x, [BLOCK_R, 128, 2, 2]).permute((0, 1, 3, 2))
    first, last = gl.split(x)
    q_rows.index(0).store(gl.reshape(first, [BLOCK_R, 256]))
    q_rows.index(1).store(gl.reshape(last, [BLOCK_R, 256]))
    return _power(exponent)


@gluon.jit
def _add_scores(words, queries, z, s, layout: gl.constexpr, PART: gl.constexpr):
    """Scores of 64 columns, the first or second half of a scale's, on their way; the operands too, which must live
    until it is done.
    """
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    first, last = _fours(words.slice(PART * 32, 32, 1).load(operand))
    q = queries.index(z).slice(PART * 32, 32, 1).permute((1, 0))
    s = warpgroup_mma(first, q, s, use_acc=PART % 2 == 1, is_async=True)
    q = queries.index(z + 1).slice(PART * 32, 32, 1).permute((1, 0))
    s = warpgroup_mma(last, q, s, is_async=True)
    return s, first, last


@gluon.jit
def _scale(scales, GROUP: gl.constexpr, layout: gl.constexpr):
    return gl.max(scales.slice(GROUP, 1, 1).load(layout), 1)


@gluon.jit(do_not_specialize=VARYING)
def _mla_decode_rows_kernel(
    q_rope_desc, k_desc, s_desc, r_desc, q_ptr,
    table_ptr, seq_lens_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, counter_ptr,
    scale_log2, stride_tb, stride_ob, stride_os, stride_oh,
    batch, q_len, heads, capacity, row_tiles, slots, splits, most_pieces, slot_items, zero,
    CAUSAL: gl.constexpr, FLAT: gl.constexpr, PAGE: gl.constexpr, BLOCK_B: gl.constexpr, LEAST: gl.constexpr,
    BLOCK_R: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    codes: gl.constexpr = gl.NVMMASharedLayout(128, 8, rank=2)
    matrix: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_R, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, product, 2)
    score: gl.constexpr = product
    narrow: gl.constexpr = gl.NVMMASharedLayout(2 * BLOCK_R, 16, rank=2)
    of_key: gl.constexpr = gl.SliceLayout(1, score)
    of_row: gl.constexpr = gl.SliceLayout(0, score)
    by_key: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    tile = gl.program_id(0) % row_tiles  # the tiles of one slot run side by side and share its keys in L2
    slot = gl.program_id(0) // row_tiles
    requests, lens = _load_lengths(seq_lens_ptr, table_ptr, batch, capacity, PAGE, BLOCK_B)
    queries = gl.allocate_shared_memory(gl.float16, [2, BLOCK_R, 256], matrix)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [1, BLOCK_R, 64], matrix)
    keys = gl.allocate_shared_memory(gl.uint8, [STAGES, 64, 512], codes)
    scales = gl.allocate_shared_memory(gl.float32, [STAGES, 64, 4], gl.NVMMASharedLayout(0, 32, rank=2))
    ropes = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 64], matrix)
    weights = gl.allocate_shared_memory(gl.float16, [4, 64, BLOCK_R], narrow)
    tops = gl.allocate_shared_memory(gl.float32, [1, 4 * BLOCK_R], vector)
    full = _barriers(STAGES, 1)
    full_q = _barriers(1, 1).index(0)
    pairs = keys._reinterpret(gl.int16, [STAGES, 64, 256], gl.NVMMASharedLayout(128, 16, rank=2))
    as_words = keys._reinterpret(gl.int32, [STAGES, 64, 128], gl.NVMMASharedLayout(128, 32, rank=2))
    fence_async_shared()
    _barrier()
    begin, end, aligned, pieces, share, start_before = _own_share(
        requests, lens, slot, slots, batch, splits, most_pieces, slot_items, capacity, 64, LEAST, BLOCK_B
    )
    rows = q_len * heads
    key = gl.arange(0, 64, of_key)
    row = tile * BLOCK_R + gl.arange(0, BLOCK_R, of_row)
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    out_local = gl.arange(0, BLOCK_R, gl.SliceLayout(1, plain))
    out_row = tile * BLOCK_R + out_local
    out_col = gl.arange(0, 512, gl.SliceLayout(0, plain))
    passed = slot * 0
    done = slot * 0
    before = start_before
    for item in range(begin, end):
        request, length, steps, first, last, number, count, base = _piece(
            item, before, slot, aligned, pieces, share, seq_lens_ptr, capacity, 64
        )
        if first < last:
            mbarrier.expect(full_q, BLOCK_R * 128)
            q_row = request * rows + tile * BLOCK_R
            tma.async_copy_global_to_shared(q_rope_desc, [q_row, 512], full_q, q_rope.index(0))
            valid = gl.minimum(length, capacity)
            last_key = valid - 1
            table = table_ptr + request.to(gl.int64) * stride_tb
            for i in gl.static_range(STAGES):
                now = _tile_rows(table, first + i, last_key, PAGE)
                stage = (passed + i) % STAGES
                _fill(
                    k_desc, s_desc, r_desc, now, keys.index(stage), scales.index(stage), ropes.index(stage),
                    full.index(stage), first + i < last, PAGE,
                )  # fmt: skip
            next_row = _tile_rows(table, first + STAGES, last_key, PAGE)
            sight, shortest = _sight(valid, q_len, heads, row, 0, CAUSAL)
            m = gl.full([BLOCK_R], -float("inf"), gl.float32, of_row)
            l = gl.zeros([64, BLOCK_R], gl.float32, score)
            e0 = gl.zeros([64, BLOCK_R], gl.float32, product)
            e1, e2, e3, o0, o1, o2, o3 = e0, e0, e0, e0, e0, e0, e0
            q_at = q_ptr + (q_row + out_local).to(gl.int64) * 576
            unit = _load_query(q_at, out_row < rows, queries, BLOCK_R, plain)
            unit = gl.convert_layout(unit, of_row)[None, :] * scale_log2
            fence_async_shared()
            _barrier()
            mbarrier.wait(full_q, done & 1)
            for step in range(first, last):
                z = _same_for_warp(step * zero)
                stage = passed % STAGES
                at_stage = _same_for_warp(step * zero + stage)
                tile_full = full.index(stage)
                at = step * 64
                then_row = _tile_rows(table, step + STAGES + 1, last_key, PAGE)
                mbarrier.wait(tile_full, passed // STAGES & 1)
                passed += 1
                if at + 64 > valid:
                    _zero_tail(as_words.index(at_stage), valid - at)
                    fence_async_shared()
                    _barrier()
                words = pairs.index(at_stage)
                own_scales = scales.index(at_stage)._reinterpret(gl.float32, [64, 4], by_key)
                is_there = at + key < valid
                c0 = gl.where(is_there, _scale(own_scales, 0, score), 0.0)
                c1 = gl.where(is_there, _scale(own_scales, 1, score), 0.0)
                c2 = gl.where(is_there, _scale(own_scales, 2, score), 0.0)
                c3 = gl.where(is_there, _scale(own_scales, 3, score), 0.0)
                s4 = gl.zeros([64, BLOCK_R], gl.float32, score)
                s4 = warpgroup_mma(
                    ropes.index(at_stage), q_rope.index(z).permute((1, 0)), s4, use_acc=False, is_async=True
                )
                none = gl.zeros([64, BLOCK_R], gl.float32, score)
                s0, a, b = _add_scores(words, queries, z, none, score, 0)
                s0, c, d = _add_scores(words, queries, z, s0, score, 1)
                s4, a, b = warpgroup_mma_wait(2, [s4, a, b])
                s1, a, b = _add_scores(words, queries, z, none, score, 2)
                s0, c, d = warpgroup_mma_wait(2, [s0, c, d])
                s1, c, d = _add_scores(words, queries, z, s1, score, 3)
                s = s0 * c0[:, None]
                a, b = warpgroup_mma_wait(2, [a, b])
                s2, a, b = _add_scores(words, queries, z, none, score, 4)
                s1, c, d = warpgroup_mma_wait(2, [s1, c, d])
                s2, c, d = _add_scores(words, queries, z, s2, score, 5)
                s += s1 * c1[:, None]
                a, b = warpgroup_mma_wait(2, [a, b])
                s3, a, b = _add_scores(words, queries, z, none, score, 6)
                s2, c, d = warpgroup_mma_wait(2, [s2, c, d])
                s3, c, d = _add_scores(words, queries, z, s3, score, 7)
                s += s2 * c2[:, None]
                s3, a, b, c, d = warpgroup_mma_wait(0, [s3, a, b, c, d])
                s += s3 * c3[:, None]
                largest = gl.maximum(gl.maximum(c0, c1), gl.maximum(c2, c3))
                exponent = gl.minimum(gl.maximum((largest.to(gl.int32, bitcast=True) >> 23) - 127, -60), 100)
                shrink = _power(-exponent)
                s = s * unit + (s4 * scale_log2 + exponent.to(gl.float32)[:, None])
                if at + 64 > shortest:
                    s = gl.where((at + key)[:, None] < sight[None, :], s, -float("inf"))
                m_new = gl.maximum(m, _largest(s, tops, of_row, BLOCK_R))
                shift = _finite(m_new, CAUSAL)
                factor = gl.exp2(m - shift)
                m = m_new
                p = gl.exp2(s - (shift - BASE)[None, :])
                l = l * factor[None, :] + p * shrink[:, None]
                weights.index(0).store((p * (c0 * shrink)[:, None]).to(gl.float16))
                weights.index(1).store((p * (c1 * shrink)[:, None]).to(gl.float16))
                weights.index(2).store((p * (c2 * shrink)[:, None]).to(gl.float16))
                weights.index(3).store((p * (c3 * shrink)[:, None]).to(gl.float16))
                fence_async_shared()
                f = factor[None, :]
                e0, e1, e2, e3 = e0 * f, e1 * f, e2 * f, e3 * f
                o0, o1, o2, o3 = o0 * f, o1 * f, o2 * f, o3 * f
                _barrier()
                e0, o0, a, b = _add_halves(words.slice(0, 64, 1), weights.index(z), e0, o0, operand)
                e1, o1, c, d = _add_halves(words.slice(64, 64, 1), weights.index(z + 1), e1, o1, operand)
                a, b = warpgroup_mma_wait(2, [a, b])
                e2, o2, a, b = _add_halves(words.slice(128, 64, 1), weights.index(z + 2), e2, o2, operand)
                c, d = warpgroup_mma_wait(2, [c, d])
                e3, o3, c, d = _add_halves(words.slice(192, 64, 1), weights.index(z + 3), e3, o3, operand)
                e0, e1, e2, e3, o0, o1, o2, o3, a, b, c, d = warpgroup_mma_wait(
                    0, [e0, e1, e2, e3, o0, o1, o2, o3, a, b, c, d]
                )
                _barrier()
                _fill(
                    k_desc, s_desc, r_desc, next_row, keys.index(at_stage), scales.index(at_stage),
                    ropes.index(at_stage), tile_full, step + STAGES < last, PAGE,
                )  # fmt: skip
                next_row = then_row
            done += 1
            total = gl.sum(l, 0)
            inverse = _inverse(total, 1.0, length, capacity)
            lse = _lse(m - BASE, total)
            f = inverse[None, :]
            # Through the keys' memory, so that rows are written whole.
            wide = keys._reinterpret(
                gl.int32, [STAGES * 32 // BLOCK_R, BLOCK_R, 256], gl.NVMMASharedLayout(128, 32, rank=2)
            ).index(0)
            wide.slice(0, 64, 1).permute((1, 0)).store(_words(e0 * f, o0 * f, True))
            wide.slice(64, 64, 1).permute((1, 0)).store(_words(e1 * f, o1 * f, True))
            wide.slice(128, 64, 1).permute((1, 0)).store(_words(e2 * f, o2 * f, True))
            wide.slice(192, 64, 1).permute((1, 0)).store(_words(e3 * f, o3 * f, True))
            _barrier()
            wide_out = keys._reinterpret(
                gl.bfloat16, [STAGES * 32 // BLOCK_R, BLOCK_R, 512], gl.NVMMASharedLayout(128, 16, rank=2)
            ).index(0)
            o_all = wide_out.load(plain)
            fence_async_shared()
            _store_rows(
                o_all, lse, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, counter_ptr, request, length, capacity,
                number, count, base, aligned, tile, row_tiles, rows, heads, stride_ob, stride_os, stride_oh, out_local,
                out_row, out_col, row, 0, BLOCK_R, FLAT,
            )  # fmt: skip
        before += steps

    _answer_without_keys(
        seq_lens_ptr, out_ptr, lse_ptr, slot, slots, batch, capacity, tile, rows, heads, stride_ob, stride_os,
        stride_oh, BLOCK_R, 512, plain, of_row, FLAT,
    )  # fmt: skip

    _merge_own_pieces(
        begin, end, start_before, slot, aligned, pieces, share, seq_lens_ptr, out_ptr, lse_ptr, partial_ptr,
        partial_lse_ptr, counter_ptr, capacity, tile, row_tiles, rows, heads, stride_ob, stride_os, stride_oh,
        64, 0, 512, BLOCK_R, FLAT,
    )  # fmt: skip
