"""The launcher of the Hopper decode kernels: from caches of 16 bits, of e4m3, and of 656 bytes a token."""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from mlakit.decode.hopper_config import (
    RANK,
    ROPE,
    HopperConfig,
    choose_config,
    choose_fp8_config,
    plan_slots,
)
from mlakit.decode.hopper_few import _mla_decode_few_kernel
from mlakit.decode.hopper_fp8_few import _mla_decode_e4m3_few_kernel
from mlakit.decode.hopper_fp8_many import _mla_decode_e4m3_many_kernel
from mlakit.decode.hopper_fp8_rows import _mla_decode_rows_kernel
from mlakit.decode.hopper_many import _mla_decode_many_kernel
from mlakit.hardware import device_info
from mlakit.hopper_compile import warps_together
from mlakit.hopper_counters import counters as counters_of
from mlakit.hopper_descriptors import descriptor
from mlakit.triton_launch import LOG2E, Launches, Remembered

_FEW, _MANY = Launches(_mla_decode_few_kernel), Launches(_mla_decode_many_kernel)
_E4M3_FEW, _E4M3_MANY = Launches(_mla_decode_e4m3_few_kernel), Launches(_mla_decode_e4m3_many_kernel)
_ROWS = Launches(_mla_decode_rows_kernel)

# Bulk loads from the queries or the cache, each as one matrix: the first byte, the dtype that it is read as, length,
# width and stride of the matrix, rows and columns of a box.
_Boxes = tuple[tuple[int, torch.dtype, int, int, int, int, int], ...]


@dataclass(frozen=True, eq=False)
class _CallPlan:
    """All of a call that follows from shapes, strides, dtypes, options and device."""

    launches: Launches
    query_boxes: _Boxes
    key_boxes: _Boxes
    takes_query: bool  # its address too
    partials: int  # rows of partial results
    counters: int
    grid: tuple[int, int, int]
    numbers: tuple[int | float, ...]
    constants: dict[str, Any]
    max_registers: int


_PLANS: Remembered[_CallPlan] = Remembered()


def _plan_call(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    num_splits: int | None,
    q_scale: float,
    kv_scale: float,
    config: HopperConfig | None,
) -> _CallPlan:
    batch, q_len, heads, latent = q.shape
    pages, page_size, _ = cache.shape
    rows, capacity, slots, stride = q_len * heads, block_table.shape[1] * page_size, pages * page_size, cache.stride(1)
    packed, e4m3 = cache.dtype == torch.uint8, cache.dtype == torch.float8_e4m3fn
    if config is None:
        config = choose_fp8_config(rows=rows, packed=packed) if packed or e4m3 else choose_config(rows=rows)
    units = device_info(q.device).units
    plan = plan_slots(
        batch=batch, rows=rows, capacity=capacity, units=units, num_splits=num_splits, config=config
    )  # fmt: skip
    tile_rows, many = config.tile_rows, config.kernel == "many"

    def query_box(columns: int) -> _Boxes:
        return ((0, q.dtype, batch * rows, latent, latent, tile_rows, columns),)

    def key_box(columns: int, narrow: int) -> _Boxes:
        """Of a tile, or of each of its pages: those are only as wide as the swizzled rows of shared memory."""
        if page_size < 64:
            return ((0, cache.dtype, slots, latent, stride, page_size, narrow),)
        return ((0, cache.dtype, slots, latent, stride, 64, columns),)

    if packed:
        launches = _ROWS
        query_boxes, keys = query_box(ROPE), min(page_size, 64)
        key_boxes: _Boxes = (
            (0, torch.uint8, slots, RANK, stride, keys, RANK if page_size >= 64 else 128),
            (RANK, torch.float32, slots, 4, stride // 4, keys, 4),
            (RANK + 16, torch.bfloat16, slots, ROPE, stride // 2, keys, ROPE),
        )
    elif e4m3:
        launches = _E4M3_MANY if many else _E4M3_FEW
        width = RANK // 2 if many else RANK
        query_boxes, key_boxes = query_box(width) + query_box(ROPE), key_box(width, 128) + key_box(ROPE, ROPE)
    else:
        launches = _MANY if many else _FEW
        query_boxes = query_box(RANK // 2) if many else query_box(RANK // 2) + query_box(ROPE)
        key_boxes = key_box(RANK // 2, ROPE) + key_box(ROPE, ROPE)
    own = {"WORKER_REGISTERS": config.worker_registers} if many else {"BLOCK_R": tile_rows, "STAGES": config.stages}
    return _CallPlan(
        launches=launches,
        query_boxes=query_boxes,
        key_boxes=key_boxes,
        takes_query=packed or launches is _MANY,
        partials=plan.partials * plan.row_tiles * tile_rows,
        counters=batch * plan.row_tiles,
        grid=(plan.programs, 1, 1),
        numbers=(
            softmax_scale * q_scale * kv_scale * LOG2E, *((float(kv_scale),) if e4m3 else ()),
            block_table.stride(0), *out.stride()[:3], batch, q_len, heads, capacity,
            *(() if launches is _FEW else (plan.row_tiles,)), plan.slots, plan.splits, plan.most_pieces,
            plan.slot_items, 0,
        ),
        constants={
            "CAUSAL": causal and q_len > 1,
            "FLAT": q_len == 1 or out.stride(1) == heads * out.stride(2),
            "PAGE": page_size,
            "BLOCK_B": 1 if batch == 1 else max(128, triton.next_power_of_2(batch)),
            "LEAST": config.least,
            **own,
        },
        max_registers=config.max_registers,
    )  # fmt: skip


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
    q_scale: float = 1.0,
    kv_scale: float = 1.0,
    config: HopperConfig | None = None,
) -> None:
    """Fill `out` and `lse`. Inputs are valid already and `hopper_config.refusal` found nothing; partial results lie in
    memory from the caching allocator, so that a CUDA graph owns its own.
    """
    if q.shape[0] == 0:
        return
    device = q.device
    if not q.is_contiguous() or q.data_ptr() % 16:
        q = q.clone(memory_format=torch.contiguous_format)
    key = (
        q.shape, q.dtype, cache.shape, cache.stride(1), cache.dtype, block_table.shape[1], block_table.stride(0),
        out.stride(), out.dtype, softmax_scale, q_scale, kv_scale, causal, num_splits, config, device,
    )  # fmt: skip
    plan = _PLANS.get(key)
    if plan is None:
        plan = _plan_call(
            q, cache, block_table, out, softmax_scale, causal, num_splits, q_scale, kv_scale, config
        )  # fmt: skip
        if device.type == "cuda":
            _PLANS[key] = plan
    partial, partial_lse, counters = out, lse, seq_lens  # never touched if nothing is split
    if plan.partials:
        partial = torch.empty((plan.partials, RANK), dtype=out.dtype, device=device)
        partial_lse = torch.empty(plan.partials, dtype=torch.float32, device=device)
        counters = counters_of(device, plan.counters)
    q_at, k_at = q.data_ptr(), cache.data_ptr()
    tensors = (
        *[descriptor(q_at + first, *box) for first, *box in plan.query_boxes],
        *[descriptor(k_at + first, *box) for first, *box in plan.key_boxes],
        *((q,) if plan.takes_query else ()),
        block_table, seq_lens, out, lse, partial, partial_lse, counters,
    )  # fmt: skip
    if device.type != "cuda" or not plan.launches.again(plan, device, tensors):
        with warps_together(fixed_registers=plan.launches is _MANY):
            # Cooperative where programs wait for one another: all of them must be resident.
            plan.launches.first(
                plan, device, plan.grid, tensors, plan.numbers, plan.constants, num_warps=4,
                maxnreg=plan.max_registers, launch_cooperative_grid=plan.partials > 0,
            )  # fmt: skip
