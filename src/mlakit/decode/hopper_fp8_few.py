"""Dense MLA decode for few heads from e4m3 caches on Hopper: keys as the rows of every product.

As `hopper_few`, but keys stay e4m3 in shared memory. Scores are e4m3 products straight from the copied tile. The second
product takes the values as its left operand, O^T = V^T P^T, and a left operand may come from registers: two
neighbouring codes of a key are read as one number of 16 bits, transposed on the way (`ldmatrix.trans`), so that a
register has two codes of each of two neighbouring keys; one permutation and two conversions make of it an operand for
the even columns of the value and one for the odd ones, in float16, which is exact. The two have accumulators of their
own, and meet when the output is written. Nothing that is dequantized is ever written to shared memory.

Two programs a multiprocessor: one computes while the other waits.
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

from mlakit.decode.hopper_fp8_parts import BASE, _add_values, _fill, _kept_maximum, _largest, _rescale, _words
from mlakit.decode.hopper_parts import (
    VARYING,
    _barrier,
    _barriers,
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


@gluon.jit
def _scores(queries, q_rope, keys, rope, z, layout: gl.constexpr, BLOCK_R: gl.constexpr):
    """K Q^T of a tile in four sums, on their way. Matrix instructions add e4m3 products in some 14 bits: in one sum of
    576 scores are wrong by 0.0006 (standard deviation, at a softmax scale of 192^-0.5), in four by 0.0002.
    """
    s = gl.zeros([64, BLOCK_R], gl.float32, layout)
    q = queries.index(z)
    s0 = warpgroup_mma(rope, q_rope.index(z).permute((1, 0)), s, use_acc=False, is_async=True)
    s0 = warpgroup_mma(keys.slice(0, 128, 1), q.slice(0, 128, 1).permute((1, 0)), s0, is_async=True)
    part = q.slice(128, 128, 1).permute((1, 0))
    s1 = warpgroup_mma(keys.slice(128, 128, 1), part, s, use_acc=False, is_async=True)
    part = q.slice(256, 128, 1).permute((1, 0))
    s2 = warpgroup_mma(keys.slice(256, 128, 1), part, s, use_acc=False, is_async=True)
    part = q.slice(384, 128, 1).permute((1, 0))
    s3 = warpgroup_mma(keys.slice(384, 128, 1), part, s, use_acc=False, is_async=True)
    s0, s1, s2, s3 = warpgroup_mma_wait(0, [s0, s1, s2, s3])
    return (s0 + s1) + (s2 + s3)


@gluon.jit(do_not_specialize=VARYING)
def _mla_decode_e4m3_few_kernel(
    q_desc, q_rope_desc, k_desc, r_desc,
    table_ptr, seq_lens_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, counter_ptr,
    scale_log2, kv_scale, stride_tb, stride_ob, stride_os, stride_oh,
    batch, q_len, heads, capacity, row_tiles, slots, splits, most_pieces, slot_items, zero,
    CAUSAL: gl.constexpr, FLAT: gl.constexpr, PAGE: gl.constexpr, BLOCK_B: gl.constexpr, LEAST: gl.constexpr,
    BLOCK_R: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    CODE: gl.constexpr = k_desc.dtype
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    codes: gl.constexpr = gl.NVMMASharedLayout(128, 8, rank=2)
    rope_codes: gl.constexpr = gl.NVMMASharedLayout(64, 8, rank=2)
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_R, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, product, 2)
    of_column: gl.constexpr = gl.SliceLayout(0, product)  # query rows, which are columns of the output's transpose
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_R, 32])
    narrow: gl.constexpr = gl.NVMMASharedLayout(2 * BLOCK_R, 16, rank=2)
    of_key: gl.constexpr = gl.SliceLayout(1, score)
    of_row: gl.constexpr = gl.SliceLayout(0, score)
    tile = gl.program_id(0) % row_tiles  # the tiles of one slot run side by side and share its keys in L2
    slot = gl.program_id(0) // row_tiles
    requests, lens = _load_lengths(seq_lens_ptr, table_ptr, batch, capacity, PAGE, BLOCK_B)
    queries = gl.allocate_shared_memory(CODE, [1, BLOCK_R, 512], codes)
    q_rope = gl.allocate_shared_memory(CODE, [1, BLOCK_R, 64], rope_codes)
    keys = gl.allocate_shared_memory(CODE, [STAGES, 64, 512], codes)
    ropes = gl.allocate_shared_memory(CODE, [STAGES, 64, 64], rope_codes)
    weights = gl.allocate_shared_memory(gl.float16, [1, 64, BLOCK_R], narrow)
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
            mbarrier.expect(full_q, BLOCK_R * 576)
            q_row = request * rows + tile * BLOCK_R
            tma.async_copy_global_to_shared(q_desc, [q_row, 0], full_q, queries.index(0))
            tma.async_copy_global_to_shared(q_rope_desc, [q_row, 512], full_q, q_rope.index(0))
            valid = gl.minimum(length, capacity)
            last_key = valid - 1
            table = table_ptr + request.to(gl.int64) * stride_tb
            for i in gl.static_range(STAGES):
                now = _tile_rows(table, first + i, last_key, PAGE)
                stage = (passed + i) % STAGES
                _fill(
                    k_desc, r_desc, now, keys.index(stage), ropes.index(stage), full.index(stage), 0, True,
                    first + i < last, PAGE,
                )  # fmt: skip
            next_row = _tile_rows(table, first + STAGES, last_key, PAGE)
            sight, shortest = _sight(valid, q_len, heads, row, 0, CAUSAL)
            m = gl.full([BLOCK_R], -float("inf"), gl.float32, of_row)
            l = gl.zeros([64, BLOCK_R], gl.float32, score)
            o0 = gl.zeros([128, BLOCK_R], gl.float32, product)
            o1 = gl.zeros([128, BLOCK_R], gl.float32, product)
            o2 = gl.zeros([128, BLOCK_R], gl.float32, product)
            o3 = gl.zeros([128, BLOCK_R], gl.float32, product)
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
                s = _scores(queries, q_rope, keys.index(at_stage), ropes.index(at_stage), z, score, BLOCK_R)
                if at + 64 > shortest:
                    s = gl.where((at + key)[:, None] < sight[None, :], s, -float("inf"))
                m_new = _kept_maximum(m, _largest(s, tops, of_row, BLOCK_R) * scale_log2)
                shift = _finite(m_new, CAUSAL)
                factor = gl.exp2(m - shift)
                m = m_new
                p = gl.exp2(s * scale_log2 - (shift - BASE)[None, :])
                l = l * factor[None, :] + p
                weights.index(0).store(p.to(gl.float16))
                fence_async_shared()
                o0, o1, o2, o3 = _rescale(gl.convert_layout(factor, of_column), o0, o1, o2, o3)
                _barrier()
                o0, o1, o2, o3 = _add_values(pairs.index(at_stage), weights.index(z), o0, o1, o2, o3, operand)
                _barrier()
                _fill(
                    k_desc, r_desc, next_row, keys.index(at_stage), ropes.index(at_stage), tile_full, 0, True,
                    step + STAGES < last, PAGE,
                )  # fmt: skip
                next_row = then_row
            done += 1
            total = gl.sum(l, 0)
            inverse = _inverse(total, kv_scale, length, capacity)
            lse = _lse(m - BASE, total)
            last_factor = gl.convert_layout(inverse, of_column)[None, :]
            # Through the keys' memory, so that rows are written whole.
            wide = keys._reinterpret(
                gl.int32, [STAGES * 32 // BLOCK_R, BLOCK_R, 256], gl.NVMMASharedLayout(128, 32, rank=2)
            ).index(0)
            BF16: gl.constexpr = DTYPE == gl.bfloat16  # noqa: SIM300 - the constant is DTYPE to ruff
            wide.slice(0, 128, 1).permute((1, 0)).store(_words(o0 * last_factor, o1 * last_factor, BF16))
            wide.slice(128, 128, 1).permute((1, 0)).store(_words(o2 * last_factor, o3 * last_factor, BF16))
            _barrier()
            wide_out = keys._reinterpret(
                DTYPE, [STAGES * 32 // BLOCK_R, BLOCK_R, 512], gl.NVMMASharedLayout(128, 16, rank=2)
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
