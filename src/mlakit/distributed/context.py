"""`context_parallel_decode`: attention to a latent cache whose pages are spread over ranks.

Each rank attends to the keys that it holds, for all heads, and the ranks exchange partial results: a value of
`kv_lora_rank` and a log-sum-exp for each token and head, whatever the length of the context.
"""

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from mlakit.decode import mla_decode
from mlakit.dispatch import check_device, check_dtype, check_shape
from mlakit.distributed.exchange import Messages, gather_heads, message_bytes
from mlakit.merge import merge_states

HEADS = ("all", "own")
EXCHANGES = ("all_to_all", "all_gather")
# Bytes that a rank may send in vain, if that spares it copying lses, or a second collective. Four H200s, 128 heads, µs
# with the merge: all heads of 1 token gathered 21.6, swapped and gathered 36.2; of 4 tokens 28.9 and 39.7, of 8 48.8
# and 46.4. Own heads of 1 token gathered 21.3, swapped 21.9; of 4 tokens 28.5 and 24.8.
_CHEAPER_THAN_A_COPY, _CHEAPER_THAN_A_COLLECTIVE = 2**19, 2**20


def context_parallel_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    mesh: DeviceMesh,
    softmax_scale: float,
    kv_lora_rank: int = 512,
    query_heads: str = "all",
    out_heads: str | None = None,
    exchange: str | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from a few new tokens a request to a paged latent cache of which each rank holds some pages.

    Every rank of `mesh` calls it, with the same batch. As `mla_decode` it does not wait for the GPU and runs under CUDA
    graphs (call it once before capturing: that sets up NCCL's connections).

    Args:
        q: [batch, q_len, num_heads, latent_dim], as for `mla_decode`: all heads, the same on every rank; or, with
            query_heads "own", this rank's alone, which are gathered first: rank i of n has the i-th n-th of them.
        cache: [pages, page_size, latent_dim], this rank's pages.
        block_table: [batch, max_pages] int32: where this rank keeps its tokens of each request, in order.
        seq_lens: int32, the keys that this rank holds (`local_lengths` tells): [batch], and every new token sees all
            of them; or [batch, q_len], those that each new token sees, where tokens differ by new ones alone (at most
            q_len - 1). 0 is allowed, also for all.
        mesh: one-dimensional, of any number of ranks.
        softmax_scale: multiplies the scores.
        kv_lora_rank: width of the value.
        query_heads: which heads q holds, "all" or "own".
        out_heads: which heads the result is wanted for, "all" on every rank or this rank's "own"; None: those of q.
        exchange: how partial results travel. "all_to_all" sends each rank its own heads' (and gathers what is merged,
            where all are wanted), the least bytes; "all_gather" sends all of them to every rank in one collective. None
            takes "all_gather" where that is faster, as it is for a few tokens, or where the heads cannot be divided;
            else "all_to_all".
        impl: of `mla_decode`.

    Returns:
        out [batch, q_len, heads, kv_lora_rank] in q's dtype and lse [batch, q_len, heads], natural log, float32
        (float64 if q is), for all or this rank's heads. A row that sees no key on any rank gives zeros and -inf.

    Raises:
        ValueError: a wrong shape, dtype, device or option, or heads that cannot be divided over the ranks.
        RuntimeError: the named implementation cannot run these inputs, or a collective failed.

    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.2; the merge of FlashAttention (arXiv:2205.14135), section 3.1.
    """
    out_heads = query_heads if out_heads is None else out_heads
    _validate(q, cache, block_table, seq_lens, mesh, query_heads, out_heads, exchange)
    ranks = mesh.size()
    batch, q_len, given, _ = q.shape
    tokens, heads = batch * q_len, given * ranks if query_heads == "own" else given
    options: dict[str, Any] = {"softmax_scale": softmax_scale, "kv_lora_rank": kv_lora_rank, "impl": impl}
    if ranks == 1:
        return attend_locally(q, cache, block_table, seq_lens, **options)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    swaps = exchange == "all_to_all"
    if exchange is None:
        swaps = swaps_first(message_bytes(q.dtype, lse_dtype, tokens, heads, kv_lora_rank), heads, ranks, out_heads)
    queries = gather_heads(q, mesh) if query_heads == "own" else q.unflatten(2, (ranks, -1) if swaps else (1, heads))
    groups = ranks if swaps else 1  # messages that this rank writes
    messages = Messages.allocate(q, lse_dtype, groups, tokens, heads // groups, kv_lora_rank)
    inputs = cache, block_table, seq_lens
    if groups == 1:
        out, lse = messages.out.unflatten(1, (batch, q_len)), messages.lse.unflatten(1, (batch, q_len))
        attend_locally(queries.flatten(2, 3), *inputs, out=out[0], lse=lse[0], **options)
    elif q_len == 1:
        # Heads that go to different ranks as if they were different tokens: the values then lie where they are sent
        # from.
        split = queries.squeeze(1) if queries.shape[2] == groups else queries.flatten(2, 3)
        _, lse = attend_locally(split, *inputs, out=messages.out.transpose(0, 1), **options)
        messages.lse.copy_(lse.transpose(0, 1))
    else:
        out, lse = attend_locally(queries.flatten(2, 3), *inputs, **options)
        messages.out.copy_(out.flatten(0, 1).unflatten(1, (groups, heads // groups)).transpose(0, 1))
        messages.lse.copy_(lse.flatten(0, 1).unflatten(1, (groups, heads // groups)).transpose(0, 1))
    if not swaps:
        first = mesh.get_local_rank() * (heads // ranks)
        wanted = slice(first, first + heads // ranks) if out_heads == "own" else slice(None)
        out, lse = messages.gathered(mesh).merge(wanted)
    else:
        out, lse = messages.swapped(mesh).merge()
        if out_heads == "all":
            mine = Messages.allocate(q, lse_dtype, 1, tokens, heads // ranks, kv_lora_rank)
            mine.out[0].copy_(out)
            mine.lse[0].copy_(lse)
            merged = mine.gathered(mesh)
            out, lse = merged.out.transpose(0, 1).flatten(1, 2), merged.lse.transpose(0, 1).flatten(1, 2)
    return out.unflatten(0, (batch, q_len)), lse.unflatten(0, (batch, q_len))


def local_lengths(
    seq_lens: torch.Tensor,
    *,
    page_size: int,
    rank: int,
    ranks: int,
    q_len: int = 1,
    causal: bool = True,
    first: int = 0,
) -> torch.Tensor:
    """Of requests' keys, how many a rank holds where page j of a request lies on rank (first + j) % ranks.

    Args:
        seq_lens: [batch] int32, keys of each request, its new tokens' own included.
        page_size: tokens of a page.
        rank: whose.
        ranks: among how many the pages are dealt out.
        q_len: new tokens of a request.
        causal: new token i of q_len sees the first seq_len - q_len + i + 1 keys.
        first: the rank of every request's first page.

    Returns:
        int32 for `context_parallel_decode`: [batch, q_len] where new tokens see different keys, else [batch].

    Not read by the host: it may be part of a CUDA graph, whose replays find new lengths.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank must be in 0 to {ranks - 1}, got {rank}")
    if page_size < 1 or q_len < 1:
        raise ValueError(f"page_size and q_len must be at least 1, got {page_size} and {q_len}")
    visible = seq_lens
    if causal and q_len > 1:
        steps = torch.arange(1 - q_len, 1, device=seq_lens.device, dtype=seq_lens.dtype)
        visible = (seq_lens[:, None] + steps).clamp_min_(0)
    if ranks == 1:
        return visible
    # Whole rounds of pages, and what there is of this rank's page in the last one. Counted from this rank's first
    # token on, so that a request that does not reach it has -1 rounds and a whole page, which is none.
    visible = visible - (rank - first) % ranks * page_size
    rounds = torch.div(visible, page_size * ranks, rounding_mode="floor")
    return torch.add(torch.remainder(visible, page_size * ranks).clamp_max_(page_size), rounds, alpha=page_size)


def swaps_first(nbytes: int, heads: int, ranks: int, out_heads: str) -> bool:
    """Whether every rank gets its own heads' results first, where all heads' results are a message of `nbytes`."""
    if heads % ranks:
        return False
    gathered = (ranks - 1) * nbytes
    if out_heads == "own":
        return gathered - gathered // ranks > _CHEAPER_THAN_A_COPY
    return gathered - 2 * gathered // ranks > _CHEAPER_THAN_A_COLLECTIVE


def attend_locally(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    softmax_scale: float,
    kv_lora_rank: int,
    impl: str | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to what this rank holds; `out` and `lse` as for `mla_decode`."""
    batch, q_len, heads, _ = q.shape
    if cache.shape[0] == 0 or block_table.shape[1] == 0 or batch == 0:  # no key, and perhaps no memory to point at
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = q.new_empty(batch, q_len, heads, kv_lora_rank) if out is None else out
        lse = q.new_empty(q.shape[:3], dtype=lse_dtype) if lse is None else lse
        return out.zero_(), lse.fill_(-torch.inf)
    options: dict[str, Any] = {"softmax_scale": softmax_scale, "kv_lora_rank": kv_lora_rank, "impl": impl}
    if seq_lens.ndim == 1 or seq_lens.shape[1] == 1:
        return mla_decode(q, cache, block_table, seq_lens.flatten(), causal=False, out=out, lse=lse, **options)
    found = _attend_causally(q, cache, block_table, seq_lens, options)
    if out is None and lse is None:
        return found
    return found[0] if out is None else out.copy_(found[0]), found[1] if lse is None else lse.copy_(found[1])


def _attend_causally(
    q: torch.Tensor, cache: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens that see different keys: the whole pages that all of them see, for all at once, and the rest for each
    as if it were a request of its own.
    """
    batch, q_len, heads, latent = q.shape
    page_size = cache.shape[1]
    pages = torch.div(seq_lens[:, 0], page_size, rounding_mode="floor")
    out, lse = mla_decode(q, cache, block_table, pages * page_size, causal=False, **options)
    # What the first token sees of its last page, and one key more for each of the others.
    columns = -(-(page_size - 1 + q_len - 1) // page_size)
    steps = torch.arange(columns, device=q.device, dtype=torch.int32)
    picked = (pages[:, None] + steps).clamp_max_(block_table.shape[1] - 1).long()
    tail_table = block_table.gather(1, picked).repeat_interleave(q_len, dim=0, output_size=batch * q_len)
    tail_lens = (seq_lens - (pages * page_size)[:, None]).flatten()
    tail_q = q.reshape(batch * q_len, 1, heads, latent)
    tail, tail_lse = mla_decode(tail_q, cache, tail_table, tail_lens, causal=False, **options)
    states = (out.flatten(0, 1), tail.flatten(0, 1)), (lse.flatten(0, 1), tail_lse.flatten(0, 1))
    merged, merged_lse = merge_states(*states)
    return merged.view(out.shape), merged_lse.view(lse.shape)


def _validate(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    mesh: DeviceMesh,
    query_heads: str,
    out_heads: str,
    exchange: str | None,
) -> None:
    """What `mla_decode` does not see, or would see after another rank waits already."""
    for name, value in (("query_heads", query_heads), ("out_heads", out_heads)):
        if value not in HEADS:
            raise ValueError(f"{name} must be 'all' or 'own', got {value!r}")
    if exchange is not None and exchange not in EXCHANGES:
        raise ValueError(f"exchange must be None, 'all_to_all' or 'all_gather', got {exchange!r}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension (name one: mesh['cp']), got {mesh.ndim}")
    check_shape("q", q, ("batch", "q_len", "num_heads", "latent_dim"))
    batch, q_len, given, latent = q.shape
    if q_len < 1 or given < 1:
        raise ValueError(f"q must have at least one token and one head, got shape {list(q.shape)}")
    check_shape("cache", cache, ("pages", "page_size", latent))
    check_shape("block_table", block_table, (batch, "max_pages"))
    check_dtype("cache", cache, q.dtype)
    check_dtype("block_table", block_table, torch.int32)
    check_dtype("seq_lens", seq_lens, torch.int32)
    for name, tensor in (("cache", cache), ("block_table", block_table), ("seq_lens", seq_lens)):
        check_device(name, tensor, q.device)
    if tuple(seq_lens.shape) not in ((batch,), (batch, q_len)):
        raise ValueError(f"seq_lens must have shape [{batch}] or [{batch}, {q_len}], got {list(seq_lens.shape)}")
    divided = out_heads == "own" or exchange == "all_to_all"
    if query_heads == "all" and divided and given % mesh.size():
        raise ValueError(f"{given} heads cannot be divided over {mesh.size()} ranks; expected a multiple of that")
