"""The launcher of the Hopper kernels."""

from dataclasses import dataclass
from typing import Any

import torch

from mlakit.hardware import device_info
from mlakit.hopper_compile import warps_together
from mlakit.hopper_counters import counters as counters_of
from mlakit.sparse.config import choose_splits
from mlakit.sparse.hopper_attention import _mla_sparse_hopper_kernel
from mlakit.sparse.hopper_config import PAIR, RANK, ROWS, HopperConfig, choose_config
from mlakit.triton_launch import LOG2E, Launches, Remembered

_ATTENTION = Launches(_mla_sparse_hopper_kernel)


@dataclass(frozen=True)
class _CallPlan:
    """All of a call that follows from shapes, strides, options and device."""

    grid: tuple[int, int, int]
    numbers: tuple[int | float, ...]
    constants: dict[str, Any]
    splits: int
    pieces: int  # rows of partial results
    counters: int  # tiles of heads of all tokens


_PLANS: Remembered[_CallPlan] = Remembered()


def _plan_call(
    q: torch.Tensor,
    keys: torch.Tensor,
    indices: torch.Tensor,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    out: torch.Tensor,
    max_logits: torch.Tensor | None,
    softmax_scale: float,
    num_splits: int | None,
    config: HopperConfig | None,
) -> _CallPlan:
    fp8 = keys.dtype == torch.uint8
    config = config or choose_config(fp8)
    units = device_info(q.device).units
    latent, heads, topk = q.shape[-1], q.shape[-2], indices.shape[-1]
    length_strides = (0, 0)
    page_size, splits = 0, 1
    if q.ndim == 4:  # decode
        batch, q_len = q.shape[:2]
        q_strides, index_strides, out_strides = q.stride()[:3], (*indices.stride()[:2], 0), out.stride()[:3]
        if topk_length is not None:
            length_strides = (topk_length.stride(0), topk_length.stride(1) if topk_length.ndim == 2 else 0)
        pages, page_size, _ = keys.shape
        page_stride, key_stride = keys.stride()[:2]
        key_heads, head_stride, total = 1, 0, pages * page_size
        if pages == 1 or page_stride == page_size * key_stride:
            page_size = 0  # pages follow one another
        splits = choose_splits(
            programs=batch * q_len * -(-heads // ROWS), topk=topk, block_n=PAIR, resident=units, num_splits=num_splits
        )
    else:
        batch, q_len = q.shape[0], 1
        q_strides, index_strides, out_strides = (
            (x.stride(0), 0, x.stride(1)) for x in (q, indices, out)
        )  # fmt: skip
        if topk_length is not None:
            length_strides = (topk_length.stride(0), 0)
        total, key_heads, _ = keys.shape
        page_stride, (key_stride, head_stride) = 0, keys.stride()[:2]
    tokens, group = batch * q_len, heads // key_heads
    row_tiles = key_heads * -(-group // ROWS)
    items = tokens * splits * row_tiles
    unit = 16 // keys.element_size()  # strides in units of 16 bytes: the compiler then knows how addresses are aligned
    return _CallPlan(
        grid=(min(items, units), 1, 1),
        numbers=(
            softmax_scale * LOG2E, *(stride // 8 for stride in q_strides), page_stride // unit, head_stride // unit,
            *index_strides, *length_strides, *out_strides, items, q_len, heads, group, row_tiles, topk,
            min(total, 2**31 - 1), splits, 0,
        ),
        constants={
            "STRIDE_KT": key_stride,
            "PAGE_SIZE": page_size,
            "FP8": fp8,
            "ROPE": latent > RANK,
            "SINK": attn_sink is not None,
            "LENGTH": topk_length is not None,
            "MAX_LOGITS": max_logits is not None,
            "SPLIT": splits > 1,
            "PARTS": 1 if fp8 else config.parts,
            "CONSUMER_REGS": config.consumer_regs,
            "PRODUCER_REGS": config.producer_regs,
        },
        splits=splits,
        pieces=tokens * splits * heads,
        counters=tokens * row_tiles,
    )  # fmt: skip


def _launch_hopper(
    q: torch.Tensor,
    keys: torch.Tensor,
    indices: torch.Tensor,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    out: torch.Tensor,
    max_logits: torch.Tensor | None,
    lse: torch.Tensor,
    *,
    softmax_scale: float,
    num_splits: int | None,
    config: HopperConfig | None = None,
) -> None:
    """Fill `out`, `max_logits` (prefill has them) and `lse`. Inputs are valid already and `hopper_config.refusal` found
    nothing. Prefill: q [tokens, heads, d], keys [s_kv, key heads, d]; decode: q [batch, q_len, heads, d], keys
    [pages, page_size, d]. Partial results lie in memory from the caching allocator, so that a CUDA graph owns its own.
    """
    device = q.device
    key = (
        q.shape, q.stride(), q.dtype, keys.shape, keys.stride(), keys.dtype, indices.shape, indices.stride(),
        out.stride(), attn_sink is None, None if topk_length is None else topk_length.stride(), softmax_scale,
        num_splits, config, device,
    )  # fmt: skip
    plan = _PLANS.get(key)
    if plan is None:
        plan = _plan_call(
            q, keys, indices, attn_sink, topk_length, out, max_logits, softmax_scale, num_splits, config
        )  # fmt: skip
        if device.type == "cuda":
            _PLANS[key] = plan
    # A kernel argument needs some pointer, also where nothing is read or written by it.
    sink, length = out if attn_sink is None else attn_sink, indices if topk_length is None else topk_length
    partial, partial_lse, counters = out, lse, indices
    if plan.splits > 1:
        partial = torch.empty((plan.pieces, RANK), dtype=out.dtype, device=device)
        partial_lse = torch.empty(plan.pieces, dtype=torch.float32, device=device)
        counters = counters_of(device, plan.counters)
    tensors = (
        q, keys, indices, length, sink, out, lse if max_logits is None else max_logits, lse, partial, partial_lse,
        counters,
    )  # fmt: skip
    if device.type != "cuda" or not _ATTENTION.again(key, device, tensors):
        with warps_together():
            # Cooperative where programs wait for one another: all of them must be resident.
            _ATTENTION.first(
                key, device, plan.grid, tensors, plan.numbers, plan.constants, num_warps=4,
                launch_cooperative_grid=plan.splits > 1,
            )  # fmt: skip
