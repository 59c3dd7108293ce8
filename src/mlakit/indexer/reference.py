"""The definitions of `indexer_logits`, `indexer_logits_paged` and `select_topk`, in plain PyTorch."""

import torch

from mlakit.indexer.layout import unpack_index_cache


def indexer_logits_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scales: torch.Tensor,
    weights: torch.Tensor,
    k_start: torch.Tensor | None = None,
    k_end: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Score every key for every query: k_scale * sum over heads of weight * relu(q . k).

    Args:
        q: [s_q, heads, dim] float8_e4m3fn.
        k: [s_kv, dim] float8_e4m3fn.
        k_scales: [s_kv] float32: a key is code * scale.
        weights: [s_q, heads] float32, the scale of q in them.
        k_start: [s_q] integer: the first key of each query; None for 0.
        k_end: [s_q] integer: one past the last; None for s_kv.
        dtype: of the sums and of the result [s_q, s_kv]; keys outside a query's limits get -inf.
    """
    keys = k.to(dtype)
    logits = q.new_zeros((q.shape[0], k.shape[0]), dtype=dtype)
    for head in range(q.shape[1]):  # [s_q, heads, s_kv] at once would be 17 GB for 4096 x 8192 in float64
        logits += weights[:, head, None].to(dtype) * (q[:, head].to(dtype) @ keys.T).relu()
    logits *= k_scales.to(dtype)
    column = torch.arange(k.shape[0], device=k.device)
    if k_start is not None:
        logits = logits.masked_fill(column < k_start[:, None], -torch.inf)
    if k_end is not None:
        logits = logits.masked_fill(column >= k_end[:, None], -torch.inf)
    return logits


def indexer_logits_paged_reference(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    max_context_len: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`indexer_logits_reference` of requests whose keys lie in a paged cache.

    Args:
        q: [batch, q_len, heads, dim] float8_e4m3fn: the newest tokens of each request.
        cache: [pages, page_size, dim + 4] uint8, as `pack_index_cache` lays a page out.
        weights: [batch, q_len, heads] float32.
        block_table: [batch, blocks] integer page numbers.
        context_lens: [batch] integer: keys of each request, its newest tokens' own among them.
        max_context_len: columns of the result.
        dtype: of the sums and of the result.

    Returns:
        [batch * q_len, max_context_len]: token j of a request sees the first context_len - q_len + j + 1 keys, the
        others get -inf.
    """
    batch, q_len = q.shape[:2]
    page_size, dim = cache.shape[1], q.shape[-1]
    logits = q.new_full((batch * q_len, max_context_len), -torch.inf, dtype=dtype)
    for request, length in enumerate(context_lens.tolist()):
        length = min(length, max_context_len)
        if length < 1:
            continue
        pages = block_table[request, : -(-length // page_size)].long()
        codes, scales = unpack_index_cache(cache[pages], dim)
        ends = torch.arange(q_len, device=q.device) + length - q_len + 1
        logits[request * q_len : (request + 1) * q_len, :length] = indexer_logits_reference(
            q[request], codes.flatten(0, 1)[:length], scales.flatten()[:length], weights[request], None, ends, dtype
        )
    return logits


def select_topk_reference(logits: torch.Tensor, k: int, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """Indices of the k largest of each row, in ascending order of index.

    Args:
        logits: [rows, columns], of any floating dtype. -inf is never selected; NaN counts as larger than any number.
        k: how many; among equals the lowest index wins.
        lengths: [rows] integer: only the first of each row count; None for all of them.

    Returns:
        [rows, k] int32, rows with fewer candidates filled up with -1.
    """
    columns = logits.shape[1]
    column = torch.arange(columns, device=logits.device)
    live = ~torch.isneginf(logits)
    if lengths is not None:
        live &= column < lengths[:, None]
    # On a GPU long rows are sorted by their bits, in which NaN and zero have signs.
    values = torch.where(logits.isnan(), torch.nan, logits + 0.0).masked_fill(~live, -torch.inf)
    order = torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :k]
    # Columns that do not count sort behind all others, and come last in ascending order too.
    chosen = torch.where(live.gather(1, order), order, columns).sort(dim=-1).values
    out = logits.new_full((logits.shape[0], k), -1, dtype=torch.int32)
    out[:, : chosen.shape[1]] = torch.where(chosen < columns, chosen, -1)
    return out
