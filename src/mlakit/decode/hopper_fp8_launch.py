"""The launcher of the Hopper decode kernels for float8 caches."""

from typing import Any

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mlakit.decode.hopper_config import RANK, ROPE, HopperConfig, HopperPlan, choose_fp8_config, plan_slots
from mlakit.decode.hopper_fp8_few import _mla_decode_e4m3_few_kernel
from mlakit.decode.hopper_fp8_many import _mla_decode_e4m3_many_kernel
from mlakit.decode.hopper_fp8_rows import _mla_decode_rows_kernel
from mlakit.hardware import device_info
from mlakit.hopper_compile import warps_together
from mlakit.hopper_counters import counters as _counters

LOG2E = 1.4426950408889634
_MOST_LAUNCHES = 4096
_LAUNCHES: dict[Any, tuple[Any, HopperConfig, HopperPlan, tuple[Any, ...]]] = {}


def _descriptor(matrix: torch.Tensor, block: list[int]) -> TensorDescriptor:
    swizzled = min(block[1] * matrix.element_size(), 128)
    layout = gl.NVMMASharedLayout(swizzled if swizzled >= 32 else 0, matrix.element_size() * 8, rank=2)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block, layout)


def _e4m3_descriptors(
    q: torch.Tensor, cache: torch.Tensor, tile_rows: int, page_size: int, width: int
) -> tuple[TensorDescriptor, ...]:
    """Of the queries' latent and rope parts, and of the keys'."""
    box = [page_size, 128] if page_size < 64 else [64, width]
    return (
        _descriptor(q, [tile_rows, width]), _descriptor(q, [tile_rows, ROPE]), _descriptor(cache, box),
        _descriptor(cache, [box[0], ROPE]),
    )  # fmt: skip


def _rows_descriptors(q: torch.Tensor, cache: torch.Tensor, tile_rows: int, page_size: int) -> tuple[Any, ...]:
    """Of the queries' rope part and of the keys' codes, scales and rope parts; and the queries."""
    keys = min(page_size, 64)
    codes = cache[:, :RANK]
    scales = cache.view(torch.float32)[:, RANK // 4 : RANK // 4 + 4]
    ropes = cache.view(torch.bfloat16)[:, RANK // 2 + 8 : RANK // 2 + 8 + ROPE]
    return (
        _descriptor(q, [tile_rows, ROPE]), _descriptor(codes, [keys, RANK if page_size >= 64 else 128]),
        _descriptor(scales, [keys, 4]), _descriptor(ropes, [keys, ROPE]), q,
    )  # fmt: skip


def _launch_hopper_fp8(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    num_splits: int | None,
    q_scale: float,
    kv_scale: float,
    config: HopperConfig | None = None,
) -> None:
    """Fill `out` and `lse` as `hopper_launch._launch_hopper_decode` does: from an e4m3 query and cache, or from a
    bfloat16 query and the cache of 656 bytes a token.
    """
    batch, q_len, heads, latent = q.shape
    if batch == 0:
        return
    device, rows = q.device, q_len * heads
    if not q.is_contiguous() or q.data_ptr() % 16:
        q = q.clone(memory_format=torch.contiguous_format)
    q_matrix = q.view(batch * rows, latent)
    pages, page_size, _ = cache.shape
    k_matrix = cache.as_strided((pages * page_size, cache.shape[2]), (cache.stride(1), 1))
    aligned = tuple(tensor.data_ptr() % 16 for tensor in (out, lse, seq_lens, block_table))
    key = (
        q.shape, cache.shape, cache.stride(1), block_table.shape[1], block_table.stride(0), out.stride(), out.dtype,
        cache.dtype, softmax_scale, q_scale, kv_scale, causal, num_splits, config, device, aligned,
    )  # fmt: skip
    known = _LAUNCHES.get(key)
    packed = cache.dtype == torch.uint8
    if known is None:
        capacity = block_table.shape[1] * page_size
        chosen = config or choose_fp8_config(rows=rows, packed=packed)
        plan = plan_slots(
            batch=batch, rows=rows, capacity=capacity, units=device_info(device).units, num_splits=num_splits,
            config=chosen,
        )  # fmt: skip
    else:
        kernel, chosen, plan, rest = known
    tile_rows = chosen.tile_rows
    partial, partial_lse, counters = out, lse, seq_lens  # never touched if nothing is split
    if plan.partials:
        partial = torch.empty((plan.partials, plan.row_tiles * tile_rows, RANK), dtype=out.dtype, device=device)
        partial_lse = torch.empty((plan.partials, plan.row_tiles * tile_rows), dtype=torch.float32, device=device)
        counters = _counters(device, batch * plan.row_tiles)

    if packed:
        descriptors: tuple[Any, ...] = _rows_descriptors(q_matrix, k_matrix, tile_rows, page_size)
    else:
        width = RANK // 2 if chosen.kernel == "many" else RANK
        descriptors = _e4m3_descriptors(q_matrix, k_matrix, tile_rows, page_size, width)
    arguments = (*descriptors, block_table, seq_lens, out, lse, partial, partial_lse, counters)
    if known is not None:
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                kernel(*arguments, *rest)
        else:
            kernel(*arguments, *rest)
        return
    numbers: tuple[Any, ...] = (softmax_scale * q_scale * kv_scale * LOG2E,)
    numbers += () if packed else (float(kv_scale),)
    numbers += (
        block_table.stride(0), *out.stride()[:3], batch, q_len, heads, capacity, plan.row_tiles, plan.slots,
        plan.splits, plan.most_pieces, plan.slot_items, 0,
    )  # fmt: skip
    evenly_spaced = q_len == 1 or out.stride(1) == heads * out.stride(2)
    requests = 1 if batch == 1 else max(128, triton.next_power_of_2(batch))
    constants: tuple[Any, ...] = (causal and q_len > 1, evenly_spaced, page_size, requests, chosen.least)
    if packed:
        function, constants = _mla_decode_rows_kernel, (*constants, tile_rows, chosen.stages)
    elif chosen.kernel == "many":
        function, constants = _mla_decode_e4m3_many_kernel, (*constants, chosen.worker_registers)
    else:
        function, constants = _mla_decode_e4m3_few_kernel, (*constants, tile_rows, chosen.stages)
    grid = (plan.programs, 1, 1)
    options = {
        "num_warps": 4,
        "maxnreg": chosen.max_registers,
        "launch_cooperative_grid": plan.partials > 0,
    }
    if device.type != "cuda":
        with warps_together():
            function[grid](*arguments, *numbers, *constants, **options)
        return
    with torch.cuda.device(device), warps_together():
        compiled = function[grid](*arguments, *numbers, *constants, **options)
    if len(_LAUNCHES) >= _MOST_LAUNCHES:
        _LAUNCHES.clear()
    _LAUNCHES[key] = compiled[grid], chosen, plan, (*numbers, *constants)
