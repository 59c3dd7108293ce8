"""Merging the partial results of a token's pieces within the launch that computes them."""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _merge_rows(
    partial_ptr, partial_lse_ptr, sink_ptr, out_ptr, lse_ptr, first, end, splits, heads, stride_oh,
    FIRST_COL: gl.constexpr, PIECES: gl.constexpr, ROWS: gl.constexpr, SINK: gl.constexpr,
):  # fmt: skip
    """Rows [first, end) of a tile of heads, 256 columns from FIRST_COL on: PIECES and ROWS at a time, all of whose
    loads are under way at once. A warp has a row, so that sums over pieces stay inside of threads.
    """
    LN2: gl.constexpr = 0.6931471805599453
    LOG2E: gl.constexpr = 1.4426950408889634
    layout: gl.constexpr = gl.BlockedLayout([PIECES, ROWS // 4, 8], [1, 1, 32], [1, 4, 1], [2, 1, 0])
    scores: gl.constexpr = gl.SliceLayout(2, layout)
    result: gl.constexpr = gl.SliceLayout(0, layout)
    of_row: gl.constexpr = gl.SliceLayout(0, scores)
    of_result_row: gl.constexpr = gl.SliceLayout(1, result)
    piece = gl.arange(0, PIECES, gl.SliceLayout(1, scores))
    col = FIRST_COL + gl.arange(0, 256, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    local = gl.arange(0, ROWS, of_row)
    for start in range(first, end, ROWS):
        # Rows and pieces past the last are the last again, and count for nothing: loads need no masks.
        row = gl.minimum(start + local, end - 1)
        m = gl.full([ROWS], -float("inf"), gl.float32, of_row)
        l = gl.zeros([ROWS], gl.float32, of_row)
        acc = gl.zeros([ROWS, 256], gl.float32, result)
        for begin in range(0, splits, PIECES):
            at = gl.minimum(begin + piece, splits - 1)[:, None] * heads + row[None, :]
            lse = gl.load(partial_lse_ptr + at)
            some = gl.load(partial_ptr + ((at * 512)[:, :, None] + col[None, None, :]))
            lse = gl.where((begin + piece < splits)[:, None], lse, -float("inf"))
            m_new = gl.maximum(m, gl.max(lse, 0))
            shift = gl.where(m_new == -float("inf"), 0.0, m_new)  # a row that has no key: 0 instead of inf - inf
            old = gl.exp2(m - shift)
            weight = gl.exp2(lse - shift[None, :])
            l = l * old + gl.sum(weight, 0)
            acc = acc * gl.convert_layout(old, of_result_row)[:, None]
            acc += gl.sum(some.to(gl.float32) * weight[:, :, None], 0)
            m = m_new
        lse = gl.where(l == 0.0, -float("inf"), m + gl.log2(l))
        scale = gl.where(l == 0.0, 0.0, 1.0 / l)
        if SINK:
            scale = gl.where(l == 0.0, 0.0, scale / (1.0 + gl.exp2(gl.load(sink_ptr + row) * LOG2E - lse)))
        live = start + local < end
        live_result = gl.convert_layout(live.to(gl.int32), of_result_row) != 0
        place = gl.convert_layout(row, of_result_row).to(gl.int64) * stride_oh
        out_col = gl.convert_layout(col, gl.SliceLayout(0, result))
        acc = acc * gl.convert_layout(scale, of_result_row)[:, None]
        gl.store(
            out_ptr + (place[:, None] + out_col[None, :]), acc.to(out_ptr.dtype.element_ty), mask=live_result[:, None]
        )
        if FIRST_COL == 0:
            gl.store(lse_ptr + row, lse * LN2, mask=live)


@gluon.jit
def merge(
    partial_ptr, partial_lse_ptr, sink_ptr, out_ptr, lse_ptr, rows, piece, splits, heads, stride_oh,
    FIRST_COL: gl.constexpr, SINK: gl.constexpr,
):  # fmt: skip
    """This piece's share of a tile's rows. Pointers are to the tile's first row, of the first piece."""
    first = piece * rows // splits
    end = (piece + 1) * rows // splits
    if splits <= 2:
        _merge_rows(
            partial_ptr, partial_lse_ptr, sink_ptr, out_ptr, lse_ptr, first, end, splits, heads, stride_oh,
            FIRST_COL, 2, 8, SINK,
        )  # fmt: skip
    else:
        _merge_rows(
            partial_ptr, partial_lse_ptr, sink_ptr, out_ptr, lse_ptr, first, end, splits, heads, stride_oh,
            FIRST_COL, 4, 4, SINK,
        )  # fmt: skip
