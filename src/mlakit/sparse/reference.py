"""The definitions of `mla_sparse_prefill` and `mla_sparse_decode`, in plain PyTorch."""

import torch

from mlakit.cache import unpack_fp8

# Keys gathered at once, in bytes: every query token has keys of its own, and all of them for 4096 tokens of 2048 keys
# are 9.7 GB in bfloat16.
_CHUNK_BYTES = 2**28


def mla_sparse_prefill_reference(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    *,
    softmax_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend from each query token to the keys that its row of `indices` names; the first `d_v` entries of a key are
    the value.

    Args:
        q: [s_q, h_q, d_qk].
        kv: [s_kv, h_kv, d_qk], the dtype of `q`; query head i uses key head i // (h_q / h_kv).
        indices: [s_q, h_kv, topk] int32. One below 0 or from s_kv on is ignored; one given twice counts twice.
        softmax_scale: multiplies the scores.
        d_v: width of the value.
        attn_sink: [h_q], a score that takes part in the softmax and has no value: the output is multiplied by
            exp(lse) / (exp(lse) + exp(attn_sink)). lse and max_logits are without it.
        topk_length: [s_q] int32: only the first `topk_length` indices of a token are used.

    Returns:
        out [s_q, h_q, d_v] in q's dtype; max_logits, the largest scaled score, and lse, natural log, both [s_q, h_q]
        in float32 (float64 if q is). A row without a key gives zeros, -inf and -inf.

    Scores and products are computed in q's dtype and the softmax in float32, as eager PyTorch would; with float64
    inputs this is the oracle. Source: DeepSeek-V3.2-Exp (section 2.1), with FlashMLA's options.
    """
    (s_q, h_q, d_qk), (s_kv, h_kv, _), topk = q.shape, kv.shape, indices.shape[2]
    out, max_logits, lse = _no_keys(q, d_v)
    group = h_q // h_kv
    if s_kv == 0 or topk == 0:
        return out, max_logits, lse
    for tokens in _chunks(s_q, topk * d_qk * q.element_size()):
        for head in range(h_kv):
            row = indices[tokens, head].long()
            valid = (row >= 0) & (row < s_kv) & _within(topk_length, tokens, topk, q.device)
            keys = kv[row.masked_fill(~valid, 0), head]
            heads = slice(head * group, (head + 1) * group)
            sink = None if attn_sink is None else attn_sink[heads]
            found = _attend(q[tokens, heads], keys, valid, softmax_scale, d_v, sink)
            out[tokens, heads], max_logits[tokens, heads], lse[tokens, heads] = found
    return out, max_logits, lse


def mla_sparse_decode_reference(
    q: torch.Tensor,
    cache: torch.Tensor,
    indices: torch.Tensor,
    *,
    softmax_scale: float,
    kv_lora_rank: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from each new token to the cache slots that its row of `indices` names.

    Args:
        q: [batch, q_len, num_heads, latent_dim].
        cache: [pages, page_size, latent_dim] in q's dtype, or the float8 cache, uint8 [pages, page_size, bytes]
            (`mlakit.cache.layout`), whose keys are codes times scales, not rounded. Slots that no index names are not
            read.
        indices: [batch, q_len, topk] int32, page * page_size + offset. One below 0 or past the cache is ignored; one
            given twice counts twice.
        softmax_scale: multiplies the scores.
        kv_lora_rank: width of the value.
        attn_sink: [num_heads], as in `mla_sparse_prefill_reference`.
        topk_length: [batch] or [batch, q_len] int32: only the first `topk_length` indices of a token are used.

    Returns:
        out [batch, q_len, num_heads, kv_lora_rank] in q's dtype and lse [batch, q_len, num_heads], natural log,
        float32 (float64 if q is). A row without a key gives zeros and -inf.

    Scores and products are computed in q's dtype and the softmax in float32, as eager PyTorch would; from the float8
    cache all of it in float32, or float64 if q is. A kernel may round that cache's keys to q's dtype.
    """
    batch, q_len, heads, latent_dim = q.shape
    compute = torch.promote_types(q.dtype, torch.float32) if cache.dtype == torch.uint8 else q.dtype
    page_size, topk = cache.shape[1], indices.shape[2]
    q, indices = q.flatten(0, 1), indices.flatten(0, 1)
    if topk_length is not None:
        topk_length = topk_length.view(batch, -1).expand(batch, q_len).flatten()
    out, _, lse = _no_keys(q, kv_lora_rank)
    for tokens in _chunks(batch * q_len, topk * latent_dim * compute.itemsize):
        row = indices[tokens].long()
        valid = (row >= 0) & (row < cache.shape[0] * page_size) & _within(topk_length, tokens, topk, q.device)
        if not valid.any():
            continue
        slot = row.masked_fill(~valid, 0)
        keys = cache[slot // page_size, slot % page_size]
        if cache.dtype == torch.uint8:
            keys = unpack_fp8(keys, kv_lora_rank, compute)
        found = _attend(q[tokens].to(compute), keys, valid, softmax_scale, kv_lora_rank, attn_sink)
        out[tokens], lse[tokens] = found[0].to(q.dtype), found[2]
    return out.view(batch, q_len, heads, kv_lora_rank), lse.view(batch, q_len, heads)


def _no_keys(q: torch.Tensor, d_v: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The results of rows that have no key."""
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    nothing = q.new_full(q.shape[:2], -torch.inf, dtype=accumulate)
    return q.new_zeros((*q.shape[:2], d_v)), nothing, nothing.clone()


def _chunks(tokens: int, bytes_per_token: int) -> list[slice]:
    size = max(1, _CHUNK_BYTES // max(bytes_per_token, 1))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _within(topk_length: torch.Tensor | None, tokens: slice, topk: int, device: torch.device) -> torch.Tensor:
    position = torch.arange(topk, device=device)
    return position >= 0 if topk_length is None else position < topk_length[tokens, None]


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    valid: torch.Tensor,
    softmax_scale: float,
    d_v: int,
    sink: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of q [tokens, heads, d] to each token's own keys [tokens, topk, d], where `valid` [tokens, topk]."""
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = keys.masked_fill(~valid[..., None], 0.0)  # what stands in for an ignored key may be a NaN
    scores = torch.einsum("thd,tkd->thk", q, keys).to(accumulate) * softmax_scale
    scores = scores.masked_fill(~valid[:, None], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)  # exp(-inf - -inf) is NaN; a row without keys must be zero
    weights = torch.exp(scores - finite[..., None])
    if sink is not None:
        weights = weights * torch.sigmoid(finite - sink.to(accumulate))[..., None]
    out = torch.einsum("thk,tkd->thd", weights.to(q.dtype), keys[..., :d_v])
    return out, scores.amax(dim=-1), lse
