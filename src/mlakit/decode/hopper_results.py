"""After the keys, the Hopper decode kernels store results, merge those of pieces, and answer requests without keys."""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mlakit.decode.hopper_parts import _arrive, _await, _barrier, _late
from mlakit.decode.hopper_schedule import _partial_at, _piece


@gluon.jit
def _row_at(row, heads, stride_os, stride_oh, FLAT: gl.constexpr):
    """Where a query row's output begins in its request's; FLAT: all rows are equally far apart."""
    if FLAT:
        at = row.to(gl.int64) * stride_oh
    else:
        at = (row // heads).to(gl.int64) * stride_os + (row % heads).to(gl.int64) * stride_oh
    return at


@gluon.jit
def _store_rows(
    o, lse, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, counter_ptr, request, length, capacity, number, count, base,
    aligned, tile, row_tiles, rows, heads, stride_ob, stride_os, stride_oh, local, own, col, row,
    FIRST: gl.constexpr, TILE: gl.constexpr, FLAT: gl.constexpr,
):  # fmt: skip
    """Write a piece's o, columns from FIRST on, and with the first ones its lse in base 2: as partial results, or as
    the request's own. Rows of o are `local` in their tile and `own` in the request, its columns `col`; those of lse are
    `row`.
    """
    LN2: gl.constexpr = 0.6931471805599453
    if count > 1:
        place = _partial_at(base, number, aligned) * row_tiles + tile
        part = partial_ptr + place.to(gl.int64) * (TILE * 512) + (local * 512)[:, None]
        gl.store(part + col[None, :], o, mask=(own < rows)[:, None])
        if FIRST == 0:
            gl.store(partial_lse_ptr + place * TILE + (row - tile * TILE), lse)
        _arrive(counter_ptr + request * row_tiles + tile, (number == 0) & (FIRST == 0), 512 // o.shape[1] * count)
    else:
        at_row = _row_at(own, heads, stride_os, stride_oh, FLAT)
        result = out_ptr + request.to(gl.int64) * stride_ob + at_row[:, None] + col[None, :]
        gl.store(result, o, mask=(own < rows)[:, None])
        if FIRST == 0:
            natural = gl.where(length > capacity, float("nan"), lse * LN2)
            gl.store(lse_ptr + request.to(gl.int64) * rows + row, natural, mask=row < rows)
        _barrier()


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


@gluon.jit
def _merge_pieces(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, base, count, aligned, number, tile, row_tiles, rows, heads,
    stride_os, stride_oh, too_long, FIRST: gl.constexpr, WIDTH: gl.constexpr, TILE: gl.constexpr, FLAT: gl.constexpr,
):  # fmt: skip
    """`_merge` in a shape for the number of pieces: 8192 elements at a time, all of whose loads are under way at once.
    Whole rows are a program's alone, and may be cut into more pieces than half rows, which have two warpgroups.
    """
    if count <= 2:
        _merge(
            partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, base, count, aligned, number, tile, row_tiles, rows, heads,
            stride_os, stride_oh, too_long, FIRST, WIDTH, 2, 4096 // WIDTH, WIDTH, TILE, True, FLAT,
        )  # fmt: skip
    elif count <= 4:
        _merge(
            partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, base, count, aligned, number, tile, row_tiles, rows, heads,
            stride_os, stride_oh, too_long, FIRST, WIDTH, 4, 2048 // WIDTH, WIDTH, TILE, True, FLAT,
        )  # fmt: skip
    elif count <= 8:
        _merge(
            partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, base, count, aligned, number, tile, row_tiles, rows, heads,
            stride_os, stride_oh, too_long, FIRST, WIDTH, 8, 1024 // WIDTH, WIDTH, TILE, True, FLAT,
        )  # fmt: skip
    elif count <= 16:
        _merge(
            partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, base, count, aligned, number, tile, row_tiles, rows, heads,
            stride_os, stride_oh, too_long, FIRST, WIDTH, 16, 512 // WIDTH, WIDTH, TILE, True, FLAT,
        )  # fmt: skip
    elif WIDTH < 512:
        _merge(
            partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, base, count, aligned, number, tile, row_tiles, rows, heads,
            stride_os, stride_oh, too_long, FIRST, WIDTH, 32, 1, 256, TILE, False, FLAT,
        )  # fmt: skip
    elif count <= 32:
        _merge(
            partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, base, count, aligned, number, tile, row_tiles, rows, heads,
            stride_os, stride_oh, too_long, FIRST, WIDTH, 32, 1, 256, TILE, True, FLAT,
        )  # fmt: skip
    elif count <= 64:
        _merge(
            partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, base, count, aligned, number, tile, row_tiles, rows, heads,
            stride_os, stride_oh, too_long, FIRST, WIDTH, 64, 1, 128, TILE, True, FLAT,
        )  # fmt: skip
    else:
        _merge(
            partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, base, count, aligned, number, tile, row_tiles, rows, heads,
            stride_os, stride_oh, too_long, FIRST, WIDTH, 128, 1, 64, TILE, False, FLAT,
        )  # fmt: skip


@gluon.jit
def _merge_own_pieces(
    begin, end, before, slot, aligned, pieces, share, seq_lens_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    counter_ptr, capacity, tile, row_tiles, rows, heads, stride_ob, stride_os, stride_oh, STEP: gl.constexpr,
    FIRST: gl.constexpr, WIDTH: gl.constexpr, TILE: gl.constexpr, FLAT: gl.constexpr,
):  # fmt: skip
    """Pieces of a request are merged by the programs that computed them, each some rows or some columns of one; this
    one's are items [begin, end).
    """
    for item in range(begin, end):
        request, length, steps, first, last, number, count, base = _piece(
            item, before, slot, aligned, pieces, share, seq_lens_ptr, capacity, STEP
        )
        if (first < last) & (count > 1):
            own_tile = tile
            if WIDTH < 512:  # half rows: of kernels that have no register to spare
                own_tile = _late(tile, length)
            _await(counter_ptr + request * row_tiles + own_tile)
            result = out_ptr + request.to(gl.int64) * stride_ob
            result_lse = lse_ptr + request.to(gl.int64) * rows
            _merge_pieces(
                partial_ptr, partial_lse_ptr, result, result_lse, base, count, aligned, number, own_tile, row_tiles,
                rows, heads, stride_os, stride_oh, length > capacity, FIRST, WIDTH, TILE, FLAT,
            )  # fmt: skip
        before += steps


@gluon.jit
def _answer_without_keys(
    seq_lens_ptr, out_ptr, lse_ptr, slot, slots, batch, capacity, tile, rows, heads, stride_ob, stride_os, stride_oh,
    TILE: gl.constexpr, WIDTH: gl.constexpr, plain: gl.constexpr, of_row: gl.constexpr, FLAT: gl.constexpr,
):  # fmt: skip
    """Zeros and -inf for requests without keys, which are nobody's pieces: every slot looks at some of the batch. A
    table without pages is too short for a request that has keys.
    """
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    for other in range(slot, batch, slots):
        request = slot * 0 + other  # a tensor, also to the type checker
        length = gl.load(seq_lens_ptr + request)
        if gl.minimum(length, capacity) <= 0:
            row = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(1, plain))
            col = gl.arange(0, WIDTH, gl.SliceLayout(0, plain))
            at_row = _row_at(row, heads, stride_os, stride_oh, FLAT)
            result = out_ptr + request.to(gl.int64) * stride_ob + at_row[:, None] + col[None, :]
            nothing = gl.where(length > capacity, float("nan"), 0.0).to(DTYPE)
            nothings = gl.zeros([TILE, WIDTH], DTYPE, plain) + nothing
            for first in gl.static_range(0, 512, WIDTH):
                gl.store(result + first, nothings, mask=(row < rows)[:, None])
            lse_row = tile * TILE + gl.arange(0, TILE, of_row)
            no_lse = gl.where(length > capacity, float("nan"), -float("inf"))
            no_lse += gl.zeros([TILE], gl.float32, of_row)
            gl.store(lse_ptr + request.to(gl.int64) * rows + lse_row, no_lse, mask=lse_row < rows)
