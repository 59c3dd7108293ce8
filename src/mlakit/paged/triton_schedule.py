"""Who does what: dividing the keys of a batch among programs, with no host sync and no metadata kernel.

A *slot* is a program for every KV head and tile of query rows. Either the slots share all keys of the batch evenly
(BALANCED): keys, counted in tiles of BLOCK_N and laid end to end, are cut into equal ranges, and a slot walks through
the requests of its range. Or every request is cut into a number of pieces that the caller named. Requests of more query
rows than `most_rows`, and those without queries, have no keys here: the former are the whole-row kernel's.
Programs find their part from the lengths themselves, so that these may change between replays of a CUDA graph.
"""

# Kernel arguments have no Python type; only the constexprs among them are annotated.
# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl


@triton.jit
def _tiles_of(q_len, length, capacity, most_rows, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of keys that the slots share of a request."""
    mine = (q_len > 0) & (q_len * GROUP <= most_rows)
    return tl.where(mine, tl.cdiv(tl.minimum(tl.maximum(length, 0), capacity), BLOCK_N), 0)


@triton.jit
def _all_tiles(
    cu_ptr,
    seq_lens_ptr,
    batch,
    slots,
    capacity,
    most_rows,
    GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """Requests, their tiles, and the tiles a slot takes."""
    requests = tl.arange(0, BLOCK_B)
    live = requests < batch
    begin = tl.load(cu_ptr + requests, mask=live, other=0)
    end = tl.load(cu_ptr + requests + 1, mask=live, other=0)
    length = tl.load(seq_lens_ptr + requests, mask=live, other=0)
    tiles = _tiles_of(end - begin, length, capacity, most_rows, GROUP, BLOCK_N)
    return requests, tiles, tl.maximum(tl.cdiv(tl.sum(tiles, 0), slots), MIN_TILES)


@triton.jit
def _range_of_slot(
    cu_ptr,
    seq_lens_ptr,
    slot,
    batch,
    slots,
    capacity,
    most_rows,
    GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """First request of an evenly shared slot, and where the slot begins and ends, in tiles from the start of that one;
    an idle slot ends at 0 or before.
    """
    requests, tiles, share = _all_tiles(
        cu_ptr, seq_lens_ptr, batch, slots, capacity, most_rows, GROUP, BLOCK_B, BLOCK_N, MIN_TILES
    )
    begin = slot * share
    end = tl.minimum(begin + share, tl.sum(tiles, 0))
    first = tl.sum((tl.cumsum(tiles, 0) <= begin).to(tl.int32), 0)
    before = tl.sum(tl.where(requests < first, tiles, 0), 0)
    end = tl.where(begin < end, end - before, 0)
    return first, begin - before, end


@triton.jit
def _even_pieces(tiles, splits):
    """Pieces of a request where the caller named a number: never more than it has tiles."""
    return tl.maximum(tl.minimum(splits, tiles), 1)


@triton.jit
def _even_bounds(piece, count, tiles):
    """First tile of a piece, and the one past its last: even to one tile, and none of a live request is empty."""
    wide = tiles.to(tl.int64)
    return (piece * wide // count).to(tl.int32), ((piece + 1) * wide // count).to(tl.int32)


@triton.jit
def _pieces_of_request(
    cu_ptr,
    seq_lens_ptr,
    request,
    q_len,
    length,
    batch,
    slots,
    splits,
    capacity,
    most_rows,
    BALANCED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """First slot and number of pieces of a request: the combine kernel's side. One piece needs no combining; none is a
    request without keys.
    """
    own = _tiles_of(q_len, length, capacity, most_rows, GROUP, BLOCK_N)
    if BALANCED:
        requests, tiles, share = _all_tiles(
            cu_ptr, seq_lens_ptr, batch, slots, capacity, most_rows, GROUP, BLOCK_B, BLOCK_N, MIN_TILES
        )
        before = tl.sum(tl.where(requests < request, tiles, 0), 0)
        first = before // share
        count = tl.where(own > 0, (before + own - 1) // share - first + 1, 0)
    else:
        first = request * splits
        count = tl.where(own > 0, _even_pieces(own, splits), 0)
    return first, count
