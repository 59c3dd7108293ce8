"""The launchers of the sparse kernels."""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from mlakit.hardware import DeviceInfo, device_info
from mlakit.sparse.config import SparseConfig, choose_config, choose_splits
from mlakit.sparse.triton_attention import _mla_sparse_kernel
from mlakit.sparse.triton_combine import _mla_sparse_combine_kernel
from mlakit.triton_launch import LOG2E, Launches, Remembered


@dataclass(frozen=True)
class _CallPlan:
    """All of a call that follows from shapes, options and device."""

    grid: tuple[int, int, int]
    numbers: tuple[int | float, ...]
    constants: dict[str, Any]
    num_warps: int
    splits: int
    combine_grid: tuple[int, int, int]
    combine_numbers: tuple[int, ...]
    combine_constants: dict[str, Any]
    dependent: bool


_ATTENTION, _COMBINE = Launches(_mla_sparse_kernel), Launches(_mla_sparse_combine_kernel)
_PLANS: Remembered[_CallPlan] = Remembered()


@dataclass(frozen=True)
class _Shape:
    """A call in the kernel's terms: tokens are [batch, q_len]; strides in elements."""

    batch: int
    q_len: int
    heads: int
    key_heads: int
    rank: int
    rope: int
    topk: int
    keys: int
    page_size: int
    q_strides: tuple[int, ...]  # batch, q_len, head
    key_strides: tuple[int, ...]  # page, token, head
    index_strides: tuple[int, ...]  # batch, q_len, key head
    length_strides: tuple[int, ...]  # batch, q_len
    out_strides: tuple[int, ...]  # batch, q_len, head
    item_bytes: int
    fp8: bool
    sink: bool
    length: bool
    max_logits: bool


def _plan_call(
    shape: _Shape, softmax_scale: float, num_splits: int | None, config: SparseConfig | None, device: DeviceInfo
) -> _CallPlan:
    group = shape.heads // shape.key_heads
    config = config or choose_config(
        group=group,
        rank=shape.rank,
        rope=shape.rope,
        item_bytes=shape.item_bytes,
        fp8=shape.fp8,
        capability=device.capability,
    )
    row_tiles = shape.key_heads * triton.cdiv(group, config.block_m)
    tokens = shape.batch * shape.q_len
    splits = choose_splits(
        programs=tokens * row_tiles,
        topk=shape.topk,
        block_n=config.block_n,
        resident=device.units * config.resident,
        num_splits=num_splits,
    )
    # From sm_90 on the combine grid may be brought up while the attention grid drains.
    dependent = splits > 1 and device.capability is not None and device.capability[0] >= 9
    block_c = min(128, shape.rank)
    strides = (
        *shape.q_strides, shape.key_strides[0], shape.key_strides[2], *shape.index_strides, *shape.length_strides,
        *shape.out_strides,
    )  # fmt: skip
    shared = {"RANK": shape.rank, "SINK": shape.sink, "DEPENDENT": dependent}
    return _CallPlan(
        grid=(tokens * splits * row_tiles, 1, 1),
        numbers=(
            softmax_scale * LOG2E, *strides, shape.q_len, shape.heads, group, row_tiles, shape.topk,
            min(shape.keys, 2**31 - 1), splits,
        ),
        constants={
            "STRIDE_KT": shape.key_strides[1],
            "ROPE": shape.rope,
            "FP8": shape.fp8,
            "NATIVE": device.capability is not None and device.capability >= (8, 9),
            "PAGE_SIZE": shape.page_size,
            "LENGTH": shape.length,
            "MAX_LOGITS": shape.max_logits,
            "SPLIT": splits > 1,
            "WGMMA": config.wgmma,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "STAGES": config.num_stages,
            **shared,
        },
        num_warps=config.num_warps,
        splits=splits,
        combine_grid=(tokens * shape.heads, shape.rank // block_c, 1),
        combine_numbers=(*shape.out_strides, shape.q_len, shape.heads, splits),
        combine_constants={"BLOCK_P": max(2, triton.next_power_of_2(splits)), "BLOCK_C": block_c, **shared},
        dependent=dependent,
    )  # fmt: skip


def _launch(
    shape_key: tuple[Any, ...],
    make_shape: Any,
    tensors: tuple[torch.Tensor, ...],
    softmax_scale: float,
    num_splits: int | None,
    config: SparseConfig | None,
) -> None:
    """Run both kernels. `tensors`: q, keys, indices, sink, length, out, max_logits, lse; the workspace comes from the
    caching allocator, so that a CUDA graph owns its own.
    """
    q, _, _, sink, _, out, _, lse = tensors
    device = q.device
    key = (shape_key, softmax_scale, num_splits, config, device)
    plan = _PLANS.get(key)
    if plan is None:
        plan = _plan_call(make_shape(), softmax_scale, num_splits, config, device_info(device))
        if device.type == "cuda":
            _PLANS[key] = plan
    if plan.grid[0] == 0:
        return
    partial, partial_lse = out, lse  # never touched if nothing is split; a kernel argument needs some pointer
    if plan.splits > 1:
        pieces = q.numel() // q.shape[-1] * plan.splits
        partial = torch.empty((pieces, out.shape[-1]), dtype=torch.float32, device=device)
        partial_lse = torch.empty(pieces, dtype=torch.float32, device=device)
    everything = (*tensors, partial, partial_lse)
    if device.type != "cuda" or not _ATTENTION.again(key, device, everything):
        _ATTENTION.first(key, device, plan.grid, everything, plan.numbers, plan.constants, num_warps=plan.num_warps)
    if plan.splits == 1:
        return
    merged = (partial, partial_lse, sink, out, lse)
    if device.type != "cuda" or not _COMBINE.again(key, device, merged):
        pdl = {"launch_pdl": True} if plan.dependent else {}
        numbers, constants = plan.combine_numbers, plan.combine_constants
        _COMBINE.first(key, device, plan.combine_grid, merged, numbers, constants, num_warps=4, **pdl)


def _launch_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    out: torch.Tensor,
    max_logits: torch.Tensor,
    lse: torch.Tensor,
    *,
    softmax_scale: float,
    config: SparseConfig | None = None,
) -> None:
    """Fill `out`, `max_logits` and `lse`. Inputs are valid already."""
    sink, length = q if attn_sink is None else attn_sink, indices if topk_length is None else topk_length
    q_strides, kv_strides, index_strides, out_strides = q.stride(), kv.stride(), indices.stride(), out.stride()
    key = (
        "prefill", q.shape, q_strides, kv.shape, kv_strides, indices.shape, index_strides, out.shape, out_strides,
        q.dtype, attn_sink is None, None if topk_length is None else topk_length.stride(),
    )  # fmt: skip

    def shape() -> _Shape:
        s_q, h_q, d_qk = q.shape
        return _Shape(
            batch=s_q,
            q_len=1,
            heads=h_q,
            key_heads=kv.shape[1],
            rank=out.shape[2],
            rope=d_qk - out.shape[2],
            topk=indices.shape[2],
            keys=kv.shape[0],
            page_size=0,
            q_strides=(q_strides[0], 0, q_strides[1]),
            key_strides=(0, *kv_strides[:2]),
            index_strides=(index_strides[0], 0, index_strides[1]),
            length_strides=(length.stride(0), 0),
            out_strides=(out_strides[0], 0, out_strides[1]),
            item_bytes=q.element_size(),
            fp8=False,
            sink=attn_sink is not None,
            length=topk_length is not None,
            max_logits=True,
        )

    tensors = (q, kv, indices, sink, length, out, max_logits, lse)
    _launch(key, shape, tensors, softmax_scale, 1, config)


def _launch_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    indices: torch.Tensor,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    softmax_scale: float,
    num_splits: int | None,
    config: SparseConfig | None = None,
) -> None:
    """Fill `out` and `lse`. Inputs are valid already."""
    sink, length = q if attn_sink is None else attn_sink, indices if topk_length is None else topk_length
    q_strides, key_strides, index_strides, out_strides = q.stride(), cache.stride(), indices.stride(), out.stride()
    key = (
        "decode", q.shape, q_strides, cache.shape, key_strides, indices.shape, index_strides, out.shape, out_strides,
        q.dtype, cache.dtype, attn_sink is None, None if topk_length is None else topk_length.stride(),
    )  # fmt: skip

    def shape() -> _Shape:
        batch, q_len, heads, latent_dim = q.shape
        pages, page_size, _ = cache.shape
        in_a_row = pages == 1 or key_strides[0] == page_size * key_strides[1]
        per_token = topk_length is not None and topk_length.ndim == 2
        return _Shape(
            batch=batch,
            q_len=q_len,
            heads=heads,
            key_heads=1,
            rank=out.shape[3],
            rope=latent_dim - out.shape[3],
            topk=indices.shape[2],
            keys=pages * page_size,
            page_size=0 if in_a_row else page_size,
            q_strides=q_strides[:3],
            key_strides=(*key_strides[:2], 0),
            index_strides=(*index_strides[:2], 0),
            length_strides=(length.stride(0), length.stride(1) if per_token else 0),
            out_strides=out_strides[:3],
            item_bytes=q.element_size(),
            fp8=cache.dtype == torch.uint8,
            sink=attn_sink is not None,
            length=topk_length is not None,
            max_logits=False,
        )

    tensors = (q, cache, indices, sink, length, out, lse, lse)
    _launch(key, shape, tensors, softmax_scale, num_splits, config)
