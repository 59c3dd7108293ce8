"""The torch.library schema of `paged_attention`: what torch.compile and CUDA graphs see. No gradient: a cache of pages
is for inference.
"""

import torch

from mlakit.dispatch import choose_triton
from mlakit.paged.config import MAX_HEAD_DIM
from mlakit.paged.reference import paged_attention_reference

_INPUTS = "Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, Tensor cu_seqlens_q"
_OPTIONS = "float softmax_scale, bool causal, SymInt? max_seqlen_q, int? num_splits, str? impl"
_MAX_ROWS = 2**30  # query rows are numbered with 32 bits, with room to round up

# Registered by key and not by torch.library.custom_op: the wrappers of the latter cost more host time than a small
# decode takes.
torch.library.define(
    "mlakit::paged_attention", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,)
)
torch.library.define(
    "mlakit::paged_attention_out",
    f"({_INPUTS}, Tensor(a!) out, {_OPTIONS}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    max_seqlen_q: int | None,
    num_splits: int | None,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) as `mlakit.paged.paged_attention` defines them."""
    out = q.new_empty(q.shape)
    options = (softmax_scale, causal, max_seqlen_q, num_splits, impl)
    return out, attend_out(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, out, *options)


def attend_out(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    out: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    max_seqlen_q: int | None,
    num_splits: int | None,
    impl: str | None,
) -> torch.Tensor:
    """Likewise, with `out` filled in place and lse returned."""
    if q.device.type == "cpu":
        check_lengths(k_cache, block_table, seq_lens, cu_seqlens_q, max_seqlen_q)
    inputs = (q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q)
    if choose_triton("paged_attention", impl, q, why_not(q, k_cache, v_cache)) == "reference":
        result, logs = paged_attention_reference(*inputs, softmax_scale=softmax_scale, causal=causal)
        out.copy_(result)
        return logs
    from mlakit.paged.triton_launch import _launch_paged

    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    _launch_paged(
        *inputs,
        out,
        lse,
        softmax_scale=softmax_scale,
        causal=causal,
        max_seqlen_q=max_seqlen_q,
        num_splits=num_splits,
    )
    return lse


def why_not(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> str | None:
    """Why the kernel cannot run these inputs; None if it can, where the device can."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, got {q.dtype}"
    if not q.is_cuda and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies the bits of bfloat16 as integers; use float16 there"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim may be up to {MAX_HEAD_DIM}, got {q.shape[-1]}"
    if q.shape[0] * q.shape[1] > _MAX_ROWS:
        return f"tokens x heads may be up to {_MAX_ROWS}, got {q.shape[0]} x {q.shape[1]}"
    return None


def check_lengths(
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int | None,
) -> None:
    """Require of lengths on a CPU what cannot be asked on a GPU without waiting for it.

    Raises:
        ValueError: a request has more keys than its row of the table has room for, or more queries than promised.
    """
    if seq_lens.numel() == 0:
        return
    shortest, longest = (int(x) for x in seq_lens.aminmax())
    capacity = block_table.shape[1] * k_cache.shape[1]
    if shortest < 0:
        raise ValueError(f"seq_lens must not be negative, got {shortest}")
    if longest > capacity:
        raise ValueError(
            f"block_table is too short: its {block_table.shape[1]} pages of {k_cache.shape[1]} tokens hold {capacity} "
            f"keys, seq_lens has {longest}"
        )
    queries = int(cu_seqlens_q.diff().max())
    if max_seqlen_q is not None and queries > max_seqlen_q:
        raise ValueError(f"max_seqlen_q must be at least the longest request's {queries} tokens, got {max_seqlen_q}")


def _lse_like(q: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


torch.library.impl("mlakit::paged_attention", ("cpu", "cuda"), attend)
torch.library.impl("mlakit::paged_attention_out", ("cpu", "cuda"), attend_out)


@torch.library.register_fake("mlakit::paged_attention")
def _(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, softmax_scale, causal, max_seqlen_q, num_splits, impl):
    return q.new_empty(q.shape), _lse_like(q)


@torch.library.register_fake("mlakit::paged_attention_out")
def _(
    q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, out, softmax_scale, causal, max_seqlen_q, num_splits, impl
):
    return _lse_like(q)
