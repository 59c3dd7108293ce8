"""Ragged batches of many rows: which head and which sequence a program has, found on the device, and loading rows."""

# Kernel arguments have no Python type; only the constexprs among them are annotated.
# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl

_L2_TARGET_BYTES = 24 * 2**20  # of the 40 MB that an A100 has and the 60 MB of an H200


@triton.jit
def head_and_tile(program, tiles, heads, heads_at_once):
    """The head of a program, and its tile of the list: heads go in groups whose keys and values fit L2, and within a
    group every head's first tile comes first.
    """
    group = program // (tiles * heads_at_once)
    within = program - group * tiles * heads_at_once
    heads_here = tl.minimum(heads_at_once, heads - group * heads_at_once)
    return group * heads_at_once + within % heads_here, within // heads_here


@triton.jit
def locate_tile(tile, cu_ptr, batch, total, BLOCK: tl.constexpr, GROUP: tl.constexpr = 1):
    """Find the sequence that a tile of the list belongs to: (sequence, its first token, its end, the tile's first row
    in it). A token has GROUP rows, a tile BLOCK.

    Sequence i owns tiles cu[i] * GROUP // BLOCK + i and on, as many as it needs: the host can bound the list's length
    by total * GROUP // BLOCK + batch + 1 without knowing the lengths. Tokens past cu[batch] belong to sequence `batch`,
    which has no keys. The tile may lie past the end of its sequence; then it has no rows.
    """
    seq = 0
    # Counting with whole vectors needs one round trip to memory for 128 sequences, where a binary search needs seven.
    for first in range(0, batch, 128):
        i = first + 1 + tl.arange(0, 128)
        bound = tl.load(cu_ptr + i, mask=i <= batch, other=0)
        seq += tl.sum(((bound * GROUP // BLOCK + i <= tile) & (i <= batch)).to(tl.int32), 0)
    start = tl.load(cu_ptr + seq)
    end = tl.load(cu_ptr + seq + 1, mask=seq < batch, other=total)
    return seq, start, end, (tile - start * GROUP // BLOCK - seq) * BLOCK


@triton.jit
def load_rows(base, rows, stride, cols, row_end, col_end, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr):
    """Load [rows, cols] of a row-major matrix; what is masked is not read and gives 0."""
    ptrs = base + rows[:, None] * stride + cols[None, :]
    if MASK_ROWS and MASK_COLS:
        x = tl.load(ptrs, mask=(rows[:, None] < row_end) & (cols[None, :] < col_end), other=0.0)
    elif MASK_ROWS:
        x = tl.load(ptrs, mask=rows[:, None] < row_end, other=0.0)
    elif MASK_COLS:
        x = tl.load(ptrs, mask=cols[None, :] < col_end, other=0.0)
    else:
        x = tl.load(ptrs)
    return x


def heads_in_l2(heads: int, rows: int, batch: int, row_bytes: int) -> int:
    """How many heads to run side by side, so that what they all stream (`row_bytes` a row and head) stays in L2."""
    per_head = rows // max(batch, 1) * row_bytes
    return min(heads, max(1, _L2_TARGET_BYTES // max(per_head, 1)))
