# mypy: disallow-incomplete-defs=False
# (kernel arguments are pointers and numbers of the GPU, which have no Python type)
"""The k largest of each row without sorting it.

A program takes a row at a time. A short row is held in registers. Of a long one a sample is, which tells a threshold
that a little more than k of the row lie above; one pass over the row collects these candidates, and from here on they
are the row. The k-th largest is then found by counting how many lie above two keys, until exactly k do or one key is
left. Every other time the two keys are guesses, in between they cut the range of possible keys in three: 42 rounds at
most, 6 to 7 for normally distributed logits.

If the sample has misled (fewer than k candidates, or more than there is room for) the row is searched where it lies,
which takes longer and is as exact.
"""

import torch
import triton
import triton.language as tl

from mlakit.hardware import device_info
from mlakit.indexer.config import TopkConfig, topk_config
from mlakit.triton_launch import Launches

NOTHING = tl.constexpr(-2139095041)  # the key of -inf: everything above it may be selected
MISSING = tl.constexpr(-8388608 << 32)  # a candidate of -inf
GROUP = tl.constexpr(8)  # neighbours in the sample: a sector of 32 bytes


@triton.jit
def _keys_of(x):
    """An int32 for each float32, in the order of the floats: -0 is 0, NaN comes last."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _candidate_keys(candidate):
    """The keys of what `_collect` wrote: a float32 above its index."""
    return _keys_of((candidate >> 32).to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def _cuts(low, high):
    """Two keys that cut [low, high) in three; low < first <= second < high if there is room for one."""
    third = tl.maximum((high - low).to(tl.uint32) // 3, 1).to(tl.int64)
    return low + third, tl.minimum(low + third + third, high - 1)


@triton.jit
def _value_of(key):
    """The float32 that has a key."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _guesses(low, high, count, above, k):
    """Two keys around where the k-th largest should be: one guess is that the keys in [low, high) are spread evenly,
    the other that they thin out exponentially, as the tail of a normal distribution nearly does.
    """
    bottom = _value_of(low)
    width = _value_of(high - 1) - bottom
    inside = (count - above).to(tl.float32)
    wanted = (k - above).to(tl.float32)
    even = 1 - wanted / inside
    all_keys = tl.log2(count.to(tl.float32))
    thinning = (all_keys - tl.log2(k.to(tl.float32))) / (all_keys - tl.log2(above.to(tl.float32) + 0.5))
    margin = (0.6 * tl.sqrt(wanted * even) + 0.3) / inside
    first = _keys_of(bottom + width * (tl.minimum(even, thinning) - margin)).to(tl.int64)
    second = _keys_of(bottom + width * (tl.maximum(even, thinning) + margin)).to(tl.int64)
    # Whatever the guesses are worth (they may be NaN): they must be inside.
    first = tl.minimum(tl.maximum(first, low + 1), high - 1)
    return first, tl.minimum(tl.maximum(second, first), high - 1)


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
    low = tl.min(tl.where(live, keys, 0x7FFFFFFF)).to(tl.int64)
    high = tl.max(keys).to(tl.int64) + 1
    count = tl.sum(live.to(tl.int32))
    above = count * 0
    guess = True
    while (high - low > 1) & (count - k > tolerance):
        if guess:
            first, second = _guesses(low, high, count, above, k)
        else:
            first, second = _cuts(low, high)
        guess = not guess
        both = (keys >= first.to(tl.int32)).to(tl.int32) + ((keys >= second.to(tl.int32)).to(tl.int32) << 16)
        found = tl.sum(both)
        low, high, count, above = _narrow(low, high, count, above, first, second, found & 0xFFFF, found >> 16, k)
    return low, count, above


@triton.jit
def _values(row_ptr, start, length, hidden, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Values [BLOCK / 4, 4] of a row from `start` on, -inf past its end."""
    group = start + (tl.arange(0, BLOCK // 4) + hidden) * 4
    offs = group[:, None] + tl.arange(0, 4)[None, :]
    if WHOLE:  # sixteen bytes at a time, the last ones of a row too
        x = tl.load(row_ptr + offs, mask=(group < length)[:, None], other=float("-inf"))
        if start + BLOCK > length:
            x = tl.where(offs < length, x, float("-inf"))
    else:
        x = tl.load(row_ptr + offs, mask=offs < length, other=float("-inf"))
    return x


@triton.jit
def _search_in_place(row_ptr, length, k, hidden, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """`_search` of a row that is read from memory in each round."""
    live = tl.zeros((BLOCK // 4, 4), tl.int32)
    for start in range(0, length, BLOCK):
        live += (_keys_of(_values(row_ptr, start, length, hidden, BLOCK, WHOLE)) > NOTHING).to(tl.int32)
    count = tl.sum(live)
    low = tl.full((), NOTHING + 1, tl.int64)
    high = tl.full((), 0x7FFFFFFF, tl.int64) + 1
    above = 0
    while (high - low > 1) & (count > k):
        first, second = _cuts(low, high)
        in_first = tl.zeros((BLOCK // 4, 4), tl.int32)
        in_second = tl.zeros((BLOCK // 4, 4), tl.int32)
        for start in range(0, length, BLOCK):
            keys = _keys_of(_values(row_ptr, start, length, hidden, BLOCK, WHOLE))
            in_first += (keys >= first.to(tl.int32)).to(tl.int32)
            in_second += (keys >= second.to(tl.int32)).to(tl.int32)
        low, high, count, above = _narrow(
            low, high, count, above, first, second, tl.sum(in_first), tl.sum(in_second), k
        )
    return low, count, above


@triton.jit
def _sampled_threshold(row_ptr, length, k, hidden, SAMPLE: tl.constexpr):
    """A key that, judging by a sample, a little more than k of a row's keys are not below."""
    offs = tl.arange(0, SAMPLE) + hidden
    apart = (length - GROUP) // (SAMPLE // GROUP - 1)  # of a row shorter than its sample, groups overlap
    keys = _keys_of(tl.load(row_ptr + (offs // GROUP) * apart + offs % GROUP))
    # Three and a half standard deviations of the number of the k largest that are in the sample.
    share = k.to(tl.float32) / length
    expected = share * SAMPLE
    wanted = (expected + 3.5 * tl.sqrt(expected * (1 - tl.minimum(share, 1.0))) + 3).to(tl.int32)
    low, count, _ = _search(keys, wanted, wanted // 16)
    return tl.where(count < wanted, NOTHING + 1, low).to(tl.int32)  # few keys at all: let all of them through


@triton.jit
def _four(row_ptr, offs, length, TAIL: tl.constexpr):
    if TAIL:
        return tl.load(row_ptr + offs, mask=offs < length, other=float("-inf"))
    else:  # noqa: RET505 - Triton compiles both branches if there is no else
        return tl.load(row_ptr + offs)


@triton.jit
def _hits(x, threshold):
    """How many of each row's four are not below the threshold."""
    return tl.sum(tl.where(x < threshold, 0, 1), axis=1)


@triton.jit
def _store_four(scratch_ptr, x, first, threshold, position):
    """Write those of each row's four that are not below the threshold, one column at a time; where the next go."""
    column = tl.arange(0, 4)[None, :]
    hit = tl.where(x < threshold, 0, 1)
    bits = x.to(tl.int32, bitcast=True)
    for i in tl.static_range(4):
        mine = tl.sum(tl.where(column == i, hit, 0), axis=1)
        high = tl.sum(tl.where(column == i, bits, 0), axis=1)
        candidate = (high.to(tl.int64) << 32) | (first + i).to(tl.uint32).to(tl.int64)
        tl.store(scratch_ptr + position.to(tl.uint32).to(tl.int64), candidate, mask=mine > 0)
        position += mine
    return position


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
def _collect_block(scratch_ptr, a, b, c, d, start, threshold, total, THREADS: tl.constexpr):
    """Write what is not below the threshold, each value with its index, in order, after `total` others.

    A thread has sixteen neighbours, and only their counts are summed over threads: that sum is the dear part. Values
    are stored column by column, as the neighbours would otherwise be dealt out to other threads first.
    """
    run = start + tl.arange(0, THREADS) * 16
    hits = _hits(a, threshold) + _hits(b, threshold) + _hits(c, threshold) + _hits(d, threshold)
    position = total + tl.cumsum(hits, axis=0) - hits
    position = _store_four(scratch_ptr, a, run, threshold, position)
    position = _store_four(scratch_ptr, b, run + 4, threshold, position)
    position = _store_four(scratch_ptr, c, run + 8, threshold, position)
    _store_four(scratch_ptr, d, run + 12, threshold, position)
    return total + tl.sum(hits)


@triton.jit
def _collect(row_ptr, scratch_ptr, hidden, length, key, CAPACITY: tl.constexpr, THREADS: tl.constexpr,
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
                total = _collect_block(scratch_ptr, a, b, c, d, start, threshold, total, THREADS)
                a = e
                b = f
                c = g
                d = h
                start += STEP
            if total <= CAPACITY:  # there is room for one block more, not for two
                total = _collect_block(scratch_ptr, a, b, c, d, start, threshold, total, THREADS)
            start += STEP
    else:
        while (start + STEP <= length) & (total <= CAPACITY):
            a, b, c, d = _sixteen(row_ptr, start, length, False, THREADS)
            total = _collect_block(scratch_ptr, a, b, c, d, start, threshold, total, THREADS)
            start += STEP
    if (start < length) & (total <= CAPACITY):
        a, b, c, d = _sixteen(row_ptr, start, length, True, THREADS)
        total = _collect_block(scratch_ptr, a, b, c, d, start, threshold, total, THREADS)
    return total


@triton.jit
def _emit(keys, start, scratch_ptr, collected, out_ptr, limit, ties, taken, tied, COUNT: tl.constexpr):
    """Write the indices of keys [COUNT / 4, 4] above `limit`, and of the first `ties` that equal it, in order, after
    `taken` and `tied` that were written before. The index is the place from `start` on, or what the candidate there
    says.
    """
    column = tl.arange(0, 4)[None, :]
    place = start + tl.arange(0, COUNT // 4) * 4
    both = (keys > limit).to(tl.int32) + ((keys == limit).to(tl.int32) << 16)
    sums = tl.sum(both, axis=1)
    rank = tl.cumsum(sums, axis=0) - sums
    for i in tl.static_range(4):
        mine = tl.sum(tl.where(column == i, both, 0), axis=1)
        rank_tied = tied + (rank >> 16)  # before this one
        chosen = (mine == 1) | ((mine > 1) & (rank_tied < ties))
        position = taken + (rank & 0xFFFF) + tl.minimum(rank_tied, ties)
        index = place + i
        if collected:
            index = tl.load(scratch_ptr + index, mask=chosen, other=0).to(tl.int32)
        tl.store(out_ptr + position, index, mask=chosen)
        rank += mine
    total = tl.sum(sums)
    return taken + (total & 0xFFFF), tied + (total >> 16)


@triton.jit
def _limit(low, count, above, k):
    """What `_emit` writes: the keys above a limit, and so many that equal it."""
    exact = count <= k  # else low itself is the k-th largest, and has equals that must stay behind
    return tl.where(exact, low - 1, low).to(tl.int32), tl.where(exact, 0, k - above)


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
    SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    scratch_ptr += tl.program_id(0).to(tl.int64) * (CAPACITY + 16 * THREADS)
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
        left = length
        collected = length > CAPACITY
        if collected:
            threshold = _sampled_threshold(row_ptr, length, k, hidden, SAMPLE)
            found = _collect(row_ptr, scratch_ptr, hidden, length, threshold, CAPACITY, THREADS, PREFETCH)
            tl.debug_barrier()  # candidates are read by other threads than wrote them
            # A threshold that lets everything through is as good if few enough are left.
            collected = (found <= CAPACITY) & ((found >= k) | (threshold <= NOTHING + 1))
            if collected:
                left = found
        if left <= CAPACITY:
            if collected:
                offs = hidden + tl.arange(0, CAPACITY // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
                keys = _candidate_keys(tl.load(scratch_ptr + offs, mask=offs < left, other=MISSING))
            else:
                keys = _keys_of(_values(row_ptr, 0, left, hidden, CAPACITY, WHOLE))
            low, count, above = _search(keys, k, 0)
            limit, ties = _limit(low, count, above, k)
            _emit(keys, hidden, scratch_ptr, collected, row_out, limit, ties, 0, 0, CAPACITY)
        else:
            low, count, above = _search_in_place(row_ptr, length, k, hidden, BLOCK, WHOLE)
            limit, ties = _limit(low, count, above, k)
            taken = count * 0
            tied = count * 0
            for start in range(0, left, BLOCK):
                keys = _keys_of(_values(row_ptr, start, left, hidden, BLOCK, WHOLE))
                taken, tied = _emit(keys, start, scratch_ptr, False, row_out, limit, ties, taken, tied, BLOCK)
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
        config = topk_config(columns, k, rows, info)
    programs = min(rows, info.units * config.programs)
    words = (config.capacity + 512 * config.num_warps) * programs  # a block more: only then is it known to be too many
    # Memory of the caching allocator, so that a CUDA graph keeps its own.
    scratch = logits.new_empty(words if columns > config.capacity else 1, dtype=torch.int64)
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
            "SAMPLE": config.sample,
            "BLOCK": config.block,
            "THREADS": 32 * config.num_warps,
            "PREFETCH": config.prefetch,
        },
        num_warps=config.num_warps,
        maxnreg=config.max_registers,
    )
