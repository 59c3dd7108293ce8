"""What eager PyTorch makes of e4m3 scores: the yardstick of kernels that multiply e4m3 by e4m3."""

import torch

E4M3 = torch.float8_e4m3fn


def eager_e4m3_lse(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    q_scale: float = 1.0,
    kv_scale: float = 1.0,
) -> torch.Tensor:
    """The lse of `mla_decode` over e4m3 queries and an e4m3 cache, with scores by `torch._scaled_mm`.

    Tensor cores of compute capability 9.0 add e4m3 products in some 14 bits, so that scores, and with them the lse of a
    request of few keys, are further from float64 than any rounding in the definition. All 576 are added so here
    (`use_fast_accum`): PyTorch's default sums them in parts of 128, and is wrong by a third of it.

    Args:
        q: [batch, q_len, num_heads, latent_dim] e4m3, on a GPU that multiplies it.
        cache: [pages, page_size, latent_dim] e4m3.
        block_table, seq_lens, softmax_scale, causal, q_scale, kv_scale: as for `mla_decode`.

    Returns:
        [batch, q_len, num_heads] float32, -inf where a row sees no key.
    """
    batch, q_len, heads, _ = q.shape
    page_size = cache.shape[1]
    one = torch.ones((), device=q.device)
    lse = torch.full((batch, q_len, heads), -torch.inf, device=q.device)
    for i, length in enumerate(seq_lens.tolist()):
        if length == 0:
            continue
        table = block_table[i, : -(-length // page_size)].long()
        keys = _whole_16s(cache.view(torch.uint8)[table].flatten(0, 1)[:length])
        rows = _whole_16s(q[i].view(torch.uint8).flatten(0, 1))
        product = torch._scaled_mm(rows, keys.t(), one, one, out_dtype=torch.float32, use_fast_accum=True)
        scores = product[: q_len * heads, :length].unflatten(0, (q_len, heads)) * (softmax_scale * q_scale * kv_scale)
        if causal:
            visible = length - q_len + torch.arange(q_len, device=q.device)[:, None, None]
            scores = scores.masked_fill(torch.arange(length, device=q.device) > visible, -torch.inf)
        lse[i] = scores.logsumexp(-1)
    return lse


def _whole_16s(codes: torch.Tensor) -> torch.Tensor:
    """Rows of e4m3 codes, as uint8, with zeros below them: `torch._scaled_mm` takes whole sixteens alone."""
    padded = codes.new_zeros((-(-codes.shape[0] // 16) * 16, codes.shape[1]))
    padded[: codes.shape[0]] = codes
    return padded.view(E4M3)
