"""What the Hopper decode kernels share: finding a program's share, looking up and copying tiles, and softmax."""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from mlakit.decode.hopper_schedule import _load_lens, _share_out, _share_out_one
from mlakit.hopper_counters import arrive as _arrive  # noqa: F401 - for the kernels that merge
from mlakit.hopper_counters import await_all as _await  # noqa: F401
from mlakit.hopper_counters import barrier as _barrier  # noqa: F401

# Arguments of the kernels that change from batch to batch, and must not recompile; `zero` must stay unknown.
VARYING = [
    "stride_tb", "batch", "q_len", "heads", "capacity", "row_tiles", "slots", "splits", "most_pieces", "slot_items",
    "zero",
]  # fmt: skip


@gluon.jit
def _uniform(value):
    """`value`, which all threads have in common, in a register that they have in common."""
    return gl.inline_asm_elementwise(
        "redux.sync.max.s32 $0, $1, -1;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _fetch_into_l2(ptr, bytes):
    """Ask for up to 4 KiB from `ptr` on: what follows a chain of look-ups in memory is then waited for only once."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred wanted; .reg .u32 lane; .reg .u64 at;
        mov.u32 lane, %tid.x; setp.lt.u32 wanted, lane, 32; shl.b32 lane, lane, 7;
        setp.lt.and.u32 wanted, lane, $2, wanted;
        cvt.u64.u32 at, lane; add.u64 at, at, $1;
        @wanted prefetch.global.L2 [at];
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [ptr, bytes],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _fetch_table(ptr, bytes):
    """Ask for up to 128 bytes a thread of all programs from `ptr` on: `_fetch_into_l2` for tables of many requests."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred wanted; .reg .u32 line, program, programs; .reg .u64 at;
        mov.u32 line, %tid.x; mov.u32 program, %ctaid.x; mov.u32 programs, %nctaid.x;
        mad.lo.u32 line, line, programs, program; shl.b32 line, line, 7; setp.lt.u32 wanted, line, $2;
        cvt.u64.u32 at, line; add.u64 at, at, $1;
        @wanted prefetch.global.L2 [at];
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [ptr, bytes],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _tell(name, zero):
    """Arrive at a named barrier of two warpgroups without waiting, and at once: a branch that is never taken ends the
    basic block, else ptxas puts off what nobody here waits for by hundreds of instructions. `zero` is zero and ptxas
    must not know; after one such branch it does, so the next one needs another. Returns 0: what is added to it comes
    later.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .pred again;
        AGAIN: bar.arrive $1, 256;
        setp.ne.s32 again, $2, 0;
        @again bra AGAIN;
        mov.u32 $0, 0;
        }""",
        "=r,r,r",
        [name, zero],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _hear(name):
    """Wait at a named barrier for the other warpgroup to have arrived."""
    gl.inline_asm_elementwise("bar.sync $1, 256; mov.u32 $0, 0;", "=r,r", [name], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _same_for_warp(value):
    """`value`, which all threads of a warp have in common, so that the compiler knows that they do."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _late(tile, length):
    """`tile`, plus 0: `length` is not negative where this is called, which the compiler does not know. Else it computes
    what follows from the tile once, in front of all pieces, and keeps it in registers that the accumulator needs.
    """
    return tile + (length < 0).to(gl.int32)


@gluon.jit
def _pause(cycles):
    """Wait for so many cycles of this multiprocessor's clock."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred more; .reg .u32 begin, now;
        mov.u32 begin, %clock;
        AGAIN: mov.u32 now, %clock; sub.u32 now, now, begin; setp.lt.u32 more, now, $1;
        @more bra AGAIN;
        mov.u32 $0, 0;
        }""",
        "=r,r",
        [cycles],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _load_lengths(seq_lens_ptr, table_ptr, batch, capacity, PAGE: gl.constexpr, BLOCK_B: gl.constexpr):
    """Numbers of the requests and their lengths, for `_own_share`: first of all, as everything waits for them. Of one
    request alone its length, twice, and its table is asked for at once.
    """
    if BLOCK_B == 1:
        lens = gl.load(seq_lens_ptr)
        requests = lens
        _fetch_into_l2(table_ptr, capacity // PAGE * 4)
    else:
        requests, lens = _load_lens(seq_lens_ptr, batch, BLOCK_B)
    return requests, lens


@gluon.jit
def _own_share(
    requests, lens, slot, slots, batch, splits, most_pieces, slot_items, capacity,
    STEP: gl.constexpr, LEAST: gl.constexpr, BLOCK_B: gl.constexpr,
):  # fmt: skip
    """`_share_out`, or its form for one request, of what `_load_lengths` has loaded."""
    if BLOCK_B == 1:
        share = _share_out_one(_uniform(lens), slot, splits, most_pieces, slot_items, capacity, STEP, LEAST)
    else:
        share = _share_out(requests, lens, slot, slots, batch, splits, most_pieces, slot_items, capacity, STEP, LEAST)
    return share


@gluon.jit
def _barriers(count: gl.constexpr, arrivals: gl.constexpr):
    """So many barriers in shared memory, each of which turns after so many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(barriers.index(i), count=arrivals)
    return barriers


@gluon.jit
def _page_row(table_ptr, key, last_key, PAGE: gl.constexpr):
    """Row of a key in the cache as one matrix; the first one of its page if that is smaller than a tile."""
    key = gl.minimum(key, last_key)
    if PAGE >= 64:
        inside = key % PAGE // 64 * 64
    else:
        inside = 0
    return gl.load(table_ptr + key // PAGE) * PAGE + inside


@gluon.jit
def _tile_rows(table_ptr, tile, last_key, PAGE: gl.constexpr):
    """Rows of the cache at which a tile's keys begin: one, or one for each of its pages; a tile or page past the last
    one is the last one.
    """
    key = tile * 64
    if PAGE >= 64:
        rows = (_page_row(table_ptr, key, last_key, PAGE),)
    elif PAGE == 32:
        rows = (  # type: ignore[assignment]  # Triton takes one branch
            _page_row(table_ptr, key, last_key, PAGE),
            _page_row(table_ptr, key + 32, last_key, PAGE),
        )
    else:
        rows = (  # type: ignore[assignment]
            _page_row(table_ptr, key, last_key, PAGE),
            _page_row(table_ptr, key + 16, last_key, PAGE),
            _page_row(table_ptr, key + 32, last_key, PAGE),
            _page_row(table_ptr, key + 48, last_key, PAGE),
        )
    return rows


@gluon.jit
def _copy_page(desc, row, col, tile, number: gl.constexpr, full, wanted, PAGE: gl.constexpr):
    """Copy columns from `col` on of those of a tile's keys that one page has, its `number`-th: one box if that is all
    of them, else one for each 128 bytes of a row.
    """
    if PAGE >= 64:
        tma.async_copy_global_to_shared(desc, [row, col], full, tile, pred=wanted)
    else:
        MOST: gl.constexpr = 1024 // tile.dtype.primitive_bitwidth
        WIDTH: gl.constexpr = tile.shape[1] if tile.shape[1] < MOST else MOST  # noqa: FURB136 - what Triton compiles
        for part in gl.static_range(tile.shape[1] // WIDTH):
            box = tile.slice(number * PAGE, PAGE, 0).slice(part * WIDTH, WIDTH, 1)
            tma.async_copy_global_to_shared(desc, [row, col + part * WIDTH], full, box, pred=wanted)


@gluon.jit
def _copy_tile(desc, page_rows, col, tile, full, wanted, PAGE: gl.constexpr):
    """Copy columns from `col` on of a tile's keys."""
    for i in gl.static_range(len(page_rows)):
        _copy_page(desc, page_rows[i], col, tile, i, full, wanted, PAGE)


@gluon.jit
def _zero_tail(keys, valid):
    """Set rows of a tile of keys past the request's last one to zero: 0 * NaN would not be 0."""
    VECTOR: gl.constexpr = 128 // keys.dtype.primitive_bitwidth
    layout: gl.constexpr = gl.BlockedLayout([1, VECTOR], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, 64, gl.SliceLayout(1, layout))
    for part in gl.static_range(keys.shape[1] // (8 * VECTOR)):
        some = keys.slice(part * 8 * VECTOR, 8 * VECTOR, 1)
        some.store(gl.where(row[:, None] < valid, some.load(layout), 0))


@gluon.jit
def _sight(valid, q_len, heads, row, first_row, CAUSAL: gl.constexpr):
    """How many of `valid` keys each query row sees, and how many all rows from `first_row` on see."""
    if CAUSAL:
        sight = valid - q_len + 1 + row // heads
        shortest = valid - q_len + 1 + first_row // heads
    else:
        sight = row * 0 + valid
        shortest = valid
    return sight, shortest


@gluon.jit
def _finite(m, CAUSAL: gl.constexpr):
    """What to subtract from scores whose maximum is m: with a causal mask a row may not have seen a key yet."""
    if CAUSAL:
        m = gl.where(m == -float("inf"), 0.0, m)
    return m


@gluon.jit
def _inverse(l, scale, length, capacity):
    """`scale` over the sum of a row's weights, and 0 for a row that has seen no key. A table too short for its request
    cannot be refused without a host sync; NaN is louder than attention over a part.
    """
    inverse = gl.where(l == 0.0, 0.0, scale / l)
    return gl.where(length > capacity, float("nan"), inverse)


@gluon.jit
def _lse(m, l):
    """In base 2, of a row whose weights, relative to 2^m, add up to l."""
    return gl.where(l == 0.0, -float("inf"), m + gl.log2(l))
