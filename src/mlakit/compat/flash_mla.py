"""FlashMLA's functions over mlakit's operations: `import mlakit.compat.flash_mla as flash_mla`.

Signatures, defaults and conventions are FlashMLA's (flash_mla/flash_mla_interface.py of April 2026): a cache with a
head dimension, `softmax_scale` 1/sqrt(q's last dimension) unless given, no causal mask unless asked for, lse as
[batch, num_heads, q_len] with +inf where a row sees no key. Scheduling metadata is not needed here; what older and
newer callers pass is accepted and not read. FlashMLA's dense prefill is for SM100; here it runs wherever `mla_prefill`
does.
"""

from dataclasses import dataclass
from typing import Any

import torch

from mlakit.decode import mla_decode
from mlakit.hardware import device_info
from mlakit.prefill import mla_prefill
from mlakit.sparse import mla_sparse_decode, mla_sparse_prefill

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
        *args: further arguments of older versions; not read.
        **kwargs: the same by name.

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
        k_cache: [pages, page_size, 1, head_dim], q's dtype (sparse decoding too). Page sizes other than FlashMLA's 64
            work too.
        block_table: [batch, max_pages] int32.
        cache_seqlens: [batch] int32.
        head_dim_v: width of the value, the first entries of a key; 512 for DeepSeek's models.
        tile_scheduler_metadata: from `get_mla_metadata`, or an older version's tensor; not read.
        num_splits: likewise.
        softmax_scale: multiplies the scores; 1/sqrt(head_dim) by default, as FlashMLA has it. (DeepSeek's models want
            1/sqrt(192): give it.)
        causal: bottom-right aligned mask; off by default.
        is_fp8_kvcache: the cache is FlashMLA's for sparse decoding, [pages, page_size, 1, 656] of one-byte elements:
            512 e4m3 codes, 4 float32 scales and 64 bfloat16 rope values a token. Here dense decoding reads it too.
        indices: [batch, q_len, topk] int32, page * page_size + offset, -1 for none: attend to these tokens alone
            (sparse decoding; `block_table` and `cache_seqlens` may be None and are not read).
        attn_sink: [num_heads_q] float32, with `indices`: the output is multiplied by
            exp(lse) / (exp(lse) + exp(attn_sink)).
        topk_length: [batch] int32, with `indices`: only the first so many of a request's are used.
        extra_k_cache: a second cache, which is not here: leave it out.
        extra_indices_in_kvcache: leave it out.
        extra_topk_length: leave it out.
        out: written instead of a new tensor, [batch, q_len, num_heads_q, head_dim_v].

    Returns:
        out [batch, q_len, num_heads_q, head_dim_v] in q's dtype, and lse [batch, num_heads_q, q_len] float32, natural
        log, +inf where a row sees no key (its output is zero).

    Raises:
        ValueError: a wrong shape, dtype or device, more than one key head, no block table or lengths for dense
            attention, a causal mask for sparse.
        NotImplementedError: a second cache.
    """
    if any(x is not None for x in (extra_k_cache, extra_indices_in_kvcache, extra_topk_length)):
        raise NotImplementedError(
            "flash_mla_with_kvcache: leave out extra_k_cache, extra_indices_in_kvcache and extra_topk_length; a second "
            "cache is not supported"
        )
    if k_cache.ndim != 4 or k_cache.shape[2] != 1:
        raise ValueError(f"k_cache must have shape [pages, page_size, 1, head_dim], got {list(k_cache.shape)}")
    cache, scale = k_cache[:, :, 0], q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if is_fp8_kvcache:
        cache = cache.view(torch.uint8)
    if indices is not None:
        if causal:
            raise ValueError("causal must be False for sparse attention (indices given), got True")
        result, lse = mla_sparse_decode(
            q,
            cache,
            indices,
            softmax_scale=scale,
            kv_lora_rank=head_dim_v,
            attn_sink=attn_sink,
            topk_length=topk_length,
            out=out,
        )
        return result, _plus_inf_if_empty(lse).transpose(1, 2).contiguous()
    if attn_sink is not None or topk_length is not None:
        raise ValueError("attn_sink and topk_length must be None for dense attention (no indices)")
    if block_table is None or cache_seqlens is None:
        raise ValueError("block_table and cache_seqlens must be given for dense attention, got None")
    result, lse = mla_decode(
        q,
        cache,
        block_table,
        cache_seqlens,
        softmax_scale=scale,
        causal=causal,
        kv_lora_rank=head_dim_v,
        out=out,
    )
    return result, _plus_inf_if_empty(lse).transpose(1, 2).contiguous()


def flash_mla_sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    indexer_topk: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend from each query token to the keys that its indices name (sparse prefill).

    Args:
        q: [s_q, h_q, d_qk], bfloat16 or float16. Any number of heads.
        kv: [s_kv, h_kv, d_qk].
        indices: [s_q, h_kv, topk] int32, any topk; below 0 or from s_kv on means none.
        sm_scale: multiplies the scores.
        d_v: width of the value.
        attn_sink: [h_q] float32: the output is multiplied by exp(lse) / (exp(lse) + exp(attn_sink)).
        topk_length: [s_q] int32: only the first so many indices of a token are used.
        out: written instead of a new tensor, [s_q, h_q, d_v].
        indexer_topk: a second log-sum-exp, of the first so many indices, which is not here: leave it 0.

    Returns:
        out [s_q, h_q, d_v], and max_logits and lse [s_q, h_q] float32, natural log; a row without a key gives zeros,
        -inf and +inf.

    Raises:
        ValueError: a wrong shape, dtype or device.
        NotImplementedError: an indexer_topk.
    """
    if indexer_topk:
        raise NotImplementedError(f"flash_mla_sparse_fwd: indexer_topk must be 0, got {indexer_topk!r}")
    result, max_logits, lse = mla_sparse_prefill(
        q, kv, indices, softmax_scale=sm_scale, d_v=d_v, attn_sink=attn_sink, topk_length=topk_length, out=out
    )
    return result, max_logits, _plus_inf_if_empty(lse)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_qo: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend within each of several sequences laid end to end (dense prefill); differentiable in q, k and v.

    Args:
        q: [tokens, num_heads_q, head_dim_qk], bfloat16 or float16.
        k: [keys, num_heads_kv, head_dim_qk]; num_heads_q is a multiple of num_heads_kv.
        v: [keys, num_heads_kv, head_dim_v].
        cu_seqlens_qo: [batch + 1] int32: where each sequence of queries begins, and the last one ends.
        cu_seqlens_kv: [batch + 1] int32, the same for keys.
        max_seqlen_qo: the longest sequence of queries; only how the work is cut depends on it.
        max_seqlen_kv: not read.
        dropout_p: 0, as in FlashMLA.
        softmax_scale: multiplies the scores; 1/sqrt(head_dim_qk) by default.
        causal: bottom-right aligned mask; off by default.
        deterministic: False, as in FlashMLA.
        is_varlen: not read.

    Returns:
        out [tokens, num_heads_q, head_dim_v] in q's dtype, and lse [tokens, num_heads_q] float32, natural log; a row
        without a key gives zeros and -inf.

    Raises:
        ValueError: a wrong shape, dtype or device, or dropout_p or deterministic given.
    """
    if dropout_p or deterministic:
        raise ValueError(
            f"dropout_p must be 0 and deterministic False, as in FlashMLA, got {dropout_p!r} and {deterministic!r}"
        )
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return mla_prefill(
        q, k, v, cu_seqlens_qo, cu_seqlens_kv, softmax_scale=scale, causal=causal, max_seqlen_q=max_seqlen_qo
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, head_dim_qk: int, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`flash_attn_varlen_func` of qkv [tokens, num_heads, 2 * head_dim_qk + head_dim_v]: queries, keys and values side
    by side, read as they lie. The further arguments are that one's from `dropout_p` on.
    """
    q, k, v = qkv.split((head_dim_qk, head_dim_qk, qkv.shape[-1] - 2 * head_dim_qk), dim=-1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs)


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_qo: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`flash_attn_varlen_func` of kv [keys, num_heads_kv, head_dim_qk + head_dim_v]: keys and values side by side, read
    as they lie. The further arguments are that one's from `dropout_p` on.
    """
    k, v = kv.split((head_dim_qk, kv.shape[-1] - head_dim_qk), dim=-1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv, *args, **kwargs)


def _plus_inf_if_empty(lse: torch.Tensor) -> torch.Tensor:
    return torch.where(lse == -torch.inf, torch.inf, lse.float())
