"""`mla_prefill`: checks its inputs, picks an implementation, and says why one cannot run."""

import torch

from mlakit.dispatch import (
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_scale,
    check_shape,
    choose,
    choose_triton,
    chooses,
    unobserved,
)
from mlakit.prefill.config import MAX_BACKWARD_DIM, MAX_QK_DIM, MAX_V_DIM
from mlakit.prefill.hopper_config import why_not_hopper

_MAX_ROW_STRIDE = 2**24  # the kernels number the elements within a tile of up to 128 rows with 32 bits
_MAX_ROWS = 2**30  # and rows too, with room to round up


def mla_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    k_pe: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    out: torch.Tensor | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend within each of several sequences laid end to end; differentiable in q, k, k_pe and v.

    Args:
        q: [tokens, num_heads, qk_head_dim], bfloat16 or float16 (any floating dtype for `impl="reference"`).
        k: [keys, num_kv_heads, qk_head_dim]; `num_heads` is a multiple of `num_kv_heads`, consecutive query heads
            share one. With `k_pe`, k holds the first columns alone, [keys, num_kv_heads, qk_head_dim - rope].
        v: [keys, num_kv_heads, v_head_dim]. All may have any strides but the last, which is 1; k and v may be views of
            a tensor that holds more, such as k and v side by side.
        cu_seqlens_q: [batch + 1] int32, on q's device, from 0 up: sequence i holds rows cu_seqlens_q[i] to
            cu_seqlens_q[i + 1]. Empty sequences are allowed. Rows of q past cu_seqlens_q[-1] are no sequence's: they
            are not read, and get zeros and -inf.
        cu_seqlens_k: [batch + 1] int32, the same for k and v. Rows past cu_seqlens_k[-1] are not read; their gradients
            are zero.
        k_pe: [keys, 1 or num_kv_heads, rope], the last columns of the keys (the rotated part, which all heads share in
            MLA): scores are q's first columns times k plus its last ones times k_pe, as if k were the concatenation.
            "hopper" reads both as they are, "triton" concatenates first, in a kernel of its own.
        softmax_scale: multiplies the scores, as a rule 1/sqrt(qk_head_dim); positive.
        causal: query i of q_len sees the first `k_len - q_len + i + 1` keys (bottom-right alignment).
        max_seqlen_q: a hint, the longest sequence of queries; only the choice of tiles depends on it, never the result.
        out: [tokens, num_heads, v_head_dim] in q's dtype, wholly overwritten if given. Not differentiable then.
        impl: "hopper" (Gluon, compute capability 9.0), "triton" (from 8.0 on) or "reference"; None picks the fastest
            that can run. Gradients of both kernels are Triton's.

    Returns:
        out [tokens, num_heads, v_head_dim] in q's dtype, and lse [tokens, num_heads], natural log, float32 (float64 if
        q is). A row that sees no key gives zeros and -inf. Gradients flow through both. Nothing here waits for the GPU.

    Chunked prefill: call this on each chunk of the context (causal=False for the chunks before the new tokens) and
    give the results to `mlakit.merge.merge_states`.

    Raises:
        ValueError: a shape, dtype, device or stride is not as above, or `impl` is unknown.
        RuntimeError: the implementation asked for cannot run these inputs, with the reason.

    Source: FlashAttention-2 (arXiv:2307.08691); MHA mode as in DeepSeek-V2 (arXiv:2405.04434), section 2.1.
    """
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, k_pe, max_seqlen_q, out)
    chosen = _choose(impl, q, k, v, k_pe, out, cu_seqlens_q.shape[0] - 1)

    from mlakit.prefill import ops

    hint = -1 if max_seqlen_q is None else max_seqlen_q
    plain = unobserved(q, k, v, cu_seqlens_q, cu_seqlens_k) and (k_pe is None or unobserved(k_pe))
    if out is not None:
        fill = ops.run_prefill_out if plain and unobserved(out) else ops.mla_prefill_out
        return out, fill(q, k, v, cu_seqlens_q, cu_seqlens_k, out, softmax_scale, causal, hint, k_pe, chosen)
    run = ops.run_prefill if plain else ops.mla_prefill
    return run(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, hint, k_pe, chosen)


@chooses(mla_prefill)
def _which(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    k_pe: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    out: torch.Tensor | None = None,
    impl: str | None = None,
) -> str:
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, k_pe, max_seqlen_q, out)
    chosen = _choose(impl, q, k, v, k_pe, out, cu_seqlens_q.shape[0] - 1)
    if chosen not in ("auto", "hopper"):
        return chosen

    from mlakit.prefill.ops import takes_hopper

    hint = -1 if max_seqlen_q is None else max_seqlen_q
    return "hopper" if takes_hopper(q, k, v, k_pe, cu_seqlens_q, hint, chosen == "hopper") else "triton"


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    softmax_scale: float,
    k_pe: torch.Tensor | None,
    max_seqlen_q: int | None,
    out: torch.Tensor | None,
) -> None:
    check_shape("q", q, ("tokens", "num_heads", "qk_head_dim"))
    tokens, num_heads, qk_dim = q.shape
    if k_pe is None:
        check_shape("k", k, ("keys", "num_kv_heads", qk_dim))
    else:
        check_shape("k", k, ("keys", "num_kv_heads", "qk_head_dim - rope"))
    keys, num_kv_heads, k_dim = k.shape
    check_shape("v", v, (keys, num_kv_heads, "v_head_dim"))
    check_shape("cu_seqlens_q", cu_seqlens_q, ("batch + 1",))
    check_shape("cu_seqlens_k", cu_seqlens_k, (cu_seqlens_q.shape[0],))
    if cu_seqlens_q.shape[0] < 1:
        raise ValueError("cu_seqlens_q must have batch + 1 entries, at least 1, got 0")
    if min(num_heads, num_kv_heads, qk_dim, v.shape[-1]) < 1:
        raise ValueError(f"heads and head dims must be at least 1, got q {list(q.shape)}, v {list(v.shape)}")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads must be a multiple of k's num_kv_heads {num_kv_heads}, got {num_heads}")
    check_dtype("q", q, torch.bfloat16, torch.float16, torch.float32, torch.float64)
    check_dtype("k", k, q.dtype)
    check_dtype("v", v, q.dtype)
    if k_pe is not None:
        check_shape("k_pe", k_pe, (keys, "1 or num_kv_heads", qk_dim - k_dim))
        if k_pe.shape[1] not in (1, num_kv_heads):
            raise ValueError(f"k_pe must have 1 head or k's num_kv_heads {num_kv_heads}, got {k_pe.shape[1]}")
        if k_dim < 1 or k_pe.shape[-1] < 1:
            raise ValueError(f"k and k_pe must each have a column, got k {list(k.shape)}, k_pe {list(k_pe.shape)}")
        check_dtype("k_pe", k_pe, q.dtype)
        check_device("k_pe", k_pe, q.device)
        check_last_dim_contiguous("k_pe", k_pe)
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_dtype(name, cu, torch.int32)
        check_device(name, cu, q.device)
        check_last_dim_contiguous(name, cu)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_device(name, x, q.device)
        check_last_dim_contiguous(name, x)
    check_scale(softmax_scale)
    if max_seqlen_q is not None and max_seqlen_q < 0:
        raise ValueError(f"max_seqlen_q must be at least 0, got {max_seqlen_q}")
    if out is not None:
        check_shape("out", out, (tokens, num_heads, v.shape[-1]))
        check_dtype("out", out, q.dtype)
        check_device("out", out, q.device)
        check_last_dim_contiguous("out", out)
        if _needs_grad(q, k, v, k_pe, out):
            raise ValueError("out cannot be given when a gradient is required; expected out=None")


def _choose(
    impl: str | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pe: torch.Tensor | None,
    out: torch.Tensor | None,
    batch: int,
) -> str:
    """The implementation's name, or "auto" for the faster kernel, which the operator finds out."""
    reason = _why_not(q, k, v, k_pe, out)
    if impl is None and q.is_cuda:
        name = choose_triton("mla_prefill", None, q, reason)
        return "auto" if name == "triton" else name
    if impl == "triton":
        return choose_triton("mla_prefill", impl, q, reason)
    hopper = None
    if impl == "hopper" and (hopper := why_not_hopper(q, k, v, k_pe, batch) or reason) is None:
        return impl
    return choose("mla_prefill", impl, {"reference": None, "triton": reason, "hopper": hopper})


def _needs_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _why_not(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_pe: torch.Tensor | None, out: torch.Tensor | None
) -> str | None:
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, got {q.dtype}"
    if not q.is_cuda and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies the bits of bfloat16 as integers; use float16 there"
    qk_dim, v_dim = q.shape[-1], v.shape[-1]
    if qk_dim > MAX_QK_DIM or v_dim > MAX_V_DIM:
        return f"head dims may be up to {MAX_QK_DIM} and {MAX_V_DIM}, got {qk_dim} and {v_dim}"
    if max(qk_dim, v_dim) > MAX_BACKWARD_DIM and _needs_grad(q, k, v, k_pe):
        return f"gradients need head dims up to {MAX_BACKWARD_DIM}, got {qk_dim} and {v_dim}"
    for name, x in (("q", q), ("k", k), ("v", v), ("k_pe", k_pe), ("out", out)):
        if x is not None and (x.stride(0) > _MAX_ROW_STRIDE or x.shape[0] > _MAX_ROWS):
            return (
                f"{name} may have up to {_MAX_ROWS} rows at a stride of up to {_MAX_ROW_STRIDE}, "
                f"got {x.shape[0]} at {x.stride(0)}"
            )
    return None
