# mypy: disallow-incomplete-defs=False
# (kernel arguments are pointers and numbers of the GPU, which have no Python type)
"""The lightning indexer's logits from pages on Hopper: while a tile of keys is scored, the one before is summed.

A program is one warpgroup with the heads of a few queries as the columns of a product, and tiles of 64 keys as its
rows. Two accumulators take turns: the next product is started as soon as the last one is done, and runs while relu,
weights and the sum over heads are computed from that. Two programs share a multiprocessor, four of single queries.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
_ALL = gl.constexpr(tl.PropagateNan.ALL)
TILE = gl.constexpr(64)
DIM = gl.constexpr(128)


@gluon.jit
def _zero_word(anything):
    """The address of a zero in shared memory. It takes 1024 bytes, as tiles begin behind it at multiples of that."""
    return gl.inline_asm_elementwise(
        ".shared .align 1024 .b32 mlakit_zero[256];\nmov.u32 $0, mlakit_zero; st.shared.b32 [mlakit_zero], 0;",
        "=r,r", [anything], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _tile_row(table_ptr, key, end, page_rows, PAGE: gl.constexpr):
    """The row of the cache at which a tile begins, by its first key; page 0 is looked up for one past the last."""
    page = gl.load(table_ptr + key // PAGE, mask=key < end, other=0)
    return page * page_rows + key % PAGE


@gluon.jit
def _scales_at(scales_ptr, key, row, offs, PAGE: gl.constexpr):
    """Scales of the tile whose first key is `key`, and which begins at `row` of 128 bytes: they lie behind the page's
    codes.
    """
    within = key % PAGE
    return gl.load(scales_ptr + (row - within + PAGE).to(gl.int64) * 32 + within + offs)


@gluon.jit
def _start_product(keys, queries, full, zeros, zero, tile, tiles, STAGES: gl.constexpr):
    stage = tile % STAGES
    mbarrier.wait(full.index(stage), (tile // STAGES) & 1, pred=tile < tiles)
    # An index that the compiler does not know: else it computes all descriptors ahead, and spills them.
    return warpgroup_mma(
        keys.index(stage + zero), queries.index(zero).permute((1, 0)), zeros, use_acc=False, is_async=True
    )


@gluon.jit
def _refill(k_desc, keys, full, word, row, tile, tiles, STAGES: gl.constexpr):
    """All warps are done with a tile: ask for another one in its place. Gives a zero that is not known before: with it
    as an operand, no work on a product is done ahead of starting the next one.
    """
    _barrier()
    nothing = gl.inline_asm_elementwise(
        "ld.shared.f32 $0, [$1];", "=f,r", [word], dtype=gl.float32, is_pure=False, pack=1
    )
    stage = tile % STAGES
    wanted = tile + STAGES < tiles
    mbarrier.expect(full.index(stage), TILE * DIM, pred=wanted)
    tma.async_copy_global_to_shared(k_desc, [row, 0], full.index(stage), keys.index(stage), pred=wanted)
    return nothing


@gluon.jit
def _finish(s, weights, nothing, scale, first, out_ptr, first_q, end_q, stride_out, end,
            QUERIES: gl.constexpr, HEADS: gl.constexpr):  # fmt: skip
    """Sum over heads of weight * relu(score), two instructions a score, times the key's scale; write it."""
    s = gl.maximum(s, nothing, propagate_nan=_ALL) * weights[None, :]
    logits = gl.sum(gl.reshape(s, [TILE, QUERIES, HEADS]), axis=2)
    layout: gl.constexpr = logits.type.layout
    column = first + gl.arange(0, TILE, gl.SliceLayout(1, layout))
    query = first_q + gl.arange(0, QUERIES, gl.SliceLayout(0, layout))
    logits *= gl.convert_layout(scale, gl.SliceLayout(1, layout))[:, None]
    out_ptrs = out_ptr + query[None, :].to(gl.int64) * stride_out + column[:, None]
    gl.store(out_ptrs, logits, mask=(column < end)[:, None] & (query < end_q)[None, :])


@gluon.jit
def _fill(out_ptr, begin, end):
    """-inf in columns [begin, end) of a row."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    offs = gl.arange(0, 128, layout)
    for first in range(begin, end, 128):
        gl.store(out_ptr + first + offs, gl.full([128], -float("inf"), gl.float32, layout), mask=first + offs < end)


# What changes from batch to batch must not recompile; `zero` must stay unknown.
@gluon.jit(
    do_not_specialize=["q_len", "columns", "q_blocks", "programs_q", "split", "stride_table", "page_rows", "zero"]
)
def _indexer_logits_paged_hopper_kernel(
    q_desc,
    k_desc,
    scales_ptr,
    weights_ptr,
    lens_ptr,
    table_ptr,
    out_ptr,
    q_len,
    columns,
    q_blocks,  # of a request
    programs_q,
    split,
    stride_table,
    page_rows,  # from one page to the next, in rows of 128 bytes
    zero,
    HEADS: gl.constexpr,
    PAGE: gl.constexpr,  # tokens
    QUERIES: gl.constexpr,
    STAGES: gl.constexpr,
):
    COLUMNS: gl.constexpr = QUERIES * HEADS
    matrix: gl.constexpr = gl.NVMMASharedLayout(128, 8, rank=2)
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    queries = gl.allocate_shared_memory(gl.float8e4nv, [1, COLUMNS, DIM], matrix)
    keys = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TILE, DIM], matrix)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full_q = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    word = _zero_word(zero)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    mbarrier.init(full_q, count=1)
    fence_async_shared()
    _barrier()

    pid = gl.program_id(0)
    begin = (pid // programs_q) * split
    end = gl.minimum(begin + split, columns)
    block = pid % programs_q
    request = block // q_blocks
    end_q = (request + 1) * q_len
    first_q = request * q_len + (block % q_blocks) * QUERIES
    table_ptr += request.to(gl.int64) * stride_table
    sight = gl.load(lens_ptr + request) - end_q + 1  # query i sees the first sight + i keys
    highest = gl.minimum(sight + gl.minimum(first_q + QUERIES, end_q) - 1, end)
    tiles = gl.maximum(gl.cdiv(highest - begin, TILE), 0)

    if tiles > 0:
        mbarrier.expect(full_q, COLUMNS * DIM)
        tma.async_copy_global_to_shared(q_desc, [first_q * HEADS, 0], full_q, queries.index(0))
        for i in gl.static_range(STAGES):
            row = _tile_row(table_ptr, begin + i * TILE, highest, page_rows, PAGE)
            mbarrier.expect(full.index(i), TILE * DIM, pred=i < tiles)
            tma.async_copy_global_to_shared(k_desc, [row, 0], full.index(i), keys.index(i), pred=i < tiles)
        # Looked up a step before it is needed: the scales' page, and the page to ask for.
        scale_row = _tile_row(table_ptr, begin + TILE, highest, page_rows, PAGE)
        next_row = _tile_row(table_ptr, begin + STAGES * TILE, highest, page_rows, PAGE)
        offs = gl.arange(0, TILE, gl.SliceLayout(1, product))
        first_row = _tile_row(table_ptr, begin, highest, page_rows, PAGE)
        scale = _scales_at(scales_ptr, begin, first_row, offs, PAGE)
        column = gl.arange(0, COLUMNS, gl.SliceLayout(0, product))
        query = first_q + column // HEADS
        weights = gl.load(weights_ptr + query.to(gl.int64) * HEADS + column % HEADS, mask=query < end_q, other=0.0)
        zeros = gl.zeros([TILE, COLUMNS], gl.float32, product)
        mbarrier.wait(full_q, 0)
        s0 = _start_product(keys, queries, full, zeros, zero, 0, tiles, STAGES)
        s1 = zeros
        for pair in range(tiles // 2):
            t = 2 * pair
            key = begin + t * TILE
            s0 = warpgroup_mma_wait(0, [s0])
            s1 = _start_product(keys, queries, full, zeros, zero, t + 1, tiles, STAGES)
            nothing = _refill(k_desc, keys, full, word, next_row, t, tiles, STAGES)
            next_row = _tile_row(table_ptr, key + (STAGES + 1) * TILE, highest, page_rows, PAGE)
            next_scale = _scales_at(scales_ptr, key + TILE, scale_row, offs, PAGE)
            scale_row = _tile_row(table_ptr, key + 2 * TILE, highest, page_rows, PAGE)
            _finish(s0, weights, nothing, scale, key, out_ptr, first_q, end_q, columns, end, QUERIES, HEADS)
            t = 2 * pair + 1
            key = begin + t * TILE
            s1 = warpgroup_mma_wait(0, [s1])
            s0 = _start_product(keys, queries, full, zeros, zero, t + 1, tiles, STAGES)
            nothing = _refill(k_desc, keys, full, word, next_row, t, tiles, STAGES)
            next_row = _tile_row(table_ptr, key + (STAGES + 1) * TILE, highest, page_rows, PAGE)
            scale = _scales_at(scales_ptr, key + TILE, scale_row, offs, PAGE)
            scale_row = _tile_row(table_ptr, key + 2 * TILE, highest, page_rows, PAGE)
            _finish(s1, weights, nothing, next_scale, key, out_ptr, first_q, end_q, columns, end, QUERIES, HEADS)
        s0 = warpgroup_mma_wait(0, [s0])
        if tiles % 2 > 0:
            key = begin + (tiles - 1) * TILE
            _finish(s0, weights, 0.0, scale, key, out_ptr, first_q, end_q, columns, end, QUERIES, HEADS)

    _barrier()  # other threads wrote what is overwritten now: keys that a query of the tile does not see
    for i in gl.static_range(QUERIES):
        query = first_q + i
        if query < end_q:
            _fill(out_ptr + query.to(gl.int64) * columns, gl.maximum(sight + query, begin), end)
