"""`mla_decode`: the public function. It validates, chooses an implementation and explains a refusal."""

from typing import Any

import torch

from mlakit.cache import fp8_row_bytes
from mlakit.decode.ops import candidates, check_capacity, decode, decode_out, lse_dtype, out_dtype
from mlakit.decode.reference import mla_decode_reference
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

_E4M3 = torch.float8_e4m3fn
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_NO_GRADIENT = "it has no gradient, and an input requires one (torch.no_grad() would turn that off)"
_WITH_GRADIENT = {"reference": None, "triton": _NO_GRADIENT, "hopper": _NO_GRADIENT}


def mla_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    kv_lora_rank: int = 512,
    num_splits: int | None = None,
    q_scale: float = 1.0,
    kv_scale: float = 1.0,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from a few new tokens a request to its paged latent cache (MLA in MQA mode, up-projections absorbed).

    Every head shares one key a token, whose first `kv_lora_rank` entries are the value.

    Args:
        q: [batch, q_len, num_heads, latent_dim], bfloat16 or float16 (the reference also takes float32 and float64),
            or float8_e4m3fn over a cache of it; any number of heads.
        cache: [pages, page_size, latent_dim] in q's dtype or float8_e4m3fn; or the float8 cache with scales of its own,
            uint8 [pages, page_size, bytes] (656 for DeepSeek's dimensions: 512 e4m3 codes, 4 float32 scales, 64
            bfloat16 rope values). What `seq_lens` does not promise is not read and may hold anything.
        block_table: [batch, max_pages] int32, the page of a request's tokens i * page_size and on; slots past its last
            page are not used.
        seq_lens: [batch] int32, the keys of each request with the new tokens' own included; 0 gives zeros and an lse
            of -inf. Lengths on a GPU are not read by the host, and may change between replays of a CUDA graph. One
            that exceeds the table's capacity is refused on a CPU, and gives that request NaN on a GPU.
        softmax_scale: multiplies the scores; positive. No default: 1/sqrt(576) and 1/sqrt(192) are both plausible,
            and one is silently wrong.
        causal: query token i of q_len sees the first `seq_len - q_len + i + 1` keys (bottom-right alignment). False:
            all of them.
        kv_lora_rank: width of the value; the rest of `latent_dim` is the rope part.
        num_splits: cut each request's keys into this many pieces. A given number makes a request's result independent
            of the rest of the batch. None balances the pieces over the GPU, from shapes alone.
        q_scale, kv_scale: what the codes of a float8_e4m3fn query and cache are multiplied by (one number a tensor).
            1 for everything else.
        out: written instead of a new tensor, [batch, q_len, num_heads, kv_lora_rank] in q's dtype (bfloat16 or float16
            if that is float8), last dimension contiguous.
        lse: written instead of a new tensor, [batch, q_len, num_heads], contiguous, float32 (float64 if q is).
        impl: "hopper", "triton" or "reference"; None takes the fastest that can run.

    Returns:
        out [batch, q_len, num_heads, kv_lora_rank] in q's dtype (bfloat16 if that is float8) and lse [batch, q_len,
        num_heads], natural log, float32 (float64 if q is).

    Raises:
        ValueError: a wrong shape, dtype, device, stride, option or name of an implementation, or a table that is too
            short (CPU).
        RuntimeError: the named implementation cannot run these inputs; the message says why.

    The reference alone has gradients. Of e4m3 queries "hopper" adds products as tensor cores do, in some 14 bits: the
    lse of a request of few keys may be off by a hundredth. Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.2.
    """
    check_scale(softmax_scale)
    _validate(q, cache, block_table, seq_lens, kv_lora_rank, num_splits, q_scale, kv_scale, out, lse)
    if torch.is_grad_enabled() and (q.requires_grad or cache.requires_grad):
        return _differentiable(
            q, cache, block_table, seq_lens, softmax_scale, causal, kv_lora_rank, q_scale, kv_scale, out, lse, impl
        )
    options: tuple[Any, ...] = (
        float(softmax_scale), causal, kv_lora_rank, num_splits, impl, float(q_scale), float(kv_scale),
    )  # fmt: skip
    inputs = (q, cache, block_table, seq_lens)
    if out is None and lse is None:
        return decode(*inputs, *options) if unobserved(*inputs) else torch.ops.mlakit.mla_decode(*inputs, *options)
    if out is None:
        out = q.new_empty((*q.shape[:3], kv_lora_rank), dtype=out_dtype(q))
    if lse is None:
        lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q))
    into = decode_out if unobserved(*inputs, out, lse) else torch.ops.mlakit.mla_decode_out
    into(*inputs, out, lse, *options)
    return out, lse


@chooses(mla_decode)
def _which(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    kv_lora_rank: int = 512,
    num_splits: int | None = None,
    q_scale: float = 1.0,
    kv_scale: float = 1.0,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    impl: str | None = None,
) -> str:
    check_scale(softmax_scale)
    _validate(q, cache, block_table, seq_lens, kv_lora_rank, num_splits, q_scale, kv_scale, out, lse)
    if torch.is_grad_enabled() and (q.requires_grad or cache.requires_grad):
        return choose("mla_decode", impl, _WITH_GRADIENT)
    return choose("mla_decode", impl, candidates(q, cache, softmax_scale, kv_lora_rank, num_splits))


def _differentiable(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    kv_lora_rank: int,
    q_scale: float,
    kv_scale: float,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    for name, given in (("out", out), ("lse", lse)):
        if given is not None:
            raise ValueError(f"{name} must be None where a gradient is wanted; call under torch.no_grad()")
    choose("mla_decode", impl, _WITH_GRADIENT)
    if q.device.type == "cpu":
        check_capacity(cache, block_table, seq_lens)
    return mla_decode_reference(
        q,
        cache,
        block_table,
        seq_lens,
        softmax_scale=softmax_scale,
        causal=causal,
        kv_lora_rank=kv_lora_rank,
        q_scale=q_scale,
        kv_scale=kv_scale,
    )


def _validate(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    kv_lora_rank: int,
    num_splits: int | None,
    q_scale: float,
    kv_scale: float,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> None:
    check_shape("q", q, ("batch", "q_len", "num_heads", "latent_dim"))
    batch, q_len, heads, latent_dim = q.shape
    if q_len < 1 or heads < 1:
        raise ValueError(f"q must have at least one token and one head, got shape {list(q.shape)}")
    if not 1 <= kv_lora_rank < latent_dim:
        raise ValueError(
            f"kv_lora_rank must be at least 1 and below q's last dimension {latent_dim}, got {kv_lora_rank}"
        )
    check_dtype("q", q, *_FLOATS, _E4M3)
    packed = cache.dtype == torch.uint8
    width = fp8_row_bytes(kv_lora_rank, latent_dim - kv_lora_rank) if packed else latent_dim
    check_shape("cache", cache, ("pages", "page_size", width))
    if cache.shape[1] < 1:
        raise ValueError(f"cache must have a page size of at least 1, got shape {list(cache.shape)}")
    check_dtype("cache", cache, *((_E4M3,) if q.dtype == _E4M3 else (q.dtype, _E4M3, torch.uint8)))
    for name, scale, codes in (("q_scale", q_scale, q), ("kv_scale", kv_scale, cache)):
        if isinstance(scale, torch.Tensor):  # to look at it would wait for the GPU
            raise ValueError(f"{name} must be a number, got a tensor of shape {list(scale.shape)}")
        if not 0 < scale < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {scale}")
        if scale != 1 and codes.dtype != _E4M3:
            raise ValueError(f"{name} must be 1 where there is no tensor of {_E4M3} to multiply, got {scale}")
    check_shape("block_table", block_table, (batch, "max_pages"))
    check_dtype("block_table", block_table, torch.int32)
    check_shape("seq_lens", seq_lens, (batch,))
    check_dtype("seq_lens", seq_lens, torch.int32)
    if batch > 1 and seq_lens.stride(0) != 1:
        raise ValueError(f"seq_lens must be contiguous, got stride {seq_lens.stride(0)}")
    for name, tensor in {"q": q, "cache": cache, "block_table": block_table}.items():
        check_last_dim_contiguous(name, tensor)
    for name, tensor in {"cache": cache, "block_table": block_table, "seq_lens": seq_lens}.items():
        check_device(name, tensor, q.device)
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits must be None or at least 1, got {num_splits}")
    if out is not None:
        check_shape("out", out, (batch, q_len, heads, kv_lora_rank))
        check_dtype("out", out, *((torch.bfloat16, torch.float16) if q.dtype == _E4M3 else (q.dtype,)))
        check_device("out", out, q.device)
        check_last_dim_contiguous("out", out)
    if lse is not None:
        check_shape("lse", lse, (batch, q_len, heads))
        check_dtype("lse", lse, lse_dtype(q))
        check_device("lse", lse, q.device)
        if not lse.is_contiguous():
            raise ValueError(f"lse must be contiguous, got strides {list(lse.stride())}")
