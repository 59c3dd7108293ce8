"""The layer's linear maps, with weights in bfloat16 or in float8 with block scales."""

import torch
from torch import nn
from torch.nn import functional as F

from mlakit.quant import act_quant, fp8_gemm, weight_dequant, weight_quant

_BLOCK = 128


class Linear(nn.Module):
    """y = x @ weight.T, without a bias, as DeepSeek's checkpoints store it.

    With `dtype` "fp8" the weight is float8_e4m3fn [out, in] beside `scale` [ceil(out / 128), ceil(in / 128)] float32,
    and is multiplied as `gemm_impl` says: "bf16" dequantizes it to the activations' dtype, "fp8" quantizes the
    activations in runs of 128 (a width that is no multiple of 128, and a gradient, take the former). A float8 weight is
    frozen: gradients flow to the activations only.

    Source: DeepSeek-V3, inference/model.py.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: str = "bf16",
        gemm_impl: str = "bf16",
        scale_fmt: str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.gemm_impl, self.scale_fmt = gemm_impl, scale_fmt
        if dtype == "fp8":
            blocks = -(-out_features // _BLOCK), -(-in_features // _BLOCK)
            weight = torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn)
            self.weight = nn.Parameter(weight, requires_grad=False)
            self.scale = nn.Parameter(torch.empty(blocks, dtype=torch.float32), requires_grad=False)
        else:
            self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.bfloat16))
            self.register_parameter("scale", None)
        self.reset_parameters()

    @property
    def is_fp8(self) -> bool:
        """Whether the weight is float8."""
        return self.scale is not None

    def reset_parameters(self) -> None:
        """Normal weights of standard deviation 1/sqrt(in_features), so that outputs are as large as inputs."""
        if self.weight.is_meta:
            return
        with torch.no_grad():
            if not self.is_fp8:
                self.weight.normal_(std=self.in_features**-0.5)
                return
            full = torch.empty(self.weight.shape, device=self.weight.device).normal_(std=self.in_features**-0.5)
            codes, scale = weight_quant(full)
            self.weight.copy_(codes)
            self.scale.copy_(scale)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] in a dtype one can multiply in: the parameter itself if it is not float8."""
        if not self.is_fp8:
            return self.weight
        if dtype == torch.float64:  # for comparisons; no kernel gives that
            return weight_dequant(self.weight, self.scale, _BLOCK, torch.float32).double()
        return weight_dequant(self.weight, self.scale, _BLOCK, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        quantizes = self.is_fp8 and self.gemm_impl == "fp8" and self.in_features % _BLOCK == 0
        if quantizes and not (torch.is_grad_enabled() and x.requires_grad) and x.dtype != torch.float64:
            codes, scales = act_quant(x.contiguous(), _BLOCK, self.scale_fmt)
            return fp8_gemm(codes, scales, self.weight, self.scale, x.dtype)
        return F.linear(x, self.dequantized(x.dtype))

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.weight.dtype}"

    def _apply(self, fn, recurse=True):
        """Move between devices, but never turn float8 codes into another dtype (`model.double()`), as they would lose
        their scales' meaning.
        """
        if not self.is_fp8:
            return super()._apply(fn, recurse)

        def keeping_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keeping_dtype, recurse)
