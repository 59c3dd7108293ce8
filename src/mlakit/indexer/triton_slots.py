# mypy: disallow-incomplete-defs=False
# (kernel arguments are pointers and numbers of the GPU, which have no Python type)
"""Positions in a request to slots of the cache in one launch, where PyTorch needs eight."""

import torch
import triton
import triton.language as tl

from mlakit.triton_launch import Launches

_BLOCK = 1024


@triton.jit
def _slots_of_kernel(
    indices_ptr,
    table_ptr,
    out_ptr,
    k,
    blocks,
    page_size,
    stride_row,
    stride_table,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices_ptr + row * stride_row + column, mask=column < k, other=-1)
    page = tl.load(table_ptr + row * stride_table + index // page_size, mask=index >= 0, other=0)
    slot = tl.where(index >= 0, page * page_size + index % page_size, -1)
    tl.store(out_ptr + row * k + column, slot, mask=column < k)


_SLOTS = Launches(_slots_of_kernel)


def launch_slots_of(indices: torch.Tensor, block_table: torch.Tensor, page_size: int, out: torch.Tensor) -> None:
    """Write the slots of `indices` [rows, k] to `out`, contiguous; rows of both inputs have unit stride."""
    if out.numel() == 0:
        return
    rows, k = indices.shape
    blocks = -(-k // _BLOCK)
    key = (indices.shape, indices.stride(), block_table.stride(), page_size)
    tensors = (indices, block_table, out)
    if out.is_cuda and _SLOTS.again(key, out.device, tensors):
        return
    numbers = (k, blocks, page_size, indices.stride(0), block_table.stride(0))
    _SLOTS.first(key, out.device, (rows * blocks, 1, 1), tensors, numbers, {"BLOCK": _BLOCK}, num_warps=4)
