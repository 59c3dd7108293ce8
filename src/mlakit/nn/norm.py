"""Root mean square normalization."""

import torch
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 and rounded once to x's dtype.

    Source: arXiv:1910.07467.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim] to [..., dim]."""
        # In the activations' dtype, so that PyTorch's one kernel takes it; it computes in float32 inside.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
