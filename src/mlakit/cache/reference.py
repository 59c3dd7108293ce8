"""The definitions of `append_latent` and `gather_latent`, in plain PyTorch."""

from itertools import pairwise

import torch

from mlakit.cache.layout import pack_fp8, unpack_fp8


def append_latent_reference(
    kv: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    eps: float = 1e-6,
    rope_layout: str = "interleaved",
    scale_fmt: str | None = None,
) -> None:
    """Normalize, rotate and write new tokens into the cache; arguments as `append_latent`'s.

    Computed in float32 (float64 if kv is) and rounded once to kv's dtype; the float8 cache quantizes what was rounded.
    """
    compute = torch.float64 if kv.dtype == torch.float64 else torch.float32
    rank = norm_weight.shape[0]
    x = kv[:, :rank].to(compute)
    latent = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * norm_weight.to(compute)
    if positions is not None:
        cos, sin = cos[positions.long()], sin[positions.long()]
    k_pe = rotate(kv[:, rank:].to(compute), cos.to(compute), sin.to(compute), rope_layout)
    latent, k_pe = latent.to(kv.dtype), k_pe.to(kv.dtype)
    rows = pack_fp8(latent, k_pe, scale_fmt) if cache.dtype == torch.uint8 else torch.cat((latent, k_pe), dim=-1)
    written = slot_mapping >= 0
    slots = slot_mapping[written].long()
    cache[slots // cache.shape[1], slots % cache.shape[1]] = rows[written]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str) -> torch.Tensor:
    """Rotate pairs of x [T, D] by angles whose cos and sin are [T, D / 2].

    "interleaved" pairs elements 2i and 2i + 1 (DeepSeek's own code), "half" pairs i and i + D / 2 (GPT-NeoX, Hugging
    Face).
    """
    if layout == "interleaved":
        first, second = x[:, 0::2], x[:, 1::2]
    else:
        first, second = x.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(turned, dim=-1).flatten(-2) if layout == "interleaved" else torch.cat(turned, dim=-1)


def gather_latent_reference(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    total: int,
    *,
    starts: torch.Tensor | None = None,
    kv_lora_rank: int = 512,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Read the cached tokens of every request, end to end; arguments as `gather_latent`'s.

    Raises:
        ValueError: cu_seqlens descends, or a request has more tokens than its row of block_table.
    """
    page_size, max_pages = cache.shape[1], block_table.shape[1]
    is_fp8 = cache.dtype == torch.uint8
    bounds = cu_seqlens.tolist()
    first = starts.tolist() if starts is not None else [0] * (len(bounds) - 1)
    rows = []
    for request, (begin, end) in enumerate(pairwise(bounds)):
        if end < begin:
            raise ValueError(f"cu_seqlens must ascend, got {bounds}")
        if first[request] + end - begin > max_pages * page_size:
            raise ValueError(
                f"block_table is too short: its {max_pages} pages of {page_size} tokens hold {max_pages * page_size}, "
                f"request {request} has {first[request] + end - begin}"
            )
        positions = first[request] + torch.arange(end - begin, device=cache.device)
        pages = block_table[request].long()[positions // page_size]
        rows.append(cache[pages, positions % page_size])
    found = torch.cat(rows)[:total] if rows else cache.new_empty(0, cache.shape[2])
    values = unpack_fp8(found, kv_lora_rank, dtype) if is_fp8 else found
    out = values.new_zeros(total, values.shape[1])
    out[: values.shape[0]] = values
    return out
