"""`indexer_logits`, `indexer_logits_paged` and `select_topk`: validate, choose an implementation, run it."""

import torch

from mlakit.dispatch import check_device, check_dtype, check_last_dim_contiguous, check_shape, unobserved
from mlakit.indexer import ops
from mlakit.indexer.layout import SCALE_BYTES
from mlakit.indexer.reference import indexer_logits_reference, select_topk_reference

_MOST_K = 4096


def indexer_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scales: torch.Tensor,
    weights: torch.Tensor,
    k_start: torch.Tensor | None = None,
    k_end: torch.Tensor | None = None,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """Score every key for every query with DeepSeek's lightning indexer: k_scale * sum over heads of weight *
    relu(q . k).

    Args:
        q: [s_q, heads, dim] float8_e4m3fn, stride 1 in the last dimension (DeepSeek-V3.2: 64 heads of 128).
        k: [s_kv, dim] float8_e4m3fn, stride 1 in the last dimension.
        k_scales: [s_kv] float32, contiguous; a key is code * scale.
        weights: [s_q, heads] float32, stride 1 in the last dimension; the scale of q belongs in them
            (`quantize_queries`).
        k_start: [s_q] int32: the first key that each query sees; None for 0.
        k_end: [s_q] int32: one past the last; None for s_kv. A query that sees none gets a row of -inf.
        impl: "hopper" (Gluon, compute capability 9.0; 32, 64 or 128 heads of 128, contiguous queries), "triton" or
            "reference"; None takes the first that can run.

    Returns:
        [s_q, s_kv] float32, contiguous; -inf where a query does not see a key. NaN stays NaN.

    Raises:
        ValueError: a wrong shape, dtype, device or stride.
        RuntimeError: the named `impl` cannot run these inputs here.

    Source: DeepSeek-V3.2-Exp report, equation 1; DeepGEMM's `fp8_mqa_logits`.
    """
    check_shape("q", q, ("s_q", "heads", "dim"))
    s_q, heads, dim = q.shape
    check_dtype("q", q, torch.float8_e4m3fn)
    check_last_dim_contiguous("q", q)
    check_shape("k", k, ("s_kv", dim))
    check_dtype("k", k, torch.float8_e4m3fn)
    check_device("k", k, q.device)
    check_last_dim_contiguous("k", k)
    _check_floats("k_scales", k_scales, (k.shape[0],), q.device)
    _check_floats("weights", weights, (s_q, heads), q.device)
    for name, limit in (("k_start", k_start), ("k_end", k_end)):
        if limit is not None:
            _check_integers(name, limit, (s_q,), q.device)
    name = ops.choose_kernel("indexer_logits", impl, q, ops.unsuitable(heads, dim))
    if name != "reference":
        if k_start is None and k_end is not None:
            k_start = torch.zeros_like(k_end)
        elif k_end is None and k_start is not None:
            k_end = torch.full_like(k_start, k.shape[0])
        limits = () if k_start is None or k_end is None else (k_start, k_end)
        run = ops.run_indexer_logits if unobserved(q, k, k_scales, weights, *limits) else ops.indexer_logits
        return run(q, k, k_scales, weights, k_start, k_end, name)
    return indexer_logits_reference(q, k, k_scales, weights, k_start, k_end)


def indexer_logits_paged(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    max_context_len: int,
    impl: str | None = None,
) -> torch.Tensor:
    """`indexer_logits` of requests whose keys lie in a paged cache; queries are the newest tokens of each request.

    Args:
        q: [batch, q_len, heads, dim] float8_e4m3fn, contiguous.
        cache: [pages, page_size, dim + 4] uint8, contiguous in the last two dimensions, laid out as `pack_index_cache`
            does: all codes of a page, then all its scales.
        weights: [batch, q_len, heads] float32, contiguous.
        block_table: [batch, blocks] int32, stride 1 in the last dimension. Slots past a request's last page are not
            read.
        context_lens: [batch] int32: keys of each request, its newest tokens' own among them; at most blocks *
            page_size.
        max_context_len: columns of the result, at least the longest context.
        impl: "hopper" (Gluon, compute capability 9.0; 32, 64 or 128 heads of 128, pages of a multiple of 64 tokens),
            "triton" or "reference" (which waits for the lengths); None takes the first that can run.

    Returns:
        [batch * q_len, max_context_len] float32, contiguous. Token j of a request sees the first context_len - q_len +
        j + 1 keys, the others get -inf.

    Raises:
        ValueError: a wrong shape, dtype, device or stride.
        RuntimeError: the named `impl` cannot run these inputs here.

    Source: DeepGEMM's `fp8_paged_mqa_logits`.
    """
    check_shape("q", q, ("batch", "q_len", "heads", "dim"))
    batch, q_len, heads, dim = q.shape
    check_dtype("q", q, torch.float8_e4m3fn)
    check_shape("cache", cache, ("pages", "page_size", dim + SCALE_BYTES))
    check_dtype("cache", cache, torch.uint8)
    check_device("cache", cache, q.device)
    if cache.shape[0] and not cache[0].is_contiguous():
        raise ValueError(f"cache must have contiguous pages, got strides {list(cache.stride())}")
    _check_floats("weights", weights, (batch, q_len, heads), q.device)
    check_shape("block_table", block_table, (batch, "blocks"))
    check_dtype("block_table", block_table, torch.int32)
    check_device("block_table", block_table, q.device)
    check_last_dim_contiguous("block_table", block_table)
    _check_integers("context_lens", context_lens, (batch,), q.device)
    for name, tensor in (("q", q), ("weights", weights)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")
    if max_context_len < 0:
        raise ValueError(f"max_context_len must not be negative, got {max_context_len}")
    tensors = (q, cache, weights, block_table, context_lens)
    run = ops.run_indexer_logits_paged if unobserved(*tensors) else ops.indexer_logits_paged
    return run(*tensors, max_context_len, impl)


def select_topk(
    logits: torch.Tensor, k: int, lengths: torch.Tensor | None = None, *, impl: str | None = None
) -> torch.Tensor:
    """Indices of the k largest of each row: exact, and the same at every call.

    Args:
        logits: [rows, columns] float32, stride 1 in the last dimension. -inf is never selected; NaN counts as larger
            than any number, -0 as 0. Among equals the lowest index wins.
        k: how many, at least 1.
        lengths: [rows] int32: only the first of each row count, what lies behind is not looked at; None for all.
        impl: "hopper" (Gluon, compute capability 9.0, k up to 2048 of up to 163840 columns), "triton" (k up to 4096) or
            "reference"; None takes the first that can run.

    Returns:
        [rows, k] int32, contiguous: the selected indices of each row in ascending order, then -1 if there are fewer
        than k.

    Raises:
        ValueError: a wrong shape, dtype, device or stride, or k below 1.
        RuntimeError: the named `impl` cannot run these inputs here.
    """
    check_shape("logits", logits, ("rows", "columns"))
    check_dtype("logits", logits, torch.float32)
    check_last_dim_contiguous("logits", logits)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if lengths is not None:
        _check_integers("lengths", lengths, (logits.shape[0],), logits.device)
    reason = None if k <= _MOST_K else f"k must be at most {_MOST_K}, got {k}"
    name = ops.choose_kernel("select_topk", impl, logits, reason)
    if name != "reference":
        tensors = (logits,) if lengths is None else (logits, lengths)
        return (ops.run_select_topk if unobserved(*tensors) else ops.select_topk)(logits, k, lengths, name)
    return select_topk_reference(logits, k, lengths)


def _check_floats(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    check_shape(name, tensor, shape)
    check_dtype(name, tensor, torch.float32)
    check_device(name, tensor, device)
    check_last_dim_contiguous(name, tensor)


def _check_integers(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    check_shape(name, tensor, shape)
    check_dtype(name, tensor, torch.int32)
    check_device(name, tensor, device)
    check_last_dim_contiguous(name, tensor)
