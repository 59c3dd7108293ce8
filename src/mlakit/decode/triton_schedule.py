"""Who does what: dividing the keys of a batch among programs, with no host sync and no metadata kernel.

A *slot* is a program for every tile of query rows. Either the slots share all keys of the batch evenly (BALANCED):
keys, counted in tiles of BLOCK_N and laid end to end, are cut into equal ranges, and a slot walks through the requests
of its range; lengths may be as ragged as they like. Or every request is cut into a number of pieces that the caller
named.
Programs find their part from `seq_lens` themselves, and the combine kernel finds the pieces of a request the same way,
so lengths may change between replays of a CUDA graph.
"""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class Plan:
    """How many slots a batch gets. `splits` is None where they share the batch evenly, else every request is cut into
    that many pieces.
    """

    slots: int
    splits: int | None

    @property
    def is_split(self) -> bool:
        """True if a request may be cut, so that partial results and the combine kernel are needed."""
        return self.splits is None or self.splits > 1

    @property
    def partials(self) -> int:
        """Partial results that may have to be kept: an evenly shared slot has at most two, of the request that it
        takes over from the slot before and of the one that it leaves to the next.
        """
        if not self.is_split:
            return 0
        return 2 * self.slots if self.splits is None else self.slots


def plan_slots(
    *, batch: int, row_tiles: int, capacity: int, block_n: int, resident: int, min_tiles: int, num_splits: int | None
) -> Plan:
    """Choose the number of slots from what the host knows; `resident` programs run at once, `capacity` keys fit a
    request's table.

    One wave of programs, as all get the same work; several where the tiles of query rows would leave part of one idle.
    """
    tiles = -(-capacity // block_n)
    if num_splits is not None:
        splits = min(num_splits, tiles or 1)
        return Plan(batch * splits, splits)
    if tiles <= min_tiles:
        return Plan(batch, 1)
    slots = resident // row_tiles
    if slots * row_tiles < 0.8 * resident:
        slots = max(1, 4 * resident // row_tiles)
    return Plan(min(slots, batch * -(-tiles // min_tiles)), None)


@triton.jit
def _tiles_of(length, capacity, BLOCK_N: tl.constexpr):
    return tl.cdiv(tl.minimum(tl.maximum(length, 0), capacity), BLOCK_N)


@triton.jit
def _all_tiles(
    seq_lens_ptr, batch, slots, capacity, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, MIN_TILES: tl.constexpr
):
    """Requests, their tiles, and the tiles a slot takes."""
    requests = tl.arange(0, BLOCK_B)
    tiles = _tiles_of(tl.load(seq_lens_ptr + requests, mask=requests < batch, other=0), capacity, BLOCK_N)
    return requests, tiles, tl.maximum(tl.cdiv(tl.sum(tiles, 0), slots), MIN_TILES)


@triton.jit
def _tiles_of_one(seq_lens_ptr, slots, capacity, BLOCK_N: tl.constexpr, MIN_TILES: tl.constexpr):
    """The tiles of a batch of one request, and the tiles a slot takes: numbers, with no sums over threads."""
    tiles = _tiles_of(tl.load(seq_lens_ptr), capacity, BLOCK_N)
    return tiles, tl.maximum(tl.cdiv(tiles, slots), MIN_TILES)


@triton.jit
def _range_of_slot(
    seq_lens_ptr, slot, batch, slots, capacity, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, MIN_TILES: tl.constexpr
):
    """First and last request of an evenly shared slot (last < first if it is idle), and where the slot begins and ends,
    in tiles from the start of the first.
    """
    if BLOCK_B == 1:
        tiles, share = _tiles_of_one(seq_lens_ptr, slots, capacity, BLOCK_N, MIN_TILES)
        begin = slot * share
        end = tl.minimum(begin + share, tiles)
        first = slot * 0
        last = tl.where(begin < end, 0, -1)
    else:
        requests, tiles, share = _all_tiles(seq_lens_ptr, batch, slots, capacity, BLOCK_B, BLOCK_N, MIN_TILES)
        begin = slot * share
        end = tl.minimum(begin + share, tl.sum(tiles, 0))
        ends = tl.cumsum(tiles, 0)
        first = tl.sum((ends <= begin).to(tl.int32), 0)
        last = tl.where(begin < end, tl.sum((ends < end).to(tl.int32), 0), -1)
        before = tl.sum(tl.where(requests < first, tiles, 0), 0)
        begin -= before
        end -= before
    return first, last, begin, end


@triton.jit
def _even_pieces(length, splits, capacity, BLOCK_N: tl.constexpr):
    """Pieces of a request where the caller named a number: never more than it has tiles."""
    return tl.maximum(tl.minimum(splits, _tiles_of(length, capacity, BLOCK_N)), 1)


@triton.jit
def _even_bounds(piece, count, length, capacity, BLOCK_N: tl.constexpr):
    """First tile of a piece, and the one past its last: even to one tile, and none of a live request is empty."""
    tiles = _tiles_of(length, capacity, BLOCK_N).to(tl.int64)
    return (piece * tiles // count).to(tl.int32), ((piece + 1) * tiles // count).to(tl.int32)


@triton.jit
def _pieces_of_request(
    seq_lens_ptr,
    request,
    batch,
    slots,
    splits,
    capacity,
    BALANCED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """First slot and number of pieces of a request: the combine kernel's side. One piece needs no combining; none is an
    empty request.
    """
    if BALANCED and BLOCK_B == 1:
        own, share = _tiles_of_one(seq_lens_ptr, slots, capacity, BLOCK_N, MIN_TILES)
        first = request * 0
        count = tl.where(own > 0, (own - 1) // share + 1, 0)
    elif BALANCED:
        requests, tiles, share = _all_tiles(seq_lens_ptr, batch, slots, capacity, BLOCK_B, BLOCK_N, MIN_TILES)
        before = tl.sum(tl.where(requests < request, tiles, 0), 0)
        own = tl.sum(tl.where(requests == request, tiles, 0), 0)
        first = before // share
        count = tl.where(own > 0, (before + own - 1) // share - first + 1, 0)
    else:
        first = request * splits
        count = _even_pieces(tl.load(seq_lens_ptr + request), splits, capacity, BLOCK_N)
    return first, count
