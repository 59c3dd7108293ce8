"""Dense MLA decode for few heads on Hopper: keys as the rows of every product, one warpgroup a program.

A warpgroup's matrix instruction has 64 rows; 16 heads in them would waste three quarters. So the scores are computed
transposed, S^T = K Q^T with 64 keys as rows and the query rows as columns, and the output too, O^T = V^T P^T with 512
rows. Nothing is padded, the accumulator is small, and the memory system is the limit: while one tile of keys is
computed with, the next is on its way.
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

from mlakit.decode.hopper_parts import (
    VARYING,
    _arrive,
    _await,
    _barrier,
    _barriers,
    _copy_tile,
    _fetch_table,
    _finite,
    _inverse,
    _load_lengths,
    _lse,
    _same_for_warp,
    _sight,
    _tile_rows,
    _uniform,
    _zero_tail,
)
from mlakit.decode.hopper_results import _answer_without_keys, _merge_pieces, _row_at
from mlakit.decode.hopper_schedule import _partial_at, _piece, _piece_of_one, _share_out, _share_out_one


@gluon.jit
def _fill_left(k_desc, r_desc, page_rows, keys, rope, full, wanted, PAGE: gl.constexpr):
    mbarrier.expect(full, 64 * (256 + 64) * 2, pred=wanted)
    _copy_tile(k_desc, page_rows, 0, keys, full, wanted, PAGE)
    _copy_tile(r_desc, page_rows, 512, rope, full, wanted, PAGE)


@gluon.jit
def _fill_right(k_desc, page_rows, keys, full, wanted, PAGE: gl.constexpr):
    mbarrier.expect(full, 64 * 256 * 2, pred=wanted)
    _copy_tile(k_desc, page_rows, 256, keys, full, wanted, PAGE)


@gluon.jit(do_not_specialize=VARYING)
def _mla_decode_few_kernel(
    q_desc, q_rope_desc, k_desc, r_desc,
    table_ptr, seq_lens_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, counter_ptr,
    scale_log2, stride_tb, stride_ob, stride_os, stride_oh,
    batch, q_len, heads, capacity, slots, splits, most_pieces, slot_items, zero,
    CAUSAL: gl.constexpr, FLAT: gl.constexpr, PAGE: gl.constexpr, BLOCK_B: gl.constexpr, LEAST: gl.constexpr,
    BLOCK_R: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = k_desc.dtype
    LN2: gl.constexpr = 0.6931471805599453
    matrix: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    narrow: gl.constexpr = gl.NVMMASharedLayout(2 * BLOCK_R, 16, rank=2)
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_R, 16])
    of_key: gl.constexpr = gl.SliceLayout(1, product)
    of_row: gl.constexpr = gl.SliceLayout(0, product)
    slot = gl.program_id(0)
    requests, lens = _load_lengths(seq_lens_ptr, table_ptr, batch, capacity, PAGE, BLOCK_B)
    if BLOCK_B > 1:
        _fetch_table(table_ptr, batch * stride_tb * 4)
    queries = gl.allocate_shared_memory(DTYPE, [2, BLOCK_R, 256], matrix)
    q_rope = gl.allocate_shared_memory(DTYPE, [1, BLOCK_R, 64], matrix)
    keys = gl.allocate_shared_memory(DTYPE, [2 * STAGES, 64, 256], matrix)
    ropes = gl.allocate_shared_memory(DTYPE, [STAGES, 64, 64], matrix)
    weights = gl.allocate_shared_memory(DTYPE, [1, 64, BLOCK_R], narrow)
    full = _barriers(2 * STAGES, 1)
    full_q = _barriers(1, 1).index(0)
    fence_async_shared()
    _barrier()
    if BLOCK_B == 1:
        only_length = _uniform(lens)
        begin, end, aligned, pieces, share, start_before = _share_out_one(
            only_length, slot, splits, most_pieces, slot_items, capacity, 64, LEAST
        )
    else:
        begin, end, aligned, pieces, share, start_before = _share_out(
            requests, lens, slot, slots, batch, splits, most_pieces, slot_items, capacity, 64, LEAST
        )
    rows = q_len * heads
    key = gl.arange(0, 64, of_key)
    row = gl.arange(0, BLOCK_R, of_row)
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    out_row = gl.arange(0, BLOCK_R, gl.SliceLayout(1, plain))
    out_col = gl.arange(0, 256, gl.SliceLayout(0, plain))
    passed = slot * 0
    done = slot * 0
    before = start_before
    for item in range(begin, end):
        if BLOCK_B == 1:
            request, length, steps, first, last, number, count, base = _piece_of_one(
                item, pieces, only_length, capacity, 64
            )
        else:
            request, length, steps, first, last, number, count, base = _piece(
                item, before, slot, aligned, pieces, share, seq_lens_ptr, capacity, 64
            )
        if first < last:
            mbarrier.expect(full_q, BLOCK_R * 576 * 2)
            tma.async_copy_global_to_shared(q_desc, [request * rows, 0], full_q, queries.index(0))
            tma.async_copy_global_to_shared(q_desc, [request * rows, 256], full_q, queries.index(1))
            tma.async_copy_global_to_shared(q_rope_desc, [request * rows, 512], full_q, q_rope.index(0))
            valid = gl.minimum(length, capacity)
            last_key = valid - 1
            table = table_ptr + request.to(gl.int64) * stride_tb
            for i in gl.static_range(STAGES):
                now = _tile_rows(table, first + i, last_key, PAGE)
                stage = (passed + i) % STAGES
                left_full, right_full = full.index(2 * stage), full.index(2 * stage + 1)
                wanted = first + i < last
                _fill_left(k_desc, r_desc, now, keys.index(2 * stage), ropes.index(stage), left_full, wanted, PAGE)
                _fill_right(k_desc, now, keys.index(2 * stage + 1), right_full, wanted, PAGE)
            next_row = _tile_rows(table, first + STAGES, last_key, PAGE)
            sight, shortest = _sight(valid, q_len, heads, row, 0, CAUSAL)
            m = gl.full([BLOCK_R], -float("inf"), gl.float32, of_row)
            l = gl.zeros([64, BLOCK_R], gl.float32, product)
            o_left = gl.zeros([256, BLOCK_R], gl.float32, product)
            o_right = gl.zeros([256, BLOCK_R], gl.float32, product)
            mbarrier.wait(full_q, done & 1)
            for step in range(first, last):
                stage = passed % STAGES
                phase = passed // STAGES & 1
                passed += 1
                z = _same_for_warp(step * zero)
                at = step * 64
                more = step + STAGES < last
                then_row = _tile_rows(table, step + STAGES + 1, last_key, PAGE)
                if STAGES == 1:
                    left, right, rope = keys.index(z), keys.index(z + 1), ropes.index(z)
                else:
                    at_stage = _same_for_warp(step * zero + stage)
                    left, right, rope = keys.index(2 * at_stage), keys.index(2 * at_stage + 1), ropes.index(at_stage)
                left_full = full.index(2 * stage)
                right_full = full.index(2 * stage + 1)
                mbarrier.wait(left_full, phase)
                if at + 64 > valid:
                    mbarrier.wait(right_full, phase)
                    _zero_tail(left, valid - at)
                    _zero_tail(right, valid - at)
                    fence_async_shared()
                    _barrier()
                s = gl.zeros([64, BLOCK_R], gl.float32, product)
                s = warpgroup_mma(left, queries.index(z).permute((1, 0)), s, use_acc=False, is_async=True)
                s = warpgroup_mma(rope, q_rope.index(z).permute((1, 0)), s, is_async=True)
                mbarrier.wait(right_full, phase)
                s = warpgroup_mma(right, queries.index(z + 1).permute((1, 0)), s, is_async=True)
                s = warpgroup_mma_wait(0, [s])
                if at + 64 > shortest:
                    s = gl.where((at + key)[:, None] < sight[None, :], s, -float("inf"))
                m_new = gl.maximum(m, gl.max(s, 0) * scale_log2)
                shift = _finite(m_new, CAUSAL)
                factor = gl.exp2(m - shift)
                m = m_new
                p = gl.exp2(s * scale_log2 - shift[None, :])
                l = l * factor[None, :] + p
                weights.index(0).store(p.to(DTYPE))
                fence_async_shared()
                o_left = o_left * factor[None, :]
                o_right = o_right * factor[None, :]
                _barrier()
                o_left = warpgroup_mma(left.permute((1, 0)), weights.index(z), o_left, is_async=True)
                o_right = warpgroup_mma(right.permute((1, 0)), weights.index(z), o_right, is_async=True)
                o_left = warpgroup_mma_wait(1, [o_left])
                _barrier()
                _fill_left(k_desc, r_desc, next_row, left, rope, left_full, more, PAGE)
                o_right = warpgroup_mma_wait(0, [o_right])
                _barrier()
                _fill_right(k_desc, next_row, right, right_full, more, PAGE)
                next_row = then_row
            done += 1
            total = gl.sum(l, 0)
            inverse = _inverse(total, 1.0, length, capacity)
            lse = _lse(m, total)
            o_left = o_left * inverse[None, :]
            o_right = o_right * inverse[None, :]
            # Through the keys' memory, so that rows are written whole.
            wide_left = keys.index(0).slice(0, BLOCK_R, 0)
            wide_right = keys.index(1).slice(0, BLOCK_R, 0)
            wide_left.permute((1, 0)).store(o_left.to(DTYPE))
            wide_right.permute((1, 0)).store(o_right.to(DTYPE))
            _barrier()
            left_part = wide_left.load(plain)
            right_part = wide_right.load(plain)
            fence_async_shared()
            live = (out_row < rows)[:, None]
            if count > 1:
                place = _partial_at(base, number, aligned)
                part = partial_ptr + place.to(gl.int64) * (BLOCK_R * 512) + (out_row * 512)[:, None] + out_col[None, :]
                gl.store(part, left_part, mask=live)
                gl.store(part + 256, right_part, mask=live)
                gl.store(partial_lse_ptr + place * BLOCK_R + row, lse)
                _arrive(counter_ptr + request, number == 0, count)
            else:
                at_row = _row_at(out_row, heads, stride_os, stride_oh, FLAT)
                result = out_ptr + request.to(gl.int64) * stride_ob + at_row[:, None] + out_col[None, :]
                gl.store(result, left_part, mask=live)
                gl.store(result + 256, right_part, mask=live)
                natural = gl.where(length > capacity, float("nan"), lse * LN2)
                gl.store(lse_ptr + request.to(gl.int64) * rows + row, natural, mask=row < rows)
                _barrier()
        before += steps

    _answer_without_keys(
        seq_lens_ptr, out_ptr, lse_ptr, slot, slots, batch, capacity, slot * 0, rows, heads, stride_ob, stride_os,
        stride_oh, BLOCK_R, 256, plain, of_row, FLAT,
    )  # fmt: skip

    # Pieces of a request are merged by the programs that computed them, each some rows or some columns of one.
    before = start_before
    for item in range(begin, end):
        if BLOCK_B == 1:
            request, length, steps, first, last, number, count, base = _piece_of_one(
                item, pieces, only_length, capacity, 64
            )
        else:
            request, length, steps, first, last, number, count, base = _piece(
                item, before, slot, aligned, pieces, share, seq_lens_ptr, capacity, 64
            )
        if (first < last) & (count > 1):
            _await(counter_ptr + request)
            result = out_ptr + request.to(gl.int64) * stride_ob
            result_lse = lse_ptr + request.to(gl.int64) * rows
            _merge_pieces(
                partial_ptr, partial_lse_ptr, result, result_lse, base, count, aligned, number, slot * 0, 1, rows,
                heads, stride_os, stride_oh, length > capacity, 0, 512, BLOCK_R, FLAT,
            )  # fmt: skip
        before += steps
