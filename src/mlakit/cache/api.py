"""`append_latent` and `gather_latent`: validate, choose an implementation, run it."""

import torch

from mlakit.cache import ops
from mlakit.cache.layout import fp8_row_bytes
from mlakit.dispatch import check_device, check_dtype, check_last_dim_contiguous, check_shape, unobserved

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_ROPE_LAYOUTS = ("interleaved", "half")


def append_latent(
    kv: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    eps: float = 1e-6,
    rope_layout: str = "interleaved",
    scale_fmt: str | None = None,
    impl: str | None = None,
) -> None:
    """Put new tokens into the paged cache: RMSNorm of the latent, rope of the shared key part, and the write, in one
    kernel.

    Args:
        kv: [T, kv_lora_rank + rope], the down-projection's output, stride 1 in the last dimension; bfloat16, float16 or
            float32.
        norm_weight: [kv_lora_rank], any floating dtype.
        cos: [T, rope / 2], a row a token, or [max_positions, rope / 2] if `positions` is given; floating, any strides
            (the real part of a complex table of frequencies will do).
        sin: as cos.
        cache: written in place. [pages, page_size, kv_lora_rank + rope] of kv's dtype, or the float8 cache, uint8
            [pages, page_size, bytes] (656 for DeepSeek: 512 e4m3 codes, 4 float32 scales, 64 bfloat16 rope values);
            stride 1 in the last dimension.
        slot_mapping: [T] int64 (or int32): page * page_size + offset of each token, less than pages * page_size and
            each at most once; a token with a negative slot is skipped.
        positions: [T] int64 or int32, rows of cos and sin; None takes row i for token i.
        eps: of the RMSNorm.
        rope_layout: "interleaved" turns elements 2i and 2i + 1 (DeepSeek's inference code), "half" turns i and i + rope
            / 2 (Hugging Face's after its permutation). The queries must use the same.
        scale_fmt: scales of the float8 cache: None for max(amax, 1e-4) / 448, "ue8m0" for that rounded up to a power of
            two.
        impl: "triton" or "reference"; None takes the first that can run.

    The sum of squares, the products and the rotation are computed in float32 and rounded once to kv's dtype; the float8
    cache quantizes what was rounded. No gradient flows through it.

    Raises:
        ValueError: a wrong shape, dtype, device, stride or option.
        RuntimeError: the named `impl` cannot run here.

    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1; DeepSeek-V3, inference/model.py; FlashMLA for the 656-byte row.
    """
    check_shape("norm_weight", norm_weight, ("kv_lora_rank",))
    check_dtype("norm_weight", norm_weight, *_FLOATS)
    check_shape("kv", kv, ("T", "kv_lora_rank + rope"))
    check_dtype("kv", kv, *_FLOATS)
    check_last_dim_contiguous("kv", kv)
    tokens, rank, rope = kv.shape[0], norm_weight.shape[0], kv.shape[1] - norm_weight.shape[0]
    if rope < 2 or rope % 2:
        raise ValueError(f"kv must have an even number of rope columns after the {rank} of norm_weight, got {rope}")
    check_shape("slot_mapping", slot_mapping, (tokens,))
    check_dtype("slot_mapping", slot_mapping, torch.int64, torch.int32)
    for name, table in (("cos", cos), ("sin", sin)):
        check_shape(name, table, (tokens if positions is None else "max_positions", rope // 2))
        check_dtype(name, table, *_FLOATS)
    check_shape("sin", sin, tuple(cos.shape))
    check_dtype("sin", sin, cos.dtype)
    if positions is not None:
        check_shape("positions", positions, (tokens,))
        check_dtype("positions", positions, torch.int64, torch.int32)
    check_dtype("cache", cache, kv.dtype, torch.uint8)
    width = fp8_row_bytes(rank, rope) if cache.dtype == torch.uint8 else rank + rope
    check_shape("cache", cache, ("pages", "page_size", width))
    check_last_dim_contiguous("cache", cache)
    others = {"norm_weight": norm_weight, "cos": cos, "sin": sin, "cache": cache, "slot_mapping": slot_mapping}
    for name, tensor in others.items():
        check_device(name, tensor, kv.device)
    if positions is not None:
        check_device("positions", positions, kv.device)
    if rope_layout not in _ROPE_LAYOUTS:
        raise ValueError(f"rope_layout must be one of {', '.join(_ROPE_LAYOUTS)}, got {rope_layout!r}")
    if scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"scale_fmt must be None or 'ue8m0', got {scale_fmt!r}")

    inputs = (kv, norm_weight, cos, sin, cache)
    kv, norm_weight, cos, sin, cache = (t.detach() if t.requires_grad else t for t in inputs)
    observed = not unobserved(kv, norm_weight, cos, sin, cache, slot_mapping)
    run = ops.append_latent if observed else ops.run_append_latent
    run(kv, norm_weight, cos, sin, cache, slot_mapping, positions, eps, rope_layout, scale_fmt, impl)


def gather_latent(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    total: int,
    *,
    starts: torch.Tensor | None = None,
    kv_lora_rank: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    impl: str | None = None,
) -> torch.Tensor:
    """Read requests' cached tokens into one ragged tensor, as prefill over a cached context wants them; dequantized if
    need be.

    Args:
        cache: [pages, page_size, kv_lora_rank + rope] floating, or the float8 cache, uint8 [pages, page_size, bytes];
            stride 1 in the last dimension.
        block_table: [batch, max_pages] int32: which page holds a request's tokens i * page_size and on.
        seq_lens: int32 (or int64), tokens to read of each request [batch], or where each begins in the result, [batch +
            1] (that is cu_seqlens, whose last entry is the number of tokens). 0 tokens are allowed.
        total: rows of the result, on the host, so that no length has to be fetched from the GPU. Rows past the last
            token are zero; tokens past `total` are left out.
        starts: [batch] int32 (or int64): the first token to read of each request, for a context that is read in pieces;
            None is 0.
        kv_lora_rank: of the float8 cache; another cache does not need it.
        dtype: of the result, for the float8 cache; another cache is copied as it is.
        impl: "triton" or "reference"; None takes the first that can run.

    Returns:
        [total, kv_lora_rank + rope], contiguous. No gradient flows to the cache.

    Raises:
        ValueError: a wrong shape, dtype, device or stride, or a block_table that cannot hold `total` tokens; on a CPU
            also lengths that it cannot hold, or cu_seqlens that descend.
        RuntimeError: the named `impl` cannot run here.
    """
    check_shape("cache", cache, ("pages", "page_size", "width"))
    check_dtype("cache", cache, *_FLOATS, torch.uint8)
    check_last_dim_contiguous("cache", cache)
    check_shape("block_table", block_table, ("batch", "max_pages"))
    check_dtype("block_table", block_table, torch.int32)
    batch, max_pages = block_table.shape
    if seq_lens.ndim != 1 or seq_lens.shape[0] not in (batch, batch + 1):
        raise ValueError(
            f"seq_lens must have shape [{batch}] (lengths) or [{batch + 1}] (cu_seqlens), got {list(seq_lens.shape)}"
        )
    check_dtype("seq_lens", seq_lens, torch.int32, torch.int64)
    if starts is not None:
        check_shape("starts", starts, (batch,))
        check_dtype("starts", starts, torch.int32, torch.int64)
        check_device("starts", starts, cache.device)
    for name, tensor in (("block_table", block_table), ("seq_lens", seq_lens)):
        check_device(name, tensor, cache.device)
    if total < 0:
        raise ValueError(f"total must be at least 0, got {total}")
    room = batch * max_pages * cache.shape[1]
    if total > room:
        raise ValueError(f"block_table is too short: {batch} x {max_pages} pages hold {room} tokens, got total={total}")
    if cache.dtype == torch.uint8:
        _check_result_dtype(dtype)
        least = fp8_row_bytes(kv_lora_rank, 0)
        if cache.shape[2] < least or (cache.shape[2] - least) % 2:
            raise ValueError(f"cache must have rows of {least} + 2 * rope bytes, got {cache.shape[2]}")
    else:
        dtype = cache.dtype

    cu_seqlens = seq_lens
    if seq_lens.shape[0] == batch:
        cu_seqlens = torch.nn.functional.pad(seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
    cache = cache.detach() if cache.requires_grad else cache
    run = ops.run_gather_latent if unobserved(cache, block_table, cu_seqlens) else ops.gather_latent
    return run(cache, block_table, cu_seqlens, total, starts, kv_lora_rank, dtype, impl)


def _check_result_dtype(dtype: torch.dtype) -> None:
    if dtype not in _FLOATS:
        raise ValueError(f"dtype must be {' or '.join(map(str, _FLOATS))}, got {dtype}")
