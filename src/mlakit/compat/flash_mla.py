"""FlashMLA's functions over mlakit's operations: `import mlakit.compat.flash_mla as flash_mla`.

Signatures, defaults and conventions are FlashMLA's (flash_mla/flash_mla_interface.py of April 2026): a cache with a
head dimension, `softmax_scale` 1/sqrt(q's last dimension) unless given, no causal mask unless asked for, lse as
[batch, num_heads, q_len] with +inf where a row sees no key. Scheduling metadata is not needed here; what older and
newer callers pass is accepted and not read.
"""

from dataclasses import dataclass

import torch

from mlakit.decode import mla_decode
from mlakit.hardware import device_info

# Of an older FlashMLA: what a row of its scheduling table holds.
_METADATA_SIZE = 8


@dataclass
class FlashMLASchedMeta:
    """Stands for FlashMLA's scheduling metadata; holds nothing. Reuse it, or not, as you like."""


def get_mla_metadata(
    cache_seqlens: torch.Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    *args: object,
    **kwargs: object,
) -> tuple[FlashMLASchedMeta | torch.Tensor, torch.Tensor | None]:
    """Metadata to hand to `flash_mla_with_kvcache`.

    Args:
        cache_seqlens: [batch] int32, as older callers pass it; they get tensors, of the shapes that FlashMLA's had,
            that may be copied into the static buffers of a CUDA graph. Without it: an empty object and None, as today.
        num_q_tokens_per_head_k: query rows a key head, q_len * num_heads_q // num_heads_k.
        num_heads_k: heads of the cache.
        args, kwargs: further arguments of older versions; not read.

    Returns:
        (FlashMLASchedMeta, None), or tensors [parts, 8] and [batch + 1] int32, all zero.
    """
    if cache_seqlens is None:
        return FlashMLASchedMeta(), None
    tiles = -(-(num_q_tokens_per_head_k or 1) // 64) * (num_heads_k or 1)
    parts = max(device_info(cache_seqlens.device).units // tiles, 1)
    return cache_seqlens.new_zeros((parts, _METADATA_SIZE)), cache_seqlens.new_zeros(cache_seqlens.shape[0] + 1)


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | torch.Tensor | None = None,
    num_splits: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from a few new tokens a request to its paged latent cache.

    Args:
        q: [batch, q_len, num_heads_q, head_dim], bfloat16 or float16.
        k_cache: [pages, page_size, 1, head_dim], q's dtype. Page sizes other than FlashMLA's 64 work too.
        block_table: [batch, max_pages] int32.
        cache_seqlens: [batch] int32.
        head_dim_v: width of the value, the first entries of a key; 512 for DeepSeek's models.
        tile_scheduler_metadata, num_splits: from `get_mla_metadata`, or older versions' tensors; not read.
        softmax_scale: multiplies the scores; 1/sqrt(head_dim) by default, as FlashMLA has it. (DeepSeek's models want
            1/sqrt(192): give it.)
        causal: bottom-right aligned mask; off by default.
        is_fp8_kvcache, indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length:
            FlashMLA's sparse and fp8 decoding, which this function does not have yet: leave them out.
        out: written instead of a new tensor, [batch, q_len, num_heads_q, head_dim_v].

    Returns:
        out [batch, q_len, num_heads_q, head_dim_v] in q's dtype, and lse [batch, num_heads_q, q_len] float32, natural
        log, +inf where a row sees no key (its output is zero).

    Raises:
        ValueError: a wrong shape, dtype or device, more than one key head, or no block table or lengths.
        NotImplementedError: sparse or fp8 decoding.
    """
    sparse = (indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length)
    if is_fp8_kvcache or any(x is not None for x in sparse):
        raise NotImplementedError(
            "flash_mla_with_kvcache: sparse decoding and fp8 caches are not here yet; leave out is_fp8_kvcache, "
            "indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length and extra_topk_length"
        )
    if block_table is None or cache_seqlens is None:
        raise ValueError("block_table and cache_seqlens must be given for dense attention, got None")
    if k_cache.ndim != 4 or k_cache.shape[2] != 1:
        raise ValueError(f"k_cache must have shape [pages, page_size, 1, head_dim], got {list(k_cache.shape)}")
    result, lse = mla_decode(
        q,
        k_cache[:, :, 0],
        block_table,
        cache_seqlens,
        softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        causal=causal,
        kv_lora_rank=head_dim_v,
        out=out,
    )
    lse = torch.where(lse == -torch.inf, torch.inf, lse.float())
    return result, lse.transpose(1, 2).contiguous()
