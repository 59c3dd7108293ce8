"""The launcher of the Hopper decode kernels."""

from typing import Any

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mlakit.decode.hopper_config import RANK, ROPE, HopperConfig, HopperPlan, choose_config, plan_slots
from mlakit.decode.hopper_few import _mla_decode_few_kernel
from mlakit.decode.hopper_many import _mla_decode_many_kernel
from mlakit.hardware import device_info
from mlakit.hopper_compile import warps_together
from mlakit.hopper_counters import counters as _counters

LOG2E = 1.4426950408889634
_LAYOUT = gl.NVMMASharedLayout(128, 16, rank=2)
_MOST_LAUNCHES = 4096
# A launch by what determines it but the tensors' addresses: the compiled kernel and all arguments after the tensors.
_LAUNCHES: dict[Any, tuple[Any, HopperConfig, HopperPlan, tuple[Any, ...]]] = {}


def _descriptor(matrix: torch.Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block, _LAYOUT)


def _launch_hopper_decode(
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
    config: HopperConfig | None = None,
) -> None:
    """Fill `out` and `lse`. Inputs are valid already and `hopper_config.refusal` found nothing; partial results lie in
    memory from the caching allocator, so that a CUDA graph owns its own.
    """
    batch, q_len, heads, latent = q.shape
    if batch == 0:
        return
    device, rows = q.device, q_len * heads
    if not q.is_contiguous() or q.data_ptr() % 16:
        q = q.clone(memory_format=torch.contiguous_format)
    q_matrix = q.view(batch * rows, latent)
    pages, page_size, _ = cache.shape
    k_matrix = cache.as_strided((pages * page_size, latent), (cache.stride(1), 1))
    aligned = tuple(tensor.data_ptr() % 16 for tensor in (out, lse, seq_lens, block_table))
    key = (
        q.shape, cache.shape, cache.stride(1), block_table.shape[1], block_table.stride(0), out.stride(), q.dtype,
        softmax_scale, causal, num_splits, config, device, aligned,
    )  # fmt: skip
    known = _LAUNCHES.get(key)
    if known is None:
        capacity = block_table.shape[1] * page_size
        chosen = config or choose_config(rows=rows)
        plan = plan_slots(
            batch=batch, rows=rows, capacity=capacity, units=device_info(device).units, num_splits=num_splits,
            config=chosen,
        )  # fmt: skip
    else:
        kernel, chosen, plan, rest = known
    tile_rows = chosen.tile_rows
    partial, partial_lse, counters = out, lse, seq_lens  # never touched if nothing is split
    if plan.partials:
        partial = torch.empty((plan.partials, plan.row_tiles * tile_rows, RANK), dtype=q.dtype, device=device)
        partial_lse = torch.empty((plan.partials, plan.row_tiles * tile_rows), dtype=torch.float32, device=device)
        counters = _counters(device, batch * plan.row_tiles)
    if page_size < 64:  # a box for each page, and as wide as the swizzled rows of shared memory
        keys = (_descriptor(k_matrix, [page_size, ROPE]),) * 2
    else:
        keys = _descriptor(k_matrix, [64, RANK // 2]), _descriptor(k_matrix, [64, ROPE])
    tensors = block_table, seq_lens, out, lse, partial, partial_lse, counters
    arguments: tuple[Any, ...]
    if chosen.kernel == "many":
        arguments = _descriptor(q_matrix, [tile_rows, RANK // 2]), *keys, q, *tensors
    else:
        queries = _descriptor(q_matrix, [tile_rows, RANK // 2]), _descriptor(q_matrix, [tile_rows, ROPE])
        arguments = *queries, *keys, *tensors
    if known is not None:
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                kernel(*arguments, *rest)
        else:
            kernel(*arguments, *rest)
        return
    numbers: tuple[Any, ...] = (
        softmax_scale * LOG2E, block_table.stride(0), *out.stride()[:3], batch, q_len, heads, capacity,
    )  # fmt: skip
    numbers += (plan.row_tiles,) if chosen.kernel == "many" else ()
    numbers += (plan.slots, plan.splits, plan.most_pieces, plan.slot_items, 0)
    evenly_spaced = q_len == 1 or out.stride(1) == heads * out.stride(2)
    requests = 1 if batch == 1 else max(128, triton.next_power_of_2(batch))
    constants: tuple[Any, ...] = (causal and q_len > 1, evenly_spaced, page_size, requests, chosen.least)
    if chosen.kernel == "many":
        function, constants = _mla_decode_many_kernel, (*constants, chosen.worker_registers)
    else:
        function, constants = _mla_decode_few_kernel, (*constants, tile_rows, chosen.stages)
    grid = (plan.programs, 1, 1)
    # Cooperative where programs wait for one another: all of them must be resident.
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
