"""After the keys, the Hopper decode kernels store results, merge those of pieces, and answer requests without keys."""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mlakit.decode.hopper_parts import _arrive, _barrier, _merge, _row_at
from mlakit.decode.hopper_schedule import _partial_at


@gluon.jit
def _store_rows(
    o, lse, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, counter_ptr, request, length, capacity, number, count, base,
    aligned, tile, row_tiles, rows, heads, stride_ob, stride_os, stride_oh, local, own, col, row,
    TILE: gl.constexpr, FLAT: gl.constexpr,
):  # fmt: skip
    """Write a piece's rows of 512 columns, and their lse in base 2: as partial results, or as the request's own."""
    LN2: gl.constexpr = 0.6931471805599453
    live = (own < rows)[:, None]
    if count > 1:
        place = _partial_at(base, number, aligned) * row_tiles + tile
        part = partial_ptr + place.to(gl.int64) * (TILE * 512) + (local * 512)[:, None]
        gl.store(part + col[None, :], o, mask=live)
        gl.store(partial_lse_ptr + place * TILE + (row - tile * TILE), lse)
        _arrive(counter_ptr + request * row_tiles + tile, number == 0, count)
    else:
        at_row = _row_at(own, heads, stride_os, stride_oh, FLAT)
        result = out_ptr + request.to(gl.int64) * stride_ob + at_row[:, None] + col[None, :]
        gl.store(result, o, mask=live)
        natural = gl.where(length > capacity, float("nan"), lse * LN2)
        gl.store(lse_ptr + request.to(gl.int64) * rows + row, natural, mask=row < rows)
        _barrier()


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
