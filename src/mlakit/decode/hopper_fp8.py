"""Dense MLA decode from e4m3 caches on Hopper: keys stay e4m3 in shared memory, and are float16 in registers alone.

Scores are e4m3 products straight from the copied tile, which is exact: query and keys are e4m3 both. The second product
takes the values as its left operand, O^T = V^T P^T, and a left operand may come from registers: two neighbouring codes
of a key are read as one number of 16 bits, transposed on the way (`ldmatrix.trans`), so that a register has two codes
of each of two neighbouring keys; one permutation and two conversions make of it one operand for the even columns of the
value and one for the odd ones, in float16, which is exact. The two have accumulators of their own, and meet when the
output is written. Nothing that is dequantized is ever written to shared memory.

While a tile's values are multiplied, the scores of the next one are computed.
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
    _await,
    _barrier,
    _fetch_into_l2,
    _merge,
    _row_at,
    _same_for_warp,
    _tile_rows,
    _uniform,
)
from mlakit.decode.hopper_schedule import _load_lens, _partial_at, _piece, _share_out, _share_out_one


@gluon.jit
def _arrive(counter_ptr, first, arrivals):
    """`hopper_parts._arrive` for a program of any number of warps: one arrival a program."""
    _barrier()
    gl.inline_asm_elementwise(
        """{
        .reg .pred one; .reg .u32 lane;
        mov.u32 lane, %tid.x; setp.eq.u32 one, lane, 0;
        @one red.release.gpu.global.add.u32 [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [counter_ptr, gl.where(first, 65537 - arrivals, 1)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _fill(k_desc, r_desc, page_rows, keys, rope, full, wanted, PAGE: gl.constexpr):
    """Copy a tile: one box, or one for each page and 128 columns."""
    mbarrier.expect(full, 64 * 576, pred=wanted)
    if PAGE >= 64:
        tma.async_copy_global_to_shared(k_desc, [page_rows[0], 0], full, keys, pred=wanted)
        tma.async_copy_global_to_shared(r_desc, [page_rows[0], 512], full, rope, pred=wanted)
    else:
        for i in gl.static_range(64 // PAGE):
            for part in gl.static_range(4):
                box = keys.slice(i * PAGE, PAGE, 0).slice(part * 128, 128, 1)
                tma.async_copy_global_to_shared(k_desc, [page_rows[i], part * 128], full, box, pred=wanted)
            box = rope.slice(i * PAGE, PAGE, 0)
            tma.async_copy_global_to_shared(r_desc, [page_rows[i], 512], full, box, pred=wanted)


@gluon.jit
def _zero_tail(keys, valid, WARPS: gl.constexpr):
    """Set codes of a tile's keys past the request's last one to zero: 0 * NaN would not be 0. Rows of words."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    row = gl.arange(0, 64, gl.SliceLayout(1, layout))
    for part in gl.static_range(4):
        some = keys.slice(part * 32, 32, 1)
        some.store(gl.where(row[:, None] < valid, some.load(layout), 0))


@gluon.jit
def _halves(pairs):
    """Codes of two neighbouring columns, in float16: those of the even one and those of the odd one."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 t; .reg .b16 even, odd;
        prmt.b32 t, $2, 0, 0x3120;
        mov.b32 {even, odd}, t;
        cvt.rn.f16x2.e4m3x2 $0, even;
        cvt.rn.f16x2.e4m3x2 $1, odd;
        }""",
        "=r,=r,r",
        [pairs],
        dtype=(gl.float16, gl.float16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _words(even, odd, BF16: gl.constexpr):
    """Two columns of the output in one word."""
    if BF16:
        word = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        word = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
        )
    return word


@gluon.jit
def _part(queries, keys, s, layout: gl.constexpr, BLOCK_R: gl.constexpr, ADD: gl.constexpr):
    if BLOCK_R == 64:
        s = warpgroup_mma(queries, keys.permute((1, 0)), s, use_acc=ADD, is_async=True)
    else:
        s = warpgroup_mma(keys, queries.permute((1, 0)), s, use_acc=ADD, is_async=True)
    return s


@gluon.jit
def _scores(queries, q_rope, keys, rope, z, layout: gl.constexpr, BLOCK_R: gl.constexpr):
    """Scores of a tile, on their way, in four sums: [64 rows, 64 keys] where rows fill a matrix instruction, else the
    transpose. Matrix instructions add e4m3 products in 14 bits: in one sum of 576 the last of them are rounded to 2^-9.
    """
    zeros = gl.zeros([64, BLOCK_R], gl.float32, layout)
    q = queries.index(z)
    s0 = _part(q_rope.index(z), rope, zeros, layout, BLOCK_R, False)
    s0 = _part(q.slice(0, 128, 1), keys.slice(0, 128, 1), s0, layout, BLOCK_R, True)
    s1 = _part(q.slice(128, 128, 1), keys.slice(128, 128, 1), zeros, layout, BLOCK_R, False)
    s2 = _part(q.slice(256, 128, 1), keys.slice(256, 128, 1), zeros, layout, BLOCK_R, False)
    s3 = _part(q.slice(384, 128, 1), keys.slice(384, 128, 1), zeros, layout, BLOCK_R, False)
    return s0, s1, s2, s3


@gluon.jit
def _softmax(s, m, l, at, key, sight, shortest, scale_log2, CAUSAL: gl.constexpr, KEYS: gl.constexpr):
    """Weights times 2^12, in float16 of which few are then subnormal; KEYS: the dimension of the keys."""
    ROWS: gl.constexpr = 1 - KEYS
    if at + 64 > shortest:
        s = gl.where(gl.expand_dims(at + key, ROWS) < gl.expand_dims(sight, KEYS), s, -float("inf"))
    m_new = gl.maximum(m, gl.max(s, KEYS) * scale_log2)
    shift = m_new
    if CAUSAL:  # a row that has seen no key yet: 0 instead of inf - inf
        shift = gl.where(m_new == -float("inf"), 0.0, m_new)
    factor = gl.exp2(m - shift)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(shift - 12.0, KEYS))
    l = l * gl.expand_dims(factor, KEYS) + p
    return m_new, l, factor, p


@gluon.jit
def _add_values(words, weights, o0, o1, o2, o3, operand: gl.constexpr, PAIRS: gl.constexpr):
    """O^T += V^T P^T of a tile: the even and the odd columns of its left half and of its right half."""
    left = words.slice(0, PAIRS, 1).permute((1, 0)).load(operand)
    even_left, odd_left = _halves(left)
    o0 = warpgroup_mma(even_left, weights, o0, is_async=True)
    o1 = warpgroup_mma(odd_left, weights, o1, is_async=True)
    right = words.slice(PAIRS, PAIRS, 1).permute((1, 0)).load(operand)
    even_right, odd_right = _halves(right)
    o2 = warpgroup_mma(even_right, weights, o2, is_async=True)
    o3 = warpgroup_mma(odd_right, weights, o3, is_async=True)
    return o0, o1, o2, o3, even_left, odd_left, even_right, odd_right


# What changes from batch to batch must not recompile; `zero` must stay unknown.
@gluon.jit(
    do_not_specialize=[
        "stride_tb",
        "batch",
        "q_len",
        "heads",
        "capacity",
        "row_tiles",
        "slots",
        "splits",
        "most_pieces",
        "slot_items",
        "zero",
    ]
)
def _mla_decode_e4m3_kernel(
    q_desc, q_rope_desc, k_desc, r_desc,
    table_ptr, seq_lens_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, counter_ptr,
    scale_log2, kv_scale, stride_tb, stride_ob, stride_os, stride_oh,
    batch, q_len, heads, capacity, row_tiles, slots, splits, most_pieces, slot_items, zero,
    CAUSAL: gl.constexpr, FLAT: gl.constexpr, PAGE: gl.constexpr, BLOCK_B: gl.constexpr, LEAST: gl.constexpr,
    BLOCK_R: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    CODE: gl.constexpr = k_desc.dtype
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    LN2: gl.constexpr = 0.6931471805599453
    STEP: gl.constexpr = 64
    codes: gl.constexpr = gl.NVMMASharedLayout(128, 8, rank=2)
    rope_codes: gl.constexpr = gl.NVMMASharedLayout(64, 8, rank=2)
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_R, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, product, 2)
    of_column: gl.constexpr = gl.SliceLayout(0, product)  # query rows, which are columns of the output's transpose
    KEYS: gl.constexpr = 1 if BLOCK_R == 64 else 0
    if BLOCK_R == 64:
        score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, 256 // WARPS, 32])
        narrow: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
        of_key: gl.constexpr = gl.SliceLayout(0, score)
        of_row: gl.constexpr = gl.SliceLayout(1, score)
    else:
        score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_R, 32])
        narrow: gl.constexpr = gl.NVMMASharedLayout(2 * BLOCK_R, 16, rank=2)
        of_key: gl.constexpr = gl.SliceLayout(1, score)
        of_row: gl.constexpr = gl.SliceLayout(0, score)
    PAIRS: gl.constexpr = 128
    tile = gl.program_id(0) % row_tiles  # the tiles of one slot run side by side and share its keys in L2
    slot = gl.program_id(0) // row_tiles
    if BLOCK_B == 1:
        length_of_all = gl.load(seq_lens_ptr)
        _fetch_into_l2(table_ptr, capacity // PAGE * 4)
    else:
        requests, lens = _load_lens(seq_lens_ptr, batch, BLOCK_B, WARPS)
    queries = gl.allocate_shared_memory(CODE, [1, BLOCK_R, 512], codes)
    q_rope = gl.allocate_shared_memory(CODE, [1, BLOCK_R, 64], rope_codes)
    keys = gl.allocate_shared_memory(CODE, [STAGES, 64, 512], codes)
    ropes = gl.allocate_shared_memory(CODE, [STAGES, 64, 64], rope_codes)
    weights = gl.allocate_shared_memory(gl.float16, [2, 64, BLOCK_R], narrow)
    factors = gl.allocate_shared_memory(gl.float32, [2, BLOCK_R], vector)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full_q = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    pairs = keys._reinterpret(gl.int16, [STAGES, 64, 256], gl.NVMMASharedLayout(128, 16, rank=2))
    as_words = keys._reinterpret(gl.int32, [STAGES, 64, 128], gl.NVMMASharedLayout(128, 32, rank=2))
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    mbarrier.init(full_q, count=1)
    fence_async_shared()
    _barrier()
    if BLOCK_B == 1:
        begin, end, aligned, pieces, share, start_before = _share_out_one(
            _uniform(length_of_all), slot, splits, most_pieces, slot_items, capacity, STEP, LEAST
        )
    else:
        begin, end, aligned, pieces, share, start_before = _share_out(
            requests, lens, slot, slots, batch, splits, most_pieces, slot_items, capacity, STEP, LEAST
        )
    rows = q_len * heads
    key = gl.arange(0, 64, of_key)
    row = tile * BLOCK_R + gl.arange(0, BLOCK_R, of_row)
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    out_local = gl.arange(0, BLOCK_R, gl.SliceLayout(1, plain))
    out_row = tile * BLOCK_R + out_local
    out_col = gl.arange(0, 512, gl.SliceLayout(0, plain))
    passed = slot * 0
    done = slot * 0
    before = start_before
    for item in range(begin, end):
        request, length, steps, first, last, number, count, base = _piece(
            item, before, slot, aligned, pieces, share, seq_lens_ptr, capacity, STEP
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
                _fill(k_desc, r_desc, now, keys.index(stage), ropes.index(stage), full.index(stage), first + i < last, PAGE)
            next_row = _tile_rows(table, first + STAGES, last_key, PAGE)
            if CAUSAL:
                sight = valid - q_len + 1 + row // heads
                shortest = valid - q_len + 1
            else:
                sight = gl.full([BLOCK_R], 0, gl.int32, of_row) + valid
                shortest = valid
            m = gl.full([BLOCK_R], -float("inf"), gl.float32, of_row)
            l = gl.zeros([64, BLOCK_R], gl.float32, score)
            o0 = gl.zeros([PAIRS, BLOCK_R], gl.float32, product)
            o1 = gl.zeros([PAIRS, BLOCK_R], gl.float32, product)
            o2 = gl.zeros([PAIRS, BLOCK_R], gl.float32, product)
            o3 = gl.zeros([PAIRS, BLOCK_R], gl.float32, product)
            mbarrier.wait(full_q, done & 1)
            # The first tile's scores.
            z = _same_for_warp(first * zero)
            stage = _same_for_warp(first * zero + passed % STAGES)
            mbarrier.wait(full.index(stage), passed // STAGES & 1)
            if first * 64 + 64 > valid:
                _zero_tail(as_words.index(stage), valid - first * 64, WARPS)
                fence_async_shared()
                _barrier()
            s0, s1, s2, s3 = _scores(queries, q_rope, keys.index(stage), ropes.index(stage), z, score, BLOCK_R)
            s0, s1, s2, s3 = warpgroup_mma_wait(0, [s0, s1, s2, s3])
            s = (s0 + s1) + (s2 + s3)
            m, l, factor, p = _softmax(s, m, l, first * 64, key, sight, shortest, scale_log2, CAUSAL, KEYS)
            factors.index(passed & 1).store(factor)
            weights.index(passed & 1).store(p.to(gl.float16))
            fence_async_shared()
            _barrier()
            for step in range(first + 1, last):
                z = _same_for_warp(step * zero)
                before_stage = _same_for_warp(step * zero + passed % STAGES)
                buffer = _same_for_warp(step * zero + (passed & 1))
                before_full = full.index(passed % STAGES)
                passed += 1
                stage = _same_for_warp(step * zero + passed % STAGES)
                at = step * 64
                then_row = _tile_rows(table, step + STAGES, last_key, PAGE)
                mbarrier.wait(full.index(passed % STAGES), passed // STAGES & 1)
                if at + 64 > valid:
                    _zero_tail(as_words.index(stage), valid - at, WARPS)
                    fence_async_shared()
                    _barrier()
                s0, s1, s2, s3 = _scores(queries, q_rope, keys.index(stage), ropes.index(stage), z, score, BLOCK_R)
                rescale = factors.index(buffer).load(of_column)[None, :]
                o0 = o0 * rescale
                o1 = o1 * rescale
                o2 = o2 * rescale
                o3 = o3 * rescale
                held = weights.index(buffer)
                if KEYS == 1:
                    held = held.permute((1, 0))
                o0, o1, o2, o3, a0, a1, a2, a3 = _add_values(
                    pairs.index(before_stage), held, o0, o1, o2, o3, operand, PAIRS
                )
                s0, s1, s2, s3 = warpgroup_mma_wait(4, [s0, s1, s2, s3])
                s = (s0 + s1) + (s2 + s3)
                m, l, factor, p = _softmax(s, m, l, at, key, sight, shortest, scale_log2, CAUSAL, KEYS)
                factors.index(passed & 1).store(factor)
                weights.index(passed & 1).store(p.to(gl.float16))
                fence_async_shared()
                o0, o1, o2, o3, a0, a1, a2, a3 = warpgroup_mma_wait(0, [o0, o1, o2, o3, a0, a1, a2, a3])
                _barrier()
                more = step - 1 + STAGES < last
                _fill(k_desc, r_desc, next_row, keys.index(before_stage), ropes.index(before_stage), before_full, more, PAGE)
                next_row = then_row
            # The last tile's values.
            z = _same_for_warp(last * zero)
            stage = _same_for_warp(last * zero + passed % STAGES)
            buffer = _same_for_warp(last * zero + (passed & 1))
            passed += 1
            rescale = factors.index(buffer).load(of_column)[None, :]
            held = weights.index(buffer)
            if KEYS == 1:
                held = held.permute((1, 0))
            o0, o1, o2, o3, a0, a1, a2, a3 = _add_values(
                pairs.index(stage), held, o0 * rescale, o1 * rescale, o2 * rescale, o3 * rescale, operand, PAIRS
            )
            o0, o1, o2, o3, a0, a1, a2, a3 = warpgroup_mma_wait(0, [o0, o1, o2, o3, a0, a1, a2, a3])
            done += 1
            total = gl.sum(l, KEYS)
            # A table too short for its request cannot be refused without a host sync; NaN is louder than attention
            # over a part.
            inverse = gl.where(total == 0.0, 0.0, kv_scale / total)
            inverse = gl.where(length > capacity, float("nan"), inverse)
            lse = gl.where(total == 0.0, -float("inf"), m - 12.0 + gl.log2(total))
            factors.index(0).store(inverse)
            _barrier()
            last_factor = factors.index(0).load(of_column)[None, :]
            # Through the keys' memory, so that rows are written whole.
            wide = keys._reinterpret(
                gl.int32, [STAGES * 32 // BLOCK_R, BLOCK_R, 256], gl.NVMMASharedLayout(128, 32, rank=2)
            ).index(0)
            BF16: gl.constexpr = DTYPE == gl.bfloat16
            wide.slice(0, PAIRS, 1).permute((1, 0)).store(_words(o0 * last_factor, o1 * last_factor, BF16))
            wide.slice(PAIRS, PAIRS, 1).permute((1, 0)).store(_words(o2 * last_factor, o3 * last_factor, BF16))
            _barrier()
            wide_out = keys._reinterpret(
                DTYPE, [STAGES * 32 // BLOCK_R, BLOCK_R, 512], gl.NVMMASharedLayout(128, 16, rank=2)
            ).index(0)
            o_all = wide_out.load(plain)
            fence_async_shared()
            live = (out_row < rows)[:, None]
            if count > 1:
                place = _partial_at(base, number, aligned) * row_tiles + tile
                part = partial_ptr + place.to(gl.int64) * (BLOCK_R * 512) + (out_local * 512)[:, None]
                gl.store(part + out_col[None, :], o_all, mask=live)
                gl.store(partial_lse_ptr + place * BLOCK_R + (row - tile * BLOCK_R), lse)
                _arrive(counter_ptr + request * row_tiles + tile, number == 0, count)
            else:
                at_row = _row_at(out_row, heads, stride_os, stride_oh, FLAT)
                result = out_ptr + request.to(gl.int64) * stride_ob + at_row[:, None] + out_col[None, :]
                gl.store(result, o_all, mask=live)
                natural = gl.where(length > capacity, float("nan"), lse * LN2)
                gl.store(lse_ptr + request.to(gl.int64) * rows + row, natural, mask=row < rows)
                _barrier()
        before += steps

    # Requests without keys: nobody's pieces.
    for other in range(slot, batch, slots):
        request = slot * 0 + other  # a tensor, also to the type checker
        length = gl.load(seq_lens_ptr + request)
        if gl.minimum(length, capacity) <= 0:
            at_row = _row_at(out_row, heads, stride_os, stride_oh, FLAT)
            result = out_ptr + request.to(gl.int64) * stride_ob + at_row[:, None] + out_col[None, :]
            nothing = gl.where(length > capacity, float("nan"), 0.0).to(DTYPE)
            gl.store(result, gl.zeros([BLOCK_R, 512], DTYPE, plain) + nothing, mask=(out_row < rows)[:, None])
            nothing = gl.where(length > capacity, float("nan"), -float("inf"))
            nothing += gl.zeros([BLOCK_R], gl.float32, of_row)
            gl.store(lse_ptr + request.to(gl.int64) * rows + row, nothing, mask=row < rows)

    # Pieces of a request are merged by the programs that computed them, each some rows or some columns of one.
    before = start_before
    for item in range(begin, end):
        request, length, steps, first, last, number, count, base = _piece(
            item, before, slot, aligned, pieces, share, seq_lens_ptr, capacity, STEP
        )
        if (first < last) & (count > 1):
            _await(counter_ptr + request * row_tiles + tile)
            result = out_ptr + request.to(gl.int64) * stride_ob
            result_lse = lse_ptr + request.to(gl.int64) * rows
            too_long = length > capacity
            if count <= 2:
                _merge(
                    partial_ptr, partial_lse_ptr, result, result_lse, base, count, aligned, number, tile, row_tiles,
                    rows, heads, stride_os, stride_oh, too_long, 0, 512, 2, 8, 512, BLOCK_R, True, FLAT, WARPS,
                )  # fmt: skip
            elif count <= 4:
                _merge(
                    partial_ptr, partial_lse_ptr, result, result_lse, base, count, aligned, number, tile, row_tiles,
                    rows, heads, stride_os, stride_oh, too_long, 0, 512, 4, 4, 512, BLOCK_R, True, FLAT, WARPS,
                )  # fmt: skip
            elif count <= 16:
                _merge(
                    partial_ptr, partial_lse_ptr, result, result_lse, base, count, aligned, number, tile, row_tiles,
                    rows, heads, stride_os, stride_oh, too_long, 0, 512, 16, 1, 512, BLOCK_R, True, FLAT, WARPS,
                )  # fmt: skip
            elif count <= 64:
                _merge(
                    partial_ptr, partial_lse_ptr, result, result_lse, base, count, aligned, number, tile, row_tiles,
                    rows, heads, stride_os, stride_oh, too_long, 0, 512, 64, 1, 128, BLOCK_R, True, FLAT, WARPS,
                )  # fmt: skip
            else:
                _merge(
                    partial_ptr, partial_lse_ptr, result, result_lse, base, count, aligned, number, tile, row_tiles,
                    rows, heads, stride_os, stride_oh, too_long, 0, 512, 128, 1, 64, BLOCK_R, False, FLAT, WARPS,
                )  # fmt: skip
        before += steps
