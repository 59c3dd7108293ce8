"""The definition of `mla_decode`, in plain PyTorch."""

import torch

from mlakit.cache import unpack_fp8


def mla_decode_reference(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    kv_lora_rank: int = 512,
    q_scale: float = 1.0,
    kv_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from `q` to the paged latent cache; each head shares the one key, whose first `kv_lora_rank` entries are
    the value.

    Args:
        q: [batch, q_len, num_heads, latent_dim], any floating dtype; float8_e4m3fn over a cache of it.
        cache: [pages, page_size, latent_dim] in q's dtype or float8_e4m3fn, or the float8 cache of
            `mlakit.cache.layout`, uint8 [pages, page_size, bytes], whose keys are codes times scales, not rounded. What
            no length in `seq_lens` promises is never read.
        block_table: [batch, max_pages] int32: which page holds a request's tokens i * page_size and on.
        seq_lens: [batch] int32: the keys of each request, the new tokens' own included; 0 is allowed.
        softmax_scale: multiplies the scores, as a rule 1/sqrt(qk_nope_head_dim + qk_rope_head_dim).
        causal: query token i of q_len sees the first `seq_len - q_len + i + 1` keys (bottom-right alignment).
        kv_lora_rank: width of the value.
        q_scale, kv_scale: what float8_e4m3fn codes of the query and of the cache are multiplied by.

    Returns:
        out [batch, q_len, num_heads, kv_lora_rank] in q's dtype (bfloat16 if that is float8), and lse [batch, q_len,
        num_heads], natural log, float32 (float64 if q is). A row that sees no key gives zeros and -inf.

    Scores and products are computed in q's dtype (bfloat16 if that is float8) and the softmax in float32, as eager
    PyTorch would; from a cache with scales of its own all of it in float32, and a kernel may round its keys to q's
    dtype. With float64 queries this is the oracle. Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.2, with the
    up-projections absorbed.
    """
    batch, q_len, heads, _ = q.shape
    if q.dtype == torch.float8_e4m3fn:
        q = q.to(torch.bfloat16)  # exactly
    softmax_scale *= q_scale * kv_scale
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros((batch, q_len, heads, kv_lora_rank))
    lse = q.new_full((batch, q_len, heads), -torch.inf, dtype=accumulate)
    page_size = cache.shape[1]
    if cache.dtype == torch.uint8:
        q = q.to(accumulate)
    for i, length in enumerate(seq_lens.tolist()):
        if length == 0:
            continue
        table = block_table[i, : -(-length // page_size)].long()
        pages = cache[table] if cache.dtype != torch.float8_e4m3fn else cache.view(torch.uint8)[table].view(cache.dtype)
        keys = pages.flatten(0, 1)[:length]
        keys = unpack_fp8(keys, kv_lora_rank, q.dtype) if keys.dtype == torch.uint8 else keys.to(q.dtype)
        scores = torch.einsum("qhd,kd->hqk", q[i], keys).to(accumulate) * softmax_scale
        if causal:
            visible = length - q_len + torch.arange(q_len, device=q.device)[:, None]
            scores.masked_fill_(torch.arange(length, device=q.device) > visible, -torch.inf)
        row_lse = torch.logsumexp(scores, dim=-1)
        # exp(-inf - -inf) is NaN; a row without keys must be zero.
        weights = torch.exp(scores - row_lse.masked_fill(row_lse == -torch.inf, 0.0)[..., None])
        out[i] = torch.einsum("hqk,kd->qhd", weights.to(q.dtype), keys[:, :kv_lora_rank]) * kv_scale
        lse[i] = row_lse.T
    return out, lse
