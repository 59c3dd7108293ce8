"""The warpgroup of the Hopper kernel that gathers keys: 16 bytes a thread at once, straight into the swizzled tiles."""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mlakit.sparse.hopper_work import item_of


@gluon.jit
def _rows_of(kv_ptr, index, stride_kp, STRIDE_KT: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """Where keys begin: 64 bits, as a cache may hold more than 2^31 elements. Of no use if the index is invalid."""
    if PAGE_SIZE == 0:  # pages follow one another
        offset = index.to(gl.uint32).to(gl.int64) * STRIDE_KT
    else:
        page = index // PAGE_SIZE
        offset = page.to(gl.int64) * stride_kp * 8 + (index - page * PAGE_SIZE).to(gl.uint32).to(gl.int64) * STRIDE_KT
    return kv_ptr + offset


@gluon.jit
def _copy(rows, valid, FIRST: gl.constexpr, keys, layout: gl.constexpr):
    WIDTH: gl.constexpr = keys.shape[1]
    c = FIRST + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(keys, rows[:, None] + c[None, :], mask=valid[:, None])


@gluon.jit
def _fill(rows, valid, keys, full, NUMBER: gl.constexpr, PARTS: gl.constexpr, layout: gl.constexpr):
    """Half a tile, in parts that are told to be there one by one: products of the first need not wait for the last."""
    WIDTH: gl.constexpr = 256 // PARTS
    for i in gl.static_range(PARTS):
        place = keys.index(NUMBER).slice(i * WIDTH, WIDTH, 1)
        _copy(rows, valid, NUMBER % 2 * 256 + i * WIDTH, place, layout)
        async_copy.mbarrier_arrive(full.index(NUMBER * PARTS + i), increment_count=False)


@gluon.jit
def load_queries(
    q_ptr, token, head, live, stride_qb, stride_qs, stride_qh, q_len, queries, q_rope, full_q, layout: gl.constexpr,
    ROPE: gl.constexpr,
):  # fmt: skip
    """A program's heads of one token; rows that are none become zero. Strides are in units of 16 bytes."""
    r = gl.arange(0, 64, gl.SliceLayout(1, layout))
    first = q_ptr + ((token // q_len) * stride_qb + (token % q_len) * stride_qs + head * stride_qh) * 8
    rows = first + r.to(gl.int64) * stride_qh * 8
    _copy(rows, r < live, 0, queries.index(0), layout)
    _copy(rows, r < live, 256, queries.index(1), layout)
    if ROPE:
        _copy(rows, r < live, 512, q_rope.index(0), layout)
    async_copy.mbarrier_arrive(full_q, increment_count=False)


@gluon.jit
def gather(
    q_ptr, kv_ptr, indices_ptr, length_ptr, stride_qb, stride_qs, stride_qh, stride_kp, stride_kh,
    stride_ib, stride_is, stride_ih, stride_lb, stride_ls, items, q_len, heads, group, row_tiles, topk, s_kv, splits,
    queries, q_rope, keys, ropes, numbers, full, empty, full_q, empty_q, full_b,
    STRIDE_KT: gl.constexpr, ROPE: gl.constexpr, PAGE_SIZE: gl.constexpr, LENGTH: gl.constexpr, SPLIT: gl.constexpr,
    PARTS: gl.constexpr,
):  # fmt: skip
    # Eight threads have 128 bytes of a key: what a warp writes at once has no bank conflict.
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    of_key: gl.constexpr = gl.SliceLayout(1, layout)
    n = gl.arange(0, 64, of_key)
    passed = gl.program_id(0) * 0
    done = gl.program_id(0) * 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        token, _piece, kv_head, head, live, first, last, end = item_of(
            item, length_ptr, stride_lb, stride_ls, q_len, group, row_tiles, topk, splits, LENGTH, SPLIT
        )
        own = indices_ptr + (token // q_len) * stride_ib + (token % q_len) * stride_is + kv_head * stride_ih
        base = kv_ptr + kv_head * stride_kh * 8
        at = first * 128 + n
        index_a = gl.load(own + at, mask=at < end, other=-1)
        index_b = gl.load(own + (at + 64), mask=at + 64 < end, other=-1)
        mbarrier.wait(empty_q, (done & 1) ^ 1)
        done += 1
        load_queries(
            q_ptr, token, head, live, stride_qb, stride_qs, stride_qh, q_len, queries, q_rope, full_q, layout, ROPE
        )
        for pair in range(first, last):
            free = (passed & 1) ^ 1
            passed += 1
            valid_a = index_a.to(gl.uint32) < s_kv.to(gl.uint32)  # below 0 is far above
            valid_b = index_b.to(gl.uint32) < s_kv.to(gl.uint32)
            rows_a = _rows_of(base, index_a, stride_kp, STRIDE_KT, PAGE_SIZE)
            rows_b = _rows_of(base, index_b, stride_kp, STRIDE_KT, PAGE_SIZE)
            at = (pair + 1) * 128 + n
            index_a = gl.load(own + at, mask=at < end, other=-1)
            index_b = gl.load(own + (at + 64), mask=at + 64 < end, other=-1)
            mbarrier.wait(empty.index(0), free)
            _fill(rows_a, valid_a, keys, full, 0, PARTS, layout)
            numbers.index(0).store(gl.where(valid_a, 0.0, -float("inf")))
            mbarrier.arrive(full_b.index(0), count=1)
            mbarrier.wait(empty.index(3), free)
            _fill(rows_b, valid_b, keys, full, 3, PARTS, layout)
            numbers.index(1).store(gl.where(valid_b, 0.0, -float("inf")))
            mbarrier.arrive(full_b.index(1), count=1)
            mbarrier.wait(empty.index(1), free)
            if ROPE:
                _copy(rows_a, valid_a, 512, ropes.index(0), layout)
            _fill(rows_a, valid_a, keys, full, 1, PARTS, layout)
            mbarrier.wait(empty.index(2), free)
            if ROPE:
                _copy(rows_b, valid_b, 512, ropes.index(1), layout)
            _fill(rows_b, valid_b, keys, full, 2, PARTS, layout)
