"""`fp8_gemm` on Hopper: of few rows by the kernel that shares a weight out among all multiprocessors, of many by one
whose warpgroups scale while another multiplies.
"""

import torch

from mlakit.hardware import device_info

MOST_ROWS = 32
# Where tiles are long and few. One H200, microseconds, this kernel and Triton's: 32x7168x16384 40.3 and 64.7,
# 32x1536x7168 11.8 and 25.3; but 32x24576x1536 20.7 and 14.2, 16x7168x2048 16.0 and 11.7 (these two from a cold L2).
LEAST_WIDTH = 4096
MOST_COLUMNS = 16384


def launch_few_rows(
    a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor, out: torch.Tensor
) -> bool:
    """Write a @ b.T to `out`, all of them contiguous, and True; or False if this is not for this kernel."""
    n, k = b.shape
    if not a.is_cuda or n > MOST_COLUMNS or k < LEAST_WIDTH:
        return False
    if a.numel() > MOST_ROWS * k or device_info(a.device).capability != (9, 0):
        return False
    if out.numel() == 0 or k % 16 or (a.data_ptr() | b.data_ptr()) % 16:  # what bulk loads cannot read
        return False
    from mlakit.hopper_linear import launch_linear

    launch_linear(a.view(-1, k), (b,), (out.view(-1, n),), (a_scales, b_scales))
    return True


def launch_many_rows_if_faster(
    a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor, out: torch.Tensor
) -> bool:
    """As `launch_few_rows`, for many."""
    n, k = b.shape
    if not a.is_cuda or k == 0:
        return False
    info = device_info(a.device)
    if info.capability != (9, 0):
        return False
    from mlakit.quant.hopper_many_launch import launch_many_rows, many_rows_config, why_not_many_rows

    config = many_rows_config(a.numel() // k, n, k, info.units)
    if config is None or why_not_many_rows(a, b, out, info.capability):
        return False
    launch_many_rows(a, a_scales, b, b_scales, out, config)
    return True
