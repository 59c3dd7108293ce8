"""What the Hopper decode kernels share: counters between programs, looking up tiles, and merging the partial results of
a request's pieces.
"""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mlakit.decode.hopper_schedule import _partial_at

# The name of Triton 3.6, and that of later ones.
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.jit
def _arrive(counter_ptr):
    """Tell other programs that what this warpgroup has written so far can be read."""
    _barrier()
    gl.inline_asm_elementwise(
        """{
        .reg .pred one; .reg .u32 lane;
        mov.u32 lane, %tid.x; and.b32 lane, lane, 127; setp.eq.u32 one, lane, 0;
        @one red.release.gpu.global.add.u32 [$1], 1;
        mov.u32 $0, 0;
        }""",
        "=r,l",
        [counter_ptr],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _await(counter_ptr, arrivals):
    """Wait until so many warpgroups have arrived. The low half of a counter counts arrivals, the high half those who
    have gone on.
    """
    gl.inline_asm_elementwise(
        """{
        .reg .pred more; .reg .u32 seen;
        AGAIN: ld.acquire.gpu.global.u32 seen, [$1];
        and.b32 seen, seen, 65535; setp.lt.u32 more, seen, $2;
        @more bra AGAIN;
        mov.u32 $0, seen;
        }""",
        "=r,l,r",
        [counter_ptr, arrivals],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    _barrier()


@gluon.jit
def _leave(counter_ptr, arrivals):
    """Done with what others wrote; the last one to leave sets the counter back to zero for the next launch."""
    _barrier()
    gl.inline_asm_elementwise(
        """{
        .reg .pred one; .reg .pred last; .reg .u32 lane; .reg .u32 seen;
        mov.u32 lane, %tid.x; and.b32 lane, lane, 127; setp.eq.u32 one, lane, 0;
        mov.u32 seen, 0;
        @one atom.acq_rel.gpu.global.add.u32 seen, [$1], 65536;
        shr.u32 seen, seen, 16; add.u32 seen, seen, 1;
        setp.eq.and.u32 last, seen, $2, one;
        @last st.relaxed.gpu.global.u32 [$1], 0;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [counter_ptr, arrivals],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _same_for_warp(value):
    """`value`, which all threads of a warp have in common, so that the compiler knows that they do."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _tile_row(table_ptr, tile, last, PAGE: gl.constexpr, TILE: gl.constexpr):
    """First row of a tile of TILE keys in the cache as one matrix; a tile past the last one is the last one."""
    tile = gl.minimum(tile, last)
    each: gl.constexpr = PAGE // TILE
    return gl.load(table_ptr + tile // each) * PAGE + tile % each * TILE


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
def _merge_rows(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, base, count, aligned, tile, row_tiles, row_begin, row_end,
    rows, heads, stride_os, stride_oh, too_long, HALF: gl.constexpr, WIDTH: gl.constexpr, PIECES: gl.constexpr,
    ROWS: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Merge some rows of a tile, columns [HALF * WIDTH, HALF * WIDTH + WIDTH), from all pieces of a request: PIECES x
    ROWS loads are under way at once.
    """
    # Warps side by side in a row, or each in rows of its own; four columns a thread where that fills them.
    ROW_WARPS: gl.constexpr = 4 if (WIDTH == 256 and ROWS >= 4) else 1
    VECTOR: gl.constexpr = 4 if (WIDTH == 512 or ROWS >= 4) else 2
    layout: gl.constexpr = gl.BlockedLayout([PIECES, 1, VECTOR], [1, 1, 32], [1, ROW_WARPS, 4 // ROW_WARPS], [2, 1, 0])
    scores: gl.constexpr = gl.SliceLayout(2, layout)
    result: gl.constexpr = gl.SliceLayout(0, layout)
    of_row: gl.constexpr = gl.SliceLayout(0, scores)
    of_result_row: gl.constexpr = gl.SliceLayout(1, result)
    piece = gl.arange(0, PIECES, gl.SliceLayout(1, scores))
    local = gl.arange(0, ROWS, of_row)
    col = HALF * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    for start in range(row_begin, row_end, ROWS):
        row = start + local
        live_row = (row < row_end) & (tile * TILE + row < rows)
        m = gl.full([ROWS], -float("inf"), gl.float32, of_row)
        l = gl.zeros([ROWS], gl.float32, of_row)
        acc = gl.zeros([ROWS, WIDTH], gl.float32, result)
        for first in range(0, count, PIECES):
            number = first + piece
            at = _partial_at(base, number, aligned) * row_tiles + tile
            live = (number < count)[:, None] & live_row[None, :]
            flat = (at * TILE)[:, None] + row[None, :]
            some_lse = gl.load(partial_lse_ptr + flat, mask=live, other=-float("inf"))
            some = gl.load(
                partial_ptr + ((flat * 512)[:, :, None] + col[None, None, :]),
                mask=live[:, :, None],
                other=0.0,
            )
            m_new = gl.maximum(m, gl.max(some_lse, 0))
            shift = gl.where(m_new == -float("inf"), 0.0, m_new)  # a row that sees no key: 0 instead of inf - inf
            old = gl.exp2(m - shift)
            weight = gl.exp2(some_lse - shift[None, :])
            l = l * old + gl.sum(weight, 0)
            acc = acc * gl.convert_layout(old, of_result_row)[:, None] + gl.sum(some * weight[:, :, None], 0)
            m = m_new
        LN2: gl.constexpr = 0.6931471805599453
        inverse = gl.where(l == 0.0, 0.0, 1.0 / l)
        natural = gl.where(l == 0.0, -float("inf"), (m + gl.log2(l)) * LN2)
        inverse = gl.where(too_long, float("nan"), inverse)
        natural = gl.where(too_long, float("nan"), natural)
        acc = acc * gl.convert_layout(inverse, of_result_row)[:, None]
        q_row = tile * TILE + gl.convert_layout(row, of_result_row)
        at_row = (q_row // heads).to(gl.int64) * stride_os + (q_row % heads).to(gl.int64) * stride_oh
        cols = gl.convert_layout(col, gl.SliceLayout(0, result))
        live_result = gl.convert_layout(live_row.to(gl.int32), of_result_row) != 0
        gl.store(out_ptr + at_row[:, None] + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=live_result[:, None])
        if HALF == 0:
            gl.store(lse_ptr + tile * TILE + row, natural, mask=live_row)


@gluon.jit
def _merge_chunks(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, base, count, aligned, number, rows, heads, stride_os, stride_oh,
    too_long, PIECES: gl.constexpr, CHUNK: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Merge this program's part, in units of CHUNK columns of a row, of a request of many pieces; PIECES at once."""
    layout: gl.constexpr = gl.BlockedLayout([PIECES, CHUNK // 128], [1, 32], [1, 4], [1, 0])
    of_piece: gl.constexpr = gl.SliceLayout(1, layout)
    CHUNKS: gl.constexpr = 512 // CHUNK
    piece = gl.arange(0, PIECES, of_piece)
    col = gl.arange(0, CHUNK, gl.SliceLayout(0, layout))
    units = gl.minimum(rows, TILE) * CHUNKS
    for unit in range(number * units // count, (number + 1) * units // count):
        row = unit // CHUNKS
        m = -float("inf")
        l = 0.0
        acc = gl.zeros([CHUNK], gl.float32, gl.SliceLayout(0, layout))
        for first in range(0, count, PIECES):
            live = first + piece < count
            flat = _partial_at(base, first + piece, aligned) * TILE + row
            some_lse = gl.load(partial_lse_ptr + flat, mask=live, other=-float("inf"))
            at = (flat * 512 + unit % CHUNKS * CHUNK)[:, None] + col[None, :]
            some = gl.load(partial_ptr + at, mask=live[:, None], other=0.0)
            m_new = gl.maximum(m, gl.max(some_lse, 0))
            shift = gl.where(m_new == -float("inf"), 0.0, m_new)  # a row that sees no key: 0 instead of inf - inf
            old = gl.exp2(m - shift)
            weight = gl.exp2(some_lse - shift)
            l = l * old + gl.sum(weight, 0)
            acc = acc * old + gl.sum(some * weight[:, None], 0)
            m = m_new
        LN2: gl.constexpr = 0.6931471805599453
        inverse = gl.where(l == 0.0, 0.0, 1.0 / l)
        natural = gl.where(l == 0.0, -float("inf"), (m + gl.log2(l)) * LN2)
        inverse = gl.where(too_long, float("nan"), inverse)
        natural = gl.where(too_long, float("nan"), natural)
        at_row = (row // heads).to(gl.int64) * stride_os + (row % heads).to(gl.int64) * stride_oh
        gl.store(out_ptr + at_row + unit % CHUNKS * CHUNK + col, (acc * inverse).to(out_ptr.dtype.element_ty))
        if unit % CHUNKS == 0:
            gl.store(lse_ptr + row, natural)
