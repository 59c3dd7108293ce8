"""The definition of `paged_attention`, in plain PyTorch."""

import torch


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from each request's new tokens to its keys and values in a paged cache.

    Args:
        q: [tokens, num_heads, head_dim], the requests' new tokens laid end to end.
        k_cache, v_cache: [pages, page_size, num_kv_heads, head_dim]; `num_heads` is a multiple of `num_kv_heads`, and
            consecutive query heads share one. What no length in `seq_lens` promises is never read.
        block_table: [batch, max_pages] int32: which page holds a request's tokens i * page_size and on.
        seq_lens: [batch] int32: the keys of each request, the new tokens' own included; 0 is allowed.
        cu_seqlens_q: [batch + 1] int32: request i holds rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of q. Rows past
            cu_seqlens_q[-1] are no request's.
        softmax_scale: multiplies the scores, as a rule 1/sqrt(head_dim).
        causal: query i of q_len sees the first `seq_len - q_len + i + 1` keys (bottom-right alignment).

    Returns:
        out [tokens, num_heads, head_dim] in q's dtype, and lse [tokens, num_heads], natural log, float32 (float64 if q
        is). A row that sees no key, or is no request's, gives zeros and -inf.

    Scores and products are computed in q's dtype and the softmax in float32, as eager PyTorch would; with float64
    inputs this is the oracle.
    """
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=accumulate)
    page_size, group = k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    bounds = cu_seqlens_q.tolist()
    for i, length in enumerate(seq_lens.tolist()):
        first, end = bounds[i], bounds[i + 1]
        if length == 0 or first == end:
            continue
        pages = block_table[i, : -(-length // page_size)].long()
        keys = k_cache[pages].flatten(0, 1)[:length].repeat_interleave(group, dim=1)
        values = v_cache[pages].flatten(0, 1)[:length].repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[first:end], keys).to(accumulate) * softmax_scale
        if causal:
            visible = length - (end - first) + torch.arange(end - first, device=q.device)[:, None]
            scores.masked_fill_(torch.arange(length, device=q.device) > visible, -torch.inf)
        row_lse = torch.logsumexp(scores, dim=-1)
        # exp(-inf - -inf) is NaN; a row without keys must be zero.
        weights = torch.exp(scores - row_lse.masked_fill(row_lse == -torch.inf, 0.0)[..., None])
        out[first:end] = torch.einsum("hqk,khd->qhd", weights.to(q.dtype), values)
        lse[first:end] = row_lse.T
    return out, lse
