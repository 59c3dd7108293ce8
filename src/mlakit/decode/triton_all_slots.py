"""What sparse attention must be told to look at everything, and what it cannot say itself: two small kernels."""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

import torch
import triton
import triton.language as tl

from mlakit.triton_launch import Launches

_KEYS = 1024  # a step of a program
# Programs of a launch, where batches are not larger: a table has room for more keys than most of its requests have.
_PROGRAMS = 1024
_ROWS = 16


@triton.jit(do_not_specialize=["stride_tb", "capacity", "parts", "q_len"])
def _all_slots_kernel(
    table_ptr,
    lens_ptr,
    slots_ptr,  # [batch, capacity]
    seen_ptr,  # [batch, q_len]
    stride_tb,
    capacity,
    parts,
    q_len,
    PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    length = tl.load(lens_ptr + request)
    keys = tl.where(length > capacity, 0, length)  # what is too long becomes NaN: not worth any work
    n = tl.arange(0, BLOCK)
    for start in range(part * BLOCK, keys, parts * BLOCK):
        key = start + n
        page = tl.load(table_ptr + request * stride_tb + key // PAGE_SIZE, mask=key < keys, other=0)
        tl.store(slots_ptr + request * capacity + key, page * PAGE_SIZE + key % PAGE_SIZE, mask=key < keys)
    if part == 0:
        for start in range(0, q_len, BLOCK):
            token = start + n
            seen = keys + token * 0
            if CAUSAL:
                seen = keys - q_len + token + 1
            tl.store(seen_ptr + request * q_len + token, seen, mask=token < q_len)


@triton.jit(do_not_specialize=["rows", "heads", "capacity"])
def _finish_kernel(
    lens_ptr,
    logs_ptr,  # [batch, rows]
    out_ptr,
    lse_ptr,  # [batch, rows]
    stride_ob,
    stride_os,
    stride_oh,
    rows,
    heads,
    capacity,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    too_long = tl.load(lens_ptr + request) > capacity
    lse = tl.load(logs_ptr + request * rows + row, mask=live, other=0.0)
    tl.store(lse_ptr + request * rows + row, tl.where(too_long, float("nan"), lse), mask=live)
    if too_long:
        at = request * stride_ob + (row // heads).to(tl.int64) * stride_os + (row % heads).to(tl.int64) * stride_oh
        nan = tl.full([BLOCK, RANK], float("nan"), out_ptr.dtype.element_ty)
        tl.store(out_ptr + at[:, None] + tl.arange(0, RANK)[None, :], nan, mask=live[:, None])


_ALL_SLOTS, _FINISH = Launches(_all_slots_kernel), Launches(_finish_kernel)


def _launch_all_slots(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    slots: torch.Tensor,
    seen: torch.Tensor,
    *,
    page_size: int,
    causal: bool,
) -> None:
    """Write to `slots` [batch, 1, capacity] where each request's keys are, nothing behind its last one, and to `seen`
    [batch, q_len] how many of them a token sees: less than none, where it stands before the first. Of a request that is
    longer than its table none are seen.
    """
    device, (batch, _, capacity), q_len = seq_lens.device, slots.shape, seen.shape[1]
    key = (slots.shape, q_len, block_table.stride(0), page_size, causal)
    tensors = (block_table, seq_lens, slots, seen)
    if device.type == "cuda" and _ALL_SLOTS.again(key, device, tensors):
        return
    parts = max(min(-(-capacity // _KEYS), _PROGRAMS // batch), 1)
    numbers = (block_table.stride(0), capacity, parts, q_len)
    constants = {"PAGE_SIZE": page_size, "CAUSAL": causal and q_len > 1, "BLOCK": _KEYS}
    _ALL_SLOTS.first(key, device, (batch * parts, 1, 1), tensors, numbers, constants, num_warps=4)


def _launch_finish(
    seq_lens: torch.Tensor, logs: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, *, capacity: int
) -> None:
    """Copy `logs` [batch, q_len, heads] to `lse`, and make NaN of both results where a request is longer than
    `capacity`: it cannot be refused without a host sync, and NaN is louder than attention over a part.
    """
    device, (batch, q_len, heads, rank) = out.device, out.shape
    key = (out.shape, out.stride(), out.dtype, capacity)
    tensors = (seq_lens, logs, out, lse)
    if device.type == "cuda" and _FINISH.again(key, device, tensors):
        return
    rows = q_len * heads
    numbers = (*out.stride()[:3], rows, heads, capacity)
    grid = (batch, -(-rows // _ROWS), 1)
    _FINISH.first(key, device, grid, tensors, numbers, {"RANK": rank, "BLOCK": _ROWS}, num_warps=4)
