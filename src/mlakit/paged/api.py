"""`paged_attention`: checks its inputs, picks an implementation, and says why one cannot run."""

import torch

from mlakit.dispatch import (
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_scale,
    check_shape,
    choose_triton,
    chooses,
    unobserved,
)
from mlakit.paged.ops import attend, attend_out, why_not

_MAX_SPLITS = 256


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    max_seqlen_q: int | None = None,
    num_splits: int | None = None,
    out: torch.Tensor | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from each request's new tokens to its keys and values in a paged cache: standard attention (MHA, GQA,
    MQA), for decode, prefill, extend and mixtures of them in one call. Nothing is gathered first.

    Args:
        q: [tokens, num_heads, head_dim], bfloat16 or float16 (any floating dtype for `impl="reference"`): the requests'
            new tokens laid end to end; head_dim up to 256.
        k_cache, v_cache: [pages, page_size, num_kv_heads, head_dim] in q's dtype; `num_heads` is a multiple of
            `num_kv_heads`, consecutive query heads share one. Any strides but the last, which is 1: both may be views
            of one tensor. What `seq_lens` does not promise is not read and may hold anything.
        block_table: [batch, max_pages] int32, the page of a request's tokens i * page_size and on; slots past its last
            page are not used.
        seq_lens: [batch] int32, the keys of each request with the new tokens' own included; 0 gives zeros and an lse
            of -inf. Lengths on a GPU are not read by the host, and may change between replays of a CUDA graph. One
            that exceeds the table's capacity is refused on a CPU, and gives that request NaN on a GPU.
        cu_seqlens_q: [batch + 1] int32, from 0 up: request i holds rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of q.
            Empty requests are allowed. Rows past cu_seqlens_q[-1] are no request's and get zeros and -inf.
        softmax_scale: multiplies the scores, as a rule 1/sqrt(head_dim); positive.
        causal: query i of q_len sees the first `seq_len - q_len + i + 1` keys (bottom-right alignment). False: all.
        max_seqlen_q: the most new tokens of a request, or any number above it. From it the kernels are chosen: without
            it a batch of decode steps pays for one that looks for prefills. A request of more tokens is refused on a
            CPU, and gives NaN or the right result on a GPU.
        num_splits: cut the keys of each request of few query rows into this many pieces, 1 to 256. None balances the
            pieces over the GPU, from shapes alone. Requests of many rows are not cut.
        out: [tokens, num_heads, head_dim] in q's dtype, wholly overwritten if given.
        impl: "triton" (compute capability 8.0 and up) or "reference"; None takes the faster that can run.

    Returns:
        out [tokens, num_heads, head_dim] in q's dtype and lse [tokens, num_heads], natural log, float32 (float64 if q
        is). The same inputs give the same bits.

    Raises:
        ValueError: a wrong shape, dtype, device, stride, option or name of an implementation, or lengths beyond what
            was promised (CPU).
        RuntimeError: the named implementation cannot run these inputs; the message says why.

    It has no gradient. Source: FlashAttention-2 (arXiv:2307.08691); pages as in PagedAttention (arXiv:2309.06180).
    """
    _check(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, softmax_scale, max_seqlen_q, num_splits, out)
    inputs = (q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q)
    options = (float(softmax_scale), causal, max_seqlen_q, num_splits, impl)
    if out is None:
        run = attend if unobserved(*inputs) else torch.ops.mlakit.paged_attention
        result, lse = run(*inputs, *options)
        return result, lse
    fill = attend_out if unobserved(*inputs, out) else torch.ops.mlakit.paged_attention_out
    return out, fill(*inputs, out, *options)


@chooses(paged_attention)
def _which(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    max_seqlen_q: int | None = None,
    num_splits: int | None = None,
    out: torch.Tensor | None = None,
    impl: str | None = None,
) -> str:
    _check(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, softmax_scale, max_seqlen_q, num_splits, out)
    return choose_triton("paged_attention", impl, q, why_not(q, k_cache, v_cache))


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    softmax_scale: float,
    max_seqlen_q: int | None,
    num_splits: int | None,
    out: torch.Tensor | None,
) -> None:
    check_shape("q", q, ("tokens", "num_heads", "head_dim"))
    _, num_heads, head_dim = q.shape
    check_shape("k_cache", k_cache, ("pages", "page_size", "num_kv_heads", head_dim))
    check_shape("v_cache", v_cache, tuple(k_cache.shape))
    page_size, num_kv_heads = k_cache.shape[1:3]
    if min(num_heads, num_kv_heads, head_dim, page_size) < 1:
        raise ValueError(
            f"heads, head_dim and page_size must be at least 1, got q {list(q.shape)}, k_cache {list(k_cache.shape)}"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads must be a multiple of k_cache's num_kv_heads {num_kv_heads}, got {num_heads}")
    check_shape("seq_lens", seq_lens, ("batch",))
    batch = seq_lens.shape[0]
    check_shape("block_table", block_table, (batch, "max_pages"))
    check_shape("cu_seqlens_q", cu_seqlens_q, (batch + 1,))
    check_dtype("q", q, torch.bfloat16, torch.float16, torch.float32, torch.float64)
    check_dtype("k_cache", k_cache, q.dtype)
    check_dtype("v_cache", v_cache, q.dtype)
    tables = (("block_table", block_table), ("seq_lens", seq_lens), ("cu_seqlens_q", cu_seqlens_q))
    for name, table in tables:
        check_dtype(name, table, torch.int32)
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), *tables):
        check_device(name, tensor, q.device)
        check_last_dim_contiguous(name, tensor)
    check_scale(softmax_scale)
    if max_seqlen_q is not None and max_seqlen_q < 0:
        raise ValueError(f"max_seqlen_q must be None or at least 0, got {max_seqlen_q}")
    if num_splits is not None and not 1 <= num_splits <= _MAX_SPLITS:
        raise ValueError(f"num_splits must be None or from 1 to {_MAX_SPLITS}, got {num_splits}")
    if out is not None:
        check_shape("out", out, tuple(q.shape))
        check_dtype("out", out, q.dtype)
        check_device("out", out, q.device)
        check_last_dim_contiguous("out", out)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_cache, v_cache)):
        raise ValueError("paged_attention has no gradient, and an input requires one; call it under torch.no_grad()")
