# mypy: disallow-incomplete-defs=False
# (kernel arguments are pointers and numbers of the GPU, which have no Python type)
"""What selecting on Hopper is made of: bins, ranks among a bin's members, a bitmap and the ranks of its words.

What Gluon has no word for is in PTX: atomic additions to shared memory, votes, reductions of a warp. Shared memory is
declared there too, so that it has an address.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
_BINS = gl.constexpr(2048)
_MEMBERS = gl.constexpr(512)
_CANDIDATES = gl.constexpr(4096)
_INF = gl.constexpr(float("inf"))
_LOWEST = gl.constexpr(-3.4028234663852886e38)
# Shared memory, in bytes. From 0 on: candidates, a value and an index each; later the bitmap and the ranks of its
# words, which may run into the bins. Then the members of the wanted bin, and what all threads must know.
_HIST = gl.constexpr(32768)
_MEMBER = gl.constexpr(40960)
_FOUND = gl.constexpr(45056)  # the wanted bin, how many are above it, how many in it
_COUNTER = gl.constexpr(45056 + 12)  # of members
_LAST = gl.constexpr(45056 + 16)  # the k-th largest: its value, its index, whether an equal one is left behind
_OVERFLOW = gl.constexpr(45056 + 28)
_WARPS = gl.constexpr(45056 + 64)  # a word for each warp, twice


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _shared(anything):
    """The address of shared memory of our own; and registers of each thread, for `_append`."""
    return gl.inline_asm_elementwise(
        """.shared .align 16 .b8 mlakit_topk[45376];
        .reg .b32 mlakit_next, mlakit_hits, mlakit_at;
        .reg .pred mlakit_fits;
        mov.u32 $0, mlakit_topk;""",
        "=r,r", [anything], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _read(address):
    return gl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];", "=r,r", [address], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def _set(address, value: gl.constexpr):
    gl.inline_asm_elementwise(
        "st.shared.b32 [$1], $2; mov.u32 $0, 0;", "=r,r,r", [address, value], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def _clear(address, THREADS: gl.constexpr, WORDS: gl.constexpr):
    """Zero WORDS words of shared memory, a multiple of the threads."""
    t = gl.arange(0, THREADS, gl.BlockedLayout([1], [32], [THREADS // 32], [0]))
    if WORDS % (4 * THREADS) == 0:
        for i in gl.static_range(WORDS // (4 * THREADS)):
            gl.inline_asm_elementwise(
                "{ .reg .b32 z; mov.u32 z, 0; st.shared.v4.b32 [$1], {z, z, z, z}; mov.u32 $0, 0; }",
                "=r,r", [address + i * 16 * THREADS + 16 * t], dtype=gl.int32, is_pure=False, pack=1,
            )  # fmt: skip
    else:
        for i in gl.static_range(WORDS // THREADS):
            gl.inline_asm_elementwise(
                "st.shared.b32 [$1], 0; mov.u32 $0, 0;",
                "=r,r", [address + i * 4 * THREADS + 4 * t], dtype=gl.int32, is_pure=False, pack=1,
            )  # fmt: skip


@gluon.jit
def _lane_masks(anything):
    """Bits of the lanes below this one, and its own."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, %lanemask_lt; mov.u32 $1, %lanemask_eq;",
        "=r,=r,r", [anything], dtype=(gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _begin(shared, low, high, THREADS: gl.constexpr):
    """Zero the bins and the state; the smallest `low` and the largest `high` of all threads, compared as integers in
    the floats' order.
    """
    _barrier()
    _clear(shared + _HIST, THREADS, _BINS)
    gl.inline_asm_elementwise(
        """{
        .reg .pred p; .reg .b32 a, b, s, l, w;
        mov.b32 a, $1; shr.s32 s, a, 31; and.b32 s, s, 0x7fffffff; xor.b32 a, a, s; redux.sync.min.s32 a, a, -1;
        mov.b32 b, $2; shr.s32 s, b, 31; and.b32 s, s, 0x7fffffff; xor.b32 b, b, s; redux.sync.max.s32 b, b, -1;
        mov.u32 l, %laneid; mov.u32 w, %tid.x; shr.u32 w, w, 5; mad.lo.u32 w, w, 4, $3;
        setp.eq.u32 p, l, 0;
        @p st.shared.b32 [w], a;
        @p st.shared.b32 [w+128], b;
        mov.u32 $0, 0;
        }""",
        "=r,f,f,r", [low, high, shared + _WARPS], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    _set(shared + _FOUND, -1)
    _set(shared + _COUNTER, 0)
    _barrier()
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, s, l;
        mov.u32 l, %laneid; rem.u32 l, l, $3; mad.lo.u32 l, l, 4, $2;
        ld.shared.b32 a, [l]; redux.sync.min.s32 a, a, -1;
        ld.shared.b32 b, [l+128]; redux.sync.max.s32 b, b, -1;
        shr.s32 s, a, 31; and.b32 s, s, 0x7fffffff; xor.b32 a, a, s; mov.b32 $0, a;
        shr.s32 s, b, 31; and.b32 s, s, 0x7fffffff; xor.b32 b, b, s; mov.b32 $1, b;
        }""",
        "=f,=f,r,n", [shared + _WARPS, THREADS // 32], dtype=(gl.float32, gl.float32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _count(x, low, scale, shared):
    """Count x in its bin: 2^23 + 1 + (x - low) * scale is rounded to a whole number, whose last bits are the bin's. Bin
    0 is for what is below `low`, the last one for what is above the range, and NaN.
    """
    gl.inline_asm_elementwise(
        """{
        .reg .f32 f; .reg .b32 b;
        sub.f32 f, $1, $2;
        fma.rn.f32 f, f, $3, 0f4B000001;
        min.f32 f, f, 0f4B0007FF;
        max.f32 f, f, 0f4B000000;
        mov.b32 b, f;
        mad.lo.u32 b, b, 4, $4;
        red.shared.add.u32 [b], 1;
        mov.u32 $0, 0;
        }""",
        # 4 times the bits of 2^23 are 0x2C000000, but for what 32 bits do not hold
        "=r,f,f,f,r", [x, low, scale, shared + (_HIST - 0x2C000000)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _find(shared, k, THREADS: gl.constexpr):
    """The bin that holds the k-th largest: (bin, above, count), or (-1, ...) if there are fewer than k in all. Warps
    take their parts of the bins from the top; the one that has the k-th looks on.
    """
    t = gl.arange(0, THREADS, gl.BlockedLayout([1], [32], [THREADS // 32], [0]))
    top = _BINS - 1 - t * (_BINS // THREADS)  # a thread's bins, the largest first
    if THREADS == 512:
        d, c, b, a = gl.inline_asm_elementwise(
            "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r", [shared + _HIST + 4 * top - 12],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        b, a = gl.inline_asm_elementwise(
            "ld.shared.v2.b32 {$0, $1}, [$2];", "=r,=r,r", [shared + _HIST + 4 * top - 4],
            dtype=(gl.int32, gl.int32), is_pure=False, pack=1,
        )  # fmt: skip
        c = b * 0
        d = c
    own = a + b + c + d
    total = gl.inline_asm_elementwise(
        """{
        .reg .pred p; .reg .b32 l, w;
        redux.sync.add.u32 $0, $1, -1;
        mov.u32 l, %laneid; mov.u32 w, %tid.x; shr.u32 w, w, 5; mad.lo.u32 w, w, 4, $2;
        setp.eq.u32 p, l, 0;
        @p st.shared.b32 [w], $0;
        }""",
        "=&r,r,r", [own, shared + _WARPS], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    _barrier()
    gl.inline_asm_elementwise(
        """{
        .reg .pred p, q; .reg .b32 l, w, n, m, above, mine, x, bin;
        mov.u32 l, %laneid; mov.u32 w, %tid.x; shr.u32 w, w, 5;
        mad.lo.u32 n, l, 4, $8;
        mov.u32 m, 0;
        setp.lt.u32 p, l, w;
        @p ld.shared.b32 m, [n];
        redux.sync.add.u32 above, m, -1;
        add.u32 n, above, $2;
        setp.lt.s32 p, above, $3;
        setp.ge.and.s32 p, n, $3, p;
        @!p bra DONE;
        mov.u32 mine, $1;
        shfl.sync.up.b32 x|q, mine, 1, 0, -1; @q add.u32 mine, mine, x;
        shfl.sync.up.b32 x|q, mine, 2, 0, -1; @q add.u32 mine, mine, x;
        shfl.sync.up.b32 x|q, mine, 4, 0, -1; @q add.u32 mine, mine, x;
        shfl.sync.up.b32 x|q, mine, 8, 0, -1; @q add.u32 mine, mine, x;
        shfl.sync.up.b32 x|q, mine, 16, 0, -1; @q add.u32 mine, mine, x;
        add.u32 above, above, mine; sub.u32 above, above, $1;
        mov.u32 bin, $9;
        add.u32 n, above, $4; setp.lt.s32 p, above, $3; setp.ge.and.s32 q, n, $3, p;
        @q st.shared.v2.b32 [$10], {bin, above}; @q st.shared.b32 [$10+8], $4;
        mov.u32 above, n; sub.u32 bin, bin, 1;
        add.u32 n, above, $5; setp.lt.s32 p, above, $3; setp.ge.and.s32 q, n, $3, p;
        @q st.shared.v2.b32 [$10], {bin, above}; @q st.shared.b32 [$10+8], $5;
        mov.u32 above, n; sub.u32 bin, bin, 1;
        add.u32 n, above, $6; setp.lt.s32 p, above, $3; setp.ge.and.s32 q, n, $3, p;
        @q st.shared.v2.b32 [$10], {bin, above}; @q st.shared.b32 [$10+8], $6;
        mov.u32 above, n; sub.u32 bin, bin, 1;
        add.u32 n, above, $7; setp.lt.s32 p, above, $3; setp.ge.and.s32 q, n, $3, p;
        @q st.shared.v2.b32 [$10], {bin, above}; @q st.shared.b32 [$10+8], $7;
        DONE:
        mov.u32 $0, 0;
        }""",
        "=r,r,r,r,r,r,r,r,r,r,r", [own, total, k, a, b, c, d, shared + _WARPS, top, shared + _FOUND],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    _barrier()
    return _read(shared + _FOUND), _read(shared + _FOUND + 4), _read(shared + _FOUND + 8)


@gluon.jit
def _open_bins(shared, some, THREADS: gl.constexpr):
    """Empty bins between the smallest and the largest finite one of `some`: (low, scale)."""
    t: gl.constexpr = gl.BlockedLayout([1], [32], [THREADS // 32], [0])
    low = gl.convert_layout(gl.min(gl.where(some > -_INF, some, _INF), axis=0), t)
    high = gl.convert_layout(gl.max(gl.where(some < _INF, some, -_INF), axis=0), t)
    low, high = _begin(shared, low, high, THREADS)
    return low, (_BINS - 3.0) / (high - low)


@gluon.jit
def _count_and_find(shared, x, some, k, THREADS: gl.constexpr):
    """Count all x in bins between the smallest and the largest finite one of `some`, and find the bin of the k-th
    largest: 0 or -1 if there are fewer than k in the range and above.
    """
    low, scale = _open_bins(shared, some, THREADS)
    _count(x, low, scale, shared)
    _barrier()
    bin, above, count = _find(shared, k, THREADS)
    # An infinite range, or none, has no scale: then the row is searched in place.
    fine = ((bin < 1) | ((count <= _MEMBERS) & (bin < _BINS - 1))) & (scale > 0)
    return low, scale, bin, above, count, fine


@gluon.jit
def _rank_members(shared, x, index, low, scale, bin, count, k, THREADS: gl.constexpr):
    """Of a bin's members the k-th largest, lower indices first: its value, its index, whether others equal it that have
    higher ones.
    """
    gl.inline_asm_elementwise(
        """{
        .reg .pred p; .reg .f32 f, g; .reg .b32 b;
        sub.f32 f, $1, $3;
        fma.rn.f32 f, f, $4, 0f4B000001;
        mov.b32 g, $5;
        setp.eq.f32 p, f, g;
        @p atom.shared.inc.u32 b, [$7], 0x7fffffff;
        @p mad.lo.u32 b, b, 8, $6;
        @p st.shared.v2.b32 [b], {$1, $2};
        mov.u32 $0, 0;
        }""",
        "=r,f,r,f,f,r,r,r", [x, index, low, scale, bin + 0x4B000000, shared + _MEMBER, shared + _COUNTER],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    _barrier()
    t = gl.arange(0, THREADS, gl.BlockedLayout([1], [32], [THREADS // 32], [0]))
    gl.inline_asm_elementwise(
        """{
        .reg .pred p, q, r; .reg .f32 v, w; .reg .b32 own, i, j, n, rank, at, end, one, tie;
        mov.u32 own, $1;
        mad.lo.u32 end, $2, 8, $3;
        NEXT:
        setp.ge.s32 p, own, $2;
        @p bra DONE;
        mad.lo.u32 n, own, 8, $3;
        ld.shared.b32 v, [n];
        ld.shared.b32 i, [n+4];
        mov.u32 at, $3;
        mov.u32 rank, 1;
        mov.u32 tie, 0;
        LOOP:
        ld.shared.b32 w, [at];
        ld.shared.b32 j, [at+4];
        setp.eq.f32 r, w, v;
        setp.gt.and.s32 q, j, i, r;
        @q mov.u32 tie, 1;
        setp.lt.and.s32 q, j, i, r;
        setp.gt.or.f32 q, w, v, q;
        selp.u32 one, 1, 0, q;
        add.u32 rank, rank, one;
        add.u32 at, at, 8;
        setp.lt.u32 p, at, end;
        @p bra LOOP;
        setp.eq.s32 q, rank, $4;
        @q st.shared.b32 [$5], v;
        @q st.shared.b32 [$5+4], i;
        @q st.shared.b32 [$5+8], tie;
        add.u32 own, own, $6;
        bra NEXT;
        DONE:
        mov.u32 $0, 0;
        }""",
        "=r,r,r,r,r,r,r", [t, count, shared + _MEMBER, k, shared + _LAST, THREADS],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    _barrier()
    value = _read(shared + _LAST).to(gl.float32, bitcast=True)
    return value, _read(shared + _LAST + 4), _read(shared + _LAST + 8) > 0


@gluon.jit
def _threshold(shared, x, index, some, k, WHOLE: gl.constexpr, THREADS: gl.constexpr):
    """The last one of the k largest: (value, index, ties, fine, few). `some` of x tell the range of the bins; if that
    does not hold the k-th, all do (WHOLE: they have). Fewer than k are all above the lowest number.
    """
    low, scale, bin, above, count, fine = _count_and_find(shared, x, some, k, THREADS)
    if WHOLE == False:  # noqa: E712, SIM102 - a constant of the compiler's
        if (bin < 1) | (fine == False):  # noqa: E712
            low, scale, bin, above, count, fine = _count_and_find(shared, x, x, k, THREADS)
    few = bin < 1
    value = bin.to(gl.float32) * 0 + _LOWEST
    last = bin * 0 + 0x7FFFFFFE
    ties = bin < -1
    if fine & (few == False):  # noqa: E712
        value, last, ties = _rank_members(shared, x, index, low, scale, bin, count, k - above, THREADS)
    return value, last, ties, fine, few


@gluon.jit
def _ballot(hit):
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }",
        "=r,r", [hit.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _ballot_at_least(x, value):
    """Which lanes' x are not below a value; NaN is not."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.geu.f32 p, $1, $2; vote.sync.ballot.b32 $0, p, 0xffffffff; }",
        "=r,f,f", [x, value], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _store_word(address, word):
    """Write what all lanes of a warp have in common: they agree, and a predicate would cost a branch."""
    gl.inline_asm_elementwise(
        "st.shared.b32 [$1], $2; mov.u32 $0, 0;", "=r,r,r", [address, word], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _mark(shared, index, hit):
    """Set the bits of the hits in the bitmap."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred p; .reg .b32 b, a;
        setp.ne.s32 p, $3, 0;
        and.b32 a, $2, 31; mov.u32 b, 1; shl.b32 b, b, a;
        shr.u32 a, $2, 5; mad.lo.u32 a, a, 4, $1;
        @p red.shared.or.b32 [a], b;
        mov.u32 $0, 0;
        }""",
        "=r,r,r,r", [shared, index, hit.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _rank_words(shared, words, THREADS: gl.constexpr, PER: gl.constexpr):
    """For each word of the bitmap how many bits are set before it, in as many words behind the bitmap."""
    _barrier()
    layout: gl.constexpr = gl.BlockedLayout([PER, 1], [1, 32], [1, THREADS // 32], [0, 1])
    t = gl.arange(0, THREADS, gl.SliceLayout(0, layout))
    word = t[None, :] * PER + gl.arange(0, PER, gl.SliceLayout(1, layout))[:, None]
    live = (word < words).to(gl.int32)
    bits = gl.inline_asm_elementwise(
        """{
        .reg .pred p; .reg .b32 w;
        setp.ne.s32 p, $2, 0; mov.u32 w, 0; @p ld.shared.b32 w, [$1]; popc.b32 $0, w;
        }""",
        "=r,r,r", [shared + 4 * word, live], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    before = gl.inline_asm_elementwise(
        """{
        .reg .pred q; .reg .b32 l, w, x, s;
        mov.u32 l, %laneid; mov.u32 w, %tid.x; shr.u32 w, w, 5; mad.lo.u32 w, w, 4, $2;
        mov.u32 s, $1;
        shfl.sync.up.b32 x|q, s, 1, 0, -1; @q add.u32 s, s, x;
        shfl.sync.up.b32 x|q, s, 2, 0, -1; @q add.u32 s, s, x;
        shfl.sync.up.b32 x|q, s, 4, 0, -1; @q add.u32 s, s, x;
        shfl.sync.up.b32 x|q, s, 8, 0, -1; @q add.u32 s, s, x;
        shfl.sync.up.b32 x|q, s, 16, 0, -1; @q add.u32 s, s, x;
        setp.eq.u32 q, l, 31;
        @q st.shared.b32 [w], s;
        sub.u32 $0, s, $1;
        }""",
        "=r,r,r", [gl.sum(bits, axis=0), shared + _WARPS], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    _barrier()
    before += gl.inline_asm_elementwise(
        """{
        .reg .pred p; .reg .b32 l, w, n, m;
        mov.u32 l, %laneid; mov.u32 w, %tid.x; shr.u32 w, w, 5;
        mad.lo.u32 n, l, 4, $1;
        mov.u32 m, 0;
        setp.lt.u32 p, l, w;
        @p ld.shared.b32 m, [n];
        redux.sync.add.u32 $0, m, -1;
        }""",
        "=r,r", [shared + _WARPS], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    rank = before[None, :] + 0 * bits
    if PER > 1:
        rank += gl.associative_scan(bits, 0, _add) - bits
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.shared.b32 [$1], $2; mov.u32 $0, 0; }",
        "=r,r,r,r", [shared + 4 * words + 4 * word, rank, live], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    _barrier()


@gluon.jit
def _write_by_word(rank_at, out_ptr, index, word, below, own):
    """Write a warp's hits, which are the bits of `word`; the rank of its first one is in shared memory."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred p; .reg .b32 r, m; .reg .b64 a;
        ld.shared.b32 r, [$1];
        and.b32 m, $3, $4;
        popc.b32 m, m;
        add.u32 r, r, m;
        and.b32 m, $3, $5;
        setp.ne.u32 p, m, 0;
        mad.wide.u32 a, r, 4, $6;
        @p st.global.b32 [a], $2;
        mov.u32 $0, 0;
        }""",
        "=r,r,r,r,r,r,l", [rank_at, index, word, below, own, out_ptr], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _write(shared, words, out_ptr, index, hit):
    """Write the hits wherever they are in the row."""
    position = gl.inline_asm_elementwise(
        """{
        .reg .pred p; .reg .b32 w, a, m, r;
        setp.ne.s32 p, $3, 0;
        mov.u32 w, 0; mov.u32 r, 0;
        shr.u32 a, $1, 5;
        mad.lo.u32 m, a, 4, $2; @p ld.shared.b32 w, [m];
        mad.lo.u32 m, a, 4, $4; @p ld.shared.b32 r, [m];
        and.b32 a, $1, 31;
        bfe.u32 w, w, 0, a;
        popc.b32 w, w;
        add.u32 $0, w, r;
        }""",
        "=r,r,r,r,r", [index, shared, hit.to(gl.int32), shared + 4 * words], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    gl.store(out_ptr + position, index, mask=hit)


@gluon.jit
def _append(past, x, index, bound):
    """Keep what is not below the bound in the warp's own part of the list, which ends at `past`.

    Hits are counted by thread and summed over the warp once for all of x: a vote for each of them takes two counts of
    bits, which are slow. What does not fit is left out, and the list is then too long by its count.
    """
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.geu.f32 p, $1, $2; @p add.u32 mlakit_hits, mlakit_hits, 1; mov.u32 $0, 0; }",
        "=r,f,f", [x, bound], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    gl.inline_asm_elementwise(
        """{
        .reg .pred q; .reg .b32 s, x;
        mov.u32 s, mlakit_hits;
        shfl.sync.up.b32 x|q, s, 1, 0, -1; @q add.u32 s, s, x;
        shfl.sync.up.b32 x|q, s, 2, 0, -1; @q add.u32 s, s, x;
        shfl.sync.up.b32 x|q, s, 4, 0, -1; @q add.u32 s, s, x;
        shfl.sync.up.b32 x|q, s, 8, 0, -1; @q add.u32 s, s, x;
        shfl.sync.up.b32 x|q, s, 16, 0, -1; @q add.u32 s, s, x;
        shfl.sync.idx.b32 x, s, 31, 31, -1;
        sub.u32 s, s, mlakit_hits;
        mad.lo.u32 mlakit_at, s, 8, mlakit_next;
        mad.lo.u32 mlakit_next, x, 8, mlakit_next;
        setp.le.u32 mlakit_fits, mlakit_next, $1;
        mov.u32 mlakit_hits, 0;
        mov.u32 $0, 0;
        }""",
        "=r,r", [past], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.geu.and.f32 p, $1, $3, mlakit_fits;
        @p st.shared.v2.b32 [mlakit_at], {$1, $2};
        @p add.u32 mlakit_at, mlakit_at, 8;
        mov.u32 $0, 0;
        }""",
        "=r,f,r,f", [x, index, bound], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _load(row_ptr, start, length, R: gl.constexpr, THREADS: gl.constexpr, MASK: gl.constexpr):
    """[R, THREADS] values of a row from `start` on, and their indices."""
    layout: gl.constexpr = gl.BlockedLayout([R, 1], [1, 32], [1, THREADS // 32], [0, 1])
    index = (start + gl.arange(0, R, gl.SliceLayout(1, layout)) * THREADS)[:, None]
    index = index + gl.arange(0, THREADS, gl.SliceLayout(0, layout))[None, :]
    if MASK:
        x = gl.load(row_ptr + index, mask=index < length, other=-_INF)
    else:
        x = gl.load(row_ptr + index)
    return x, index
