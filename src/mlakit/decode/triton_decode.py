"""Dense MLA decode over a paged latent cache, in Triton, for every GPU from sm_80 up.

Query rows (new tokens x heads) are tiled by BLOCK_M, keys by BLOCK_N; a key tile is loaded once and is K for the scores
and, in its first RANK columns, V for the output. With 16 query rows the small matrix instructions of 16 rows pad
nothing; from 64 rows on Hopper's warpgroup instructions take over.

Pages are looked up one tile ahead: the look-up is otherwise a dependent load in front of every tile's copy. Positions
past the last readable key are clamped to it, so that no padding and no dead table slot is read and no load needs a
mask.
"""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from mlakit.decode.triton_fp8 import _latent, _load_query, _rope, _rows_at
from mlakit.triton_pieces import even_bounds, even_pieces, of_all_requests, partial_index, range_of_slot, tiles_of


@triton.jit
def _look_up(table_ptr, start, last, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pages of the tile that starts at key `start`: one number if a tile lies in one page, else one for each key."""
    if PAGE_SIZE >= BLOCK_N:
        page = tl.load(table_ptr + tl.minimum(start, last) // PAGE_SIZE)
    else:
        page = tl.load(table_ptr + tl.minimum(start + tl.arange(0, BLOCK_N), last) // PAGE_SIZE)
    return page


@triton.jit
def _keys_at(
    cache_ptr, page, start, last, cols, stride_cp, stride_ct, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Pointers to some columns of a tile's keys. Pages are int64 offsets, as a cache may hold more than 2^31 elements;
    inside a page 32 bits do unless it is WIDE, and are a third of the instructions.
    """
    if PAGE_SIZE >= BLOCK_N:
        first = (start + 0 * last) % PAGE_SIZE  # a tensor, also to the interpreter
        base = cache_ptr + (page.to(tl.int64) * stride_cp + first.to(tl.int64) * stride_ct)
        key = tl.minimum(tl.arange(0, BLOCK_N), last - start)
        if WIDE:
            key = key.to(tl.int64)
        at = (base + cols)[None, :] + (key * stride_ct)[:, None]
    else:
        position = tl.minimum(start + tl.arange(0, BLOCK_N), last)
        offset = page.to(tl.int64) * stride_cp + (position % PAGE_SIZE).to(tl.int64) * stride_ct
        at = cache_ptr + offset[:, None] + cols[None, :]
    return at


@triton.jit
def _sight(
    first_tile,
    end_tile,
    length,
    capacity,
    tile,
    row,
    rows,
    q_len,
    heads,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """First key of a piece, the end of those that any row of the tile sees, and where each row's sight ends."""
    keys = tl.minimum(tl.maximum(length, 0), capacity)
    start = first_tile * BLOCK_N
    end = tl.minimum(end_tile * BLOCK_N, keys)
    if CAUSAL:
        newest = tl.minimum(tile * BLOCK_M + BLOCK_M, rows) - 1
        end = tl.minimum(end, keys - q_len + newest // heads + 1)
        visible = tl.minimum(keys - q_len + row // heads + 1, end)
    else:
        visible = row * 0 + end
    return start, end, visible


@triton.jit
def _zero_by(length):
    """0, of which the compiler does not know that it is: lengths are not negative here.

    What is computed from it is computed where it stands. Else the compiler works out each row's offsets once, in front
    of all requests, and keeps them, and the 64-bit forms of the strides, in registers that the accumulator needs: 13 to
    21 loads and stores of spilled registers (64 rows on sm_90). A multiple of 16, so that aligned addresses stay so.
    """
    return (length < 0).to(tl.int32) * 16


@triton.jit
def _attend(
    q_ptr,
    cache_ptr,
    table_ptr,
    scale_log2,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_cp,
    stride_ct,
    stride_tb,
    request,
    first_tile,
    end_tile,
    length,
    tile,
    q_len,
    heads,
    capacity,
    CAUSAL: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    FORMAT: tl.constexpr,
    Q_E4M3: tl.constexpr,
    NATIVE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One tile of query rows over some tiles of one request's keys: both halves of the weighted sum of values, each
    row's sum of weights, and the score that they are relative to.
    """
    SMALL: tl.constexpr = BLOCK_M < 64
    # With large tiles registers are worth more than instructions: 128x128x8192 takes 1009 us instead of 1030 if what
    # does not change from key to key is computed for each (and where more goes on, it spills).
    COMPUTE_INSIDE: tl.constexpr = not SMALL and not CAUSAL and PAGE_SIZE >= BLOCK_N
    rows = q_len * heads
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    start, end, visible = _sight(
        first_tile, end_tile, length, capacity, tile, row, rows, q_len, heads, CAUSAL, BLOCK_M, BLOCK_N
    )
    last = end - 1

    HALF: tl.constexpr = RANK // 2
    c = tl.arange(0, HALF)
    r = RANK + tl.arange(0, ROPE)
    q_at = (
        q_ptr
        + request.to(tl.int64) * (stride_qb + _zero_by(length))
        + ((row // heads).to(tl.int64) * stride_qs + (row % heads).to(tl.int64) * stride_qh)
    )
    q_a = _load_query(q_at, c, row < rows, Q_E4M3, NATIVE, DTYPE)
    q_b = _load_query(q_at, HALF + c, row < rows, Q_E4M3, NATIVE, DTYPE)
    q_r = _load_query(q_at, r, row < rows, Q_E4M3, NATIVE, DTYPE)
    table_ptr += request.to(tl.int64) * (stride_tb + _zero_by(length))
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if SMALL:
        l = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        l = tl.zeros([BLOCK_M], tl.float32)
    acc_a = tl.zeros([BLOCK_M, HALF], tl.float32)
    acc_b = tl.zeros([BLOCK_M, HALF], tl.float32)
    if start < end:
        page = _look_up(table_ptr, start, last, PAGE_SIZE, BLOCK_N)
        for i in tl.range(start, end, BLOCK_N, num_stages=STAGES, disable_licm=COMPUTE_INSIDE):
            if FORMAT == 0:
                k_a = tl.load(_keys_at(cache_ptr, page, i, last, c, stride_cp, stride_ct, PAGE_SIZE, BLOCK_N, WIDE))
                k_b = tl.load(
                    _keys_at(cache_ptr, page, i, last, HALF + c, stride_cp, stride_ct, PAGE_SIZE, BLOCK_N, WIDE)
                )
                k_r = tl.load(_keys_at(cache_ptr, page, i, last, r, stride_cp, stride_ct, PAGE_SIZE, BLOCK_N, WIDE))
            else:
                at = _rows_at(page, i, last, stride_cp, stride_ct, PAGE_SIZE, BLOCK_N)
                k_a = _latent(cache_ptr, at, 0, HALF, RANK, FORMAT, NATIVE, DTYPE)
                k_b = _latent(cache_ptr, at, HALF, HALF, RANK, FORMAT, NATIVE, DTYPE)
                k_r = _rope(cache_ptr, at, RANK, ROPE, FORMAT, NATIVE, DTYPE)
            page = _look_up(table_ptr, i + BLOCK_N, last, PAGE_SIZE, BLOCK_N)
            s = tl.dot(q_r, tl.trans(k_r), tl.dot(q_a, tl.trans(k_a)))
            if SMALL:  # scaled first, or Triton would make it one chain again
                s = s * scale_log2 + tl.dot(q_b, tl.trans(k_b)) * scale_log2
            else:
                s = tl.dot(q_b, tl.trans(k_b), s) * scale_log2
            key = i + tl.arange(0, BLOCK_N)
            s = tl.where(key[None, :] < visible[:, None], s, -float("inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            shift = m_new
            if CAUSAL:  # a row that has seen no key yet: 0 instead of inf - inf
                shift = tl.where(m_new == -float("inf"), 0.0, m_new)
            alpha = tl.exp2(m - shift)
            p = tl.exp2(s - shift[:, None])
            if SMALL:
                l = l * alpha[:, None] + p
            else:
                l = l * alpha + tl.sum(p, 1)
            m = m_new
            acc_a = tl.dot(p.to(k_a.dtype), k_a, acc_a * alpha[:, None])
            acc_b = tl.dot(p.to(k_b.dtype), k_b, acc_b * alpha[:, None])
    if SMALL:
        l = tl.sum(l, 1)
    return acc_a, acc_b, l, m


@triton.jit
def _write(
    acc_a,
    acc_b,
    l,
    m,
    out_ptr,
    lse_ptr,
    partial_ptr,
    partial_lse_ptr,
    kv_scale,
    stride_ob,
    stride_os,
    stride_oh,
    request,
    length,
    partial,  # where to keep a partial result; -1 if this is all of the request and goes to the output
    tile,
    row_tiles,
    q_len,
    heads,
    capacity,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Store what `_attend` found."""
    HALF: tl.constexpr = RANK // 2
    LN2: tl.constexpr = 0.6931471805599453
    zero = _zero_by(length)
    rows = q_len * heads
    local = tl.arange(0, BLOCK_M) + zero
    row = tile * BLOCK_M + local
    c = tl.arange(0, HALF) + zero * HALF
    # A table too short for its request cannot be refused without a host sync; NaN is louder than attention over a part.
    inverse = tl.where(l == 0.0, 0.0, 1.0 / l)
    inverse = tl.where(length > capacity, float("nan"), inverse)
    lse = tl.where(l == 0.0, -float("inf"), m + tl.log2(l))
    lse = tl.where(length > capacity, float("nan"), lse)
    if FORMAT == 1:
        inverse *= kv_scale
    acc_a = acc_a * inverse[:, None]
    acc_b = acc_b * inverse[:, None]
    keep = False
    if SPLIT:
        keep = partial >= 0
    if keep:
        at = (partial.to(tl.int64) * row_tiles + tile) * BLOCK_M + local
        part = partial_ptr + at[:, None] * RANK + c[None, :]
        tl.store(part, acc_a, mask=(row < rows)[:, None])
        tl.store(part + HALF, acc_b, mask=(row < rows)[:, None])
        tl.store(partial_lse_ptr + at, lse, mask=row < rows)
    else:
        at = (
            request.to(tl.int64) * (stride_ob + zero)
            + (row // heads).to(tl.int64) * stride_os
            + (row % heads).to(tl.int64) * stride_oh
        )
        result = out_ptr + at[:, None] + c[None, :]
        tl.store(result, acc_a.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None])
        tl.store(result + HALF, acc_b.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None])
        tl.store(lse_ptr + request.to(tl.int64) * rows + row, lse * LN2, mask=row < rows)


# What changes from batch to batch must not recompile.
@triton.jit(do_not_specialize=["batch", "slots", "splits", "capacity", "q_len", "row_tiles", "stride_tb"])
def _mla_decode_kernel(
    q_ptr,
    cache_ptr,
    table_ptr,
    seq_lens_ptr,
    out_ptr,
    lse_ptr,
    partial_ptr,
    partial_lse_ptr,
    scale_log2,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_cp,
    stride_ct,
    stride_tb,
    stride_ob,
    stride_os,
    stride_oh,
    batch,
    q_len,
    heads,
    row_tiles,
    slots,
    splits,
    capacity,
    kv_scale,
    CAUSAL: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BALANCED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    FORMAT: tl.constexpr,
    Q_E4M3: tl.constexpr,
    NATIVE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    program = tl.program_id(0)  # the tiles of one slot run side by side and share its keys in L2
    if BALANCED:
        all_tiles = tiles_of(of_all_requests(seq_lens_ptr, batch, BLOCK_B), capacity, BLOCK_N)
        request, begin, end = range_of_slot(all_tiles, program // row_tiles, slots, BLOCK_B, MIN_TILES)
        while end > 0:  # not a count of requests: two registers more
            length = tl.load(seq_lens_ptr + request)
            tiles = tiles_of(length, capacity, BLOCK_N)
            first_tile = tl.maximum(begin, 0)
            end_tile = tl.minimum(end, tiles)
            if first_tile < end_tile:
                acc_a, acc_b, l, m = _attend(
                    q_ptr, cache_ptr, table_ptr, scale_log2,
                    stride_qb, stride_qs, stride_qh, stride_cp, stride_ct, stride_tb,
                    request, first_tile, end_tile, length, (program + _zero_by(length)) % row_tiles, q_len, heads,
                    capacity, CAUSAL, PAGE_SIZE, RANK, ROPE, BLOCK_M, BLOCK_N, STAGES, WIDE,
                    FORMAT, Q_E4M3, NATIVE, DTYPE,
                )  # fmt: skip
                # Loaded again, and everything that follows from it worked out again: nothing waits in a register.
                length = tl.load(seq_lens_ptr + request, volatile=True)
                tiles = tiles_of(length, capacity, BLOCK_N)
                taken = tl.minimum(end, tiles) - tl.maximum(begin, 0)
                own = program + _zero_by(length)
                partial = tl.where(taken == tiles, -1, partial_index(own // row_tiles, begin <= 0))
                _write(
                    acc_a, acc_b, l, m, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, kv_scale,
                    stride_ob, stride_os, stride_oh,
                    request, length, partial, own % row_tiles, row_tiles, q_len, heads, capacity, RANK, SPLIT, BLOCK_M,
                    FORMAT,
                )  # fmt: skip
            begin -= tiles
            end -= tiles
            request += 1
    else:
        slot = program // row_tiles
        request = slot // splits
        piece = slot % splits
        length = tl.load(seq_lens_ptr + request)
        tiles = tiles_of(length, capacity, BLOCK_N)
        count = even_pieces(tiles, splits)
        if piece < count:
            first_tile, end_tile = even_bounds(piece, count, tiles)
            partial = tl.where(count == 1, -1, slot)
            acc_a, acc_b, l, m = _attend(
                q_ptr, cache_ptr, table_ptr, scale_log2,
                stride_qb, stride_qs, stride_qh, stride_cp, stride_ct, stride_tb,
                request, first_tile, end_tile, length, program % row_tiles, q_len, heads,
                capacity, CAUSAL, PAGE_SIZE, RANK, ROPE, BLOCK_M, BLOCK_N, STAGES, WIDE,
                FORMAT, Q_E4M3, NATIVE, DTYPE,
            )  # fmt: skip
            _write(
                acc_a, acc_b, l, m, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, kv_scale,
                stride_ob, stride_os, stride_oh,
                request, length, partial, program % row_tiles, row_tiles, q_len, heads, capacity, RANK, SPLIT, BLOCK_M,
                FORMAT,
            )  # fmt: skip
    if DEPENDENT:  # not earlier: at the kernel's start it gains nothing (1x16x8192), or costs 2 us (1x32x8192)
        gdc_launch_dependents()
