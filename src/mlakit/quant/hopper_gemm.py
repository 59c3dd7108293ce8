"""`fp8_gemm` of few rows on Hopper, by the kernel that shares a weight out among all multiprocessors."""

import torch

from mlakit.hardware import device_info

MOST_ROWS = 32
# Above, there is a tile of the Triton kernel for every multiprocessor anyhow.
MOST_COLUMNS = 16384


def launch_few_rows(
    a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor, out: torch.Tensor
) -> bool:
    """Write a @ b.T to `out`, all of them contiguous, and True; or False if this is not for this kernel."""
    n, k = b.shape
    if not a.is_cuda or n > MOST_COLUMNS or a.numel() > MOST_ROWS * k or device_info(a.device).capability != (9, 0):
        return False
    if out.numel() == 0 or k == 0 or k % 16 or (a.data_ptr() | b.data_ptr()) % 16:  # what bulk loads cannot read
        return False
    from mlakit.hopper_linear import launch_linear

    launch_linear(a.view(-1, k), (b,), (out.view(-1, n),), (a_scales, b_scales))
    return True
