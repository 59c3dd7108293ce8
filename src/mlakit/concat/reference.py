"""The definition of `concat_k`, in plain PyTorch: two ways of writing it, both differentiable and bit-exact."""

import torch


def concat_k_cat(k_nope: torch.Tensor, k_pe: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Concatenate `k_nope` [..., H, Dn] with `k_pe` [..., 1, Dr], repeated for every head, to [..., H, Dn + Dr]:
    `torch.cat` with `expand`.

    `expand` makes a view, not a copy: the rows of `k_pe` are repeated by `torch.cat` as it reads them.
    """
    parts = (k_nope, k_pe.expand(*k_nope.shape[:-1], -1))
    return torch.cat(parts, dim=-1) if out is None else torch.cat(parts, dim=-1, out=out)


def concat_k_direct_copy(k_nope: torch.Tensor, k_pe: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The same as `concat_k_cat`, by assigning the two slices of an empty tensor: two copy kernels."""
    nope = k_nope.shape[-1]
    if out is None:
        out = k_nope.new_empty((*k_nope.shape[:-1], nope + k_pe.shape[-1]))
    out[..., :nope] = k_nope
    out[..., nope:] = k_pe
    return out
