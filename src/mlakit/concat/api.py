"""`concat_k`: validate, choose an implementation, run it."""

import torch

from mlakit.concat import ops
from mlakit.concat.reference import concat_k_cat, concat_k_direct_copy
from mlakit.dispatch import check_device, check_dtype, check_shape, choose_triton, unobserved


def concat_k(
    k_nope: torch.Tensor, k_pe: torch.Tensor, out: torch.Tensor | None = None, *, impl: str | None = None
) -> torch.Tensor:
    """Build the keys of MHA mode: every head's own part, then the rotated part that all heads share.

    Args:
        k_nope: [B, H, Dn], or [B, S, H, Dn] of B sequences, of any strides (as a rule a slice of the up-projected
            latent, whose heads hold the value behind the key) and of any dtype; float8_e4m3fn too.
        k_pe: [B, 1, Dr] or [B, S, 1, Dr], same dtype and device.
        out: [B, H, Dn + Dr] or [B, S, H, Dn + Dr] to write into, of any strides (the first tokens of a cache's
            sequences, say); it must not share memory with the inputs. No gradient flows through it.
        impl: "triton" (one kernel that reads each rotated row once), "cat" (`torch.cat` with `expand`), "direct_copy"
            (two slice assignments); None takes the first on a GPU and "cat" on a CPU.

    Returns:
        [B, H, Dn + Dr] or [B, S, H, Dn + Dr], contiguous unless `out` is given. Differentiable with respect to both
        inputs if `out` is None.

    Raises:
        ValueError: a wrong shape, dtype or device, or `out` given while a gradient is asked for.
        RuntimeError: the named `impl` cannot run here.

    Source: DeepSeek-V2 (arXiv:2405.04434), equation 18.
    """
    check_shape("k_nope", k_nope, ("B", "S", "H", "Dn") if getattr(k_nope, "ndim", 3) == 4 else ("B", "H", "Dn"))
    *tokens, heads, nope = k_nope.shape
    check_shape("k_pe", k_pe, (*tokens, 1, "Dr"))
    check_dtype("k_pe", k_pe, k_nope.dtype)
    check_device("k_pe", k_pe, k_nope.device)
    if out is not None:
        check_shape("out", out, (*tokens, heads, nope + k_pe.shape[-1]))
        check_dtype("out", out, k_nope.dtype)
        check_device("out", out, k_nope.device)
        if torch.is_grad_enabled() and (k_nope.requires_grad or k_pe.requires_grad or out.requires_grad):
            raise ValueError("out= is not differentiable: expected tensors that require no gradient, got one that does")

    wide = f"its elements are of 1, 2, 4 or 8 bytes, got {k_nope.dtype}" if k_nope.element_size() > 8 else None
    name = choose_triton("concat_k", impl, k_nope, wide, others=("cat", "direct_copy"))
    if name == "cat":
        return concat_k_cat(k_nope, k_pe, out)
    if name == "direct_copy":
        return concat_k_direct_copy(k_nope, k_pe, out)
    if out is None:
        return ops.run_concat_k(k_nope, k_pe) if unobserved(k_nope, k_pe) else ops.concat_k(k_nope, k_pe)
    (ops.run_concat_k_out if unobserved(k_nope, k_pe, out) else ops.concat_k_out)(k_nope, k_pe, out)
    return out
