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

from mlakit.decode.triton_schedule import _even_bounds, _even_pieces, _partial_index, _range_of_slot, _tiles_of


@triton.jit
def _look_up(table_ptr, start, last, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pages of the tile that starts at key `start`: one number if a tile lies in one page, else one for each key."""
    if PAGE_SIZE >= BLOCK_N:
        page = tl.load(table_ptr + tl.minimum(start, last) // PAGE_SIZE)
    else:
        page = tl.load(table_ptr + tl.minimum(start + tl.arange(0, BLOCK_N), last) // PAGE_SIZE)
    return page


@triton.jit
def _key_offsets(page, start, last, stride_cp, stride_ct, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where each key of a tile begins in the cache, in elements: int64, as a cache may hold more than 2^31."""
    position = tl.minimum(start + tl.arange(0, BLOCK_N), last)
    return page.to(tl.int64) * stride_cp + (position % PAGE_SIZE).to(tl.int64) * stride_ct


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
def _attend(
    q_ptr,
    cache_ptr,
    table_ptr,
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
    request,
    first_tile,
    end_tile,
    length,
    partial,  # where to keep a partial result
    whole,  # this is all of the request: the result goes to the output
    tile,
    row_tiles,
    q_len,
    heads,
    capacity,
    CAUSAL: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of query rows over some tiles of one request's keys."""
    rows = q_len * heads
    local = tl.arange(0, BLOCK_M)
    row = tile * BLOCK_M + local
    start, end, visible = _sight(
        first_tile, end_tile, length, capacity, tile, row, rows, q_len, heads, CAUSAL, BLOCK_M, BLOCK_N
    )
    last = end - 1

    c = tl.arange(0, RANK)
    r = tl.arange(0, ROPE)
    q_at = (
        q_ptr
        + request.to(tl.int64) * stride_qb
        + ((row // heads).to(tl.int64) * stride_qs + (row % heads).to(tl.int64) * stride_qh)
    )
    q_c = tl.load(q_at[:, None] + c[None, :], mask=(row < rows)[:, None], other=0.0)
    q_r = tl.load(q_at[:, None] + (RANK + r)[None, :], mask=(row < rows)[:, None], other=0.0)
    table_ptr += request.to(tl.int64) * stride_tb
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, RANK], tl.float32)
    if start < end:
        page = _look_up(table_ptr, start, last, PAGE_SIZE, BLOCK_N)
        for i in tl.range(start, end, BLOCK_N, num_stages=STAGES):
            at = _key_offsets(page, i, last, stride_cp, stride_ct, PAGE_SIZE, BLOCK_N)
            page = _look_up(table_ptr, i + BLOCK_N, last, PAGE_SIZE, BLOCK_N)
            k_c = tl.load(cache_ptr + at[:, None] + c[None, :])
            k_r = tl.load(cache_ptr + at[:, None] + (RANK + r)[None, :])
            s = tl.dot(q_r, tl.trans(k_r), tl.dot(q_c, tl.trans(k_c)))
            key = i + tl.arange(0, BLOCK_N)
            s = tl.where(key[None, :] < visible[:, None], s * scale_log2, -float("inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            shift = m_new
            if CAUSAL:  # a row that has seen no key yet: 0 instead of inf - inf
                shift = tl.where(m_new == -float("inf"), 0.0, m_new)
            alpha = tl.exp2(m - shift)
            p = tl.exp2(s - shift[:, None])
            l = l * alpha + tl.sum(p, 1)
            m = m_new
            acc = tl.dot(p.to(k_c.dtype), k_c, acc * alpha[:, None])

    LN2: tl.constexpr = 0.6931471805599453
    # A table too short for its request cannot be refused without a host sync; NaN is louder than attention over a part.
    inverse = tl.where(l == 0.0, 0.0, 1.0 / l)
    inverse = tl.where(length > capacity, float("nan"), inverse)
    lse = tl.where(l == 0.0, -float("inf"), m + tl.log2(l))
    lse = tl.where(length > capacity, float("nan"), lse)
    acc = acc * inverse[:, None]
    keep = False
    if SPLIT:
        keep = not whole
    if keep:
        at = (partial.to(tl.int64) * row_tiles + tile) * BLOCK_M + local
        tl.store(partial_ptr + at[:, None] * RANK + c[None, :], acc, mask=(row < rows)[:, None])
        tl.store(partial_lse_ptr + at, lse, mask=row < rows)
    else:
        at = (
            request.to(tl.int64) * stride_ob
            + (row // heads).to(tl.int64) * stride_os
            + (row % heads).to(tl.int64) * stride_oh
        )
        tl.store(out_ptr + at[:, None] + c[None, :], acc.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None])
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
    DEPENDENT: tl.constexpr,
):
    tile = tl.program_id(0) % row_tiles  # the tiles of one slot run side by side and share its keys in L2
    slot = tl.program_id(0) // row_tiles
    if BALANCED:
        first, final, before, begin, end = _range_of_slot(
            seq_lens_ptr, slot, batch, slots, capacity, BLOCK_B, BLOCK_N, MIN_TILES
        )
        for i in tl.range(first, final + 1, num_stages=1):
            request = slot * 0 + i  # a tensor, also to the interpreter
            length = tl.load(seq_lens_ptr + request)
            tiles = _tiles_of(length, capacity, BLOCK_N)
            first_tile = tl.maximum(begin - before, 0)
            end_tile = tl.minimum(end - before, tiles)
            if first_tile < end_tile:
                # Adds 0: a length is not negative here, which the compiler does not know. Else it computes each row's
                # offsets once, in front of all requests, and keeps them in registers that the accumulator needs.
                own_tile = tile + (length < 0).to(tl.int32)
                _attend(
                    q_ptr, cache_ptr, table_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, scale_log2,
                    stride_qb, stride_qs, stride_qh, stride_cp, stride_ct, stride_tb, stride_ob, stride_os, stride_oh,
                    request, first_tile, end_tile, length, _partial_index(slot, first_tile == 0),
                    end_tile - first_tile == tiles, own_tile, row_tiles, q_len, heads, capacity,
                    CAUSAL, PAGE_SIZE, RANK, ROPE, SPLIT, BLOCK_M, BLOCK_N, STAGES,
                )  # fmt: skip
            before += tiles
    else:
        request = slot // splits
        piece = slot % splits
        length = tl.load(seq_lens_ptr + request)
        count = _even_pieces(length, splits, capacity, BLOCK_N)
        if piece < count:
            first_tile, end_tile = _even_bounds(piece, count, length, capacity, BLOCK_N)
            _attend(
                q_ptr, cache_ptr, table_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, scale_log2,
                stride_qb, stride_qs, stride_qh, stride_cp, stride_ct, stride_tb, stride_ob, stride_os, stride_oh,
                request, first_tile, end_tile, length, slot, count == 1, tile, row_tiles, q_len, heads, capacity,
                CAUSAL, PAGE_SIZE, RANK, ROPE, SPLIT, BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
    if DEPENDENT:
        gdc_launch_dependents()
