"""Many query rows a request: every program takes one tile of rows, and all keys that it sees."""

# Kernel arguments have no Python type; only the constexprs among them are annotated.
# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from mlakit.paged.triton_attend import _attend, _store_rows
from mlakit.triton_ragged import head_and_tile, locate_tile


@triton.jit(do_not_specialize=["tokens", "batch", "tiles", "heads_at_once", "capacity", "stride_tb"])
def _paged_tiles_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    seq_lens_ptr,
    cu_ptr,
    out_ptr,
    lse_ptr,
    scale_log2,
    stride_qt,
    stride_qh,
    stride_kp,
    stride_kt,
    stride_kh,
    stride_vp,
    stride_vt,
    stride_vh,
    stride_tb,
    stride_ot,
    stride_oh,
    tokens,
    batch,
    kv_heads,
    tiles,
    heads_at_once,
    capacity,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    BRANCH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Requests of up to SPLIT_ROWS rows are the other kernel's, which may start as soon as all programs of this one
    have.
    """
    if DEPENDENT:
        gdc_launch_dependents()
    kv_head, tile = head_and_tile(tl.program_id(0), tiles, kv_heads, heads_at_once)
    if CAUSAL:  # the longest first
        tile = tiles - 1 - tile
    request, q_start, q_end, first_row = locate_tile(tile, cu_ptr, batch, tokens, BLOCK_M, GROUP)
    q_len = q_end - q_start
    rows = q_len * GROUP
    if (first_row >= rows) | ((rows <= SPLIT_ROWS) & (request < batch)):
        return
    length = tl.load(seq_lens_ptr + request, mask=request < batch, other=0)
    acc, l, m = _attend(
        q_ptr, k_ptr, v_ptr, table_ptr, scale_log2,
        stride_qt, stride_qh, stride_kp, stride_kt, stride_kh, stride_vp, stride_vt, stride_vh, stride_tb,
        request, q_start, q_len, length, kv_head, first_row, 0, capacity, capacity,
        CAUSAL, GROUP, HEAD_DIM, BLOCK_D, PAGE_SIZE, BLOCK_M, BLOCK_N, STAGES, WIDE, SAME_STRIDES, BRANCH,
    )  # fmt: skip
    _store_rows(
        acc, l, m, out_ptr, lse_ptr, stride_ot, stride_oh, kv_heads * GROUP,
        q_start, q_len, length, kv_head, first_row, capacity, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M,
    )  # fmt: skip
