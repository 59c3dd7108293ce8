"""Dense MLA decode for many heads on Hopper: 64 query rows a program, two warpgroups in a seesaw.

Keys come in pairs of tiles of 64. The left warpgroup computes the scores of the first tile and owns the left half of
the output, the right one those of the second tile and the right half. Each multiplies its own weights, from registers,
with its half of its own tile, and the other's, from shared memory, with its half of the other's. The running maximum
travels through shared memory, from the left to the right one and back.

- Each half of a tile is read, as values, by one warpgroup only, which then refills it itself: no barrier between the
  two stands before a copy.
- Both multiply the first tile's values first, and the right one begins its scores with the half that the left one
  refills: whatever was freed first is needed first.
- They tell one another by named barriers, at which the one that tells does not wait.
- Buffers are indexed by a number that is zero and that the compiler does not know: else it keeps every matrix
  descriptor in registers of its own and spills. It knows that the number is the same for a warp's threads, and
  `hopper_compile` lets it see that the threads stay together: then descriptors live in uniform registers.

docs/kernels.md has the measurements, and what was tried besides.
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
    _barrier,
    _barriers,
    _copy_tile,
    _fetch_table,
    _finite,
    _hear,
    _inverse,
    _late,
    _load_lengths,
    _lse,
    _own_share,
    _pause,
    _same_for_warp,
    _sight,
    _tell,
    _tile_rows,
)
from mlakit.decode.hopper_results import _answer_without_keys, _merge_own_pieces, _row_at
from mlakit.decode.hopper_schedule import _partial_at, _piece

# Barriers of both warpgroups; Triton's own have lower numbers.
FIRST_MAX, BOTH_MAX, FIRST_WEIGHTS, SECOND_WEIGHTS, SUMS = (gl.constexpr(8 + i) for i in range(5))
# Bytes of half of a tile, and of one with the rope part.
HALF_BYTES, NEAR_BYTES = gl.constexpr(64 * 256 * 2), gl.constexpr(64 * (256 + 64) * 2)
# Where as many programs as a GPU has multiprocessors, or nearly, have one piece each, of so many pairs of tiles, three
# of four begin later, by one, two or three times this much. Requests x heads x keys on an H200, microseconds without
# and with: 16x64x8192 60.3, 57.7; 32x128x4096 75.1, 73.8.
FEWEST_PAIRS, MOST_PAIRS, FEWEST_PROGRAMS, CYCLES_LATER = (gl.constexpr(i) for i in (8, 16, 128, 2000))


@gluon.jit
def _copy_near(k_desc, r_desc, page_rows, keys, rope, full, HALF: gl.constexpr, wanted, PAGE: gl.constexpr):
    """Copy the half of a tile that its own warpgroup reads as values, and the rope part."""
    _copy_tile(k_desc, page_rows, HALF * 256, keys, full, wanted, PAGE)
    _copy_tile(r_desc, page_rows, 512, rope, full, wanted, PAGE)


@gluon.jit
def _load_rope_of_queries(q_ptr, row, live, layout: gl.constexpr):
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    r = gl.arange(0, 64, gl.SliceLayout(1, operand))
    c = gl.arange(0, 64, gl.SliceLayout(0, operand))
    return gl.load(
        q_ptr + row.to(gl.int64) * 576 + 512 + r[:, None] * 576 + c[None, :], mask=(r < live)[:, None], other=0.0
    )


@gluon.jit
def _scores(W: gl.constexpr, queries, keys, ropes, q_rope, full, phase, zero, layout: gl.constexpr):
    """Q K^T of a warpgroup's own tile, the parts in the order in which their copies were asked for: the left one's NEAR
    half first, the right one's FAR half.
    """
    NEAR: gl.constexpr = 3 * W
    FAR: gl.constexpr = 1 + W
    s = gl.zeros([64, 64], gl.float32, layout)
    if W == 0:
        mbarrier.wait(full.index(NEAR), phase)
        s = warpgroup_mma(q_rope, ropes.index(zero).permute((1, 0)), s, use_acc=False, is_async=True)
        # Looked at again, though it has turned: else the descriptors of what follows are prepared before the rope part
        # is issued.
        mbarrier.wait(full.index(NEAR), phase)
        k = keys.index(zero + NEAR)
        s = warpgroup_mma(queries.index(zero), k.permute((1, 0)), s, is_async=True)
        mbarrier.wait(full.index(FAR), phase)
        k = keys.index(zero + FAR)
        s = warpgroup_mma(queries.index(zero + 1), k.permute((1, 0)), s, is_async=True)
    else:
        mbarrier.wait(full.index(FAR), phase)
        k = keys.index(zero + FAR)
        s = warpgroup_mma(queries.index(zero), k.permute((1, 0)), s, use_acc=False, is_async=True)
        mbarrier.wait(full.index(NEAR), phase)
        k = keys.index(zero + NEAR)
        s = warpgroup_mma(queries.index(zero + 1), k.permute((1, 0)), s, is_async=True)
        s = warpgroup_mma(q_rope, ropes.index(zero + 1).permute((1, 0)), s, is_async=True)
    return warpgroup_mma_wait(0, [s])


@gluon.jit
def _zero_tails(quarters, W: gl.constexpr, valid, zero):
    """Set rows past the request's last one to zero in this warpgroup's halves of both tiles: 0 * NaN would not be 0.
    From `zero` on, so that the loop stays one: unrolled it is half of the code between one pair of tiles and the next.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, 64, gl.SliceLayout(1, layout))
    for i in range(zero, 8):
        some = quarters.index(W * 4 + i // 4 * 8 + i % 4)
        some.store(gl.where(row[:, None] < valid - i // 4 * 64, some.load(layout), 0.0))


@gluon.jit
def _attend(
    W: gl.constexpr, q_desc, k_desc, r_desc, q_ptr, table_ptr, seq_lens_ptr, out_ptr, lse_ptr,
    partial_ptr, partial_lse_ptr, counter_ptr, scale_log2, stride_tb, stride_ob, stride_os, stride_oh,
    batch, q_len, heads, capacity, tile, row_tiles, slot, slots, begin, end, aligned, pieces, share, before, zero,
    queries, keys, ropes, first_weights, second_weights, first_max, both_max, first_sum, second_sum,
    full, full_q,
    CAUSAL: gl.constexpr, FLAT: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """One warpgroup, W = 0 the left one and 1 the right one, over all pieces of its slot."""
    DTYPE: gl.constexpr = k_desc.dtype
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, output, 2)
    of_row: gl.constexpr = gl.SliceLayout(1, score)
    of_out_row: gl.constexpr = gl.SliceLayout(1, output)
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    LN2: gl.constexpr = 0.6931471805599453
    rows = q_len * heads
    local = gl.arange(0, 64, of_row)
    key_col = W * 64 + gl.arange(0, 64, gl.SliceLayout(0, score))
    passed = begin * 0  # pairs so far: the parity of every barrier that turns once a pair
    done = begin * 0  # pieces so far
    start_before = before

    for item in range(begin, end):
        request, length, steps, first, last, number, count, base = _piece(
            item, before, slot, aligned, pieces, share, seq_lens_ptr, capacity, 128
        )
        if first < last:
            own_tile = _late(tile, length)
            q_row = request * rows + own_tile * 64
            live = gl.minimum(rows - own_tile * 64, 64)
            valid = gl.minimum(length, capacity)
            last_key = valid - 1
            table = table_ptr + request.to(gl.int64) * stride_tb
            # All that is looked up, before bulk copies are asked for: after them it waits in their queue.
            row_a = _tile_rows(table, 2 * first, last_key, PAGE)
            row_b = _tile_rows(table, 2 * first + 1, last_key, PAGE)
            next_a = _tile_rows(table, 2 * first + 2, last_key, PAGE)
            next_b = _tile_rows(table, 2 * first + 3, last_key, PAGE)
            q_rope = _load_rope_of_queries(q_ptr, q_row, live, score)
            if W == 0:
                mbarrier.expect(full_q, 64 * 512 * 2)
                tma.async_copy_global_to_shared(q_desc, [q_row, 0], full_q, queries.index(0))
                tma.async_copy_global_to_shared(q_desc, [q_row, 256], full_q, queries.index(1))
            # Programs that begin together multiply together, while memory idles, and then wait for it together.
            together = (end - begin == 1) & (slots * row_tiles >= FEWEST_PROGRAMS)
            if together & (last - first >= FEWEST_PAIRS) & (last - first <= MOST_PAIRS):
                _pause(slot % 4 * CYCLES_LATER)
            mbarrier.expect(full.index(3 * W), NEAR_BYTES)
            mbarrier.expect(full.index(2 - W), HALF_BYTES)
            if W == 0:
                _copy_near(k_desc, r_desc, row_a, keys.index(0), ropes.index(0), full.index(0), 0, True, PAGE)
                _copy_tile(k_desc, row_b, 0, keys.index(2), full.index(2), True, PAGE)
            else:
                _copy_near(k_desc, r_desc, row_b, keys.index(3), ropes.index(1), full.index(3), 1, True, PAGE)
                _copy_tile(k_desc, row_a, 256, keys.index(1), full.index(1), True, PAGE)
            sight, shortest = _sight(valid, q_len, heads, own_tile * 64 + local, own_tile * 64, CAUSAL)
            m = gl.full([64], -float("inf"), gl.float32, of_row)
            l = gl.zeros([64], gl.float32, of_row)
            o = gl.zeros([64, 256], gl.float32, output)
            mbarrier.wait(full_q, done & 1)
            for pair in range(first, last):
                phase = passed & 1
                passed += 1
                z = _same_for_warp(pair * zero)
                at = pair * 128
                more = pair + 1 < last
                then_a = _tile_rows(table, 2 * pair + 4, last_key, PAGE)
                then_b = _tile_rows(table, 2 * pair + 5, last_key, PAGE)
                k_al = keys.index(z)
                k_ar = keys.index(z + 1)
                k_bl = keys.index(z + 2)
                k_br = keys.index(z + 3)
                if at + 128 > valid:
                    mbarrier.wait(full.index(W), phase)
                    mbarrier.wait(full.index(2 + W), phase)
                    _zero_tails(keys._reinterpret(DTYPE, [16, 64, 64], keys.layout), W, valid - at, z)
                    fence_async_shared()
                    _barrier()
                if W == 0:
                    s = _scores(W, queries, keys, ropes, q_rope, full, phase, z, score)
                    if at + 64 > shortest:
                        s = gl.where((at + key_col)[None, :] < sight[:, None], s, -float("inf"))
                    m_new = gl.maximum(m, gl.max(s, 1) * scale_log2)
                    first_max.store(m_new)
                    _tell(FIRST_MAX, zero)
                    shift = _finite(m_new, CAUSAL)
                    factor = gl.exp2(m - shift)
                    p = gl.exp2(s * scale_log2 - shift[:, None])
                    o = o * gl.convert_layout(factor, of_out_row)[:, None]
                    rounded = p.to(DTYPE)
                    own = gl.convert_layout(rounded, operand)
                    o = warpgroup_mma(own, k_al, o, is_async=True)
                    # While products run: sums, and telling barriers what will be copied once they are over.
                    l = l * factor + gl.sum(p, 1)
                    mbarrier.expect(full.index(0), NEAR_BYTES, pred=more)
                    _hear(BOTH_MAX)
                    m = both_max.load(of_row)
                    later = gl.exp2(m_new - _finite(m, CAUSAL))
                    first_weights.store((p * later[:, None]).to(DTYPE))
                    fence_async_shared()
                    _tell(FIRST_WEIGHTS, z)
                    l = l * later
                    o, own = warpgroup_mma_wait(0, [o, own])
                    _barrier()
                    _copy_near(k_desc, r_desc, next_a, keys.index(0), ropes.index(0), full.index(0), 0, more, PAGE)
                    o = o * gl.convert_layout(later, of_out_row)[:, None]
                    _hear(SECOND_WEIGHTS)
                    o = warpgroup_mma(second_weights, k_bl, o, is_async=True)
                    mbarrier.expect(full.index(2), HALF_BYTES, pred=more)
                    o = warpgroup_mma_wait(0, [o])
                    _barrier()
                    _copy_tile(k_desc, next_b, 0, keys.index(2), full.index(2), more, PAGE)
                else:
                    s = _scores(W, queries, keys, ropes, q_rope, full, phase, z, score)
                    if at + 128 > shortest:
                        s = gl.where((at + key_col)[None, :] < sight[:, None], s, -float("inf"))
                    own_max = gl.max(s, 1) * scale_log2
                    _hear(FIRST_MAX)
                    m_new = gl.maximum(first_max.load(of_row), own_max)
                    both_max.store(m_new)
                    _tell(BOTH_MAX, zero)
                    shift = _finite(m_new, CAUSAL)
                    p = gl.exp2(s * scale_log2 - shift[:, None])
                    rounded = p.to(DTYPE)
                    second_weights.store(rounded)
                    fence_async_shared()
                    told = _tell(SECOND_WEIGHTS, z)
                    factor = gl.exp2(m - shift + told.to(gl.float32))  # added: the output is scaled after telling
                    m = m_new
                    o = o * gl.convert_layout(factor, of_out_row)[:, None]
                    own = gl.convert_layout(rounded, operand)
                    _hear(FIRST_WEIGHTS)
                    o = warpgroup_mma(first_weights, k_ar, o, is_async=True)
                    o = warpgroup_mma(own, k_br, o, is_async=True)
                    l = l * factor + gl.sum(p, 1)
                    mbarrier.expect(full.index(1), HALF_BYTES, pred=more)
                    mbarrier.expect(full.index(3), NEAR_BYTES, pred=more)
                    o = warpgroup_mma_wait(1, [o])
                    _barrier()
                    _copy_tile(k_desc, next_a, 256, keys.index(1), full.index(1), more, PAGE)
                    o, own = warpgroup_mma_wait(0, [o, own])
                    _barrier()
                    _copy_near(k_desc, r_desc, next_b, keys.index(3), ropes.index(1), full.index(3), 1, more, PAGE)
                next_a = then_a
                next_b = then_b

            if W == 0:
                first_sum.store(l)
            else:
                second_sum.store(l)
            _hear(SUMS)
            done += 1
            l += second_sum.load(of_row) if W == 0 else first_sum.load(of_row)
            inverse = _inverse(l, 1.0, length, capacity)
            o = o * gl.convert_layout(inverse, of_out_row)[:, None]
            # Through the keys' memory, a part that this warpgroup alone has read, so that rows are written whole.
            wide = keys.index(3 * W)
            wide.store(o.to(DTYPE))
            _barrier()
            o_part = wide.load(plain)
            fence_async_shared()
            out_row = gl.arange(0, 64, gl.SliceLayout(1, plain))
            out_col = W * 256 + gl.arange(0, 256, gl.SliceLayout(0, plain))
            row = own_tile * 64 + out_row
            if count > 1:
                place = _partial_at(base, number, aligned) * row_tiles + own_tile
                part = partial_ptr + place.to(gl.int64) * (64 * 512)
                gl.store(part + (out_row * 512)[:, None] + out_col[None, :], o_part, mask=(row < rows)[:, None])
                if W == 0:
                    gl.store(partial_lse_ptr + place * 64 + local, _lse(m, l))
                _arrive(counter_ptr + request * row_tiles + own_tile, (number == 0) & (W == 0), 2 * count)
            else:
                at_row = _row_at(row, heads, stride_os, stride_oh, FLAT)
                result = out_ptr + request.to(gl.int64) * stride_ob
                gl.store(result + at_row[:, None] + out_col[None, :], o_part, mask=(row < rows)[:, None])
                if W == 0:
                    natural = gl.where(l == 0.0, -float("inf"), (m + gl.log2(l)) * LN2)
                    natural = gl.where(length > capacity, float("nan"), natural)
                    lse_row = own_tile * 64 + local
                    gl.store(lse_ptr + request.to(gl.int64) * rows + lse_row, natural, mask=lse_row < rows)
                _barrier()
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
def _mla_decode_many_kernel(
    q_desc, k_desc, r_desc,
    q_ptr, table_ptr, seq_lens_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, counter_ptr,
    scale_log2, stride_tb, stride_ob, stride_os, stride_oh,
    batch, q_len, heads, capacity, row_tiles, slots, splits, most_pieces, slot_items, zero,
    CAUSAL: gl.constexpr, FLAT: gl.constexpr, PAGE: gl.constexpr, BLOCK_B: gl.constexpr, LEAST: gl.constexpr,
    WORKER_REGISTERS: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = k_desc.dtype
    requests, lens = _load_lengths(seq_lens_ptr, table_ptr, batch, capacity, PAGE, BLOCK_B)
    if BLOCK_B > 1:
        _fetch_table(table_ptr, batch * stride_tb * 4)
    tile = gl.program_id(0) % row_tiles  # the tiles of one slot run side by side and share its keys in L2
    slot = gl.program_id(0) // row_tiles
    matrix: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    queries = gl.allocate_shared_memory(DTYPE, [2, 64, 256], matrix)
    keys = gl.allocate_shared_memory(DTYPE, [4, 64, 256], matrix)  # first tile: left, right; second: left, right
    ropes = gl.allocate_shared_memory(DTYPE, [2, 64, 64], matrix)
    # What the two tell one another has memory of its own each: Triton then sees no hazard inside of a warpgroup.
    first_weights = gl.allocate_shared_memory(DTYPE, [64, 64], matrix)
    second_weights = gl.allocate_shared_memory(DTYPE, [64, 64], matrix)
    first_max = gl.allocate_shared_memory(gl.float32, [64], vector)
    both_max = gl.allocate_shared_memory(gl.float32, [64], vector)
    first_sum = gl.allocate_shared_memory(gl.float32, [64], vector)
    second_sum = gl.allocate_shared_memory(gl.float32, [64], vector)
    full = _barriers(4, 1)
    full_q = _barriers(1, 1).index(0)
    fence_async_shared()
    begin, end, aligned, pieces, share, before = _own_share(
        requests, lens, slot, slots, batch, splits, most_pieces, slot_items, capacity, 128, LEAST, BLOCK_B
    )
    args = (
        q_desc, k_desc, r_desc, q_ptr, table_ptr, seq_lens_ptr, out_ptr, lse_ptr,
        partial_ptr, partial_lse_ptr, counter_ptr, scale_log2, stride_tb, stride_ob, stride_os, stride_oh,
        batch, q_len, heads, capacity, tile, row_tiles, slot, slots, begin, end, aligned, pieces, share, before, zero,
        queries, keys, ropes, first_weights, second_weights, first_max, both_max, first_sum, second_sum,
    full, full_q,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_left, (args, CAUSAL, FLAT, PAGE)),
            (_right, (args, CAUSAL, FLAT, PAGE)),
        ],
        [4],
        [WORKER_REGISTERS],
    )
