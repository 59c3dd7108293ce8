"""What the Hopper decode kernels share: looking up tiles, and merging the partial results of a request's pieces."""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from mlakit.decode.hopper_schedule import _partial_at
from mlakit.hopper_counters import arrive as _arrive  # noqa: F401 - for the kernels that merge
from mlakit.hopper_counters import await_all as _await  # noqa: F401
from mlakit.hopper_counters import barrier as _barrier  # noqa: F401


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
def _copy_tile(desc, page_rows, col, tile, full, wanted, PAGE: gl.constexpr):
    """Copy columns from `col` on of a tile's keys: one box, or one for each page and 64 columns."""
    if PAGE >= 64:
        tma.async_copy_global_to_shared(desc, [page_rows[0], col], full, tile, pred=wanted)
    else:
        for i in gl.static_range(64 // PAGE):
            for part in gl.static_range(tile.shape[1] // 64):
                box = tile.slice(i * PAGE, PAGE, 0).slice(part * 64, 64, 1)
                tma.async_copy_global_to_shared(desc, [page_rows[i], col + part * 64], full, box, pred=wanted)


@gluon.jit
def _zero_tail(keys, valid):
    """Set rows of a tile of keys past the request's last one to zero: 0 * NaN would not be 0."""
    TILE: gl.constexpr = keys.shape[0]
    WIDTH: gl.constexpr = keys.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, TILE, gl.SliceLayout(1, layout))
    for part in gl.static_range(WIDTH // 64):
        some = keys.slice(part * 64, 64, 1)
        some.store(gl.where(row[:, None] < valid, some.load(layout), 0.0))


@gluon.jit
def _row_at(row, heads, stride_os, stride_oh, FLAT: gl.constexpr):
    """Where a query row's output begins in its request's; FLAT: all rows are equally far apart."""
    if FLAT:
        at = row.to(gl.int64) * stride_oh
    else:
        at = (row // heads).to(gl.int64) * stride_os + (row % heads).to(gl.int64) * stride_oh
    return at


@gluon.jit
def _load_partials(
    partial_ptr, partial_lse_ptr, base, piece, count, aligned, tile, row_tiles, row, col, TILE: gl.constexpr
):  # fmt: skip
    """Partial results of some pieces and rows, and what they weigh (-inf for a piece that is not there)."""
    at = _partial_at(base, gl.minimum(piece, count - 1), aligned) * row_tiles + tile
    flat = (at * TILE)[:, None] + row[None, :]
    some_lse = gl.where((piece < count)[:, None], gl.load(partial_lse_ptr + flat), -float("inf"))
    return some_lse, gl.load(partial_ptr + ((flat * 512)[:, :, None] + col[None, None, :]))


@gluon.jit
def _merge(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, base, count, aligned, number, tile, row_tiles, rows, heads,
    stride_os, stride_oh, too_long, FIRST: gl.constexpr, WIDTH: gl.constexpr, PIECES: gl.constexpr,
    ROWS: gl.constexpr, CHUNK: gl.constexpr, TILE: gl.constexpr, ONCE: gl.constexpr, FLAT: gl.constexpr,
):  # fmt: skip
    """Merge this program's part, columns [FIRST, FIRST + WIDTH), of a tile of rows of a request: units of CHUNK columns
    of a row, ROWS of them and PIECES at a time. All loads of a thread are under way at once, of 8 columns each; the
    columns of a row lie side by side in a warp, and sums over pieces stay inside of it.
    """
    OTHERS: gl.constexpr = 128 // (CHUNK // 8)
    ROW_WARPS: gl.constexpr = ROWS if ROWS < OTHERS else OTHERS  # noqa: FURB136 - what Triton compiles
    LANES: gl.constexpr = OTHERS // ROW_WARPS
    layout: gl.constexpr = gl.BlockedLayout(
        [PIECES // LANES, ROWS // ROW_WARPS, 8], [LANES, 1, 32 // LANES], [1, ROW_WARPS, 4 // ROW_WARPS], [2, 1, 0]
    )
    scores: gl.constexpr = gl.SliceLayout(2, layout)
    result: gl.constexpr = gl.SliceLayout(0, layout)
    of_row: gl.constexpr = gl.SliceLayout(0, scores)
    of_result_row: gl.constexpr = gl.SliceLayout(1, result)
    CHUNKS: gl.constexpr = WIDTH // CHUNK
    piece = gl.arange(0, PIECES, gl.SliceLayout(1, scores))
    local = gl.arange(0, ROWS, of_row)
    col = gl.arange(0, CHUNK, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    units = gl.minimum(rows - tile * TILE, TILE) * CHUNKS
    unit_end = (number + 1) * units // count
    for start in range(number * units // count, unit_end, ROWS):
        unit = start + local
        live_row = unit < unit_end
        # Rows and pieces past the last are the last again, and weigh nothing: loads need no masks.
        row = gl.minimum(unit, unit_end - 1) // CHUNKS
        first_col = FIRST + start % CHUNKS * CHUNK  # the same for all: there is more than one chunk of a row only alone
        if ONCE:
            some_lse, some = _load_partials(
                partial_ptr, partial_lse_ptr, base, piece, count, aligned, tile, row_tiles, row, first_col + col, TILE
            )
            m = gl.max(some_lse, 0)
            shift = gl.where(m == -float("inf"), 0.0, m)  # a row that sees no key: 0 instead of inf - inf
            weight = gl.exp2(some_lse - shift[None, :])
            l = gl.sum(weight, 0)
            acc = gl.sum(some.to(gl.float32) * weight[:, :, None], 0)
        else:
            m = gl.full([ROWS], -float("inf"), gl.float32, of_row)
            l = gl.zeros([ROWS], gl.float32, of_row)
            acc = gl.zeros([ROWS, CHUNK], gl.float32, result)
            for begin in range(0, count, PIECES):
                some_lse, some = _load_partials(
                    partial_ptr, partial_lse_ptr, base, begin + piece, count, aligned, tile, row_tiles, row,
                    first_col + col, TILE,
                )  # fmt: skip
                m_new = gl.maximum(m, gl.max(some_lse, 0))
                shift = gl.where(m_new == -float("inf"), 0.0, m_new)
                old = gl.exp2(m - shift)
                weight = gl.exp2(some_lse - shift[None, :])
                l = l * old + gl.sum(weight, 0)
                acc = acc * gl.convert_layout(old, of_result_row)[:, None]
                acc += gl.sum(some.to(gl.float32) * weight[:, :, None], 0)
                m = m_new
        LN2: gl.constexpr = 0.6931471805599453
        inverse = gl.where(l == 0.0, 0.0, 1.0 / l)
        natural = gl.where(l == 0.0, -float("inf"), (m + gl.log2(l)) * LN2)
        inverse = gl.where(too_long, float("nan"), inverse)
        natural = gl.where(too_long, float("nan"), natural)
        acc = acc * gl.convert_layout(inverse, of_result_row)[:, None]
        q_row = tile * TILE + gl.convert_layout(row, of_result_row)
        at_row = _row_at(q_row, heads, stride_os, stride_oh, FLAT)
        cols = first_col + gl.convert_layout(col, gl.SliceLayout(0, result))
        live_result = gl.convert_layout(live_row.to(gl.int32), of_result_row) != 0
        gl.store(out_ptr + at_row[:, None] + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=live_result[:, None])
        if FIRST == 0:
            gl.store(lse_ptr + tile * TILE + row, natural, mask=live_row & (first_col == 0))
