# mypy: disallow-incomplete-defs=False
# (kernel arguments are pointers and numbers of the GPU, which have no Python type)
"""Quantizing activations and dequantizing weights: kernels that should run at the speed of a copy."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mlakit.triton_e4m3 import block_scale, divide, e4m3_to_fp32, fp32_to_e4m3, has_e4m3
from mlakit.triton_launch import Launches


@dataclass(frozen=True)
class ActQuantConfig:
    """Elements a program quantizes, and its warps. `streaming` marks the codes as not needed soon (st.global.cs), and
    `evict_first` what is read.
    """

    elements: int = 2048
    num_warps: int = 2
    streaming: bool = False
    evict_first: bool = False


def act_quant_config(elements: int) -> ActQuantConfig:
    """The launch for so many elements.

    On an H200, medians of three rounds in one run: [4096, 7168] took 27.0 us with four warps and what is read marked as
    not needed again, 27.7 with the two warps that are best for [32768, 7168], which takes 168.8 so, and 175.8 with the
    mark. PyTorch's copy of as many bytes took 26.5 and 170.2. Of 100 others (more or fewer elements and warps, other
    cache hints, a loop over tiles with copies ahead of it) none was faster by more than noise.
    """
    return ActQuantConfig(num_warps=4, evict_first=True) if elements < _MANY_ELEMENTS else ActQuantConfig()


_MANY_ELEMENTS = 2**26


@dataclass(frozen=True)
class WeightDequantConfig:
    """The tile of a program, and its warps.

    `block_rows` divides the scales' block, `block_columns` is a multiple of it. `narrow` reads 8 bytes a thread, so
    that it keeps the elements it writes (16 bytes of bfloat16); otherwise it reads 16, and half of them change threads
    through shared memory. `streaming` marks the stores as not needed soon (st.global.cs).

    On an H200, in one run, the defaults took 99.7 us for [7168, 18432], 4 warps 101.6.
    """

    block_rows: int = 32
    block_columns: int = 128
    num_warps: int = 8
    narrow: bool = True
    streaming: bool = False


@triton.jit
def _act_quant_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    groups,
    groups_per_row,
    stride_row,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    EVEN: tl.constexpr,  # every program has BLOCK_GROUPS groups
    UE8M0: tl.constexpr,
    NATIVE: tl.constexpr,
    STORE_CACHE: tl.constexpr,
    LOAD_EVICTION: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    offs = tl.arange(0, BLOCK_SIZE)
    live = group < groups
    if CONTIGUOUS:
        start = group * BLOCK_SIZE
    else:
        start = (group // groups_per_row) * stride_row + (group % groups_per_row) * BLOCK_SIZE
    x_ptrs = x_ptr + start[:, None] + offs[None, :]
    if EVEN:  # a mask costs 0.5 us of 26
        x = tl.load(x_ptrs, eviction_policy=LOAD_EVICTION)
    else:
        x = tl.load(x_ptrs, mask=live[:, None], other=0.0, eviction_policy=LOAD_EVICTION)
    x = x.to(tl.float32)
    # Triton's maximum passes over NaN, and so does the definition.
    scale = block_scale(tl.max(tl.abs(x), axis=1), UE8M0)
    inverse = tl.div_rn(1.0, scale)
    codes = fp32_to_e4m3(divide(x, scale[:, None], inverse[:, None]), NATIVE)
    codes_ptrs = codes_ptr + group[:, None] * BLOCK_SIZE + offs[None, :]
    if EVEN:
        tl.store(codes_ptrs, codes, cache_modifier=STORE_CACHE)
        tl.store(scales_ptr + group, scale)
    else:
        tl.store(codes_ptrs, codes, mask=live[:, None], cache_modifier=STORE_CACHE)
        tl.store(scales_ptr + group, scale, mask=live)


@triton.jit
def _weight_dequant_kernel(
    w_ptr,
    scales_ptr,
    out_ptr,
    rows,
    columns,
    column_blocks,
    stride_w,
    stride_s,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    NARROW: tl.constexpr,
    NATIVE: tl.constexpr,
    STORE_CACHE: tl.constexpr,
):
    pid = tl.program_id(0)
    first = (pid // column_blocks) * BLOCK_ROWS
    offs_m = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    offs_n = (pid % column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    live = (offs_m[:, None] < rows) & (offs_n[None, :] < columns)
    offs_w = offs_m[:, None] * stride_w + offs_n[None, :]
    if NARROW:
        offs_w = tl.max_contiguous(offs_w, (1, 8))
    codes = tl.load(w_ptr + offs_w, mask=live, other=0)
    scales_ptr += (first // BLOCK_SIZE).to(tl.int64) * stride_s
    if BLOCK_COLUMNS == BLOCK_SIZE:
        out = e4m3_to_fp32(codes, NATIVE) * tl.load(scales_ptr + pid % column_blocks)
    else:
        scale = tl.load(scales_ptr + offs_n // BLOCK_SIZE, mask=offs_n < columns, other=0.0)
        out = e4m3_to_fp32(codes, NATIVE) * scale[None, :]
    out_ptrs = out_ptr + offs_m[:, None] * columns + offs_n[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=live, cache_modifier=STORE_CACHE)


_ACT_QUANT = Launches(_act_quant_kernel)
_WEIGHT_DEQUANT = Launches(_weight_dequant_kernel)


def launch_act_quant(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    block_size: int,
    ue8m0: bool,
    config: ActQuantConfig | None = None,
) -> None:
    """Quantize `x` into `codes` and `scales`, both contiguous."""
    key = (x.shape, x.stride(), x.dtype, block_size, ue8m0, config)
    if x.is_cuda and _ACT_QUANT.again(key, x.device, (x, codes, scales)):
        return
    groups = scales.numel()
    if groups == 0:
        return
    config = config or act_quant_config(x.numel())
    rows = x.reshape(-1, x.shape[-1])
    if rows.data_ptr() != x.data_ptr():  # rows are not evenly spaced, and this is a copy: the launch is another
        launch_act_quant(rows, codes, scales, block_size=block_size, ue8m0=ue8m0, config=config)
        return
    block_groups = max(config.elements // block_size, 1)
    _ACT_QUANT.first(
        key,
        x.device,
        (triton.cdiv(groups, block_groups), 1, 1),
        (rows, codes.view(torch.uint8), scales),
        (groups, rows.shape[1] // block_size, rows.stride(0)),
        {
            "BLOCK_SIZE": block_size,
            "BLOCK_GROUPS": block_groups,
            "CONTIGUOUS": rows.is_contiguous(),
            "EVEN": groups % block_groups == 0,
            "UE8M0": ue8m0,
            "NATIVE": has_e4m3(x.device),
            "STORE_CACHE": ".cs" if config.streaming else "",
            "LOAD_EVICTION": "evict_first" if config.evict_first else "",
        },
        num_warps=config.num_warps,
    )


def launch_weight_dequant(
    w: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    *,
    block_size: int,
    config: WeightDequantConfig | None = None,
) -> None:
    """Dequantize `w` into `out`, contiguous."""
    key = (w.shape, w.stride(), scales.stride(), out.dtype, block_size, config)
    if w.is_cuda and _WEIGHT_DEQUANT.again(key, w.device, (w, scales, out)):
        return
    rows, columns = w.shape
    if out.numel() == 0:
        return
    config = config or WeightDequantConfig()
    block_rows = min(config.block_rows, block_size)
    block_columns = max(config.block_columns, block_size)
    column_blocks = triton.cdiv(columns, block_columns)
    _WEIGHT_DEQUANT.first(
        key,
        w.device,
        (triton.cdiv(rows, block_rows) * column_blocks, 1, 1),
        (w.view(torch.uint8), scales, out),
        (rows, columns, column_blocks, w.stride(0), scales.stride(0)),
        {
            "BLOCK_SIZE": block_size,
            "BLOCK_ROWS": block_rows,
            "BLOCK_COLUMNS": block_columns,
            "NARROW": config.narrow,
            "NATIVE": has_e4m3(w.device),
            "STORE_CACHE": ".cs" if config.streaming else "",
        },
        num_warps=config.num_warps,
    )
