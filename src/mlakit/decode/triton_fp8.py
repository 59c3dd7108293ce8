"""Reading float8 queries and caches in the portable decode kernels.

The dot products take 16 bits: e4m3 is exact in bfloat16 and in float16, so that only a cache with scales of its own is
rounded, as eager PyTorch would. Scales of a whole tensor are multiplied into the softmax scale and the result.
"""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

import triton
import triton.language as tl

from mlakit.triton_e4m3 import e4m3_to_fp32

# How a cache holds its keys.
AS_QUERY = tl.constexpr(0)  # in the products' dtype
E4M3 = tl.constexpr(1)  # codes, one scale for all
E4M3_ROWS = tl.constexpr(2)  # RANK codes, a float32 scale for each GROUP of them, and the rope part in bfloat16
GROUP = tl.constexpr(128)


@triton.jit
def _load_query(q_at, cols, live, Q_E4M3: tl.constexpr, NATIVE: tl.constexpr, DTYPE: tl.constexpr):
    """Some columns of the query rows, in the products' dtype."""
    if Q_E4M3:
        codes = tl.load(q_at[:, None] + cols[None, :], mask=live[:, None], other=0)
        part = e4m3_to_fp32(codes, NATIVE).to(DTYPE)
    else:
        part = tl.load(q_at[:, None] + cols[None, :], mask=live[:, None], other=0.0)
    return part


@triton.jit
def _rows_at(page, start, last, stride_cp, stride_ct, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where a tile's keys begin, in bytes."""
    position = tl.minimum(start + tl.arange(0, BLOCK_N), last)
    return page.to(tl.int64) * stride_cp + (position % PAGE_SIZE).to(tl.int64) * stride_ct


@triton.jit
def _latent(
    cache_ptr, at, FIRST: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, FORMAT: tl.constexpr,
    NATIVE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Columns [FIRST, FIRST + WIDTH) of a tile's keys, a part of the value."""
    if FORMAT == 1 or WIDTH < GROUP:
        values = e4m3_to_fp32(tl.load(cache_ptr + at[:, None] + (FIRST + tl.arange(0, WIDTH))[None, :]), NATIVE)
        if FORMAT == 2:
            scale_ptr = cache_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
            values *= tl.load(scale_ptr + (at // 4 + (RANK // 4 + FIRST // GROUP)))[:, None]
    else:
        group = tl.arange(0, WIDTH // GROUP)
        column = FIRST + group[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
        codes = tl.load(cache_ptr + at[:, None, None] + column)
        scale_ptr = cache_ptr.to(tl.pointer_type(tl.float32), bitcast=True) + (RANK // 4 + FIRST // GROUP)
        scale = tl.load(scale_ptr + (at // 4)[:, None] + group[None, :])
        values = tl.reshape(e4m3_to_fp32(codes, NATIVE) * scale[:, :, None], [at.shape[0], WIDTH])
    return values.to(DTYPE)


@triton.jit
def _rope(
    cache_ptr, at, RANK: tl.constexpr, ROPE: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The rope part of a tile's keys."""
    r = tl.arange(0, ROPE)
    if FORMAT == 1:
        part = e4m3_to_fp32(tl.load(cache_ptr + at[:, None] + (RANK + r)[None, :]), NATIVE)
    else:
        rope_ptr = cache_ptr.to(tl.pointer_type(tl.bfloat16), bitcast=True) + (RANK // 2 + 2 * (RANK // GROUP))
        part = tl.load(rope_ptr + (at // 2)[:, None] + r[None, :])
    return part.to(DTYPE)
