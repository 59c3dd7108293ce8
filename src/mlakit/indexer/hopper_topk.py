# mypy: disallow-incomplete-defs=False
# (kernel arguments are pointers and numbers of the GPU, which have no Python type)
"""The k largest of each row on Hopper: counted in bins, by atomic additions to shared memory.

A program takes a row. A short one is held in registers. Of a long one a sample is, which tells a threshold that a
little more than k of the row lie above; one pass over the row collects these candidates in shared memory, each warp in
a part of its own, and from here on they are the row. Its values are counted in 2047 bins of equal width, which tells
the bin of the k-th largest; that bin's few members are ranked one against all. Indices come out in order by a bitmap:
where one goes is the number of bits before its own.

Where that does not work (few distinct values, infinities at the threshold, a sample that misled, candidates crowded in
one warp's part) the row is searched where it lies, digit by digit of value and index, which takes longer and is as
exact.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mlakit.indexer.hopper_topk_parts import (
    _BINS,
    _CANDIDATES,
    _FOUND,
    _HIST,
    _INF,
    _LOWEST,
    _OVERFLOW,
    _append,
    _ballot,
    _ballot_at_least,
    _barrier,
    _clear,
    _count,
    _find,
    _lane_masks,
    _load,
    _mark,
    _open_bins,
    _rank_words,
    _read,
    _set,
    _shared,
    _store_word,
    _threshold,
    _write,
    _write_by_word,
)


@gluon.jit
def _composite(x, index):
    """The float's order above the falling index, in 50 bits."""
    bits = (x + 0.0).to(gl.int32, bitcast=True)
    key = gl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return ((key.to(gl.int64) + 0x80000000) << 18) | (0x3FFFF - index).to(gl.int64)


@gluon.jit
def _hits_in_place(row_ptr, start, length, bound, THREADS: gl.constexpr):
    index = start + gl.arange(0, THREADS, gl.BlockedLayout([1], [32], [THREADS // 32], [0]))
    x = gl.load(row_ptr + index, mask=index < length, other=-_INF)
    composite = _composite(x, index)
    return index, composite, (composite >= bound) & ((x > -_INF) | (x != x))


@gluon.jit
def _threshold_in_place(shared, row_ptr, length, k, THREADS: gl.constexpr):
    """The composite of the k-th largest, or so much of it as tells which they are; whether there are fewer."""
    bound = length.to(gl.int64) * 0
    shift = length * 0 + 39
    few = False
    while shift >= 0:
        _barrier()
        _clear(shared + _HIST, THREADS, _BINS)
        _set(shared + _FOUND, -1)
        _barrier()
        above_digit = shift + gl.where(shift == 0, 6, 11)
        for start in range(0, length, THREADS):
            _, composite, live = _hits_in_place(row_ptr, start, length, bound, THREADS)
            live &= (composite >> above_digit) == (bound >> above_digit)
            digit = ((composite - bound) >> shift).to(gl.int32) & (_BINS - 1)
            gl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p red.shared.add.u32 [$1], 1; mov.u32 $0, 0; }",
                "=r,r,r", [shared + _HIST + 4 * digit, live.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        _barrier()
        bin, above, count = _find(shared, k, THREADS)
        if bin < 0:
            few = True
            shift = shift * 0 - 1
        else:
            bound += bin.to(gl.int64) << shift
            k -= above
            shift = gl.where((count == k) | (shift == 0), -1, gl.maximum(shift - 11, 0))
    return bound, few


@gluon.jit
def _select_held(
    shared, row_ptr, row_out, length, words, k,
    R: gl.constexpr, WORDS: gl.constexpr, THREADS: gl.constexpr,
):  # fmt: skip
    """Select from a row that fits the registers, R values a thread: (fine, few)."""
    x, index = _load(row_ptr, 0, length, R, THREADS, True)
    SOME: gl.constexpr = min(R, 4)
    if SOME < R:  # every so many of the values tell their range, the last ones among them
        part: gl.constexpr = gl.BlockedLayout([SOME, 1], [1, 32], [1, THREADS // 32], [0, 1])
        at = gl.arange(0, SOME, gl.SliceLayout(1, part))[:, None] * (R // SOME * THREADS)
        at = at + ((R // SOME - 1) * THREADS + gl.arange(0, THREADS, gl.SliceLayout(0, part)))[None, :]
        some = gl.load(row_ptr + at, mask=at < length, other=-_INF)
    else:
        some = x
    value, last, ties, fine, few = _threshold(shared, x, index, some, k, SOME == R, THREADS)
    if fine:
        if ties:
            word = _ballot((x > value) | (x != x) | ((x == value) & (index <= last)))
        else:
            word = _ballot_at_least(x, value)
        layout: gl.constexpr = gl.BlockedLayout([R, 1], [1, 32], [1, THREADS // 32], [0, 1])
        of_warp = shared + gl.arange(0, THREADS, gl.SliceLayout(0, layout)) // 32 * 4
        at_word = of_warp[None, :] + gl.arange(0, R, gl.SliceLayout(1, layout))[:, None] * (THREADS // 8)
        _store_word(at_word, word)
        _rank_words(shared, words, THREADS, WORDS)
        below, own = _lane_masks(of_warp)
        _write_by_word(at_word + 4 * words, row_out, index, word, below[None, :], own[None, :])
    return fine, few


@gluon.jit
def _sample(row_ptr, number, length, SAMPLE: gl.constexpr, THREADS: gl.constexpr):
    """2048 values of a sample, the `number`-th of so many parts: eight neighbours at a time, a sector of memory."""
    PER: gl.constexpr = 2048 // THREADS
    layout: gl.constexpr = gl.BlockedLayout([PER, 1], [1, 32], [1, THREADS // 32], [0, 1])
    i = gl.arange(0, PER, gl.SliceLayout(1, layout))[:, None] * THREADS
    i = i + gl.arange(0, THREADS, gl.SliceLayout(0, layout))[None, :]
    # Parts are interleaved, so that each is spread over the row.
    group = i // 8 * (SAMPLE // 2048) + number
    at = group * (gl.maximum(length - 8, 0) // (SAMPLE // 8 - 1)) + i % 8
    return gl.load(row_ptr + at, mask=at < length, other=-_INF)


@gluon.jit
def _sampled_bound(shared, row_ptr, length, k, SAMPLE: gl.constexpr, THREADS: gl.constexpr):
    """A value that, judging by a sample, a little more than k of a row are not below; whether it is below all."""
    part = _sample(row_ptr, 0, length, SAMPLE, THREADS)
    low, scale = _open_bins(shared, part, THREADS)  # others below count as none, above as one bin: it is a guess
    _count(part, low, scale, shared)
    for number in range(1, SAMPLE // 2048):
        _count(_sample(row_ptr, number, length, SAMPLE, THREADS), low, scale, shared)
    _barrier()
    # Four and a half standard deviations of the number of the k largest that are in the sample. With three and a half
    # one row of 4000 has too few candidates, and the others wait for it.
    share = gl.minimum(k.to(gl.float32) / gl.maximum(length, 1).to(gl.float32), 1.0)
    expected = share * SAMPLE
    wanted = (expected + 4.5 * gl.sqrt(expected * (1 - share)) + 3).to(gl.int32)
    bin, _above, _in_bin = _find(shared, wanted, THREADS)
    everything = (bin < 1) | (length <= 2048)
    return gl.where(everything, _LOWEST, low + (bin.to(gl.float32) - 1.5) / scale), everything


@gluon.jit
def _select_candidates(
    shared, row_ptr, row_out, length, words, k,
    R: gl.constexpr, SAMPLE: gl.constexpr, WORDS: gl.constexpr, THREADS: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Select from a long row by its candidates: (fine, few)."""
    PART: gl.constexpr = 8 * _CANDIDATES * 32 // THREADS  # bytes of a warp's part of the list
    STEP: gl.constexpr = R * THREADS
    _set(shared + _OVERFLOW, 0)  # barriers follow before any warp may set it
    bound, everything = _sampled_bound(shared, row_ptr, length, k, SAMPLE, THREADS)
    loaded: gl.constexpr = gl.BlockedLayout([R, 1], [1, 32], [1, THREADS // 32], [0, 1])
    part = shared + gl.arange(0, THREADS, gl.SliceLayout(0, loaded)) // 32 * PART
    gl.inline_asm_elementwise(
        "mov.u32 mlakit_next, $1; mov.u32 mlakit_hits, 0; mov.u32 $0, 0;",
        "=r,r",
        [part],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    past = part + PART
    full = length // STEP * STEP
    if AHEAD:
        if full > 0:
            x, index = _load(row_ptr, 0, length, R, THREADS, False)
            for start in range(0, full, STEP):
                x_next, index_next = _load(row_ptr, gl.minimum(start + STEP, full - STEP), length, R, THREADS, False)
                _append(past, x, index, bound)
                x = x_next
                index = index_next
    else:
        for start in range(0, full, STEP):
            x, index = _load(row_ptr, start, length, R, THREADS, False)
            _append(past, x, index, bound)
    if full < length:
        x, index = _load(row_ptr, full, length, R, THREADS, True)
        _append(past, x, index, bound)

    # Each warp takes its own candidates to registers, once all of its threads have written theirs.
    gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.u32 $0, $1;", "=r,r", [words], dtype=gl.int32, is_pure=False, pack=1
    )
    layout: gl.constexpr = gl.BlockedLayout([_CANDIDATES // THREADS, 1], [1, 32], [1, THREADS // 32], [0, 1])
    t = gl.arange(0, THREADS, gl.SliceLayout(0, layout))
    place = gl.arange(0, _CANDIDATES // THREADS, gl.SliceLayout(1, layout))[:, None] * 32 + (t % 32)[None, :]
    own_part = (shared + t // 32 * PART)[None, :] + 0 * place
    found = gl.inline_asm_elementwise(
        "sub.u32 $0, mlakit_next, $1; shr.u32 $0, $0, 3;", "=&r,r", [own_part], dtype=gl.int32, is_pure=False, pack=1
    )
    candidate, place_in_row = gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.gt.s32 p, $3, $5; @p st.shared.b32 [$4], 1;
        ld.shared.v2.b32 {$0, $1}, [$2];
        }""",
        "=f,=r,r,r,r,n", [own_part + 8 * place, found, shared + _OVERFLOW, PART // 8],
        dtype=(gl.float32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip
    candidate = gl.where(place < found, candidate, -_INF)
    place_in_row = gl.where(place < found, place_in_row, 0x7FFFFFFF)
    value, last, _ties, fine, few = _threshold(
        shared, candidate, place_in_row, candidate, k, True, THREADS
    )  # fmt: skip
    fine = fine & (_read(shared + _OVERFLOW) == 0) & (everything | (few == False))  # noqa: E712
    if fine:
        larger = (candidate > value) | (candidate != candidate)
        hit = larger | ((candidate == value) & (place_in_row <= last))
        _barrier()
        _clear(shared, THREADS, WORDS * THREADS)
        _barrier()
        _mark(shared, place_in_row, hit)
        _rank_words(shared, words, THREADS, WORDS)
        _write(shared, words, row_out, place_in_row, hit)
    return fine, few


# A new length or k must not recompile.
@gluon.jit(do_not_specialize=["columns", "k", "stride_row"])
def _select_topk_hopper_kernel(
    logits_ptr,
    lengths_ptr,
    out_ptr,
    columns,
    k,
    stride_row,
    LENGTHS: gl.constexpr,  # whether lengths_ptr is given
    HELD: gl.constexpr,  # values a thread holds of a row, or of the part that is looked through
    SAMPLE: gl.constexpr,  # 0: all of a row is held
    WORDS: gl.constexpr,  # of the bitmap, a thread
    THREADS: gl.constexpr,
    AHEAD: gl.constexpr,
):
    row = gl.program_id(0).to(gl.int64)
    shared = _shared(columns)
    row_ptr = logits_ptr + row * stride_row
    row_out = out_ptr + row * k
    length = columns + 0
    if LENGTHS:
        length = gl.maximum(gl.minimum(gl.load(lengths_ptr + row), columns), 0).to(gl.int32)
    words = gl.maximum((columns + 31) // 32, 1)
    if SAMPLE == 0:
        fine, few = _select_held(shared, row_ptr, row_out, length, words, k, HELD, WORDS, THREADS)
    else:
        fine, few = _select_candidates(
            shared, row_ptr, row_out, length, words, k, HELD, SAMPLE, WORDS, THREADS, AHEAD
        )  # fmt: skip
    if fine == False:  # noqa: E712
        bound, few = _threshold_in_place(shared, row_ptr, length, k, THREADS)
        _barrier()
        for start in range(0, words * 32, THREADS):
            index, _, hit = _hits_in_place(row_ptr, start, length, bound, THREADS)
            _store_word(shared + index // 32 * 4, _ballot(hit))
        _rank_words(shared, words, THREADS, WORDS)
        for start in range(0, length, THREADS):
            index, _, hit = _hits_in_place(row_ptr, start, length, bound, THREADS)
            _write(shared, words, row_out, index, hit)
    if few:  # the last word's rank and its bits are all there are
        total = gl.inline_asm_elementwise(
            "popc.b32 $0, $2; add.u32 $0, $0, $1;",
            "=&r,r,r", [_read(shared + 8 * words - 4), _read(shared + 4 * words - 4)],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        t: gl.constexpr = gl.BlockedLayout([1], [32], [THREADS // 32], [0])
        for start in range(0, k, THREADS):
            column = start + gl.arange(0, THREADS, t)
            gl.store(row_out + column, gl.full([THREADS], -1, gl.int32, t), mask=(column >= total) & (column < k))
