"""Who does what in the Hopper kernels: dividing the keys of a batch among resident programs, on the device.

A *slot* is one program for every tile of query rows; all slots are resident at once. Keys are counted in *steps* of
STEP keys. Two ways to share them, of which each program chooses the same from the lengths:

- ALIGNED: every request is cut into the same number of pieces (one if there are as many requests as slots), and a slot
  takes whole pieces. Taken where that costs at most a few percent in balance: no slot then starts or merges more pieces
  than it must.
- EVEN: all steps of the batch, laid end to end, are cut into equal ranges. Lengths may be as ragged as they like.

Nothing of it is known to the host, so lengths may change between replays of a CUDA graph.
"""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _steps_of(length, capacity, STEP: gl.constexpr):
    return gl.cdiv(gl.minimum(gl.maximum(length, 0), capacity), STEP)


@gluon.jit
def _load_lens(seq_lens_ptr, batch, BLOCK_B: gl.constexpr):
    """The lengths of all requests, in every warp: sums over them then need no barrier."""
    layout: gl.constexpr = gl.BlockedLayout([BLOCK_B // 32], [32], [4], [0])
    requests = gl.arange(0, BLOCK_B, layout)
    return requests, gl.load(seq_lens_ptr + requests, mask=requests < batch, other=0)


@gluon.jit
def _share_out(
    requests, lens, slot, slots, batch, splits, most_pieces, slot_items, capacity,
    STEP: gl.constexpr, LEAST: gl.constexpr,
):  # fmt: skip
    """This slot's items and how to read them (`_piece`): items [begin, end), aligned, pieces a request, steps a slot,
    steps before the first item's request. No piece is smaller than LEAST steps but where `splits` says so, or at the
    end of a request. What the host knows it need not divide here: `most_pieces`, the pieces a request that there are
    slots for, and `slot_items`, the items a slot then takes.
    """
    steps = _steps_of(lens, capacity, STEP)
    total = gl.sum(steps, 0)
    longest = gl.max(steps, 0)
    share = gl.maximum(gl.cdiv(total, slots), LEAST)
    pieces = gl.maximum(gl.minimum(most_pieces, longest // LEAST), 1)
    longest_piece = gl.cdiv(longest, pieces)
    if splits == 0:  # no more pieces than make the longest so short
        pieces = gl.maximum(gl.cdiv(longest, gl.maximum(longest_piece, 1)), 1)
    else:
        pieces = splits
    # Up to a sixteenth and one step longer than a perfect balance: to start and merge one more piece costs as much.
    fits = (splits > 0) | (slot_items * longest_piece * 16 <= share * 17 + 16)
    aligned = gl.where(fits, 1, 0)
    begin = slot * slot_items
    end = gl.minimum(begin + slot_items, batch * pieces)
    before = slot * 0
    if aligned == 0:
        ends = gl.associative_scan(steps, 0, _add)
        first_step = slot * share
        end_step = gl.minimum(first_step + share, total)
        begin = gl.sum(gl.where(ends <= first_step, 1, 0), 0)
        last = gl.sum(gl.where(ends < end_step, 1, 0), 0)
        before = gl.sum(gl.where(requests < begin, steps, 0), 0)
        end = gl.where(first_step < end_step, last + 1, begin)
    return begin, end, aligned, pieces, share, before


@gluon.jit
def _share_out_one(length, slot, splits, most_pieces, slot_items, capacity, STEP: gl.constexpr, LEAST: gl.constexpr):
    """`_share_out` for a batch of one request: the same without sums."""
    steps = _steps_of(length, capacity, STEP)
    pieces = gl.maximum(gl.minimum(most_pieces, steps // LEAST), 1)
    longest_piece = gl.maximum(gl.cdiv(steps, pieces), 1)
    if splits == 0:
        pieces = gl.maximum(gl.cdiv(steps, longest_piece), 1)
    else:
        pieces = splits
    begin = slot * slot_items
    return begin, gl.minimum(begin + slot_items, pieces), slot * 0 + 1, pieces, longest_piece, slot * 0


@gluon.jit
def _part(number, steps, count):
    """Steps [first, end) of part `number` of `count`, of which the first ones are a step longer; a part past the last
    is empty.
    """
    each = steps // count
    longer = steps - each * count
    first = number * each + gl.minimum(number, longer)
    return first, gl.where(number < count, first + each + gl.where(number < longer, 1, 0), first)


@gluon.jit
def _piece_of_one(item, pieces, length, capacity, STEP: gl.constexpr):
    """`_piece` for a batch of one request, whose length is known."""
    steps = _steps_of(length, capacity, STEP)
    count = gl.maximum(gl.minimum(pieces, steps), 1)
    first, end = _part(item, steps, count)
    return item * 0, length, steps, first, end, item, count, item * 0


@gluon.jit
def _piece(item, before, slot, aligned, pieces, share, seq_lens_ptr, capacity, STEP: gl.constexpr):
    """What an item is: request, its length and steps, steps [first, end) of it, number of the piece and how many there
    are, and where partial results lie: the request's first, and the distance from one to the next (`_partial_at`).
    """
    request = item
    if aligned != 0:
        request = item // pieces
    length = gl.load(seq_lens_ptr + request)
    steps = _steps_of(length, capacity, STEP)
    if aligned != 0:
        count = gl.maximum(gl.minimum(pieces, steps), 1)
        number = item - request * pieces
        first, end = _part(number, steps, count)
        base = request * pieces
    else:
        first_slot = before // share
        count = (before + steps - 1) // share - first_slot + 1
        number = slot - first_slot
        first = gl.maximum(slot * share - before, 0)
        end = gl.minimum(slot * share + share - before, steps)
        base = 2 * first_slot
    return request, length, steps, first, end, number, count, base


@gluon.jit
def _partial_at(base, number, aligned):
    """Where the partial result of a piece is kept. A slot that shares evenly has at most two: of the request that it
    takes over from the slot before, and of the one that it leaves to the next (the first piece of that one).
    """
    return gl.where(aligned != 0, base + number, base + 2 * number + gl.where(number == 0, 1, 0))
