"""The launchers of the indexer's Hopper kernels."""

import torch
import triton

from mlakit.hardware import device_info
from mlakit.hopper_descriptors import descriptor_of_rows
from mlakit.indexer.hopper_config import (
    DIM,
    TILE,
    HopperLogitsConfig,
    HopperTopkConfig,
    hopper_logits_config,
    hopper_topk_config,
)
from mlakit.indexer.hopper_logits import _indexer_logits_paged_hopper_kernel
from mlakit.indexer.hopper_topk import _select_topk_hopper_kernel
from mlakit.triton_launch import Launches

_LOGITS, _TOPK = Launches(_indexer_logits_paged_hopper_kernel), Launches(_select_topk_hopper_kernel)


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
    tensors = (
        descriptor_of_rows(q.view(-1, dim), config.queries * heads, DIM), descriptor_of_rows(codes, TILE, DIM), cache,
        weights, context_lens, block_table, out,
    )  # fmt: skip
    key = (q.shape, cache.shape, cache.stride(0), block_table.stride(0), columns, config)
    if q.is_cuda and _LOGITS.again(key, q.device, tensors):
        return
    q_blocks = triton.cdiv(q_len, config.queries)
    programs_q = batch * q_blocks
    _LOGITS.first(
        key,
        q.device,
        (programs_q * triton.cdiv(columns, config.split), 1, 1),
        (*tensors[:2], cache.view(torch.float32), *tensors[3:]),
        (q_len, columns, q_blocks, programs_q, config.split, block_table.stride(0), page_rows, 0),
        {"HEADS": heads, "PAGE": page_size, "QUERIES": config.queries, "STAGES": config.stages},
        num_warps=4,
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
            "WORDS": triton.next_power_of_2(triton.cdiv(columns, 32 * config.threads)),
            "THREADS": config.threads,
            "AHEAD": config.ahead,
        },
        num_warps=config.threads // 32,
        maxnreg=config.max_registers,
    )
