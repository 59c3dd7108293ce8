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

from mlakit.decode.hopper_fp8_parts import (
    BASE,
    _add_halves,
    _fill,
    _finite,
    _kept_maximum,
    _largest,
    _words,
    _zero_tail,
)
from mlakit.decode.hopper_parts import (
    _await,
    _barrier,
    _fetch_into_l2,
    _same_for_warp,
    _tile_rows,
    _uniform,
)
from mlakit.decode.hopper_results import _answer_without_keys, _merge_pieces, _store_rows
from mlakit.decode.hopper_schedule import _load_lens, _piece, _share_out, _share_out_one


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


@gluon.jit
def _add_values(pairs, weights, o0, o1, o2, o3, operand: gl.constexpr):
    """O^T += V^T P^T of a tile: the even and the odd columns of its left half and of its right half, 32 keys at a time;
    operands of 32 keys are made while the 32 before are multiplied.
    """
    left, right = pairs.slice(0, 128, 1), pairs.slice(128, 128, 1)
    p_first, p_last = weights.slice(0, 32, 0), weights.slice(32, 32, 0)
    o0, o1, a, b = _add_halves(left.slice(0, 32, 0), p_first, o0, o1, operand)
    o0, o1, c, d = _add_halves(left.slice(32, 32, 0), p_last, o0, o1, operand)
    a, b = warpgroup_mma_wait(2, [a, b])
    o2, o3, a, b = _add_halves(right.slice(0, 32, 0), p_first, o2, o3, operand)
    c, d = warpgroup_mma_wait(2, [c, d])
    o2, o3, c, d = _add_halves(right.slice(32, 32, 0), p_last, o2, o3, operand)
    o0, o1, o2, o3, a, b, c, d = warpgroup_mma_wait(0, [o0, o1, o2, o3, a, b, c, d])
    return o0, o1, o2, o3


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
    if BLOCK_B == 1:
        length_of_all = gl.load(seq_lens_ptr)
        _fetch_into_l2(table_ptr, capacity // PAGE * 4)
    else:
        requests, lens = _load_lens(seq_lens_ptr, batch, BLOCK_B)
    queries = gl.allocate_shared_memory(CODE, [1, BLOCK_R, 512], codes)
    q_rope = gl.allocate_shared_memory(CODE, [1, BLOCK_R, 64], rope_codes)
    keys = gl.allocate_shared_memory(CODE, [STAGES, 64, 512], codes)
    ropes = gl.allocate_shared_memory(CODE, [STAGES, 64, 64], rope_codes)
    weights = gl.allocate_shared_memory(gl.float16, [1, 64, BLOCK_R], narrow)
    tops = gl.allocate_shared_memory(gl.float32, [1, 4 * BLOCK_R], vector)
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
            _uniform(length_of_all), slot, splits, most_pieces, slot_items, capacity, 64, LEAST
        )
    else:
        begin, end, aligned, pieces, share, start_before = _share_out(
            requests, lens, slot, slots, batch, splits, most_pieces, slot_items, capacity, 64, LEAST
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
            if CAUSAL:
                sight = valid - q_len + 1 + row // heads
                shortest = valid - q_len + 1
            else:
                sight = gl.full([BLOCK_R], 0, gl.int32, of_row) + valid
                shortest = valid
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
                if _uniform((gl.min(factor, 0) < 1.0).to(gl.int32)) != 0:  # what each warp finds for itself, the same
                    rescale = gl.convert_layout(factor, of_column)[None, :]
                    o0 = o0 * rescale
                    o1 = o1 * rescale
                    o2 = o2 * rescale
                    o3 = o3 * rescale
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
            # A table too short for its request cannot be refused without a host sync; NaN is louder than attention
            # over a part.
            inverse = gl.where(total == 0.0, 0.0, kv_scale / total)
            inverse = gl.where(length > capacity, float("nan"), inverse)
            lse = gl.where(total == 0.0, -float("inf"), m - BASE + gl.log2(total))
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
                out_row, out_col, row, BLOCK_R, FLAT,
            )  # fmt: skip
        before += steps

    _answer_without_keys(
        seq_lens_ptr, out_ptr, lse_ptr, slot, slots, batch, capacity, tile, rows, heads, stride_ob, stride_os,
        stride_oh, BLOCK_R, 512, plain, of_row, FLAT,
    )  # fmt: skip

    # Pieces of a request are merged by the programs that computed them, each some rows or some columns of one.
    before = start_before
    for item in range(begin, end):
        request, length, steps, first, last, number, count, base = _piece(
            item, before, slot, aligned, pieces, share, seq_lens_ptr, capacity, 64
        )
        if (first < last) & (count > 1):
            _await(counter_ptr + request * row_tiles + tile)
            result = out_ptr + request.to(gl.int64) * stride_ob
            result_lse = lse_ptr + request.to(gl.int64) * rows
            _merge_pieces(
                partial_ptr, partial_lse_ptr, result, result_lse, base, count, aligned, number, tile, row_tiles, rows,
                heads, stride_os, stride_oh, length > capacity, 0, 512, BLOCK_R, FLAT,
            )  # fmt: skip
        before += steps
