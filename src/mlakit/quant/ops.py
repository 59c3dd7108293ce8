"""torch.library operators of the Triton kernels: `mlakit::act_quant`, `weight_dequant` and `fp8_gemm`."""

import torch

# Not `custom_op`: called from Python that costs 20 us a call, and this 3.5 us.
torch.library.define("mlakit::act_quant", "(Tensor x, int block_size, str? scale_fmt) -> (Tensor, Tensor)")
torch.library.define("mlakit::weight_dequant", "(Tensor w, Tensor scales, int block_size, ScalarType dtype) -> Tensor")
torch.library.define(
    "mlakit::fp8_gemm", "(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, ScalarType dtype) -> Tensor"
)


def run_act_quant(x: torch.Tensor, block_size: int, scale_fmt: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What `mlakit::act_quant` does, without the dispatcher."""
    from mlakit.quant.triton_quant import launch_act_quant

    codes, scales = _empty_codes(x, block_size, scale_fmt)
    launch_act_quant(x, codes, scales, block_size=block_size, ue8m0=scale_fmt == "ue8m0")
    return codes, scales


@torch.library.register_fake("mlakit::act_quant")
def _empty_codes(x: torch.Tensor, block_size: int, scale_fmt: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return codes, x.new_empty((*x.shape[:-1], x.shape[-1] // block_size), dtype=torch.float32)


def run_weight_dequant(w: torch.Tensor, scales: torch.Tensor, block_size: int, dtype: torch.dtype) -> torch.Tensor:
    """What `mlakit::weight_dequant` does, without the dispatcher."""
    from mlakit.quant.triton_quant import launch_weight_dequant

    out = _empty_weight(w, scales, block_size, dtype)
    launch_weight_dequant(w, scales, out, block_size=block_size)
    return out


@torch.library.register_fake("mlakit::weight_dequant")
def _empty_weight(w: torch.Tensor, scales: torch.Tensor, block_size: int, dtype: torch.dtype) -> torch.Tensor:
    return w.new_empty(w.shape, dtype=dtype)


def run_fp8_gemm(
    a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """What `mlakit::fp8_gemm` does, without the dispatcher."""
    from mlakit.quant.hopper_gemm import launch_few_rows, launch_many_rows_if_faster
    from mlakit.quant.triton_gemm import launch_fp8_gemm

    out = _empty_product(a, a_scales, b, b_scales, dtype)
    tensors = (a, a_scales, b, b_scales, out)
    if not launch_few_rows(*tensors) and not launch_many_rows_if_faster(*tensors):
        launch_fp8_gemm(*tensors)
    return out


@torch.library.register_fake("mlakit::fp8_gemm")
def _empty_product(
    a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[0]), dtype=dtype)


for _name, _run in (("act_quant", run_act_quant), ("weight_dequant", run_weight_dequant), ("fp8_gemm", run_fp8_gemm)):
    torch.library.impl(f"mlakit::{_name}", ("cpu", "cuda"), _run)

act_quant = torch.ops.mlakit.act_quant.default
weight_dequant = torch.ops.mlakit.weight_dequant.default
fp8_gemm = torch.ops.mlakit.fp8_gemm.default
