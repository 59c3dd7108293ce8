"""Descriptors of bulk loads, made once for each tensor: making one takes the host longer than finding it again."""

from functools import lru_cache

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


class _Address:
    """What a descriptor needs of a tensor. A descriptor that is kept must not keep the tensor."""

    __slots__ = ("dtype", "pointer")

    def __init__(self, pointer: int, dtype: torch.dtype) -> None:
        self.pointer = pointer
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self.pointer


class _Descriptor(TensorDescriptor):
    """A descriptor that `Launches` takes for a tensor; its address is never anything but a multiple of 16."""

    def data_ptr(self) -> int:
        return 0


@lru_cache(4096)
def descriptor(
    pointer: int, dtype: torch.dtype, length: int, width: int, stride: int, rows: int, cols: int
) -> _Descriptor:
    """Bulk loads of [rows, cols] from a matrix [length, width] at an address, whose rows begin `stride` elements apart;
    rows of shared memory are swizzled by 128 bytes, or by as many as they have.
    """
    swizzled = min(128, triton.next_power_of_2(cols * dtype.itemsize))
    layout = gl.NVMMASharedLayout(swizzled if swizzled >= 32 else 0, element_bitwidth=dtype.itemsize * 8, rank=2)
    return _Descriptor(_Address(pointer, dtype), [length, width], [stride, 1], [rows, cols], layout)


def descriptor_of_rows(x: torch.Tensor, rows: int, cols: int) -> _Descriptor:
    """Bulk loads of [rows, cols] from a matrix with stride 1 in its last dimension."""
    return descriptor(x.data_ptr(), x.dtype, x.shape[0], x.shape[1], x.stride(0), rows, cols)


def descriptor_of_heads(x: torch.Tensor, rows: int, cols: int) -> _Descriptor:
    """Bulk loads of [rows, cols] from a tensor [any, heads, any].

    Heads lie along the columns, whatever their stride: head h starts at column h * stride(1).
    """
    length, heads, dim = x.shape
    row, head, _ = x.stride()
    width = (heads - 1) * head + dim
    if length == 1:  # its stride may be anything then
        row = -(-width // 8) * 8
    return descriptor(x.data_ptr(), x.dtype, length, width, row, rows, cols)
