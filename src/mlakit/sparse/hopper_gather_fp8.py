"""The warpgroup of the Hopper kernels that gathers keys of the float8 cache and turns them into float16.

A key's latent values are kept in units of a power of two of its own, 2^e: its largest scale is then from 64 to 128, and
no value exceeds 57344. e4m3 codes are float16 numbers exactly; a scale in those units is rounded to float16, and so is
the product: two roundings of 11 bits where bfloat16 has one of 8. The softmax takes the unit into account
(`hopper_attention`), so keys may differ in magnitude as much as they like. The query's latent part, too, has a power of
two taken out of it, one for all of a program's heads. Rope parts stay bfloat16, times a power of two, which is exact.
"""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from mlakit.sparse.hopper_gather import load_queries
from mlakit.sparse.hopper_work import item_of


@gluon.jit
def _power(exponent):
    """2^exponent, from -126 to 127."""
    return ((exponent + 127) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _words_at(kv_ptr, index, stride_kp, STRIDE_KT: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """Where keys begin, in words of 4 bytes; rows are multiples of 16 bytes long, pages too."""
    if PAGE_SIZE == 0:  # pages follow one another
        offset = index.to(gl.uint32).to(gl.int64) * (STRIDE_KT // 4)
    else:
        page = index // PAGE_SIZE
        within = index - page * PAGE_SIZE
        offset = page.to(gl.int64) * stride_kp * 4 + within.to(gl.uint32).to(gl.int64) * (STRIDE_KT // 4)
    return kv_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + offset


@gluon.jit
def _load(words, valid, FIRST: gl.constexpr, layout: gl.constexpr):
    """128 bytes of each key, from word FIRST on; L2 is asked for the 256 that they are a part of."""
    c = FIRST + gl.arange(0, 32, gl.SliceLayout(0, layout))
    at = (words[:, None] + c[None, :]).to(gl.int64)
    wanted = gl.zeros([64, 32], gl.int32, layout) + valid.to(gl.int32)[:, None]
    return gl.inline_asm_elementwise(
        """{
        .reg .pred wanted;
        setp.ne.u32 wanted, $8, 0;
        mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;
        @wanted ld.global.L2::256B.v4.b32 {$0, $1, $2, $3}, [$4];
        }""",
        "=&r,=&r,=&r,=&r,l,l,l,l,r,r,r,r",
        [at, wanted],
        dtype=gl.int32,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def _load_scales(words, valid, layout: gl.constexpr):
    """The four scales of each key: 16 bytes at once."""
    of_key: gl.constexpr = gl.SliceLayout(1, layout)
    c = 128 + gl.arange(0, 4, gl.SliceLayout(0, layout))
    four = gl.load(words[:, None] + c[None, :], mask=valid[:, None], other=0).to(gl.float32, bitcast=True)
    even, odd = gl.split(gl.reshape(four, [64, 2, 2]))
    s0, s2 = gl.split(even)
    s1, s3 = gl.split(odd)
    return (
        gl.convert_layout(s0, of_key),
        gl.convert_layout(s1, of_key),
        gl.convert_layout(s2, of_key),
        gl.convert_layout(s3, of_key),
    )


@gluon.jit
def _twice(x):
    """A 16-bit float in both halves of a word."""
    return (x.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF) * 0x10001


@gluon.jit
def _convert(codes, scale):
    """128 columns of a tile, as words [64, 64] of two float16 each; computed where it stands, before a wait for the
    tile's memory, say.
    """
    low, high = gl.inline_asm_elementwise(
        """{
        .reg .b16 a, b;
        mov.b32 {a, b}, $2;
        cvt.rn.f16x2.e4m3x2 $0, a;
        cvt.rn.f16x2.e4m3x2 $1, b;
        mul.rn.f16x2 $0, $0, $3;
        mul.rn.f16x2 $1, $1, $3;
        }""",
        "=&r,=&r,r,r",
        [codes, gl.zeros_like(codes) + scale[:, None]],
        dtype=(gl.int32, gl.int32),
        is_pure=False,
        pack=1,
    )
    return gl.reshape(gl.join(low, high), [64, 64])


@gluon.jit
def _store_rope(values, factor, place):
    scaled = gl.inline_asm_elementwise(
        "mul.rn.bf16x2 $0, $1, $2;",
        "=r,r,r",
        [values, gl.zeros_like(values) + factor[:, None]],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )
    place.store(scaled)


@gluon.jit
def _units(s0, s1, s2, s3, valid, scale_log2, numbers, at, TILE: gl.constexpr):
    """Scales in units of the key's power of two, as pairs of float16, and what its rope part is multiplied by. What the
    softmax needs to know goes to shared memory.
    """
    largest = gl.maximum(gl.maximum(s0, s1), gl.maximum(s2, s3))
    exponent = gl.maximum((largest.to(gl.int32, bitcast=True) >> 23) - 127, -60) - 6
    shrink = _power(-exponent)
    numbers.index(at + TILE).store(gl.where(valid, exponent.to(gl.float32), -float("inf")))
    numbers.index(at + 2 + TILE).store(gl.where(valid, _power(exponent) * scale_log2, 0.0))
    numbers.index(at + 4 + TILE).store(gl.where(valid, shrink, 0.0))
    return (
        _twice((s0 * shrink).to(gl.float16)),
        _twice((s1 * shrink).to(gl.float16)),
        _twice((s2 * shrink).to(gl.float16)),
        _twice((s3 * shrink).to(gl.float16)),
        _twice(shrink.to(gl.bfloat16)),
    )


@gluon.jit
def gather_fp8(
    q_ptr, kv_ptr, indices_ptr, length_ptr, scale_log2, stride_qb, stride_qs, stride_qh, stride_kp,
    stride_ib, stride_is, stride_lb, stride_ls, items, q_len, heads, group, row_tiles, topk, s_kv, splits,
    queries, q_rope, keys, ropes, numbers, full, empty, full_q, empty_q,
    STRIDE_KT: gl.constexpr, PAGE_SIZE: gl.constexpr, LENGTH: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    # Four threads have 64 codes of a key, which are 128 bytes of float16: what eight threads write at once, of two
    # keys, has no bank conflict.
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    of_key: gl.constexpr = gl.SliceLayout(1, layout)
    of_query: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    raw = queries._reinterpret(q_rope.dtype, [2, 64, 256], queries.layout)
    as_words: gl.constexpr = gl.NVMMASharedLayout(128, 32, rank=2)
    tiles = keys._reinterpret(gl.int32, [4, 64, 128], as_words)
    rope_tiles = ropes._reinterpret(gl.int32, [2, 64, 32], as_words)
    n = gl.arange(0, 64, of_key)
    passed = gl.program_id(0) * 0
    done = gl.program_id(0) * 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        token, _piece, _kv_head, head, live, first, last, end = item_of(
            item, length_ptr, stride_lb, stride_ls, q_len, group, row_tiles, topk, splits, LENGTH, SPLIT
        )
        own = indices_ptr + (token // q_len) * stride_ib + (token % q_len) * stride_is
        at = first * 128 + n
        index_a = gl.load(own + at, mask=at < end, other=-1)
        index_b = gl.load(own + (at + 64), mask=at + 64 < end, other=-1)
        mbarrier.wait(empty_q, (done & 1) ^ 1)
        done += 1
        load_queries(
            q_ptr, token, head, live, stride_qb, stride_qs, stride_qh, q_len, raw, q_rope, full_q, of_query, True
        )
        valid_a = index_a.to(gl.uint32) < s_kv.to(gl.uint32)  # below 0 is far above
        valid_b = index_b.to(gl.uint32) < s_kv.to(gl.uint32)
        words_a = _words_at(kv_ptr, index_a, stride_kp, STRIDE_KT, PAGE_SIZE)
        words_b = _words_at(kv_ptr, index_b, stride_kp, STRIDE_KT, PAGE_SIZE)
        a0, a1, a2, a3 = _load_scales(words_a, valid_a, layout)
        x0 = _load(words_a, valid_a, 0, layout)
        x1 = _load(words_a, valid_a, 32, layout)
        b0, b1, b2, b3 = _load_scales(words_b, valid_b, layout)
        x2 = _load(words_b, valid_b, 64, layout)
        for pair in range(first, last):
            free = (passed & 1) ^ 1
            passed += 1
            kept = (free ^ 1) * 6  # where what is told of keys lies: there is room for two pairs
            a0h, a1h, a2h, a3h, a_rope = _units(a0, a1, a2, a3, valid_a, scale_log2, numbers, kept, 0)
            converted = _convert(x0, a0h)
            mbarrier.wait(empty.index(0), free)
            tiles.index(0).slice(0, 64, 1).store(converted)
            x3 = _load(words_b, valid_b, 96, layout)
            tiles.index(0).slice(64, 64, 1).store(_convert(x1, a1h))
            fence_async_shared()
            mbarrier.arrive(full.index(0), count=1)
            x4 = _load(words_a, valid_a, 64, layout)
            at = (pair + 1) * 128 + n
            index_a = gl.load(own + at, mask=at < end, other=-1)
            index_b = gl.load(own + (at + 64), mask=at + 64 < end, other=-1)

            b0h, b1h, b2h, b3h, b_rope = _units(b0, b1, b2, b3, valid_b, scale_log2, numbers, kept, 1)
            converted = _convert(x2, b2h)
            mbarrier.wait(empty.index(3), free)
            tiles.index(3).slice(0, 64, 1).store(converted)
            x5 = _load(words_a, valid_a, 96, layout)
            tiles.index(3).slice(64, 64, 1).store(_convert(x3, b3h))
            fence_async_shared()
            mbarrier.arrive(full.index(3), count=1)
            x6 = _load(words_a, valid_a, 132, layout)

            converted = _convert(x4, a2h)
            mbarrier.wait(empty.index(1), free)
            tiles.index(1).slice(0, 64, 1).store(converted)
            x7 = _load(words_b, valid_b, 0, layout)
            _store_rope(x6, a_rope, rope_tiles.index(0))
            tiles.index(1).slice(64, 64, 1).store(_convert(x5, a3h))
            x8 = _load(words_b, valid_b, 32, layout)
            fence_async_shared()
            mbarrier.arrive(full.index(1), count=1)
            valid_a = index_a.to(gl.uint32) < s_kv.to(gl.uint32)
            words_a = _words_at(kv_ptr, index_a, stride_kp, STRIDE_KT, PAGE_SIZE)
            a0, a1, a2, a3 = _load_scales(words_a, valid_a, layout)
            x9 = _load(words_b, valid_b, 132, layout)

            converted = _convert(x7, b0h)
            mbarrier.wait(empty.index(2), free)
            tiles.index(2).slice(0, 64, 1).store(converted)
            x0 = _load(words_a, valid_a, 0, layout)
            _store_rope(x9, b_rope, rope_tiles.index(1))
            tiles.index(2).slice(64, 64, 1).store(_convert(x8, b1h))
            valid_b = index_b.to(gl.uint32) < s_kv.to(gl.uint32)
            words_b = _words_at(kv_ptr, index_b, stride_kp, STRIDE_KT, PAGE_SIZE)
            b0, b1, b2, b3 = _load_scales(words_b, valid_b, layout)
            x1 = _load(words_a, valid_a, 32, layout)
            fence_async_shared()
            mbarrier.arrive(full.index(2), count=1)
            x2 = _load(words_b, valid_b, 64, layout)
