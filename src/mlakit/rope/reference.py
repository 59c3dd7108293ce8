"""The definition of `apply_rope`, in plain PyTorch."""

import torch


def apply_rope_reference(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    layout: str = "interleaved",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Turn pairs of x's elements; arguments as `apply_rope`'s. Computed in float32 (float64 if x is), rounded once."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    if positions is not None:
        cos, sin = cos[positions.long()], sin[positions.long()]
    cos, sin = cos.to(compute).unsqueeze(-2), sin.to(compute).unsqueeze(-2)  # every head is turned alike
    wide = x.to(compute)
    if layout == "interleaved":
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = wide.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    result = torch.stack(turned, dim=-1).flatten(-2) if layout == "interleaved" else torch.cat(turned, dim=-1)
    return result.to(x.dtype) if out is None else out.copy_(result)
