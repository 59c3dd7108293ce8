"""The definition of `mla_prefill`, in plain PyTorch."""

from collections.abc import Iterator
from itertools import pairwise

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
            are allowed. Rows past cu_seqlens_q[-1] are no sequence's.
        cu_seqlens_k: [batch + 1] int32, the same for k and v.
        softmax_scale: multiplies the scores, as a rule 1/sqrt(qk_head_dim).
        causal: query i of q_len sees the first `k_len - q_len + i + 1` keys (bottom-right alignment).
        k_pe: [keys, 1 or num_kv_heads, rope], the last columns of the keys.

    Returns:
        out [tokens, num_heads, v_head_dim] in q's dtype, and lse [tokens, num_heads], natural log, float32 (float64 if
        q is). A row that sees no key, or is no sequence's, gives zeros and -inf.

    Scores and products are computed in q's dtype and the softmax in float32, as eager PyTorch would; with float64
    inputs this is the oracle. Differentiable by autograd.
    """
    if k_pe is not None:
        k = torch.cat([k, k_pe.expand(-1, k.shape[1], -1)], dim=-1)
    outs = []
    lses = []
    for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        scores, _, values = _scores(q[rows], k[keys], v[keys], softmax_scale, causal)
        # The gradients of a row without keys must be zero too: its scores are replaced before logsumexp.
        no_keys = (scores == -torch.inf).all(dim=-1)
        row_lse = torch.logsumexp(scores.masked_fill(no_keys[..., None], 0.0), dim=-1).masked_fill(no_keys, -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", _weights(scores, row_lse).to(q.dtype), values))
        lses.append(row_lse.T)
    spare = q.shape[0] - int(cu_seqlens_q[-1])
    outs.append(q.new_zeros((spare, q.shape[1], v.shape[-1])))
    lses.append(q.new_full((spare, q.shape[1]), -torch.inf, dtype=_accumulate(q)))
    return torch.cat(outs), torch.cat(lses)


def mla_prefill_backward_reference(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) of `mla_prefill_reference` without `k_pe`, as autograd would find them: inside an operator, where
    torch.compile does not look, there is no autograd.

    Source: FlashAttention-2 (arXiv:2307.08691), section 3.1; `dlse` acts on the gradient of a row's scores as -delta.
    """
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = (dout.to(lse.dtype) * out).sum(dim=-1)
    if dlse is not None:
        delta = delta - dlse
    for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        scores, expanded, values = _scores(q[rows], k[keys], v[keys], softmax_scale, causal)
        weights = _weights(scores, lse[rows].T)
        dweights = torch.einsum("qhd,khd->hqk", dout[rows], values).to(lse.dtype)
        dscores = (weights * (dweights - delta[rows].T[..., None]) * softmax_scale).to(q.dtype)
        dq[rows] = torch.einsum("hqk,khd->qhd", dscores, expanded)
        # Query heads that share a KV head each have a part of its gradient.
        dk[keys] = torch.einsum("hqk,qhd->khd", dscores, q[rows]).unflatten(1, (k.shape[1], -1)).sum(2)
        dv[keys] = torch.einsum("hqk,qhd->khd", weights.to(q.dtype), dout[rows]).unflatten(1, (k.shape[1], -1)).sum(2)
    return dq, dk, dv


def _accumulate(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _sequences(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of q and of k of each sequence."""
    bounds_q, bounds_k = pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist())
    for (q0, q1), (k0, k1) in zip(bounds_q, bounds_k, strict=True):
        yield slice(q0, q1), slice(k0, k1)


def _scores(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one sequence: [num_heads, q_len, k_len], -inf where a row does not see a key; and the keys and values of each
    query head.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k).to(_accumulate(q)) * softmax_scale
    if causal:
        visible = k.shape[0] - q.shape[0] + torch.arange(q.shape[0], device=q.device)[:, None]
        scores = scores.masked_fill(torch.arange(k.shape[0], device=q.device) > visible, -torch.inf)
    return scores, k, v


def _weights(scores: torch.Tensor, row_lse: torch.Tensor) -> torch.Tensor:
    # exp(-inf - -inf) is NaN; the weights of a row without keys must be zero.
    return torch.exp(scores - row_lse.masked_fill(row_lse == -torch.inf, 0.0)[..., None])
