# mypy: disallow-incomplete-defs=False
# (kernel arguments are pointers and numbers of the GPU, which have no Python type)
"""The k largest of each row without sorting it.

A program takes a row at a time, with few warps (one, if there are rows enough): what is counted has to be summed over
them. A sample of the row tells two thresholds: some more than k of its values lie above the lower one, some fewer above
the upper one. One pass collects everything above the lower one, in order, with indices; from here on these candidates
are the row. Those between the two, where the k-th largest must be, fit the registers. It is found by counting how many
lie above two keys that cut the range of possible ones in three, again and again, until exactly as many do as are
wanted, or one key is left: 21 rounds at most, 9 for normally distributed logits.

Where the sample has misled (too few candidates, or more of anything than there is room for) the search reads the
candidates, or all of the row, from memory in each round: slower and as exact.
"""

import torch
import triton
import triton.language as tl

from mlakit.hardware import device_info
from mlakit.indexer.config import TopkConfig, topk_config
from mlakit.triton_launch import Launches

NOTHING = tl.constexpr(-2139095041)  # the key of -inf: everything above it may be selected
MOST = tl.constexpr(0x7FFFFFFF)
INFINITE = tl.constexpr(0x7F800000)  # the key of infinity
GROUP = tl.constexpr(8)  # neighbours in the sample: a sector of 32 bytes


@triton.jit
def _keys_of(x):
    """An int32 for each float32, in the order of the floats: -0 is 0, NaN comes last."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, MOST, bits ^ ((bits >> 31) & MOST))


@triton.jit
def _value_of(key):
    """The float32 that has a key."""
    return (key ^ ((key >> 31) & MOST)).to(tl.float32, bitcast=True)


@triton.jit
def _fours(COUNT: tl.constexpr, hidden):
    """0 to COUNT - 1 in rows of four neighbours, which a thread loads at once."""
    return (tl.arange(0, COUNT // 4)[:, None] + hidden) * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def _column(x, i: tl.constexpr):
    """Column i of rows of four: no data moves, as a thread has all four."""
    return tl.sum(tl.where(tl.arange(0, 4)[None, :] == i, x, 0), axis=1)


@triton.jit
def _cuts(low, high):
    """Two keys that cut [low, high) in three; low < first <= second < high if there is room for one."""
    third = tl.maximum((high - low).to(tl.uint32) // 3, 1).to(tl.int64)
    return low + third, tl.minimum(low + third + third, high - 1)


@triton.jit
def _narrow(low, high, count, above, first, second, in_first, in_second, k):
    """The third that holds the k-th largest. `count` keys are at least low, `above` at least high."""
    if in_second >= k:
        low = second
        count = in_second
    else:
        if in_first >= k:
            low = first
            count = in_first
            high = second
            above = in_second
        else:
            high = first
            above = in_first
    return low, high, count, above


@triton.jit
def _search(keys, k, tolerance):
    """(low, count, above): count keys are at least low, and k <= count <= k + tolerance; or count is more because of
    ties with low, and `above` of them are larger. Fewer than k keys in all are all counted.
    """
    live = keys > NOTHING
    low = tl.min(tl.where(live, keys, MOST)).to(tl.int64)
    high = tl.max(keys).to(tl.int64) + 1
    count = tl.sum(live.to(tl.int32))
    above = count * 0
    while (high - low > 1) & (count - k > tolerance):
        first, second = _cuts(low, high)
        both = (keys >= first.to(tl.int32)).to(tl.int32) + ((keys >= second.to(tl.int32)).to(tl.int32) << 16)
        found = tl.sum(both)
        low, high, count, above = _narrow(low, high, count, above, first, second, found & 0xFFFF, found >> 16, k)
    return low, count, above


@triton.jit
def _values(row_ptr, start, length, hidden, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Values [BLOCK / 4, 4] of a row from `start` on, -inf past its end."""
    offs = start + _fours(BLOCK, hidden)
    if WHOLE:  # sixteen bytes at a time, the last ones of a row too
        group = start + (tl.arange(0, BLOCK // 4) + hidden) * 4
        x = tl.load(row_ptr + offs, mask=(group < length)[:, None], other=float("-inf"))
        if start + BLOCK > length:
            x = tl.where(offs < length, x, float("-inf"))
    else:
        x = tl.load(row_ptr + offs, mask=offs < length, other=float("-inf"))
    return x


@triton.jit
def _search_in_memory(values_ptr, length, k, hidden, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """`_search` without tolerance of a row, or of candidates, read in each round."""
    live = tl.zeros((BLOCK // 4, 4), tl.int32)
    for start in range(0, length, BLOCK):
        keys = _keys_of(_values(values_ptr, start, length, hidden, BLOCK, WHOLE))
        live += (keys > NOTHING).to(tl.int32)
    count = tl.sum(live)
    low = (hidden + (NOTHING + 1)).to(tl.int64)
    high = hidden.to(tl.int64) + MOST + 1
    above = count * 0
    while (high - low > 1) & (count > k):
        first, second = _cuts(low, high)
        in_first = tl.zeros((BLOCK // 4, 4), tl.int32)
        in_second = tl.zeros((BLOCK // 4, 4), tl.int32)
        for start in range(0, length, BLOCK):
            keys = _keys_of(_values(values_ptr, start, length, hidden, BLOCK, WHOLE))
            in_first += (keys >= first.to(tl.int32)).to(tl.int32)
            in_second += (keys >= second.to(tl.int32)).to(tl.int32)
        low, high, count, above = _narrow(
            low, high, count, above, first, second, tl.sum(in_first), tl.sum(in_second), k
        )
    return low, count, above


@triton.jit
def _sampled_thresholds(row_ptr, length, k, hidden, SAMPLE: tl.constexpr):
    """Two keys: judging by a sample, a little more than k of a row's are not below the first, a little fewer not below
    the second.
    """
    offs = tl.arange(0, SAMPLE) + hidden
    apart = length // (SAMPLE // GROUP)
    # Of a row shorter than its sample the last value stands for those behind it.
    offs = tl.minimum((offs // GROUP) * apart + offs % GROUP, length - 1)
    keys = _keys_of(tl.load(row_ptr + offs))
    # Three standard deviations of the number of the k largest that are in the sample.
    share = k.to(tl.float32) / length
    expected = share * SAMPLE
    margin = 3 * tl.sqrt(expected * (1 - tl.minimum(share, 1.0))) + 3
    lower = hidden
    upper = hidden + INFINITE
    for side in range(2):
        wanted = (expected + margin).to(tl.int32)
        slack = wanted // 16
        if side == 1:
            wanted = tl.maximum((expected - margin).to(tl.int32) - slack, 0)
        low, count, _ = _search(keys, wanted, slack)
        key = tl.minimum(low, INFINITE).to(tl.int32)
        if side == 0:
            lower = tl.where(count < wanted, NOTHING + 1, key)  # few keys at all: let all of them through
        else:
            if wanted > 0:
                upper = key
    return lower, upper


@triton.jit
def _four(row_ptr, offs, length, TAIL: tl.constexpr):
    if TAIL:
        return tl.load(row_ptr + offs, mask=offs < length, other=float("-inf"))
    else:  # noqa: RET505 - Triton compiles both branches if there is no else
        return tl.load(row_ptr + offs)


@triton.jit
def _sixteen(row_ptr, start, length, TAIL: tl.constexpr, THREADS: tl.constexpr):
    """Sixteen neighbours a thread, from `start` on, in four parts."""
    offs = start + tl.arange(0, THREADS)[:, None] * 16 + tl.arange(0, 4)[None, :]
    a = _four(row_ptr, offs, length, TAIL)
    b = _four(row_ptr, offs + 4, length, TAIL)
    c = _four(row_ptr, offs + 8, length, TAIL)
    d = _four(row_ptr, offs + 12, length, TAIL)
    return a, b, c, d


@triton.jit
def _hits(x, threshold):
    """How many of each row's four are not below the threshold."""
    return tl.sum(tl.where(x < threshold, 0, 1), axis=1)


@triton.jit
def _store_four(values_ptr, index_ptr, x, first, threshold, position):
    """Write those of each row's four that are not below the threshold, one column at a time; where the next go."""
    hit = tl.where(x < threshold, 0, 1)
    bits = x.to(tl.int32, bitcast=True)
    for i in tl.static_range(4):
        mine = _column(hit, i)
        at = position.to(tl.uint32).to(tl.int64)
        tl.store(values_ptr + at, _column(bits, i).to(tl.float32, bitcast=True), mask=mine > 0)
        tl.store(index_ptr + at, first + i, mask=mine > 0)
        position += mine
    return position


@triton.jit
def _collect_block(values_ptr, index_ptr, a, b, c, d, start, threshold, total, THREADS: tl.constexpr):
    """Write what is not below the threshold, each value with its index, in order, after `total` others.

    A thread has sixteen neighbours, and only their counts are summed over threads: that sum is the dear part. Values
    are stored column by column, as the neighbours would otherwise be dealt out to other threads first.
    """
    run = start + tl.arange(0, THREADS) * 16
    hits = _hits(a, threshold) + _hits(b, threshold) + _hits(c, threshold) + _hits(d, threshold)
    position = total + tl.cumsum(hits, axis=0) - hits
    position = _store_four(values_ptr, index_ptr, a, run, threshold, position)
    position = _store_four(values_ptr, index_ptr, b, run + 4, threshold, position)
    position = _store_four(values_ptr, index_ptr, c, run + 8, threshold, position)
    _store_four(values_ptr, index_ptr, d, run + 12, threshold, position)
    return total + tl.sum(hits)


@triton.jit
def _collect(row_ptr, values_ptr, index_ptr, hidden, length, key, CAPACITY: tl.constexpr, THREADS: tl.constexpr,
             PREFETCH: tl.constexpr):  # fmt: skip
    """`_collect_block` over a row, until it ends or more than CAPACITY values were found; how many were found."""
    STEP: tl.constexpr = 16 * THREADS
    threshold = _value_of(key)
    total = hidden
    start = hidden
    if PREFETCH:
        if start + STEP <= length:
            a, b, c, d = _sixteen(row_ptr, start, length, False, THREADS)
            while (start + 2 * STEP <= length) & (total <= CAPACITY):
                e, f, g, h = _sixteen(row_ptr, start + STEP, length, False, THREADS)
                total = _collect_block(values_ptr, index_ptr, a, b, c, d, start, threshold, total, THREADS)
                a = e
                b = f
                c = g
                d = h
                start += STEP
            if total <= CAPACITY:  # there is room for one block more, not for two
                total = _collect_block(values_ptr, index_ptr, a, b, c, d, start, threshold, total, THREADS)
            start += STEP
    else:
        while (start + STEP <= length) & (total <= CAPACITY):
            a, b, c, d = _sixteen(row_ptr, start, length, False, THREADS)
            total = _collect_block(values_ptr, index_ptr, a, b, c, d, start, threshold, total, THREADS)
            start += STEP
    if (start < length) & (total <= CAPACITY):
        a, b, c, d = _sixteen(row_ptr, start, length, True, THREADS)
        total = _collect_block(values_ptr, index_ptr, a, b, c, d, start, threshold, total, THREADS)
    return total


@triton.jit
def _undecided(values_ptr, tile_ptr, found, upper, hidden, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Write the candidates that are below `upper`, without indices; how many there are (only TILE are written)."""
    total = hidden
    for start in range(0, found, BLOCK):
        x = _values(values_ptr, start, found, hidden, BLOCK, True)
        below = ((x < upper) & (x > float("-inf"))).to(tl.int32)
        bits = x.to(tl.int32, bitcast=True)
        sums = tl.sum(below, axis=1)
        position = total + tl.cumsum(sums, axis=0) - sums
        for i in tl.static_range(4):
            mine = _column(below, i)
            value = _column(bits, i).to(tl.float32, bitcast=True)
            tl.store(tile_ptr + position, value, mask=(mine > 0) & (position < TILE))
            position += mine
        total += tl.sum(sums)
    return total


@triton.jit
def _emit_above(values_ptr, index_ptr, found, limit, out_ptr, hidden, BLOCK: tl.constexpr):
    """Write the indices of candidates above `limit`, a number, in order."""
    total = hidden
    for start in range(0, found, BLOCK):
        x = _values(values_ptr, start, found, hidden, BLOCK, True)
        index = tl.load(index_ptr + start + _fours(BLOCK, hidden))  # also past the end, where nobody looks
        chosen = tl.where(x <= limit, 0, 1)  # NaN is chosen
        sums = tl.sum(chosen, axis=1)
        position = total + tl.cumsum(sums, axis=0) - sums
        for i in tl.static_range(4):
            mine = _column(chosen, i)
            tl.store(out_ptr + position, _column(index, i), mask=mine > 0)
            position += mine
        total += tl.sum(sums)


@triton.jit
def _emit(values_ptr, index_ptr, indexed, length, limit, ties, out_ptr, hidden, BLOCK: tl.constexpr,
          WHOLE: tl.constexpr):  # fmt: skip
    """Write the indices of keys above `limit`, and of the first `ties` that equal it, in order. Values have their
    places for indices unless others are given.
    """
    taken = hidden
    tied = hidden
    for start in range(0, length, BLOCK):
        keys = _keys_of(_values(values_ptr, start, length, hidden, BLOCK, WHOLE))
        index = start + _fours(BLOCK, hidden)
        if indexed:
            index = tl.load(index_ptr + index)
        both = (keys > limit).to(tl.int32) + ((keys == limit).to(tl.int32) << 16)
        sums = tl.sum(both, axis=1)
        rank = tl.cumsum(sums, axis=0) - sums
        for i in tl.static_range(4):
            mine = _column(both, i)
            rank_tied = tied + (rank >> 16)  # before this one
            chosen = (mine == 1) | ((mine > 1) & (rank_tied < ties))
            position = taken + (rank & 0xFFFF) + tl.minimum(rank_tied, ties)
            tl.store(out_ptr + position, _column(index, i), mask=chosen)
            rank += mine
        total = tl.sum(sums)
        taken += total & 0xFFFF
        tied += total >> 16


@triton.jit
def _select_topk_kernel(
    logits_ptr,
    lengths_ptr,
    out_ptr,
    scratch_ptr,
    rows,
    columns,
    k,
    stride_row,
    LENGTHS: tl.constexpr,  # whether lengths_ptr is given
    WHOLE: tl.constexpr,  # rows are multiples of four values
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    COLD: tl.constexpr = 4 * THREADS  # what is seldom run is kept short, for the instruction cache
    ROOM: tl.constexpr = CAPACITY + 16 * THREADS
    values_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * (2 * ROOM + TILE)
    index_ptr = (values_ptr + ROOM).to(tl.pointer_type(tl.int32), bitcast=True)
    tile_ptr = values_ptr + 2 * ROOM
    zero = tl.program_id(0) * 0  # makes tensors of what Triton takes for constants, as it does any 1
    k += zero
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        wide = row + zero.to(tl.int64)
        # Zero, but not to the compiler: it would keep the offsets of everything in registers from row to row.
        hidden = tl.multiple_of((wide >> 40).to(tl.int32), 16)
        row_ptr = logits_ptr + wide * stride_row
        row_out = out_ptr + wide * k
        length = columns + zero
        if LENGTHS:
            length = tl.maximum(tl.minimum(tl.load(lengths_ptr + row), columns), 0).to(tl.int32)
        source = row_ptr
        left = length
        upper = hidden + INFINITE
        in_tile = length
        collected = length > TILE
        if collected:
            lower, upper = _sampled_thresholds(row_ptr, length, k, hidden, SAMPLE)
            found = _collect(row_ptr, values_ptr, index_ptr, hidden, length, lower, CAPACITY, THREADS, PREFETCH)
            tl.debug_barrier()  # candidates are read by other threads than wrote them
            # A threshold that lets everything through is as good if few enough are left.
            collected = (found <= CAPACITY) & ((found >= k) | (lower <= NOTHING + 1))
            if collected:
                source = values_ptr
                left = found
                in_tile = _undecided(values_ptr, tile_ptr, found, _value_of(upper), hidden, TILE, BLOCK)
                tl.debug_barrier()
        above_tile = left - in_tile
        if (in_tile <= TILE) & (above_tile < k):
            tile = source
            if collected:
                tile = tile_ptr
            keys = _keys_of(_values(tile, 0, in_tile, hidden, TILE, WHOLE))
            low, count, above = _search(keys, k - above_tile, 0)
            low = tl.where(in_tile > 0, low, upper.to(tl.int64))
            count += above_tile
            above += above_tile
        else:
            low, count, above = _search_in_memory(source, left, k, hidden, COLD, WHOLE)
        exact = count <= k  # else low itself is the k-th largest, and has equals that must stay behind
        limit = tl.where(exact, low - 1, low).to(tl.int32)
        if collected & exact & (limit < INFINITE):
            _emit_above(values_ptr, index_ptr, left, _value_of(limit), row_out, hidden, BLOCK)
        else:
            ties = tl.where(exact, 0, k - above)
            _emit(source, index_ptr, collected, left, limit, ties, row_out, hidden, COLD, WHOLE)
        selected = tl.minimum(count, k)
        for start in range(selected // BLOCK * BLOCK, k, BLOCK):
            column = start + tl.arange(0, BLOCK)
            tl.store(row_out + column, -1, mask=(column >= selected) & (column < k))
        tl.debug_barrier()  # the next row's candidates take this one's place


_TOPK = Launches(_select_topk_kernel)


def launch_select_topk(
    logits: torch.Tensor,
    k: int,
    lengths: torch.Tensor | None,
    out: torch.Tensor,
    config: TopkConfig | None = None,
) -> None:
    """Write the indices of each row's k largest to `out` [rows, k], contiguous."""
    rows, columns = logits.shape
    if out.numel() == 0:
        return
    info = device_info(logits.device)
    if config is None:
        config = topk_config(columns, k, rows, info.units)
    programs = min(rows, info.units * config.programs)
    threads = 32 * config.num_warps
    # A block more than the capacity: only then is it known to be too many.
    words = (2 * (config.capacity + 16 * threads) + config.tile) * programs
    # Memory of the caching allocator, so that a CUDA graph keeps its own.
    scratch = logits.new_empty(words if columns > config.tile else 1)
    key = (logits.shape, logits.stride(), k, None if lengths is None else lengths.dtype, config)
    tensors = (logits, out if lengths is None else lengths, out, scratch)
    if logits.is_cuda and _TOPK.again(key, logits.device, tensors):
        return
    _TOPK.first(
        key,
        logits.device,
        (programs, 1, 1),
        tensors,
        (rows, columns, k, logits.stride(0)),
        {
            "LENGTHS": lengths is not None,
            "WHOLE": columns % 4 == 0,
            "CAPACITY": config.capacity,
            "TILE": config.tile,
            "SAMPLE": config.sample,
            "BLOCK": min(16 * threads, 2048),
            "THREADS": threads,
            "PREFETCH": config.prefetch,
        },
        num_warps=config.num_warps,
        maxnreg=config.max_registers,
    )
