# mypy: disallow-incomplete-defs=False
# (kernel arguments are pointers and numbers of the GPU, which have no Python type)
"""The lightning indexer's logits on Hopper, of keys in a row and from pages.

Four warpgroups share a multiprocessor: while some multiply, the others sum over heads. They stay there and go from item
to item: the heads of a few queries, which are the columns of a product, and a range of keys, in tiles of 64. Tiles are
loaded ahead, also those of the next item, and its queries. Each warpgroup is a program with items of its own, or all
four are one, share an item's queries and take every fourth tile each: then there is room for more tiles ahead.
"""

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
TILE = gl.constexpr(64)
DIM = gl.constexpr(128)


@gluon.jit
def _item(
    number, blocks, q_blocks, split, s_q, s_kv, start_ptr, end_ptr, QUERIES: gl.constexpr, BOUND: gl.constexpr,
    PAGE: gl.constexpr,
):  # fmt: skip
    """An item's request, first query, keys [begin, end), the first tile's first key and the number of tiles."""
    begin = number // blocks * split
    end = gl.minimum(begin + split, s_kv)
    block = number % blocks
    lowest = begin
    highest = end
    if PAGE:
        request = block // q_blocks
        end_q = (request + 1) * s_q
        first_q = request * s_q + block % q_blocks * QUERIES
        last_q = gl.minimum(first_q + QUERIES, end_q) - 1
        highest = gl.minimum(gl.load(end_ptr + request) - end_q + 1 + last_q, end)
    else:
        request = 0
        first_q = (blocks - 1 - block) * QUERIES  # the last first: under causal limits they take the longest
        if BOUND:
            lowest = end
            highest = begin
            for i in gl.static_range(QUERIES):
                lowest = gl.minimum(lowest, gl.load(start_ptr + gl.minimum(first_q + i, s_q - 1)))
                highest = gl.maximum(highest, gl.load(end_ptr + gl.minimum(first_q + i, s_q - 1)))
            lowest = begin + (gl.maximum(lowest, begin) - begin) // TILE * TILE
            highest = gl.minimum(highest, end)
    tiles = gl.maximum(gl.cdiv(highest - lowest, TILE), 0)
    return request, first_q, begin, end, gl.where(tiles > 0, lowest, end), tiles


@gluon.jit
def _row(key, request, table_ptr, stride_table, page_rows, wanted, PAGE: gl.constexpr):
    """The row of the matrix of all keys at which a tile begins, by its first key."""
    if PAGE:
        at = key.to(gl.uint32)  # never negative: dividing is cheaper
        page = gl.load(table_ptr + request.to(gl.int64) * stride_table + at // PAGE, mask=wanted, other=0)
        row = page * page_rows + (at % PAGE).to(gl.int32)
    else:
        row = key
    return row


@gluon.jit
def _row_ahead(
    m, mine, n_mine, lowest, n_lowest, request, n_request, table_ptr, stride_table, page_rows, W: gl.constexpr,
    GROUPS: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """The row of a warpgroup's m-th tile, counted from an item's first one into the next item's."""
    now = m < mine
    key = gl.where(now, lowest + m * (GROUPS * TILE), n_lowest + (m - mine) * (GROUPS * TILE)) + W * TILE
    of = gl.where(now, request, n_request) if PAGE else 0
    return _row(key, of, table_ptr, stride_table, page_rows, m < mine + n_mine, PAGE)


@gluon.jit
def _ask(k_desc, keys, full, row, slot, wanted, W: gl.constexpr, STAGES: gl.constexpr):
    stage = W * STAGES + (slot & (STAGES - 1))
    mbarrier.expect(full.index(stage), TILE * DIM, pred=wanted)
    tma.async_copy_global_to_shared(k_desc, [row, 0], full.index(stage), keys.index(stage), pred=wanted)


@gluon.constexpr_function
def _result_layout(queries):
    """[64, queries, 4] with the parts of four lanes in each thread, and as few keys and queries as there can be."""
    more = [[0, 2 << i, 0] for i in range(queries.bit_length() - 2)]
    lanes = [[0, 1 if queries > 1 else 0, 0], [8, 0, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], *more], lanes, [[16, 0, 0], [32, 0, 0]], [], [64, queries, 4]
    )


@gluon.jit
def _fill(
    out_ptr, s_kv, queries, begin, lowest, behind, end, W: gl.constexpr, GROUPS: gl.constexpr, UNIT: gl.constexpr
):
    """-inf in columns [begin, lowest) and [behind, end) of so many rows; a warpgroup's part of them."""
    layout: gl.constexpr = gl.BlockedLayout([UNIT], [32], [4], [0])
    STEP: gl.constexpr = 128 * UNIT
    offs = gl.arange(0, STEP, layout)
    before = lowest - begin
    dead = before + gl.maximum(end - behind, 0)
    value = gl.full([STEP], -float("inf"), gl.float32, layout)
    for _ in range(queries):
        for first in range(W * STEP, dead, GROUPS * STEP):
            at = first + offs
            column = gl.where(at < before, begin + at, behind - before + at)
            gl.store(out_ptr + column, value, mask=at < dead)
        out_ptr += s_kv


@gluon.jit
def _sum(s, weights, QUERIES: gl.constexpr, HEADS: gl.constexpr):
    # Twice relu, as weights are halves: an addition runs at twice the rate of a maximum (466 us instead of 503).
    s = s + gl.abs(s)
    # The four lanes that share a row exchange what each has of its keys and queries, so that each ends up with
    # the sum of another: three exchanges and additions where a sum that all of them know takes eight.
    parts = gl.reshape(s * weights[None, :], [TILE, QUERIES, HEADS // 8, 4, 2])
    parts = gl.sum(gl.reshape(gl.permute(parts, [0, 1, 3, 2, 4]), [TILE, QUERIES, 4, HEADS // 4]), axis=3)
    return gl.sum(gl.convert_layout(parts, _result_layout(QUERIES)), axis=2)


@gluon.jit
def _scales(scales_ptr, key, row, offs, s_kv, PAGE: gl.constexpr):
    """A tile's scales: those of keys in a row, or behind its page's codes."""
    if PAGE:
        within = (key.to(gl.uint32) % PAGE).to(gl.int32)
        return gl.load(scales_ptr + (row - within + PAGE).to(gl.int64) * (DIM // 4) + within + offs)
    return gl.load(scales_ptr + gl.minimum(key + offs, s_kv - 1))


@gluon.jit
def _score(
    W: gl.constexpr, q_desc, k_desc, scales_ptr, weights_ptr, start_ptr, end_ptr, table_ptr, out_ptr, s_q, kv_units,
    stride_w, stride_table, page_rows, blocks, q_blocks, items, split_tiles, zero, queries, keys, full, full_q,
    empty_q, UNIT: gl.constexpr, HEADS: gl.constexpr, QUERIES: gl.constexpr, STAGES: gl.constexpr,
    BOUND: gl.constexpr, PAGE: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """One warpgroup, every tile or every fourth one of all items of its program."""
    COLUMNS: gl.constexpr = QUERIES * HEADS
    BITS: gl.constexpr = STAGES.bit_length() - 1
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    result: gl.constexpr = gl.SliceLayout(2, _result_layout(QUERIES))
    s_kv = kv_units * UNIT  # so that the compiler knows of aligned rows
    split = split_tiles * TILE
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    # Forwards and backwards by turns: where items get shorter and shorter, programs get the same sum of them.
    turns = items // programs
    place = gl.where(turns % 2 == 0, pid, programs - 1 - pid)
    rounds = turns + gl.where(place < items % programs, 1, 0).to(gl.int32)
    done = pid * 0  # tiles so far
    zeros = gl.zeros([TILE, COLUMNS], gl.float32, product)
    request, first_q, begin, end, lowest, tiles = _item(
        pid, blocks, q_blocks, split, s_q, s_kv, start_ptr, end_ptr, QUERIES, BOUND, PAGE
    )
    mine = (tiles - W + GROUPS - 1) // GROUPS
    if W == GROUPS - 1:
        mbarrier.expect(full_q.index(0), COLUMNS * DIM)
        tma.async_copy_global_to_shared(q_desc, [first_q * HEADS, 0], full_q.index(0), queries.index(0))
    for i in gl.static_range(STAGES):
        row = _row(lowest + (GROUPS * i + W) * TILE, request, table_ptr, stride_table, page_rows, i < mine, PAGE)
        _ask(k_desc, keys, full, row, i, i < mine, W, STAGES)

    for r in range(rounds):
        more = r + 1 < rounds
        number = (r + 1) * programs + gl.where(r % 2 == 0, programs - 1 - pid, pid)
        n_request, n_first_q, n_begin, n_end, n_lowest, n_tiles = _item(
            gl.where(more, number, 0), blocks, q_blocks, split, s_q, s_kv, start_ptr, end_ptr, QUERIES, BOUND, PAGE
        )
        n_tiles = gl.where(more, n_tiles, 0)
        n_mine = (n_tiles - W + GROUPS - 1) // GROUPS
        if W == GROUPS - 1:
            after = (r + 1) & 1
            if GROUPS > 1:
                mbarrier.wait(empty_q.index(after), ((r - 1) >> 1) & 1, pred=r > 0)
            else:
                _barrier()  # all warps have waited for the queries that lay there, also where no tile followed
            mbarrier.expect(full_q.index(after), COLUMNS * DIM, pred=more)
            tma.async_copy_global_to_shared(
                q_desc, [n_first_q * HEADS, 0], full_q.index(after), queries.index(after), pred=more
            )
        for early in range(mine, gl.minimum(mine + n_mine, STAGES)):
            row = _row_ahead(
                early, mine, n_mine, lowest, n_lowest, request, n_request, table_ptr, stride_table, page_rows, W,
                GROUPS, PAGE,
            )  # fmt: skip
            _ask(k_desc, keys, full, row, done + early, True, W, STAGES)
        end_q = s_q
        if PAGE:
            end_q = (request + 1) * s_q
        of = first_q + gl.arange(0, QUERIES, gl.SliceLayout(0, result))
        if BOUND:
            out_row = out_ptr + first_q.to(gl.int64) * s_kv
            live = gl.minimum(end_q - first_q, QUERIES)
            _fill(out_row, s_kv.to(gl.int64), live, begin, lowest, lowest + tiles * TILE, end, W, GROUPS, UNIT)
            if PAGE:
                ends = gl.load(end_ptr + request) - end_q + 1 + of
            else:
                starts = gl.load(start_ptr + gl.minimum(of, s_q - 1))
                ends = gl.load(end_ptr + gl.minimum(of, s_q - 1))
        # Looked up a step before they are needed: where this tile is, for its scales, and the one to ask for.
        here = _row(lowest + W * TILE, request, table_ptr, stride_table, page_rows, mine > 0, PAGE)
        ahead = _row_ahead(
            STAGES, mine, n_mine, lowest, n_lowest, request, n_request, table_ptr, stride_table, page_rows, W, GROUPS,
            PAGE,
        )  # fmt: skip
        column = gl.arange(0, COLUMNS, gl.SliceLayout(0, product))
        query = first_q + column // HEADS
        weights = gl.load(weights_ptr + query.to(gl.int64) * stride_w + column % HEADS, mask=query < end_q, other=0.0)
        weights *= 0.5
        mbarrier.wait(full_q.index(r & 1), (r >> 1) & 1)
        for n in range(mine):
            key = lowest + (GROUPS * n + W) * TILE
            slot = done + n
            stage = W * STAGES + (slot & (STAGES - 1))
            offs = gl.arange(0, TILE, gl.SliceLayout(1, result))
            scale = _scales(scales_ptr, key, here, offs, s_kv, PAGE)
            mbarrier.wait(full.index(stage), (slot >> BITS) & 1)
            # An index that the compiler does not know: else it computes all descriptors ahead, and spills them.
            s = warpgroup_mma(
                keys.index(stage + zero), queries.index((r & 1) + zero).permute((1, 0)), zeros, use_acc=False,
                is_async=True,
            )  # fmt: skip
            s = warpgroup_mma_wait(0, [s])
            _barrier()  # all warps are done with the tile
            _ask(k_desc, keys, full, ahead, slot, n + STAGES < mine + n_mine, W, STAGES)
            here = _row(key + GROUPS * TILE, request, table_ptr, stride_table, page_rows, n + 1 < mine, PAGE)
            ahead = _row_ahead(
                n + STAGES + 1, mine, n_mine, lowest, n_lowest, request, n_request, table_ptr, stride_table, page_rows,
                W, GROUPS, PAGE,
            )  # fmt: skip
            logits = _sum(s, weights, QUERIES, HEADS) * scale[:, None]
            at = key + offs
            if BOUND:
                seen = at[:, None] < ends[None, :]
                if not PAGE:
                    seen = seen & (at[:, None] >= starts[None, :])
                logits = gl.where(seen, logits, -float("inf"))
            out_ptrs = out_ptr + of[None, :].to(gl.int64) * s_kv + at[:, None]
            gl.store(out_ptrs, logits, mask=(at < end)[:, None] & (of < end_q)[None, :])
        if GROUPS > 1:
            mbarrier.arrive(empty_q.index(r & 1), count=1)
        done += mine
        request = n_request
        first_q = n_first_q
        begin = n_begin
        end = n_end
        lowest = n_lowest
        tiles = n_tiles
        mine = n_mine


# What changes from batch to batch must not recompile; `zero` must stay unknown.
@gluon.jit(
    do_not_specialize=[
        "s_q", "kv_units", "stride_w", "stride_table", "page_rows", "blocks", "q_blocks", "items", "split_tiles",
        "zero",
    ]
)  # fmt: skip
def _indexer_logits_hopper_kernel(
    q_desc,
    k_desc,
    scales_ptr,
    weights_ptr,
    start_ptr,
    end_ptr,  # PAGE: context lengths
    table_ptr,
    out_ptr,
    s_q,  # PAGE: queries of a request
    kv_units,  # columns of the result, in units
    stride_w,
    stride_table,
    page_rows,  # from one page to the next, in rows of 128 bytes
    blocks,  # of queries
    q_blocks,  # of a request
    items,
    split_tiles,
    zero,
    UNIT: gl.constexpr,
    HEADS: gl.constexpr,
    QUERIES: gl.constexpr,
    STAGES: gl.constexpr,
    BOUND: gl.constexpr,  # whether start_ptr and end_ptr are given
    PAGE: gl.constexpr,  # tokens; 0: keys in a row
    GROUPS: gl.constexpr,  # warpgroups of a program, 1 or 4
):
    COLUMNS: gl.constexpr = QUERIES * HEADS
    matrix: gl.constexpr = gl.NVMMASharedLayout(128, 8, rank=2)
    queries = gl.allocate_shared_memory(gl.float8e4nv, [2, COLUMNS, DIM], matrix)
    keys = gl.allocate_shared_memory(gl.float8e4nv, [GROUPS * STAGES, TILE, DIM], matrix)
    full = gl.allocate_shared_memory(gl.int64, [GROUPS * STAGES, 1], mbarrier.MBarrierLayout())
    full_q = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(GROUPS * STAGES):
        mbarrier.init(full.index(i), count=1)
    empty_q = full_q
    if GROUPS > 1:
        empty_q = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(empty_q.index(i), count=GROUPS)
    for i in gl.static_range(2):
        mbarrier.init(full_q.index(i), count=1)
    fence_async_shared()
    if GROUPS == 1:
        _barrier()
        _score(
            0, q_desc, k_desc, scales_ptr, weights_ptr, start_ptr, end_ptr, table_ptr, out_ptr, s_q, kv_units,
            stride_w, stride_table, page_rows, blocks, q_blocks, items, split_tiles, zero, queries, keys, full, full_q,
            empty_q, UNIT, HEADS, QUERIES, STAGES, BOUND, PAGE, GROUPS,
        )  # fmt: skip
    else:  # constants keep being constants only in tuples that are written where they are used
        gl.warp_specialize(
            [
                (_score, (
                    0, q_desc, k_desc, scales_ptr, weights_ptr, start_ptr, end_ptr, table_ptr, out_ptr, s_q, kv_units,
                    stride_w, stride_table, page_rows, blocks, q_blocks, items, split_tiles, zero, queries, keys, full,
                    full_q, empty_q, UNIT, HEADS, QUERIES, STAGES, BOUND, PAGE, GROUPS,
                )),
                (_score, (
                    1, q_desc, k_desc, scales_ptr, weights_ptr, start_ptr, end_ptr, table_ptr, out_ptr, s_q, kv_units,
                    stride_w, stride_table, page_rows, blocks, q_blocks, items, split_tiles, zero, queries, keys, full,
                    full_q, empty_q, UNIT, HEADS, QUERIES, STAGES, BOUND, PAGE, GROUPS,
                )),
                (_score, (
                    2, q_desc, k_desc, scales_ptr, weights_ptr, start_ptr, end_ptr, table_ptr, out_ptr, s_q, kv_units,
                    stride_w, stride_table, page_rows, blocks, q_blocks, items, split_tiles, zero, queries, keys, full,
                    full_q, empty_q, UNIT, HEADS, QUERIES, STAGES, BOUND, PAGE, GROUPS,
                )),
                (_score, (
                    3, q_desc, k_desc, scales_ptr, weights_ptr, start_ptr, end_ptr, table_ptr, out_ptr, s_q, kv_units,
                    stride_w, stride_table, page_rows, blocks, q_blocks, items, split_tiles, zero, queries, keys, full,
                    full_q, empty_q, UNIT, HEADS, QUERIES, STAGES, BOUND, PAGE, GROUPS,
                )),
            ],
            [4, 4, 4],
            [128, 128, 128],
        )  # fmt: skip
