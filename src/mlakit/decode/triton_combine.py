"""Merging the partial results of a request's pieces, weighted by their softmax denominators."""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from mlakit.triton_pieces import add_pieces, of_all_requests, partial_index, pieces_of_request, tiles_of


@triton.jit(do_not_specialize=["batch", "slots", "splits", "capacity", "rows", "row_tiles"])
def _mla_decode_combine_kernel(
    partial_ptr,  # [partials, row_tiles, BLOCK_M, RANK] float32
    partial_lse_ptr,  # [partials, row_tiles, BLOCK_M] float32, base 2
    seq_lens_ptr,
    out_ptr,
    lse_ptr,
    stride_ob,
    stride_os,
    stride_oh,
    batch,
    heads,
    rows,
    row_tiles,
    slots,
    splits,
    capacity,
    BALANCED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program merges BLOCK_C columns of one query row; it loads up to BLOCK_P partials at once, so that latency
    is paid once. Empty requests are written here: where the batch is shared evenly, no slot has them.
    """
    request = tl.program_id(0) // rows
    row = tl.program_id(0) % rows
    length = tl.load(seq_lens_ptr + request)
    own = tiles_of(length, capacity, BLOCK_N)
    tiles = tiles_of(of_all_requests(seq_lens_ptr, batch, BLOCK_B), capacity, BLOCK_N)
    begin, count = pieces_of_request(tiles, request, own, slots, splits, BALANCED, BLOCK_B, MIN_TILES)
    if DEPENDENT:
        # Every program waits: this grid must not end before the attention grid has.
        gdc_wait()
    if count == 1:
        return
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = -float("inf")
    l = 0.0
    acc = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, count, BLOCK_P):
        pieces = start + tl.arange(0, BLOCK_P)
        live = pieces < count
        index = begin + pieces
        if BALANCED:
            index = partial_index(index, pieces == 0)
        at = (index.to(tl.int64) * row_tiles + row // BLOCK_M) * BLOCK_M + row % BLOCK_M
        part_lse = tl.load(partial_lse_ptr + at, mask=live, other=-float("inf"))
        part = tl.load(partial_ptr + at[:, None] * RANK + cols[None, :], mask=live[:, None], other=0.0)
        acc, m, l = add_pieces(acc, m, l, part, part_lse)
    LN2: tl.constexpr = 0.6931471805599453
    # `l == 0` only where no piece saw a key.
    out = tl.where(l == 0.0, 0.0, acc / l)
    natural = tl.where(l == 0.0, -float("inf"), (m + tl.log2(l)) * LN2)
    out = tl.where(length > capacity, float("nan"), out)  # as in the attention kernel
    natural = tl.where(length > capacity, float("nan"), natural)
    s = row // heads
    h = row % heads
    base = out_ptr + request.to(tl.int64) * stride_ob + s.to(tl.int64) * stride_os + h.to(tl.int64) * stride_oh
    tl.store(base + cols, out.to(out_ptr.dtype.element_ty))
    if tl.program_id(1) == 0:
        tl.store(lse_ptr + request.to(tl.int64) * rows + row, natural)
