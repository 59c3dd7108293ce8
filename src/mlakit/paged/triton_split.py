"""Few query rows a request: the keys are shared among programs, and a second kernel merges the pieces."""

# Kernel arguments have no Python type; only the constexprs among them are annotated.
# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mlakit.paged.triton_attend import _attend, _store_rows
from mlakit.triton_pieces import (
    add_pieces,
    even_bounds,
    even_pieces,
    of_all_requests,
    partial_index,
    pieces_of_request,
    range_of_slot,
    tiles_of,
)


@triton.jit
def _few_rows_tiles(q_len, length, capacity, most_rows, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of keys that the slots share of a request: none without queries, nor of more query rows than `most_rows`,
    which is the whole-row kernel's.
    """
    mine = (q_len > 0) & (q_len * GROUP <= most_rows)
    return tl.where(mine, tiles_of(length, capacity, BLOCK_N), 0)


@triton.jit
def _few_rows_tiles_of_all(
    cu_ptr, seq_lens_ptr, batch, capacity, most_rows, GROUP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr
):
    q_len = of_all_requests(cu_ptr + 1, batch, BLOCK_B) - of_all_requests(cu_ptr, batch, BLOCK_B)
    length = of_all_requests(seq_lens_ptr, batch, BLOCK_B)
    return _few_rows_tiles(q_len, length, capacity, most_rows, GROUP, BLOCK_N)


@triton.jit
def _store_partial(acc, l, m, partial_ptr, partial_lse_ptr, block, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    inverse = tl.where(l == 0.0, 0.0, 1.0 / l)
    lse = tl.where(l == 0.0, -float("inf"), m + tl.log2(l))
    at = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(partial_ptr + at[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :], acc * inverse[:, None])
    tl.store(partial_lse_ptr + at, lse)


# What changes from batch to batch must not recompile.
@triton.jit(do_not_specialize=["batch", "slots", "splits", "capacity", "most_rows", "row_tiles", "stride_tb"])
def _paged_split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    seq_lens_ptr,
    cu_ptr,
    out_ptr,
    lse_ptr,
    partial_ptr,  # [partials, kv_heads, row_tiles, BLOCK_M, BLOCK_D] float32
    partial_lse_ptr,  # [partials, kv_heads, row_tiles, BLOCK_M] float32, base 2
    scale_log2,
    stride_qt,
    stride_qh,
    stride_kp,
    stride_kt,
    stride_kh,
    stride_vp,
    stride_vt,
    stride_vh,
    stride_tb,
    stride_ot,
    stride_oh,
    batch,
    kv_heads,
    row_tiles,
    slots,
    splits,
    capacity,
    most_rows,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BALANCED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    BRANCH: tl.constexpr,
    AFTER_TILES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    # The KV heads of a slot run side by side: they read the same pages, and the tiles of a head the same keys.
    program = tl.program_id(0)
    lane = program % (kv_heads * row_tiles)
    slot = program // (kv_heads * row_tiles)
    kv_head = lane // row_tiles
    first_row = lane % row_tiles * BLOCK_M
    if BALANCED:
        all_tiles = _few_rows_tiles_of_all(cu_ptr, seq_lens_ptr, batch, capacity, most_rows, GROUP, BLOCK_B, BLOCK_N)
        request, begin, end = range_of_slot(all_tiles, slot, slots, BLOCK_B, MIN_TILES)
    else:
        request = slot // splits
        begin = 0
        end = 1
    while end > 0:
        q_start = tl.load(cu_ptr + request)
        q_len = tl.load(cu_ptr + request + 1) - q_start
        length = tl.load(seq_lens_ptr + request)
        tiles = _few_rows_tiles(q_len, length, capacity, most_rows, GROUP, BLOCK_N)
        if BALANCED:
            first_tile = tl.maximum(begin, 0)
            end_tile = tl.minimum(end, tiles)
            partial = tl.where(end_tile - first_tile == tiles, -1, partial_index(slot, begin <= 0))
        else:
            piece = slot % splits
            count = even_pieces(tiles, splits)
            first_tile, end_tile = even_bounds(piece, count, tiles)
            end_tile = tl.where(piece < count, end_tile, 0)
            partial = tl.where(count == 1, -1, slot)
        if (first_tile < end_tile) & (first_row < q_len * GROUP):
            acc, l, m = _attend(
                q_ptr, k_ptr, v_ptr, table_ptr, scale_log2,
                stride_qt, stride_qh, stride_kp, stride_kt, stride_kh, stride_vp, stride_vt, stride_vh, stride_tb,
                request, q_start, q_len, length, kv_head, first_row, first_tile * BLOCK_N, end_tile * BLOCK_N, capacity,
                CAUSAL, GROUP, HEAD_DIM, BLOCK_D, PAGE_SIZE, BLOCK_M, BLOCK_N, STAGES, WIDE, SAME_STRIDES, BRANCH,
            )  # fmt: skip
            if partial >= 0:
                block = partial.to(tl.int64) * (kv_heads * row_tiles) + lane
                _store_partial(acc, l, m, partial_ptr, partial_lse_ptr, block, BLOCK_D, BLOCK_M)
            else:
                _store_rows(
                    acc, l, m, out_ptr, lse_ptr, stride_ot, stride_oh, kv_heads * GROUP,
                    q_start, q_len, length, kv_head, first_row, capacity, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M,
                )  # fmt: skip
        begin -= tiles
        end -= tiles
        if not BALANCED:
            end = 0
        request += 1
    if AFTER_TILES:  # nothing here reads what that kernel writes, but this grid must not end before it has
        gdc_wait()
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit(do_not_specialize=["batch", "slots", "splits", "capacity", "most_rows", "row_tiles", "tokens"])
def _paged_combine_kernel(
    partial_ptr,
    partial_lse_ptr,
    seq_lens_ptr,
    cu_ptr,
    out_ptr,
    lse_ptr,
    stride_ot,
    stride_oh,
    batch,
    kv_heads,
    row_tiles,
    slots,
    splits,
    capacity,
    most_rows,
    tokens,  # rows of q in all; with AFTER_TILES, most of a request that this kernel has
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BALANCED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    AFTER_TILES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program merges one row of one head; it loads up to BLOCK_P partials at once, so that latency is paid once.

    Rows without keys are written here, and those that are no request's.
    """
    heads = kv_heads * GROUP
    head = tl.program_id(0) % heads
    at = tl.program_id(0) // heads
    if AFTER_TILES:
        request = at // tokens
        q_start = tl.load(cu_ptr + request)
        token = at % tokens
        row = q_start + token
    else:
        requests = tl.arange(0, BLOCK_B)
        ends = tl.load(cu_ptr + 1 + requests, mask=requests < batch, other=2147483647)
        request = tl.sum((ends <= at).to(tl.int32), 0)
        q_start = tl.load(cu_ptr + request)
        token = at - q_start
        row = at
    exists = request < batch
    q_end = tl.load(cu_ptr + request + 1, mask=exists, other=0)
    length = tl.load(seq_lens_ptr + request, mask=exists, other=0)
    q_len = q_end - q_start
    own = _few_rows_tiles(q_len, length, capacity, most_rows, GROUP, BLOCK_N)
    tiles = _few_rows_tiles_of_all(cu_ptr, seq_lens_ptr, batch, capacity, most_rows, GROUP, BLOCK_B, BLOCK_N)
    first, count = pieces_of_request(tiles, request, own, slots, splits, BALANCED, BLOCK_B, MIN_TILES)
    if DEPENDENT:
        # Every program waits: this grid must not end before the attention grid has.
        gdc_wait()
    long = q_len * GROUP > most_rows
    if count == 1:
        return
    if AFTER_TILES and long | (token >= q_len):
        return
    in_request = token * GROUP + head % GROUP
    block = (head // GROUP * row_tiles + in_request // BLOCK_M) * BLOCK_M + in_request % BLOCK_M
    cols = tl.arange(0, BLOCK_D)
    m = -float("inf")
    l = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_P):
        pieces = start + tl.arange(0, BLOCK_P)
        live = pieces < count
        index = first + pieces
        if BALANCED:
            index = partial_index(index, pieces == 0)
        place = index.to(tl.int64) * (kv_heads * row_tiles * BLOCK_M) + block
        part_lse = tl.load(partial_lse_ptr + place, mask=live, other=-float("inf"))
        part = tl.load(partial_ptr + place[:, None] * BLOCK_D + cols[None, :], mask=live[:, None], other=0.0)
        acc, m, l = add_pieces(acc, m, l, part, part_lse)
    LN2: tl.constexpr = 0.6931471805599453
    out = tl.where(l == 0.0, 0.0, acc / l)
    lse = tl.where(l == 0.0, -float("inf"), (m + tl.log2(l)) * LN2)
    # A table too short for its request, or a request of more tokens than max_seqlen_q promised: NaN is louder than
    # attention over a part of it.
    broken = exists & ((length > capacity) | long)
    out = tl.where(broken, float("nan"), out)
    lse = tl.where(broken, float("nan"), lse)
    out_at = row.to(tl.int64) * stride_ot + head.to(tl.int64) * stride_oh
    tl.store(out_ptr + out_at + cols, out.to(out_ptr.dtype.element_ty), mask=cols < HEAD_DIM)
    tl.store(lse_ptr + row.to(tl.int64) * heads + head, lse)
