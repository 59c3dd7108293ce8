"""One tile of query rows over a range of one request's keys, read through its block table.

The rows of a tile are the query heads that share a KV head, token after token: row r is token r // GROUP, head
r % GROUP. So that a key is read once for the whole group, and a decode step's few rows fill a matrix instruction.

Pages are looked up one tile ahead: the look-up is otherwise a dependent load in front of every tile's copy. Positions
past the last readable key are clamped to it, so that no padding and no dead table slot is read and no load needs a
mask for its rows.
"""

# Kernel arguments have no Python type; only the constexprs among them are annotated.
# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl


@triton.jit
def _look_up(table_ptr, start, last, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pages of the tile that starts at key `start`: one number if tiles lie within pages, else one for each key."""
    if PAGE_SIZE % BLOCK_N == 0:
        page = tl.load(table_ptr + tl.minimum(start, last) // PAGE_SIZE)
    else:
        page = tl.load(table_ptr + tl.minimum(start + tl.arange(0, BLOCK_N), last) // PAGE_SIZE)
    return page


@triton.jit
def _offsets(page, start, last, stride_p, stride_t, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):
    """Where a tile's keys begin, in elements: 64 bits if the cache is WIDE, else 32, a third of the instructions."""
    position = tl.minimum(start + tl.arange(0, BLOCK_N), last)
    if WIDE:
        page = page.to(tl.int64)
        at = page * stride_p + (position % PAGE_SIZE).to(tl.int64) * stride_t
    else:
        at = page * stride_p + (position % PAGE_SIZE) * stride_t
    return at


@triton.jit
def _load_rows(base, at, cols, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    if HEAD_DIM == BLOCK_D:
        x = tl.load(base + at[:, None] + cols[None, :])
    else:
        x = tl.load(base + at[:, None] + cols[None, :], mask=(cols < HEAD_DIM)[None, :], other=0.0)
    return x


@triton.jit
def _add_keys(
    acc, l, m, s, v, scale_log2, first, visible, full, SMALL: tl.constexpr, BRANCH: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Update the accumulator, the running sum and the running maximum (in units of log2) by a tile of scores."""
    if SMALL or not BRANCH:
        s = tl.where((tl.arange(0, BLOCK_N))[None, :] < (visible - first)[:, None], s, -float("inf"))
    elif first + BLOCK_N > full:
        limit = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [visible - first], tl.int32, False, 1)
        s = tl.where((tl.arange(0, BLOCK_N))[None, :] < limit[:, None], s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    p = tl.exp2(s * scale_log2 - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    if SMALL:
        l = l * alpha[:, None] + p
    else:
        l = l * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, l, m_new


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
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
    request,
    q_start,
    q_len,
    length,
    kv_head,
    first_row,
    start,  # first key of the range, and the end of it
    end,
    capacity,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    BRANCH: tl.constexpr,
):
    """The weighted sum of values, each row's sum of weights, and the maximum (in units of log2) that they refer to."""
    SMALL: tl.constexpr = BLOCK_M < 64
    keys = tl.minimum(tl.maximum(length, 0), capacity)
    row = first_row + tl.arange(0, BLOCK_M)
    rows = q_len * GROUP
    end = tl.minimum(end, keys)
    # Row r sees the keys before visible[r]; all rows see those before `full`.
    if CAUSAL:
        newest = tl.minimum(first_row + BLOCK_M, rows) - 1
        end = tl.minimum(end, keys - q_len + newest // GROUP + 1)
        visible = tl.minimum(keys - q_len + row // GROUP + 1, end)
        full = tl.minimum(keys - q_len + first_row // GROUP + 1, end)
    else:
        visible = row * 0 + end
        full = end
    last = end - 1

    cols = tl.arange(0, BLOCK_D)
    q_at = (q_start + row // GROUP).to(tl.int64) * stride_qt + (kv_head * GROUP + row % GROUP).to(tl.int64) * stride_qh
    q_mask = (row < rows)[:, None]
    if HEAD_DIM != BLOCK_D:
        q_mask = q_mask & (cols < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + q_at[:, None] + cols[None, :], mask=q_mask, other=0.0)
    table_ptr += request.to(tl.int64) * stride_tb
    k_ptr += kv_head.to(tl.int64) * stride_kh
    v_ptr += kv_head.to(tl.int64) * stride_vh

    m = tl.full([BLOCK_M], -1.0e30, tl.float32)  # finite, so that a row that has seen no key yet gives no inf - inf
    if SMALL:  # summed over keys at the end: a sum over warps in each tile would cost a round trip
        l = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if start < end:
        page = _look_up(table_ptr, start, last, PAGE_SIZE, BLOCK_N)
        for i in tl.range(start, end, BLOCK_N, num_stages=STAGES):
            k_at = _offsets(page, i, last, stride_kp, stride_kt, PAGE_SIZE, BLOCK_N, WIDE)
            if SAME_STRIDES:
                v_at = k_at
            else:
                v_at = _offsets(page, i, last, stride_vp, stride_vt, PAGE_SIZE, BLOCK_N, WIDE)
            k = _load_rows(k_ptr, k_at, cols, HEAD_DIM, BLOCK_D)
            v = _load_rows(v_ptr, v_at, cols, HEAD_DIM, BLOCK_D)
            page = _look_up(table_ptr, i + BLOCK_N, last, PAGE_SIZE, BLOCK_N)
            s = tl.dot(q, tl.trans(k))
            acc, l, m = _add_keys(acc, l, m, s, v, scale_log2, i, visible, full, SMALL, BRANCH, BLOCK_N)
    if SMALL:
        l = tl.sum(l, 1)
    return acc, l, m


@triton.jit
def _store_rows(
    acc,
    l,
    m,
    out_ptr,
    lse_ptr,
    stride_ot,
    stride_oh,
    num_heads,
    q_start,
    q_len,
    length,
    kv_head,
    first_row,
    capacity,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Write what `_attend` found of all of a request's keys."""
    LN2: tl.constexpr = 0.6931471805599453
    row = first_row + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + row % GROUP
    token = (q_start + row // GROUP).to(tl.int64)
    inverse = tl.where(l == 0.0, 0.0, 1.0 / l)
    lse = tl.where(l == 0.0, -float("inf"), (m + tl.log2(l)) * LN2)
    # A table too short for its request cannot be refused without a host sync; NaN is louder than attention over a part.
    inverse = tl.where(length > capacity, float("nan"), inverse)
    lse = tl.where(length > capacity, float("nan"), lse)
    mine = row < q_len * GROUP
    mask = mine[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (cols < HEAD_DIM)[None, :]
    at = token * stride_ot + head.to(tl.int64) * stride_oh
    result = (acc * inverse[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at[:, None] + cols[None, :], result, mask=mask)
    tl.store(lse_ptr + token * num_heads + head, lse, mask=mine)
