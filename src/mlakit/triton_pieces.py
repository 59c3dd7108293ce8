"""Sharing the keys of a batch among programs, with no host sync and no metadata kernel, and merging what they find.

A *slot* is a program for every tile of query rows (and KV head). Either the slots share all keys of the batch evenly
(BALANCED): keys, counted in tiles of BLOCK_N and laid end to end, are cut into equal ranges, and a slot walks through
the requests of its range; lengths may be as ragged as they like. Or every request is cut into a number of pieces that
the caller named.

Programs find their part from the lengths themselves, and a combine kernel finds the pieces of a request the same way,
so lengths may change between replays of a CUDA graph. What they have of all requests is a vector of BLOCK_B numbers, or
one number if BLOCK_B is 1: then there are no sums over threads.
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
    *, batch: int, programs: int, capacity: int, block_n: int, resident: int, min_tiles: int, num_splits: int | None
) -> Plan:
    """Choose the number of slots, of `programs` programs each, from what the host knows; `resident` programs run at
    once, `capacity` keys fit a request's table.

    One wave of programs, as all get the same work; several where whole slots would leave part of one idle.
    """
    tiles = -(-capacity // block_n)
    if num_splits is not None:
        splits = min(num_splits, tiles or 1)
        return Plan(batch * splits, splits)
    if batch == 0 or tiles <= min_tiles:
        return Plan(batch, 1)
    slots = resident // programs
    if slots * programs < 0.8 * resident:
        slots = max(1, 4 * resident // programs)
    return Plan(min(slots, batch * -(-tiles // min_tiles)), None)


@triton.jit
def of_all_requests(ptr, batch, BLOCK_B: tl.constexpr):
    """What memory holds of every request; 0 past the last."""
    if BLOCK_B == 1:
        found = tl.load(ptr)
    else:
        requests = tl.arange(0, BLOCK_B)
        found = tl.load(ptr + requests, mask=requests < batch, other=0)
    return found


@triton.jit
def tiles_of(length, capacity, BLOCK_N: tl.constexpr):
    """Tiles of a request's keys."""
    return tl.cdiv(tl.minimum(tl.maximum(length, 0), capacity), BLOCK_N)


@triton.jit
def _share(tiles, slots, BLOCK_B: tl.constexpr, MIN_TILES: tl.constexpr):
    """Tiles of the whole batch, and those that an evenly shared slot takes."""
    total = tiles
    if BLOCK_B > 1:
        total = tl.sum(tiles, 0)
    return total, tl.maximum(tl.cdiv(total, slots), MIN_TILES)


@triton.jit
def _tiles_before(tiles, request, BLOCK_B: tl.constexpr):
    """Tiles of the requests before one."""
    before = request * 0
    if BLOCK_B > 1:
        before = tl.sum(tl.where(tl.arange(0, BLOCK_B) < request, tiles, 0), 0)
    return before


@triton.jit
def range_of_slot(tiles, slot, slots, BLOCK_B: tl.constexpr, MIN_TILES: tl.constexpr):
    """First request of an evenly shared slot, and where the slot begins and ends, in tiles from the start of that one;
    an idle slot ends at 0. `tiles` are those of all requests.
    """
    total, share = _share(tiles, slots, BLOCK_B, MIN_TILES)
    begin = slot * share
    end = tl.minimum(begin + share, total)
    first = slot * 0
    if BLOCK_B > 1:
        first = tl.sum((tl.cumsum(tiles, 0) <= begin).to(tl.int32), 0)
    before = _tiles_before(tiles, first, BLOCK_B)
    return first, begin - before, tl.where(begin < end, end - before, 0)


@triton.jit
def even_pieces(tiles, splits):
    """Pieces of a request where the caller named a number: never more than it has tiles."""
    return tl.maximum(tl.minimum(splits, tiles), 1)


@triton.jit
def even_bounds(piece, count, tiles):
    """First tile of a piece, and the one past its last: even to one tile, and none of a live request is empty."""
    wide = tiles.to(tl.int64)
    return (piece * wide // count).to(tl.int32), ((piece + 1) * wide // count).to(tl.int32)


@triton.jit
def pieces_of_request(
    tiles, request, own, slots, splits, BALANCED: tl.constexpr, BLOCK_B: tl.constexpr, MIN_TILES: tl.constexpr
):
    """First slot and number of pieces of a request of `own` tiles, among the tiles of all requests: the combine
    kernel's side. One piece needs no combining; none is a request without keys.
    """
    if BALANCED:
        _, share = _share(tiles, slots, BLOCK_B, MIN_TILES)
        before = _tiles_before(tiles, request, BLOCK_B)
        first = before // share
        count = tl.where(own > 0, (before + own - 1) // share - first + 1, 0)
    else:
        first = request * splits
        count = tl.where(own > 0, even_pieces(own, splits), 0)
    return first, count


@triton.jit
def partial_index(slot, starts_request):
    """Where an evenly shared slot keeps a partial result: the request it leaves to the next slot comes second."""
    return 2 * slot + starts_request.to(tl.int32)


@triton.jit
def add_pieces(acc, m, l, part, part_lse):
    """Add pieces of one row, [pieces, columns] and their logarithms to base 2, to what is merged already."""
    m_new = tl.maximum(m, tl.max(part_lse, 0))
    shift = tl.where(m_new == -float("inf"), 0.0, m_new)  # a row that sees no key: 0 instead of inf - inf
    old = tl.exp2(m - shift)
    weight = tl.exp2(part_lse - shift)
    return acc * old + tl.sum(part * weight[:, None], 0), m_new, l * old + tl.sum(weight, 0)
