"""Who does what: cutting the keys of a batch into pieces, with no host sync and no metadata kernel.

A *piece* is a run of one request's keys that one program attends to. Every program finds its own piece from
`seq_lens`; the combine kernel finds the pieces of a request the same way. So lengths may change between replays of a
CUDA graph.
"""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class Plan:
    """How many programs a batch gets. `slots` counts pieces (each has one program per tile of query rows); `splits` is
    None where pieces are balanced over the batch, else every request is cut into that many.
    """

    slots: int
    splits: int | None

    @property
    def is_split(self) -> bool:
        """True if a request may be cut, so that partial results and the combine kernel are needed."""
        return self.splits is None or self.splits > 1


def plan_pieces(
    *, batch: int, row_tiles: int, capacity: int, block_n: int, resident: int, min_tiles: int, num_splits: int | None
) -> Plan:
    """Choose the number of pieces from what the host knows; `resident` programs run at once, `capacity` keys fit a
    request's table.

    `slots - batch` is the budget that lengths are divided by: as each request rounds up by at most one piece, all
    pieces together never exceed `slots`, and all of them run in one wave. If requests alone fill half the device,
    cutting them costs more than it gives.
    """
    most = max(1, triton.cdiv(triton.cdiv(capacity, block_n), min_tiles))
    if num_splits is not None:
        splits = min(num_splits, triton.cdiv(capacity, block_n) or 1)
        return Plan(batch * splits, splits)
    slots = min(resident // row_tiles, batch * most + batch)
    if most == 1 or slots < 2 * batch:
        return Plan(batch, 1)
    return Plan(slots, None)


@triton.jit
def _balanced_pieces(
    seq_lens_ptr, batch, slots, capacity, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, MIN_TILES: tl.constexpr
):
    """Tiles and pieces of every request. The sum of the pieces is at most `slots`, and an empty request has one (it
    writes zeros).
    """
    requests = tl.arange(0, BLOCK_B)
    lens = tl.load(seq_lens_ptr + requests, mask=requests < batch, other=0)
    lens = tl.minimum(tl.maximum(lens, 0), capacity)
    tiles = (lens + BLOCK_N - 1) // BLOCK_N
    # `high` keys a piece always fit the slots; fewer often do, as not every request wastes a piece: 16 requests of 1024
    # keys and 128 heads on 132 multiprocessors run in 8 tiles a program instead of 11.
    total = tl.sum(tiles, 0)
    low = tl.cdiv(total, slots)
    high = tl.cdiv(total, slots - batch)
    tries = tl.maximum(low + (high - low) * tl.arange(0, 8) // 7, MIN_TILES)
    needed = tl.maximum((tiles[None, :] + tries[:, None] - 1) // tries[:, None], 1)
    needed = tl.sum(tl.where((requests < batch)[None, :], needed, 0), 1)
    per_piece = tl.min(tl.where(needed <= slots, tries, tl.maximum(high, MIN_TILES)), 0)
    pieces = tl.maximum((tiles + per_piece - 1) // per_piece, 1)
    return requests, tiles, tl.where(requests < batch, pieces, 0)


@triton.jit
def _find_piece(
    seq_lens_ptr,
    slot,
    batch,
    slots,
    splits,
    capacity,
    BALANCED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """The request of a slot (`batch` if the slot is idle), its piece, and the number of pieces of that request."""
    if BALANCED:
        requests, _, pieces = _balanced_pieces(seq_lens_ptr, batch, slots, capacity, BLOCK_B, BLOCK_N, MIN_TILES)
        request = tl.sum(((tl.cumsum(pieces, 0) <= slot) & (requests < batch)).to(tl.int32), 0)
        begin = tl.sum(tl.where(requests < request, pieces, 0), 0)
        count = tl.sum(tl.where(requests == request, pieces, 0), 0)
        piece = slot - begin
    elif SPLIT:
        request = slot // splits
        piece = slot % splits
        count = _even_pieces(seq_lens_ptr, request, splits, capacity, BLOCK_N)
        request = tl.where(piece < count, request, batch)
    else:
        request = slot
        piece = slot * 0
        count = piece + 1
    return request, piece, count


@triton.jit
def _even_pieces(seq_lens_ptr, request, splits, capacity, BLOCK_N: tl.constexpr):
    length = tl.minimum(tl.maximum(tl.load(seq_lens_ptr + request), 0), capacity)
    return tl.maximum(tl.minimum(splits, tl.cdiv(length, BLOCK_N)), 1)


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
    """First slot and number of pieces of a request: the combine kernel's side of `_find_piece`."""
    if BALANCED:
        requests, _, pieces = _balanced_pieces(seq_lens_ptr, batch, slots, capacity, BLOCK_B, BLOCK_N, MIN_TILES)
        begin = tl.sum(tl.where(requests < request, pieces, 0), 0)
        count = tl.sum(tl.where(requests == request, pieces, 0), 0)
    else:
        begin = request * splits
        count = _even_pieces(seq_lens_ptr, request, splits, capacity, BLOCK_N)
    return begin, count
