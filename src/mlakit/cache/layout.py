"""The row of a token in the float8 cache: e4m3 codes of the latent, one float32 scale for each 128 of them, rope values
in bfloat16.

For DeepSeek's dimensions 512 + 4 * 4 + 2 * 64 = 656 bytes, the row that FlashMLA's sparse decode reads.
"""

import torch

GROUP = 128
_E4M3_MAX = 448.0
_LEAST_AMAX = 1e-4  # a group of zeros must have a scale one can divide by


def fp8_row_bytes(kv_lora_rank: int, qk_rope_head_dim: int) -> int:
    """Bytes of a token in the float8 cache.

    Raises:
        ValueError: `kv_lora_rank` is no multiple of 128.
    """
    if kv_lora_rank % GROUP:
        raise ValueError(f"the float8 cache needs a kv_lora_rank that is a multiple of {GROUP}, got {kv_lora_rank}")
    return kv_lora_rank + 4 * (kv_lora_rank // GROUP) + 2 * qk_rope_head_dim


def pack_fp8(latent: torch.Tensor, k_pe: torch.Tensor, scale_fmt: str | None = None) -> torch.Tensor:
    """Pack a latent [..., kv_lora_rank] and rope values [..., rope] into rows of the float8 cache, uint8 [..., bytes].

    A scale is max(amax, 1e-4) / 448 of its 128 values, for scale_fmt "ue8m0" rounded up to a power of two.
    """
    groups = latent.float().unflatten(-1, (-1, GROUP))
    # By a tensor: a Python number's reciprocal is what PyTorch multiplies by on a GPU, and the last bit may differ.
    scales = groups.abs().amax(dim=-1).clamp(min=_LEAST_AMAX) / groups.new_full((), _E4M3_MAX)
    if scale_fmt == "ue8m0":
        mantissa, exponent = torch.frexp(scales)
        scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).to(exponent.dtype))
    codes = (groups / scales[..., None]).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).flatten(-2)
    parts = (codes, scales, k_pe.to(torch.bfloat16))
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)


def unpack_fp8(rows: torch.Tensor, kv_lora_rank: int = 512, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Unpack rows of the float8 cache, uint8 [..., bytes], to [..., kv_lora_rank + rope] of `dtype`: code * scale,
    rounded once.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    scale_bytes = 4 * (kv_lora_rank // GROUP)
    codes, scales, rope = rows.split((kv_lora_rank, scale_bytes, rows.shape[-1] - kv_lora_rank - scale_bytes), dim=-1)
    values = codes.contiguous().view(torch.float8_e4m3fn).to(compute).unflatten(-1, (-1, GROUP))
    latent = values * scales.contiguous().view(torch.float32).to(compute)[..., None]
    return torch.cat((latent.flatten(-2).to(dtype), rope.contiguous().view(torch.bfloat16).to(dtype)), dim=-1)
