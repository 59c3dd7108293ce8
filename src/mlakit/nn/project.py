"""Queries, keys and values of every head, as naive and naive+flash attend to them."""

from typing import TYPE_CHECKING

import torch

from mlakit.nn.caches import KVCache, join_key
from mlakit.nn.step import Step

if TYPE_CHECKING:
    from mlakit.nn.mla import MultiheadLatentAttention


def project_new(
    layer: "MultiheadLatentAttention", x: torch.Tensor, step: Step
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the new tokens alone: q and k_pe rotated, k_nope and v; [bsz, seqlen, n_heads (k_pe: 1), ...].

    k_nope and v are views of one tensor.
    """
    args = layer.args
    q = rotate_query(layer, layer.query(x), step)
    latent, k_pe = layer.wkv_a(x).split((args.kv_lora_rank, args.qk_rope_head_dim), dim=-1)
    k_nope, v = layer.expand(layer.kv_norm(latent))
    return q, k_nope, step.rotate(k_pe.unsqueeze(2)), v


def rotate_query(layer: "MultiheadLatentAttention", q: torch.Tensor, step: Step) -> torch.Tensor:
    """Rotate the rope part of q [bsz, seqlen, n_heads, qk_head_dim]: in place, unless a gradient is wanted."""
    q_nope, q_pe = q.split((layer.args.qk_nope_head_dim, layer.args.qk_rope_head_dim), dim=-1)
    if wants_grad(q) or torch.compiler.is_compiling():
        return torch.cat((q_nope, step.rotate(q_pe)), dim=-1)
    step.rotate(q_pe, out=q_pe)
    return q


def wants_grad(*tensors: torch.Tensor) -> bool:
    """Whether a gradient will be asked for."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def project(
    layer: "MultiheadLatentAttention", x: torch.Tensor, step: Step
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of the new tokens, and keys and values of all that they may look at: [bsz, seqlen or end, n_heads, ...].

    What the cache held before is constant; new keys and values carry gradients, and are kept.
    """
    q, k_nope, k_pe, v = project_new(layer, x, step)
    cache = step.cache
    if cache is None:
        return q, join_key(k_nope, k_pe), v
    assert isinstance(cache, KVCache)
    cache.write(step.start, k_nope, k_pe, v)
    if step.begins:
        return q, join_key(k_nope, k_pe), v
    old_k, old_v = cache.k[: step.bsz, : step.end], cache.v[: step.bsz, : step.end]
    if isinstance(step.start, torch.Tensor):
        return q, step.only_live(old_k), step.only_live(old_v)
    if not wants_grad(q, k_nope, v):
        return q, old_k, old_v
    # Copies, as the next step will write to the cache before this one's gradients are computed.
    k = torch.cat((old_k[:, : step.start], join_key(k_nope, k_pe)), dim=1)
    return q, k, torch.cat((old_v[:, : step.start], v), dim=1)
