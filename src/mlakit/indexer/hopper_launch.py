"""The launchers of the indexer's Hopper kernels."""

import torch
import triton

from mlakit.hardware import device_info
from mlakit.indexer.hopper_config import HopperTopkConfig, hopper_topk_config
from mlakit.indexer.hopper_topk import _select_topk_hopper_kernel
from mlakit.triton_launch import Launches

_TOPK = Launches(_select_topk_hopper_kernel)


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
