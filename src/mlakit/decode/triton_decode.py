"""Dense MLA decode over a paged latent cache, in Triton, for every GPU from sm_80 up.

Two kernels share one shape of work. Query rows (new tokens x heads) are tiled by BLOCK_M, keys by BLOCK_N; a key tile
is loaded once and is K for the scores and, in its first RANK columns, V for the output.
- `_mla_decode_kernel`: S = Q K^T, O = P V, rows on the M side of the matrix instructions.
- `_mla_decode_transposed_kernel`: S^T = K Q^T, O^T = V^T P^T. A wgmma has 64 rows at least; with 16 heads the keys fill
  them and the heads do not, so that nothing is padded and the accumulator stays small.

Pages are looked up one tile ahead: the look-up is otherwise a dependent load in front of every tile's copy. Positions
past the last readable key are clamped to it, so that no padding and no dead table slot is read and no load needs a
mask.
"""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from mlakit.decode.triton_schedule import _find_piece


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
def _key_range(
    length,
    capacity,
    piece,
    count,
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
    tiles = tl.cdiv(keys, BLOCK_N).to(tl.int64)
    start = (piece * tiles // count).to(tl.int32) * BLOCK_N  # even to one tile, and no piece of a live request is empty
    end = tl.minimum(((piece + 1) * tiles // count).to(tl.int32) * BLOCK_N, keys)
    if CAUSAL:
        newest = tl.minimum(tile * BLOCK_M + BLOCK_M, rows) - 1
        end = tl.minimum(end, keys - q_len + newest // heads + 1)
        visible = tl.minimum(keys - q_len + row // heads + 1, end)
    else:
        visible = row * 0 + end
    return start, end, visible


@triton.jit
def _store_piece(
    acc,  # [BLOCK_M, RANK], not yet divided
    m,
    l,
    request,
    slot,
    tile,
    row_tiles,
    length,
    capacity,
    out_ptr,
    lse_ptr,
    partial_ptr,
    partial_lse_ptr,
    stride_ob,
    stride_os,
    stride_oh,
    heads,
    rows,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    RANK: tl.constexpr,
):
    """Write a piece: into the workspace where requests are split, else into the output."""
    LN2: tl.constexpr = 0.6931471805599453
    local = tl.arange(0, BLOCK_M)
    row = tile * BLOCK_M + local
    cols = tl.arange(0, RANK)
    # A table too short for its request cannot be refused without a host sync; NaN is louder than attention over a part.
    inverse = tl.where(l == 0.0, 0.0, 1.0 / l)
    inverse = tl.where(length > capacity, float("nan"), inverse)
    lse = tl.where(l == 0.0, -float("inf"), m + tl.log2(l))
    lse = tl.where(length > capacity, float("nan"), lse)
    out = acc * inverse[:, None]
    if SPLIT:
        at = (slot.to(tl.int64) * row_tiles + tile) * BLOCK_M + local
        tl.store(partial_ptr + at[:, None] * RANK + cols[None, :], out, mask=(row < rows)[:, None])
        tl.store(partial_lse_ptr + at, lse, mask=row < rows)
    else:
        s = row // heads
        h = row % heads
        at = request.to(tl.int64) * stride_ob + s.to(tl.int64) * stride_os + h.to(tl.int64) * stride_oh
        tl.store(out_ptr + at[:, None] + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None])
        tl.store(lse_ptr + request.to(tl.int64) * rows + row, lse * LN2, mask=row < rows)


# What changes from batch to batch must not recompile.
_VARYING = ["batch", "slots", "splits", "capacity", "q_len", "row_tiles", "stride_tb"]


@triton.jit(do_not_specialize=_VARYING)
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
    tile = tl.program_id(0) % row_tiles  # the tiles of one piece run side by side and share its keys in L2
    slot = tl.program_id(0) // row_tiles
    request, piece, count = _find_piece(
        seq_lens_ptr, slot, batch, slots, splits, capacity, BALANCED, SPLIT, BLOCK_B, BLOCK_N, MIN_TILES
    )
    if request >= batch:
        return
    rows = q_len * heads
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    length = tl.load(seq_lens_ptr + request)
    start, end, visible = _key_range(
        length, capacity, piece, count, tile, row, rows, q_len, heads, CAUSAL, BLOCK_M, BLOCK_N
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
    if DEPENDENT:
        gdc_launch_dependents()
    _store_piece(
        acc, m, l, request, slot, tile, row_tiles, length, capacity, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
        stride_ob, stride_os, stride_oh, heads, rows, SPLIT, BLOCK_M, RANK,
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def _mla_decode_transposed_kernel(
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
    tile = tl.program_id(0) % row_tiles
    slot = tl.program_id(0) // row_tiles
    request, piece, count = _find_piece(
        seq_lens_ptr, slot, batch, slots, splits, capacity, BALANCED, SPLIT, BLOCK_B, BLOCK_N, MIN_TILES
    )
    if request >= batch:
        return
    rows = q_len * heads
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    length = tl.load(seq_lens_ptr + request)
    start, end, visible = _key_range(
        length, capacity, piece, count, tile, row, rows, q_len, heads, CAUSAL, BLOCK_M, BLOCK_N
    )
    last = end - 1

    c = tl.arange(0, RANK)
    r = tl.arange(0, ROPE)
    q_at = (
        q_ptr
        + request.to(tl.int64) * stride_qb
        + ((row // heads).to(tl.int64) * stride_qs + (row % heads).to(tl.int64) * stride_qh)
    )
    q_c = tl.load(q_at[None, :] + c[:, None], mask=(row < rows)[None, :], other=0.0)
    q_r = tl.load(q_at[None, :] + (RANK + r)[:, None], mask=(row < rows)[None, :], other=0.0)
    table_ptr += request.to(tl.int64) * stride_tb
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([RANK, BLOCK_M], tl.float32)
    if start < end:
        page = _look_up(table_ptr, start, last, PAGE_SIZE, BLOCK_N)
        # The rope part waits in registers, one tile ahead: three shared-memory stages of 64 x 512 keys and Q then fit
        # 227 KiB, where three of 64 x 576 do not, and with two stages Triton copies a tile only after it has computed
        # the last.
        at = _key_offsets(page, start, last, stride_cp, stride_ct, PAGE_SIZE, BLOCK_N)
        k_r_next = tl.load(cache_ptr + at[:, None] + (RANK + r)[None, :])
        for i in tl.range(start, end, BLOCK_N, num_stages=STAGES):
            at = _key_offsets(page, i, last, stride_cp, stride_ct, PAGE_SIZE, BLOCK_N)
            page = _look_up(table_ptr, i + BLOCK_N, last, PAGE_SIZE, BLOCK_N)
            k_c = tl.load(cache_ptr + at[:, None] + c[None, :])
            k_r = k_r_next
            at_next = _key_offsets(page, i + BLOCK_N, last, stride_cp, stride_ct, PAGE_SIZE, BLOCK_N)
            k_r_next = tl.load(cache_ptr + at_next[:, None] + (RANK + r)[None, :])
            s = tl.dot(k_r, q_r, tl.dot(k_c, q_c))
            key = i + tl.arange(0, BLOCK_N)
            s = tl.where(key[:, None] < visible[None, :], s * scale_log2, -float("inf"))
            m_new = tl.maximum(m, tl.max(s, 0))
            shift = m_new
            if CAUSAL:
                shift = tl.where(m_new == -float("inf"), 0.0, m_new)
            alpha = tl.exp2(m - shift)
            p = tl.exp2(s - shift[None, :])
            l = l * alpha + tl.sum(p, 0)
            m = m_new
            acc = tl.dot(tl.trans(k_c), p.to(k_c.dtype), acc * alpha[None, :])
    if DEPENDENT:
        gdc_launch_dependents()
    _store_piece(
        tl.trans(acc), m, l, request, slot, tile, row_tiles, length, capacity, out_ptr, lse_ptr, partial_ptr,
        partial_lse_ptr, stride_ob, stride_os, stride_oh, heads, rows, SPLIT, BLOCK_M, RANK,
    )  # fmt: skip
