"""The launcher of the paged attention kernels."""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from mlakit.hardware import DeviceInfo, device_info
from mlakit.paged.config import MIN_PIECE_KEYS, Kernels, PagedConfig, choose_kernels, padded_dim
from mlakit.paged.triton_split import _paged_combine_kernel, _paged_split_kernel
from mlakit.paged.triton_tiles import _paged_tiles_kernel
from mlakit.triton_launch import LOG2E, Launches, Remembered
from mlakit.triton_pieces import plan_slots
from mlakit.triton_ragged import heads_in_l2

_TILES, _SPLIT, _COMBINE = Launches(_paged_tiles_kernel), Launches(_paged_split_kernel), Launches(_paged_combine_kernel)


@dataclass(frozen=True)
class _Launch:
    """One kernel of a call: all but the tensors."""

    grid: tuple[int, int, int]
    numbers: tuple[int | float, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class _CallPlan:
    """All of a call that follows from shapes, strides, options and device."""

    tiles: _Launch | None
    split: _Launch | None
    combine: _Launch | None
    partials: tuple[int, int]  # partial results' rows, and their columns


_PLANS: Remembered[_CallPlan] = Remembered()


def _launch_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    max_seqlen_q: int | None,
    num_splits: int | None,
    kernels: Kernels | None = None,
) -> None:
    """Fill `out` and `lse`. Inputs are valid already; the workspace comes from the caching allocator, so that a CUDA
    graph owns its own. `kernels` is there for measuring.
    """
    if q.shape[0] == 0:
        return
    device = q.device
    key = (
        q.shape,
        k_cache.shape,
        block_table.shape,
        q.stride(),
        k_cache.stride(),
        v_cache.stride(),
        block_table.stride(0),
        out.stride(),
        q.dtype,
        softmax_scale,
        causal,
        max_seqlen_q,
        num_splits,
        kernels,
        device,
    )
    plan = _PLANS.get(key)
    if plan is None:
        plan = _plan_call(
            q, k_cache, v_cache, block_table, out, softmax_scale, causal, max_seqlen_q, num_splits, kernels,
            device_info(device),
        )  # fmt: skip
        if device.type == "cuda":
            _PLANS[key] = plan
    tensors = (q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, out, lse)
    if plan.tiles is not None:
        _run(_TILES, plan.tiles, key, device, tensors)
    if plan.split is None or plan.combine is None:
        return
    rows, columns = plan.partials
    partial = torch.empty((rows, columns), dtype=torch.float32, device=device)
    partial_lse = torch.empty(rows, dtype=torch.float32, device=device)
    _run(_SPLIT, plan.split, key, device, (*tensors, partial, partial_lse))
    _run(_COMBINE, plan.combine, key, device, (partial, partial_lse, seq_lens, cu_seqlens_q, out, lse))


def _run(
    launches: Launches, launch: _Launch, key: Any, device: torch.device, tensors: tuple[torch.Tensor, ...]
) -> None:
    if device.type != "cuda" or not launches.again(key, device, tensors):
        launches.first(key, device, launch.grid, tensors, launch.numbers, launch.constants, **launch.options)


def _plan_call(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    max_seqlen_q: int | None,
    num_splits: int | None,
    kernels: Kernels | None,
    device: DeviceInfo,
) -> _CallPlan:
    tokens, heads, head_dim = q.shape
    page_size, kv_heads = k_cache.shape[1:3]
    batch, max_pages = block_table.shape
    group, capacity = heads // kv_heads, max_pages * page_size
    kernels = kernels or choose_kernels(
        tokens=tokens,
        batch=batch,
        group=group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        capacity=capacity,
        max_seqlen_q=max_seqlen_q,
        capability=device.capability,
        units=device.units,
    )
    k_strides, v_strides = k_cache.stride()[:3], v_cache.stride()[:3]
    reads = (softmax_scale * LOG2E, *q.stride()[:2], *k_strides, *v_strides, block_table.stride(0))
    writes = out.stride()[:2]
    shared = {"GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": padded_dim(head_dim)}
    paged = {
        "CAUSAL": causal,
        "PAGE_SIZE": page_size,
        "WIDE": _last_offset(k_cache) >= 2**31 or _last_offset(v_cache) >= 2**31,
        "SAME_STRIDES": k_strides[:2] == v_strides[:2],
    }
    tiles = split = combine = None
    partials = (0, 0)
    both = kernels.split is not None and kernels.tiles is not None
    # From sm_90 on a grid may be brought up while the one before it drains.
    dependent = device.capability is not None and device.capability[0] >= 9
    if (config := kernels.tiles) is not None:
        count = tokens * group // config.block_m + batch + 1
        at_once = heads_in_l2(kv_heads, capacity, 1, 2 * head_dim * k_cache.element_size())
        constants = {
            **shared,
            **paged,
            "SPLIT_ROWS": kernels.split_rows,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "STAGES": config.num_stages,
            "BRANCH": config.branch and device.capability is not None,
            "DEPENDENT": dependent and both,
        }
        tiles = _Launch(
            (count * kv_heads, 1, 1),
            (*reads, *writes, tokens, batch, kv_heads, count, at_once, capacity),
            constants,
            _options(config),
        )
    if (config := kernels.split) is not None:
        row_tiles = triton.cdiv(kernels.split_rows, config.block_m)
        min_tiles = max(1, MIN_PIECE_KEYS // config.block_n)
        programs = kv_heads * row_tiles
        plan = plan_slots(
            batch=batch,
            programs=programs,
            capacity=capacity,
            block_n=config.block_n,
            resident=device.units * config.resident,
            min_tiles=min_tiles,
            num_splits=num_splits,
        )
        partials = (plan.partials * programs * config.block_m, padded_dim(head_dim))
        cut = {
            "BALANCED": plan.splits is None,
            # As in mla_decode: sums over the batch that meet in shared memory tell ptxas that loops are uniform; one
            # request needs none (1 us less of 23 for 8192 keys).
            "BLOCK_B": 1 if batch == 1 else max(256, triton.next_power_of_2(batch)),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "MIN_TILES": min_tiles,
            "AFTER_TILES": both,
            "DEPENDENT": dependent,
        }
        counts = (batch, kv_heads, row_tiles, plan.slots, plan.splits or 0, capacity, kernels.split_rows)
        after = {"launch_pdl": True} if dependent else {}
        split = _Launch(
            (plan.slots * programs, 1, 1),
            (*reads, *writes, *counts),
            {
                **shared,
                **paged,
                **cut,
                "STAGES": config.num_stages,
                "BRANCH": config.branch and device.capability is not None,
                "AFTER_TILES": both and dependent,
            },
            {**_options(config), **(after if both else {})},
        )
        # Most partial results that a request is likely to have: loaded at once, so that latency is paid once.
        pieces = plan.splits or triton.cdiv(plan.slots, max(batch, 1)) + 1
        few_tokens = max(1, kernels.split_rows // group)
        combine = _Launch(
            ((batch * few_tokens if both else tokens) * heads, 1, 1),
            (*writes, *counts, few_tokens if both else tokens),
            {**shared, **cut, "BLOCK_P": min(64, max(2, triton.next_power_of_2(pieces)))},
            {"num_warps": 1 if pieces <= 8 else 4, **after},
        )
    return _CallPlan(tiles, split, combine, partials)


def _last_offset(cache: torch.Tensor) -> int:
    """The furthest element of a cache from its first, rounded up to whole steps."""
    return sum(size * stride for size, stride in zip(cache.shape, cache.stride(), strict=True))


def _options(config: PagedConfig) -> dict[str, Any]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}
