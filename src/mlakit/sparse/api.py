"""`mla_sparse_prefill` and `mla_sparse_decode`: the public functions. They validate, choose an implementation and
explain a refusal.
"""

from typing import Any

import torch

from mlakit.cache import fp8_row_bytes
from mlakit.dispatch import (
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_scale,
    check_shape,
    choose,
    chooses,
    unobserved,
)
from mlakit.sparse import ops
from mlakit.sparse.reference import mla_sparse_decode_reference, mla_sparse_prefill_reference

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def mla_sparse_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    *,
    softmax_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend from each query token to the keys that its row of `indices` names (MLA in MQA mode).

    Args:
        q: [s_q, h_q, d_qk], bfloat16 or float16 (the reference also takes float32 and float64); any number of heads.
        kv: [s_kv, h_kv, d_qk] in q's dtype; the first `d_v` entries of a key are its value. h_kv divides h_q, and is 1
            for MLA. Rows that no index names are not read and may hold anything.
        indices: [s_q, h_kv, topk] int32, in any order, any topk. An index below 0 or from s_kv on is ignored, wherever
            it stands; one that is given twice counts twice.
        softmax_scale: multiplies the scores; positive. No default: 1/sqrt(576) and 1/sqrt(192) are both plausible,
            and one is silently wrong.
        d_v: width of the value.
        attn_sink: [h_q] float32: the output is multiplied by exp(lse) / (exp(lse) + exp(attn_sink)), as if one more key
            had that score and no value. -inf has no effect, +inf makes zeros. lse and max_logits are without it.
        topk_length: [s_q] int32: only the first `topk_length` indices of a token are used, and the work is less.
        out: written instead of a new tensor, [s_q, h_q, d_v] in q's dtype, last dimension contiguous.
        impl: "hopper" (Gluon, compute capability 9.0, d_v 512), "triton" or "reference"; None takes the fastest that
            can run.

    Returns:
        out [s_q, h_q, d_v] in q's dtype; max_logits, the largest scaled score of a row, and lse, natural log, both
        [s_q, h_q] float32 (float64 if q is). A row without a key gives zeros, -inf and -inf (FlashMLA: an lse of +inf).

    Raises:
        ValueError: a wrong shape, dtype, device, stride, option or name of an implementation.
        RuntimeError: the named implementation cannot run these inputs; the message says why.

    The reference alone has gradients. Source: DeepSeek-V3.2-Exp, section 2.1; FlashMLA's `flash_mla_sparse_fwd` for the
    options.
    """
    check_scale(softmax_scale)
    _validate_prefill(q, kv, indices, d_v, attn_sink, topk_length, out)
    inputs = (q, kv, indices)
    options: tuple[Any, ...] = (float(softmax_scale), d_v, attn_sink, topk_length, impl)
    if torch.is_grad_enabled() and _wants_gradient(q, kv, attn_sink):
        _refuse_gradient("mla_sparse_prefill", out, impl)
        return mla_sparse_prefill_reference(
            *inputs, softmax_scale=softmax_scale, d_v=d_v, attn_sink=attn_sink, topk_length=topk_length
        )
    direct = _is_direct(q, kv, indices, attn_sink, topk_length, out)
    if out is None:
        return (ops.prefill if direct else torch.ops.mlakit.mla_sparse_prefill)(*inputs, *options)
    into = ops.prefill_out if direct else torch.ops.mlakit.mla_sparse_prefill_out
    max_logits, lse = into(*inputs, out, *options)
    return out, max_logits, lse


def mla_sparse_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    indices: torch.Tensor,
    *,
    softmax_scale: float,
    kv_lora_rank: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    num_splits: int | None = None,
    out: torch.Tensor | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from a few new tokens a request to the slots of a paged cache that `indices` name (MLA in MQA mode).

    Args:
        q: [batch, q_len, num_heads, latent_dim], bfloat16 or float16 (the reference also takes float32 and float64);
            any number of heads.
        cache: [pages, page_size, latent_dim] in q's dtype, or the float8 cache, uint8 [pages, page_size, bytes] (656
            bytes for DeepSeek: 512 e4m3 codes, 4 float32 scales, 64 bfloat16 rope values), whose keys are codes times
            scales. The reference does not round them; impl="triton" rounds to q's dtype, "hopper" to 11 bits. Slots
            that no index names are not read and may hold anything.
        indices: [batch, q_len, topk] int32, page * page_size + offset, in any order, any topk. An index below 0 or past
            the cache is ignored, wherever it stands; one that is given twice counts twice.
        softmax_scale: multiplies the scores; positive. No default: 1/sqrt(576) and 1/sqrt(192) are both plausible,
            and one is silently wrong.
        kv_lora_rank: width of the value; the rest of `latent_dim` is the rope part.
        attn_sink: [num_heads] float32: the output is multiplied by exp(lse) / (exp(lse) + exp(attn_sink)), as if one
            more key had that score and no value. -inf has no effect, +inf makes zeros. lse is without it.
        topk_length: [batch] or [batch, q_len] int32: only the first `topk_length` indices of a token are used. Not
            read by the host; may change between replays of a CUDA graph.
        num_splits: cut each token's indices into this many pieces. A given number makes a token's result independent
            of the rest of the batch. None fills the GPU, from shapes alone.
        out: written instead of a new tensor, [batch, q_len, num_heads, kv_lora_rank] in q's dtype, last dimension
            contiguous.
        impl: "hopper" (Gluon, compute capability 9.0, DeepSeek's dimensions), "triton" or "reference"; None takes the
            fastest that can run.

    Returns:
        out [batch, q_len, num_heads, kv_lora_rank] in q's dtype and lse [batch, q_len, num_heads], natural log,
        float32 (float64 if q is). A row without a key gives zeros and -inf (FlashMLA: an lse of +inf).

    Raises:
        ValueError: a wrong shape, dtype, device, stride, option or name of an implementation.
        RuntimeError: the named implementation cannot run these inputs; the message says why.

    The reference alone has gradients. Source: DeepSeek-V3.2-Exp, section 2.1; FlashMLA for the cache and the options.
    """
    check_scale(softmax_scale)
    _validate_decode(q, cache, indices, kv_lora_rank, attn_sink, topk_length, num_splits, out)
    inputs = (q, cache, indices)
    options: tuple[Any, ...] = (float(softmax_scale), kv_lora_rank, attn_sink, topk_length, num_splits, impl)
    if torch.is_grad_enabled() and _wants_gradient(q, cache, attn_sink):
        _refuse_gradient("mla_sparse_decode", out, impl)
        return mla_sparse_decode_reference(
            *inputs,
            softmax_scale=softmax_scale,
            kv_lora_rank=kv_lora_rank,
            attn_sink=attn_sink,
            topk_length=topk_length,
        )
    direct = _is_direct(q, cache, indices, attn_sink, topk_length, out)
    if out is None:
        return (ops.decode if direct else torch.ops.mlakit.mla_sparse_decode)(*inputs, *options)
    into = ops.decode_out if direct else torch.ops.mlakit.mla_sparse_decode_out
    return out, into(*inputs, out, *options)


@chooses(mla_sparse_prefill)
def _which_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    *,
    softmax_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    impl: str | None = None,
) -> str:
    check_scale(softmax_scale)
    _validate_prefill(q, kv, indices, d_v, attn_sink, topk_length, out)
    if torch.is_grad_enabled() and _wants_gradient(q, kv, attn_sink):
        return _refuse_gradient("mla_sparse_prefill", out, impl)
    return ops.choose_impl("mla_sparse_prefill", impl, q, kv, d_v, out)


@chooses(mla_sparse_decode)
def _which_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    indices: torch.Tensor,
    *,
    softmax_scale: float,
    kv_lora_rank: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    num_splits: int | None = None,
    out: torch.Tensor | None = None,
    impl: str | None = None,
) -> str:
    check_scale(softmax_scale)
    _validate_decode(q, cache, indices, kv_lora_rank, attn_sink, topk_length, num_splits, out)
    if torch.is_grad_enabled() and _wants_gradient(q, cache, attn_sink):
        return _refuse_gradient("mla_sparse_decode", out, impl)
    return ops.choose_impl("mla_sparse_decode", impl, q, cache, kv_lora_rank, out)


def _validate_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    check_shape("q", q, ("s_q", "h_q", "d_qk"))
    s_q, h_q, d_qk = q.shape
    check_shape("kv", kv, ("s_kv", "h_kv", d_qk))
    h_kv = kv.shape[1]
    if h_q < 1 or h_kv < 1 or h_q % h_kv:
        raise ValueError(f"kv must have a number of heads that divides q's {h_q}, got {h_kv}")
    if not 1 <= d_v <= d_qk:
        raise ValueError(f"d_v must be from 1 to q's last dimension {d_qk}, got {d_v}")
    check_shape("indices", indices, (s_q, h_kv, "topk"))
    _check_common(q, "kv", kv, indices, attn_sink, (s_q, h_q, d_v), out)
    if topk_length is not None:
        check_shape("topk_length", topk_length, (s_q,))
        _check_topk_length(topk_length, q.device)


def _validate_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    indices: torch.Tensor,
    kv_lora_rank: int,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    num_splits: int | None,
    out: torch.Tensor | None,
) -> None:
    check_shape("q", q, ("batch", "q_len", "num_heads", "latent_dim"))
    batch, q_len, heads, latent_dim = q.shape
    if q_len < 1 or heads < 1:
        raise ValueError(f"q must have at least one token and one head, got shape {list(q.shape)}")
    if not 1 <= kv_lora_rank <= latent_dim:
        raise ValueError(f"kv_lora_rank must be from 1 to q's last dimension {latent_dim}, got {kv_lora_rank}")
    fp8 = cache.dtype == torch.uint8
    width = fp8_row_bytes(kv_lora_rank, latent_dim - kv_lora_rank) if fp8 else latent_dim
    check_shape("cache", cache, ("pages", "page_size", width))
    if cache.shape[1] < 1:
        raise ValueError(f"cache must have a page size of at least 1, got shape {list(cache.shape)}")
    check_shape("indices", indices, (batch, q_len, "topk"))
    _check_common(q, "cache", cache, indices, attn_sink, (batch, q_len, heads, kv_lora_rank), out)
    if topk_length is not None:
        check_shape("topk_length", topk_length, (batch, q_len) if topk_length.ndim == 2 else (batch,))
        _check_topk_length(topk_length, q.device)
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits must be None or at least 1, got {num_splits}")


def _check_common(
    q: torch.Tensor,
    keys_name: str,
    keys: torch.Tensor,
    indices: torch.Tensor,
    attn_sink: torch.Tensor | None,
    out_shape: tuple[int, ...],
    out: torch.Tensor | None,
) -> None:
    check_dtype("q", q, *_DTYPES)
    check_dtype(keys_name, keys, q.dtype, *((torch.uint8,) if keys_name == "cache" else ()))
    check_dtype("indices", indices, torch.int32)
    for name, tensor in ((keys_name, keys), ("indices", indices)):
        check_device(name, tensor, q.device)
    for name, tensor in (("q", q), (keys_name, keys), ("indices", indices)):
        check_last_dim_contiguous(name, tensor)
    if attn_sink is not None:
        check_shape("attn_sink", attn_sink, (q.shape[-2],))
        check_dtype("attn_sink", attn_sink, torch.float32, *((torch.float64,) if q.dtype == torch.float64 else ()))
        check_device("attn_sink", attn_sink, q.device)
        check_last_dim_contiguous("attn_sink", attn_sink)
    if out is not None:
        check_shape("out", out, out_shape)
        check_dtype("out", out, q.dtype)
        check_device("out", out, q.device)
        check_last_dim_contiguous("out", out)


def _check_topk_length(topk_length: torch.Tensor, device: torch.device) -> None:
    check_dtype("topk_length", topk_length, torch.int32)
    check_device("topk_length", topk_length, device)


def _wants_gradient(*tensors: torch.Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _refuse_gradient(operation: str, out: torch.Tensor | None, impl: str | None) -> str:
    if out is not None:
        raise ValueError("out must be None where a gradient is wanted; call under torch.no_grad()")
    reason = "it has no gradient, and an input requires one (torch.no_grad() would turn that off)"
    return choose(operation, impl, {"reference": None, "triton": reason, "hopper": reason})


def _is_direct(*tensors: torch.Tensor | None) -> bool:
    return unobserved(*(tensor for tensor in tensors if tensor is not None))
