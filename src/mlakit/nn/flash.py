"""Keys and values expanded and kept, attention by `mla_prefill`, or by PyTorch's SDPA on a CPU."""

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from mlakit.nn.caches import KVCache, join_key
from mlakit.nn.project import project, project_new, wants_grad
from mlakit.nn.step import Step, softmax
from mlakit.prefill import mla_prefill

if TYPE_CHECKING:
    from mlakit.nn.mla import MultiheadLatentAttention


def attend(layer: "MultiheadLatentAttention", x: torch.Tensor, step: Step) -> torch.Tensor:
    """[bsz, seqlen, dim] to heads' outputs side by side, [bsz, seqlen, n_heads * v_head_dim]."""
    refuse_mask(layer.attn_impl, step)
    if step.begins:
        return attend_to_new(layer, x, step).flatten(2)
    q, k, v = project(layer, x, step)
    if not has_kernel(x) or wants_grad(q, k, v):
        return _sdpa(q, k, v, step, layer.softmax_scale).flatten(2)
    return _attend_to_cache(q, step, layer.softmax_scale).flatten(2)


def attend_to_new(layer: "MultiheadLatentAttention", x: torch.Tensor, step: Step) -> torch.Tensor:
    """Attend among the new tokens alone, where none came before; [bsz, seqlen, n_heads, v_head_dim].

    On a GPU by one kernel that makes no tensor of scores and needs no concatenated keys, elsewhere by one batched
    product each way with a softmax in float32 between them.
    """
    q, k_nope, k_pe, v = project_new(layer, x, step)
    if step.cache is not None:
        assert isinstance(step.cache, KVCache)
        step.cache.write(step.start, k_nope, k_pe, v)
    if has_kernel(x):
        out, _ = attend_in_parts(q, k_nope, k_pe, v, layer.softmax_scale, causal=step.causal)
        return out.unflatten(0, (step.bsz, step.seqlen))
    return batched_attention(q, join_key(k_nope, k_pe), v, layer.softmax_scale, causal=step.causal)


def batched_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, causal: bool) -> torch.Tensor:
    """Attend [bsz, seqlen, heads, ...] to as many keys: one batched product each way, scale and mask within the first,
    softmax in float32 (float64 if q is).
    """
    (bsz, seqlen, heads, _), keys = q.shape, k.shape[1]
    q, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (q, v))
    k_t = k.permute(0, 2, 3, 1).flatten(0, 1)
    mask = q.new_zeros(1)
    if causal:
        mask = q.new_full((seqlen, keys), -torch.inf).triu_(keys - seqlen + 1)
    scores = torch.baddbmm(mask, q, k_t, beta=1 if causal else 0, alpha=scale)
    return torch.bmm(softmax(scores), v).unflatten(0, (bsz, heads)).transpose(1, 2)


def attend_in_parts(
    q: torch.Tensor,
    k_nope: torch.Tensor,
    k_pe: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mla_prefill` on requests of equal length, q [bsz, seqlen, heads, ...] and [bsz, keys, heads (k_pe: 1), ...], the
    keys in two parts; out and lse with their tokens end to end.
    """
    bsz, seqlen, keys = q.shape[0], q.shape[1], v.shape[1]
    bounds_q, bounds_k = (
        torch.arange(0, (bsz + 1) * each, each, device=q.device, dtype=torch.int32) for each in (seqlen, keys)
    )
    return mla_prefill(
        q.flatten(0, 1),
        k_nope.flatten(0, 1),
        v.flatten(0, 1),
        bounds_q,
        bounds_k,
        softmax_scale=scale,
        causal=causal,
        max_seqlen_q=seqlen,
        k_pe=k_pe.flatten(0, 1),
    )


def _attend_to_cache(q: torch.Tensor, step: Step, scale: float) -> torch.Tensor:
    """`mla_prefill` on what the cache holds, where it lies.

    The rows of a request's unused room are a sequence of their own, which no query looks at.
    """
    cache = step.cache
    assert isinstance(cache, KVCache)
    room = torch.arange(0, step.bsz * cache.capacity, cache.capacity, device=q.device, dtype=torch.int32)
    total = room.new_full((1,), step.bsz * cache.capacity)
    bounds_k = torch.cat((torch.stack((room, room + step.seq_lens(q.device)), dim=1).flatten(), total))
    first = torch.arange(0, step.bsz * step.seqlen, step.seqlen, device=q.device, dtype=torch.int32)
    last = first.new_full((1,), step.bsz * step.seqlen)
    bounds_q = torch.cat((torch.stack((first, first + step.seqlen), dim=1).flatten(), last))
    k, v = cache.k[: step.bsz].flatten(0, 1), cache.v[: step.bsz].flatten(0, 1)
    out, _ = mla_prefill(
        q.flatten(0, 1), k, v, bounds_q, bounds_k, softmax_scale=scale, causal=step.causal, max_seqlen_q=step.seqlen
    )
    return out.unflatten(0, (step.bsz, step.seqlen))


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, scale: float) -> torch.Tensor:
    mask = step.additive_mask(q.dtype, q.device)
    if mask is not None:
        mask = mask.transpose(1, 2)  # [1 or bsz, 1, seqlen, end]
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def has_kernel(x: torch.Tensor) -> bool:
    """Whether `mla_prefill` has a kernel for tensors like x: on a GPU, 16 bits wide."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def refuse_mask(attn_impl: str, step: Step) -> None:
    """Raise ValueError for a mask that the kernels do not take."""
    if step.mask is not None:
        raise ValueError(
            f"{attn_impl} takes mask None, 'causal' or a causal tensor, got another one; naive and absorb take any"
        )
