"""The launchers of the indexer's Hopper kernels."""

from collections.abc import Hashable
from contextlib import nullcontext
from typing import Any

import torch

from mlakit.hardware import device_info
from mlakit.hopper_compile import warps_together
from mlakit.hopper_descriptors import descriptor_of_rows
from mlakit.indexer.hopper_config import (
    DIM,
    RESIDENT,
    TILE,
    HopperLogitsConfig,
    HopperTopkConfig,
    hopper_logits_config,
    hopper_rows_config,
    hopper_topk_config,
)
from mlakit.indexer.hopper_logits import _indexer_logits_hopper_kernel
from mlakit.indexer.hopper_topk import _select_topk_hopper_kernel
from mlakit.triton_launch import Launches

_LOGITS, _TOPK = Launches(_indexer_logits_hopper_kernel), Launches(_select_topk_hopper_kernel)


def launch_indexer_logits_hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scales: torch.Tensor,
    weights: torch.Tensor,
    k_start: torch.Tensor | None,
    k_end: torch.Tensor | None,
    out: torch.Tensor,
    config: HopperLogitsConfig | None = None,
) -> None:
    """Write the logits of every query and key to `out` [s_q, s_kv], contiguous. Both limits are given, or none.

    q [s_q, heads, dim] is contiguous.
    """
    if out.numel() == 0:
        return
    s_q, heads, dim = q.shape
    s_kv = k.shape[0]
    if config is None:
        config = hopper_rows_config(s_q, heads, s_kv, device_info(q.device).units)
    bound = k_start is not None and k_end is not None
    start, end = (k_start, k_end) if k_start is not None and k_end is not None else (k_scales, k_scales)
    descriptors = (descriptor_of_rows(q.view(-1, dim), config.queries * heads, DIM), descriptor_of_rows(k, TILE, DIM))
    key = (q.shape, k.shape, k.stride(0), weights.stride(0), bound, config)
    tensors = (*descriptors, k_scales, weights, start, end, end, out)
    if q.is_cuda and _LOGITS.again(key, q.device, tensors):
        return
    _first(key, q.device, tensors, config, (1, s_q, heads, s_kv), (weights.stride(0), 0, 0), bound, 0)


def launch_indexer_logits_paged_hopper(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    config: HopperLogitsConfig | None = None,
) -> None:
    """Write the logits of requests whose keys lie in pages to `out` [batch * q_len, max_context_len], contiguous.

    q [batch, q_len, heads, dim] and weights [batch, q_len, heads] are contiguous.
    """
    if out.numel() == 0:
        return
    batch, q_len, heads, dim = q.shape
    pages, page_size, _ = cache.shape
    columns = out.shape[1]
    if config is None:
        config = hopper_logits_config(batch, q_len, heads, columns, device_info(q.device).units)
    # Codes fill rows of 128 bytes, and so do scales: the cache is a matrix of such rows.
    page_rows = cache.stride(0) // DIM
    codes = cache.as_strided(((pages - 1) * page_rows + page_size, DIM), (DIM, 1)).view(torch.float8_e4m3fn)
    descriptors = (
        descriptor_of_rows(q.view(-1, dim), config.queries * heads, DIM), descriptor_of_rows(codes, TILE, DIM)
    )  # fmt: skip
    key = (q.shape, cache.shape, cache.stride(0), block_table.stride(0), columns, config)
    scales = cache.view(torch.float32)
    tensors = (*descriptors, scales, weights, context_lens, context_lens, block_table, out)
    if q.is_cuda and _LOGITS.again(key, q.device, tensors):
        return
    strides = (heads, block_table.stride(0), page_rows)
    _first(key, q.device, tensors, config, (batch, q_len, heads, columns), strides, True, page_size)


def _first(
    key: Hashable,
    device: torch.device,
    tensors: tuple[Any, ...],
    config: HopperLogitsConfig,
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int],
    bound: bool,
    page_size: int,
) -> None:
    """Launch for batch requests of q_len queries of so many heads and so many columns; `strides` of weights, of the
    block table and, in rows, of pages.
    """
    batch, q_len, heads, columns = shape
    q_blocks = -(-q_len // config.queries)
    blocks = batch * q_blocks
    items = blocks * -(-columns // config.split)
    unit = 4 if columns % 4 == 0 else 1
    constants = {
        "UNIT": unit,
        "HEADS": heads,
        "QUERIES": config.queries,
        "STAGES": config.stages,
        "BOUND": bound,
        "PAGE": page_size,
        "GROUPS": RESIDENT if config.shared else 1,
    }
    programs = device_info(device).units * (1 if config.shared else RESIDENT)
    numbers = (q_len, columns // unit, *strides, blocks, q_blocks, items, config.split // TILE, 0)
    with warps_together() if config.shared else nullcontext():
        _LOGITS.first(
            key, device, (min(items, programs), 1, 1), tensors, numbers, constants, num_warps=4,
            maxnreg=None if config.shared else 512 // RESIDENT,
        )  # fmt: skip


def launch_select_topk_hopper(
    logits: torch.Tensor,
    k: int,
    lengths: torch.Tensor | None,
    out: torch.Tensor,
    config: HopperTopkConfig | None = None,
) -> None:
    """Write the indices of each row's k largest to `out` [rows, k], contiguous."""
    key = (logits.shape, logits.stride(), k, lengths is None, config)
    tensors = (logits, out if lengths is None else lengths, out)
    if logits.is_cuda and _TOPK.again(key, logits.device, tensors):
        return
    if out.numel() == 0:
        return
    rows, columns = logits.shape
    if config is None:
        config = hopper_topk_config(columns, rows, device_info(logits.device).units)
    _TOPK.first(
        key,
        logits.device,
        (rows, 1, 1),
        tensors,
        (columns, k, logits.stride(0)),
        {
            "LENGTHS": lengths is not None,
            "HELD": config.held,
            "SAMPLE": config.sample,
            "WORDS": 1 << (-(-columns // (32 * config.threads)) - 1).bit_length(),
            "THREADS": config.threads,
            "AHEAD": config.ahead,
        },
        num_warps=config.threads // 32,
        maxnreg=config.max_registers,
    )
