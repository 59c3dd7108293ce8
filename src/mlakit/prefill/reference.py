"""The definition of `mla_prefill`, in plain PyTorch."""

import torch


def mla_prefill_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    k_pe: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend within each of several sequences laid end to end.

    Args:
        q: [tokens, num_heads, qk_head_dim].
        k: [keys, num_kv_heads, qk_head_dim]; `num_heads` is a multiple of `num_kv_heads`, and consecutive query heads
            share one. With `k_pe`, k holds the first columns alone, [keys, num_kv_heads, qk_head_dim - rope].
        v: [keys, num_kv_heads, v_head_dim].
        cu_seqlens_q: [batch + 1] int32: sequence i holds rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of q. Empty ones
            are allowed.
        cu_seqlens_k: [batch + 1] int32, the same for k and v.
        softmax_scale: multiplies the scores, as a rule 1/sqrt(qk_head_dim).
        causal: query i of q_len sees the first `k_len - q_len + i + 1` keys (bottom-right alignment).
        k_pe: [keys, 1 or num_kv_heads, rope], the last columns of the keys.

    Returns:
        out [tokens, num_heads, v_head_dim] in q's dtype, and lse [tokens, num_heads], natural log, float32 (float64 if
        q is). A row that sees no key gives zeros and -inf.

    Scores and products are computed in q's dtype and the softmax in float32, as eager PyTorch would; with float64
    inputs this is the oracle. Differentiable by autograd.
    """
    if k_pe is not None:
        k = torch.cat([k, k_pe.expand(-1, k.shape[1], -1)], dim=-1)
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    outs = []
    lses = []
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(bounds_q[:-1], bounds_q[1:], bounds_k[:-1], bounds_k[1:], strict=True):
        keys = k[k0:k1].repeat_interleave(groups, dim=1)
        values = v[k0:k1].repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], keys).to(accumulate) * softmax_scale
        if causal:
            visible = (k1 - k0) - (q1 - q0) + torch.arange(q1 - q0, device=q.device)[:, None]
            scores = scores.masked_fill(torch.arange(k1 - k0, device=q.device) > visible, -torch.inf)
        # exp(-inf - -inf) is NaN; a row without keys must be zero, and its gradients too, which is why its scores are
        # replaced before the softmax and not only after.
        no_keys = (scores == -torch.inf).all(dim=-1)
        row_lse = torch.logsumexp(scores.masked_fill(no_keys[..., None], 0.0), dim=-1).masked_fill(no_keys, -torch.inf)
        weights = torch.exp(scores - row_lse.masked_fill(no_keys, 0.0)[..., None])
        outs.append(torch.einsum("hqk,khd->qhd", weights.to(q.dtype), values))
        lses.append(row_lse.T)
    if not outs:
        return q.new_zeros((0, q.shape[1], v.shape[-1])), q.new_zeros((0, q.shape[1]), dtype=accumulate)
    return torch.cat(outs), torch.cat(lses)
